import json
import shutil

import pyarrow.parquet as pq
import pytest
import tiny_run

from trl_diffusion_rank.recipe import RecipeError
from trl_diffusion_rank.report.run import read_columns, read_log, read_run


def test_reads_all_stages_in_the_order_of_the_pipeline(full_run):
    run = read_run(full_run)
    assert run.name == "full"
    assert list(run.stages) == ["prompts", "discriminator", "score", "dpo", "cpo", "evaluate", "push"]
    assert [stage.name for stage in run.training] == ["dpo", "cpo"]
    assert run.lists.name == "score"
    assert run.recipe["shared"] == {"seed": 0}
    assert [step for step, _ in run.stages["dpo"].grids] == [0, 100, 200]
    assert run.stages["evaluate"].rows == {"test": 12 * 2 * 2 * 3}


def test_the_folder_of_one_stage(full_run):
    run = read_run(full_run / "dpo")
    assert list(run.stages) == ["dpo"]
    assert run.recipe is None
    assert run.lists is None


def test_superseded_outputs_are_no_part_of_the_run(full_run, tmp_path):
    shutil.copytree(full_run / "dpo", tmp_path / "dpo")
    shutil.copytree(full_run / "cpo", tmp_path / ".superseded" / "cpo-12345678")
    assert list(read_run(tmp_path).stages) == ["dpo"]


def test_nothing_to_report(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing to report in `.*` *: it is neither a run folder"):
        read_run(tmp_path)
    (tmp_path / "stage.json").write_text('{"stage": "dpo", "st')  # half of it
    with pytest.raises(RecipeError, match="nothing to report"):
        read_run(tmp_path)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = tmp_path / "log_history.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 20, "loss": null}\n{"step": 40, "lo')
    assert read_log(path) == [{"step": 20, "loss": None}]


def test_an_unfinished_dataset_has_no_rows(tmp_path):
    tiny_run.write_score(tmp_path)
    (tmp_path / "score" / "artefact.json").unlink()
    run = read_run(tmp_path)
    assert run.lists is None
    assert run.stages["score"].data_files() == []


def test_a_table_that_is_half_written_or_away(tmp_path):
    tiny_run.write_score(tmp_path)
    (file,) = read_run(tmp_path).lists.data_files()
    assert read_columns([file], lambda name: name == "ranks").column_names == ["ranks"]
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError):
        pq.read_table(file)
    assert read_columns([file], lambda name: True) is None
    file.unlink()
    assert read_columns([file], lambda name: True) is None


def test_grids_whose_picture_is_not_there(full_run, tmp_path):
    shutil.copytree(full_run / "dpo", tmp_path / "dpo")
    (tmp_path / "dpo" / "samples" / "step-000100.png").unlink()
    assert [step for step, _ in read_run(tmp_path).stages["dpo"].grids] == [0, 200]


def test_the_split_is_train_or_the_first(tmp_path):
    tiny_run.write_score(tmp_path)
    folder = tmp_path / "score"
    shutil.copy(folder / "data" / "train-00000-of-00001.parquet", folder / "data" / "all-00000-of-00001.parquet")
    (folder / "artefact.json").write_text(json.dumps({"made_of": "", "rows": {"all": 6}}))
    assert [file.name for file in read_run(tmp_path).lists.data_files()] == ["all-00000-of-00001.parquet"]
