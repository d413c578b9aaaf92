import json

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from trl_diffusion_rank.digits.data import parse_caption
from trl_diffusion_rank.stages.prompts import PromptsArguments, collect, main, split_prompts


ANIMALS = [f"an animal of kind {i}" for i in range(20)]


def run(tmp_path, **options) -> DatasetDict:
    main(PromptsArguments(**({"output_dir": str(tmp_path / "out"), "num_test_prompts": 5} | options)))
    return load_from_disk(str(tmp_path / "out"))


def write(tmp_path, ending: str, prompts: list[str]) -> str:
    path = tmp_path / f"prompts{ending}"
    data = Dataset.from_dict({"caption": prompts, "number": list(range(len(prompts)))})
    if ending == ".txt":
        path.write_text("\n".join(prompts) + "\n")
    elif ending == ".json":
        path.write_text(json.dumps(data.to_list()))
    elif ending == "":
        data.save_to_disk(path)
    else:
        {".parquet": data.to_parquet, ".csv": data.to_csv, ".jsonl": data.to_json}[ending](path)
    return str(path)


@pytest.mark.parametrize("ending", [".txt", ".json", ".jsonl", ".csv", ".parquet", ""])
def test_every_kind_of_file_gives_the_same_splits(ending, tmp_path):
    splits = run(tmp_path, dataset_name=write(tmp_path, ending, ANIMALS), prompt_column="caption")
    train, test = split_prompts(ANIMALS, None, 5, seed=0)
    assert list(splits["train"]["prompt"]) == train and len(train) == 15
    assert list(splits["test"]["prompt"]) == test
    assert set(train) | set(test) == set(ANIMALS)
    assert [*splits["train"]["row"], *splits["test"]["row"]] == list(range(20))


def test_empty_and_repeated_prompts_are_left_out_and_counted(tmp_path, capsys):
    path = write(tmp_path, ".jsonl", [*ANIMALS, "  ", "", f"  {ANIMALS[3]} ", ANIMALS[4]])
    splits = run(tmp_path, dataset_name=path, prompt_column="caption")
    assert len(splits["train"]) + len(splits["test"]) == 20
    assert "Left out 2 empty and 2 repeated prompts." in capsys.readouterr().out


def test_collect_takes_none_for_empty_and_stops_at_its_limit():
    assert collect([None, "b ", "a", "b"]) == (["b", "a"], 1, 1)
    texts = iter(["a", "a", "b", "c", "d"])
    assert collect(texts, limit=2)[0] == ["a", "b"]
    assert next(texts) == "c"  # nothing was read beyond


def test_split_does_not_depend_on_order_and_does_on_seed():
    train, test = split_prompts(ANIMALS, 10, 5, seed=0)
    assert (len(train), len(test)) == (10, 5) and not set(train) & set(test)
    assert split_prompts(ANIMALS[::-1], 10, 5, seed=0) == (train, test)
    assert split_prompts(ANIMALS, 10, 5, seed=1) != (train, test)


def test_streaming_reads_only_what_is_needed(tmp_path):
    path = write(tmp_path, ".jsonl", ANIMALS)
    splits = run(tmp_path, dataset_name=path, prompt_column="caption", num_prompts=6, streaming=True)
    assert {*splits["train"]["prompt"], *splits["test"]["prompt"]} == set(ANIMALS[:11])


def test_no_test_split_on_request(tmp_path):
    splits = run(tmp_path, dataset_name=write(tmp_path, ".txt", ANIMALS), num_test_prompts=0)
    assert list(splits) == ["train"]


def test_digits(tmp_path):
    """400 and 240 draws from 150 captions: rows, not captions, tell images apart."""
    splits = run(tmp_path, dataset_name="digits", num_prompts=400, num_test_prompts=240)
    assert {name: len(split) for name, split in splits.items()} == {"train": 400, "test": 240}
    for prompt in splits["test"]["prompt"]:
        parse_caption(prompt)
    rows = [*splits["train"]["row"], *splits["test"]["row"]]
    assert len(set(rows)) == 640
    again = run(tmp_path / "again", dataset_name="digits", num_prompts=400, num_test_prompts=240)
    assert list(again["train"]["prompt"]) == list(splits["train"]["prompt"])
    assert list(again["test"]["prompt"]) == list(splits["test"]["prompt"]) != list(splits["train"]["prompt"])[:240]


def test_a_missing_column_lists_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'prompt' in .*its columns are caption, number"):
        run(tmp_path, dataset_name=write(tmp_path, ".jsonl", ANIMALS))
    with pytest.raises(ValueError, match=r"no column 'prompt' in .*its columns are caption, number"):
        run(tmp_path, dataset_name=write(tmp_path, ".jsonl", ANIMALS), streaming=True, num_prompts=3)


def test_a_missing_split_lists_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"`dataset_split` is 'validation'.*has the splits train"):
        run(tmp_path, dataset_name=write(tmp_path, ".txt", ANIMALS), dataset_split="validation")


def test_a_dataset_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"`dataset_name` is .*nowhere', which is neither a file or folder"):
        run(tmp_path, dataset_name=str(tmp_path / "nowhere"))


def test_a_file_of_unknown_kind(tmp_path):
    (tmp_path / "prompts.docx").write_text("a cat")
    with pytest.raises(ValueError, match=r"must end in one of .parquet"):
        run(tmp_path, dataset_name=str(tmp_path / "prompts.docx"))


def test_more_prompts_than_there_are(tmp_path):
    path = write(tmp_path, ".txt", ANIMALS)
    with pytest.raises(ValueError, match=r"`num_prompts` is 16 .*only 20 distinct prompts"):
        run(tmp_path, dataset_name=path, num_prompts=16)
    with pytest.raises(ValueError, match=r"`num_test_prompts` is 20, .*only 20 distinct prompts"):
        run(tmp_path, dataset_name=path, num_test_prompts=20)


def test_options_are_checked_before_anything_is_read():
    with pytest.raises(ValueError, match="`num_prompts` is 0; it must be at least 1"):
        PromptsArguments(num_prompts=0)
    with pytest.raises(ValueError, match="`num_test_prompts` is -1; it must be at least 0"):
        PromptsArguments(num_test_prompts=-1)
    with pytest.raises(ValueError, match="prompts of `digits` are drawn"):
        PromptsArguments(dataset_name="digits")
    with pytest.raises(ValueError, match="`streaming` is set and `num_prompts` is not"):
        PromptsArguments(dataset_name="x", streaming=True)
    with pytest.raises(ValueError, match="`dataset_name` is not set and the stage `prompts` needs it"):
        main(PromptsArguments(output_dir="x"))
    with pytest.raises(ValueError, match="`output_dir` is not set"):
        main(PromptsArguments(dataset_name="x"))
