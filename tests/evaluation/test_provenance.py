import json
import os

import pytest

from trl_diffusion_rank.evaluation.judges import read_judges
from trl_diffusion_rank.evaluation.provenance import (
    check_adapter,
    labelling_scorers,
    name_adapters,
    partial_judges,
    weights_stamp,
)


def entries(*adapters):
    return [adapter if isinstance(adapter, dict) else {"path": adapter} for adapter in adapters]


def test_adapters_are_called_by_the_last_part_of_their_path():
    assert name_adapters(entries("runs/a/dpo", "user/lora")) == {"dpo": "runs/a/dpo", "lora": "user/lora"}
    assert name_adapters(entries("a/dpo", "b/dpo/", "a/cpo")) == {"a/dpo": "a/dpo", "b/dpo": "b/dpo/", "cpo": "a/cpo"}
    named = name_adapters(entries("a/dpo", {"path": "b/dpo", "name": "second"}))
    assert named == {"dpo": "a/dpo", "second": "b/dpo"}
    steps = name_adapters(entries("dpo", "dpo/checkpoint-100"))
    assert steps == {"dpo": "dpo", "checkpoint-100": "dpo/checkpoint-100"}


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["r/x/dpo", "s/x/dpo"], "would be called 'x/dpo', which is another one's name too: give it one of its own"),
        ([{"path": "a", "name": "n"}, {"path": "b", "name": "n"}], "called 'n', which is another one's name"),
        (["runs/base"], "called 'base', which is the base model's name"),
        ([{"path": "a", "name": "a|b"}], "is no name for a table"),
        ([{"path": "a", "name": 3}], "is no name for a table"),
        (["."], "called '', which is no name for a table"),
        ([{"name": "a"}], "An entry of `adapters` is {'name': 'a'}; a folder or Hub id is expected"),
        ([{"path": "a", "weight": 0.5}], "a mapping with the keys `path` and `name`"),
    ],
)
def test_adapters_that_are_refused(adapters, message):
    with pytest.raises(ValueError, match=message):
        name_adapters(entries(*adapters))


def test_adapters_that_can_be_nowhere(tmp_path):
    check_adapter("user/some-lora_1.0")  # the Hub is asked when it is loaded
    for path in ("runs/mine/dpo", "./dpo", "/no/where", "dpo"):
        with pytest.raises(ValueError, match="which is neither a folder on this machine nor a Hub id"):
            check_adapter(path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "pytorch_lora_weights.safetensors").touch()
    check_adapter(str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="which holds no weights"):
        check_adapter(str(tmp_path))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    check_adapter(str(tmp_path))


def test_the_stamp_changes_with_the_weights_alone(tmp_path):
    weights = tmp_path / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"1")
    stamp = weights_stamp(str(tmp_path))
    (tmp_path / "README.md").touch()
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / weights.name).touch()
    assert weights_stamp(str(tmp_path)) == stamp != []
    os.utime(weights, ns=(1, 1))
    assert weights_stamp(str(tmp_path)) != stamp
    assert weights_stamp("some/model") == []


@pytest.fixture
def trained(tmp_path):
    """The records that a run leaves; returns the adapter's folder."""

    def write(scorers, **options):
        records = {
            "dpo": {"stage": "dpo", "options": {"dataset_name": str(tmp_path / "score")}},
            "score": {"stage": "score", "options": {"scorers": scorers, **options}},
        }
        for stage, record in records.items():
            (tmp_path / stage).mkdir(exist_ok=True)
            (tmp_path / stage / "stage.json").write_text(json.dumps(record))
        return str(tmp_path / "dpo")

    return write


def test_who_ranked_the_images(trained, tmp_path):
    mapping = '{"name": "clip", "model": "some/clip", "label": "other"}'  # as on the command line
    adapter = trained(["pickscore", mapping])
    assert labelling_scorers(adapter) == [{"name": "pickscore"}, {"name": "clip", "model": "some/clip"}]
    assert labelling_scorers(f"{adapter}/checkpoint-100") == labelling_scorers(adapter)
    trained(["pickscore", mapping], rank_by="other")
    assert labelling_scorers(adapter) == [{"name": "clip", "model": "some/clip"}]
    trained("discriminator", discriminator="d")
    assert labelling_scorers(adapter) == [{"name": "discriminator", "model": "d"}]
    (tmp_path / "score" / "stage.json").write_text('{"stage": "generate", "options": {}}')
    assert (
        labelling_scorers(adapter) == labelling_scorers("someone/lora") == labelling_scorers("no/where/at/all") == []
    )


@pytest.mark.parametrize(
    ("scorers", "judges", "warned"),
    [
        (["pickscore"], [{"name": "pickscore"}], True),
        (["pickscore", "clip"], [{"name": "clip"}], True),
        (["pickscore"], [{"name": "pickscore"}, {"name": "clip"}], False),
        (["pickscore", "clip"], [{"name": "pickscore"}, {"name": "clip", "model": "other"}], True),  # one names none
        ([{"name": "clip", "model": "a"}], [{"name": "clip", "model": "b"}], False),
        ([{"name": "clip", "model": "a"}], [{"name": "clip", "model": "a"}], True),
        (["digits_clean"], [{"name": "digits"}], False),
        (["discriminator"], [{"name": "discriminator", "model": "d"}], True),
        (["discriminator"], [{"name": "discriminator", "model": "another"}], False),
    ],
)
def test_a_warning_where_all_judges_took_part(trained, scorers, judges, warned):
    adapter = trained(scorers, discriminator="d")
    warnings = partial_judges(read_judges(judges), {"dpo": adapter, "theirs": "someone/lora"})
    assert len(warnings) == warned
    for warning in warnings:
        assert "the images that dpo was trained on. The table says how well that taste was learnt, no more" in warning
        assert "Add a judge that took no part" in warning


def test_folders_are_the_same_under_any_name(trained, tmp_path, monkeypatch):
    (tmp_path / "discriminator").mkdir()
    adapter = trained(["discriminator"], discriminator=str(tmp_path / "discriminator"))
    monkeypatch.chdir(tmp_path)
    assert partial_judges(read_judges([{"name": "discriminator", "model": "discriminator"}]), {"dpo": adapter})
