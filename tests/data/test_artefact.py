import dataclasses
import io
import json

import pytest
from datasets import Features, Image, List, Value, load_dataset
from huggingface_hub import DatasetCard
from PIL import Image as PILImage

from trl_diffusion_rank.data import artefact as module
from trl_diffusion_rank.data.artefact import Artefact, Card, public
from trl_diffusion_rank.data.loading import load_splits
from trl_diffusion_rank.versions import package_versions


FEATURES = Features({"prompt": Value("string"), "images": List(Image()), "psi": List(Value("float32"))})
CARD = Card(
    title="Ranked images",
    text="Four images a prompt.",
    columns={"prompt": "the caption"},
    stage="score",
    options={"seed": 3, "scorers": ["clip"]},
    versions={"torch": "2.13.0"},
    sections={"Sources": "| a | b |"},
    tags=["text-to-image"],
)


def png(value: int) -> dict:
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def batch(first: int, n: int) -> dict[str, list]:
    return {
        "prompt": [f"p{i}" for i in range(first, first + n)],
        "images": [[png(i % 256), png(255)] for i in range(first, first + n)],
        "psi": [[1.0, 0.0]] * n,
    }


def test_the_folder_is_a_dataset_with_images_and_a_card(tmp_path):
    artefact = Artefact(tmp_path, {"seed": 3})
    assert not artefact.finished
    counts = artefact.save({"train": [batch(0, 50), batch(50, 20)], "test": iter([batch(70, 1)])}, FEATURES, CARD)
    assert counts == {"train": 70, "test": 1}
    assert artefact.finished

    for data in (load_dataset(str(tmp_path)), load_splits(str(tmp_path))):
        assert set(data) == {"train", "test"}
        assert list(data["train"]["prompt"]) == [f"p{i}" for i in range(70)]
        assert data["train"].features == FEATURES
        assert data["train"][33]["images"][0].getpixel((0, 0)) == (33, 0, 0)
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.tags == ["text-to-image", "trl-diffusion-rank"]
    assert "70 in `train`, 1 in `test`" in card.text
    assert "| `images` | list of image |  |" in card.text
    assert "| `psi` | list of float32 |" in card.text
    assert "| `prompt` | string | the caption |" in card.text
    assert "## Sources\n\n| a | b |" in card.text
    assert json.loads(card.text.split("```json\n")[1].split("\n```")[0])["options"] == CARD.options


def test_a_card_tells_the_installed_versions_unless_they_are_given():
    assert Card("Rows", "", {}, "score", {}).versions == package_versions()
    assert CARD.versions == {"torch": "2.13.0"}


def test_folders_of_one_name_are_not_mistaken_for_each_other(tmp_path):
    """A trap of `datasets`, which caches by the folder's last name and a hash."""
    for name, n in (("a/out", 3), ("b/out", 5)):
        Artefact(tmp_path / name, {}).save({"train": [batch(0, n)]}, FEATURES, CARD)
        assert len(load_dataset(str(tmp_path / name))["train"]) == n
    Artefact(tmp_path / "a/out", {}).save({"train": [batch(0, 7)]}, FEATURES, CARD)
    assert len(load_dataset(str(tmp_path / "a/out"))["train"]) == 7


def test_the_files_do_not_tell_how_large_the_batches_were(tmp_path):
    Artefact(tmp_path / "a", {}).save({"train": [batch(0, 70)]}, FEATURES, CARD)
    Artefact(tmp_path / "b", {}).save({"train": [batch(i, 7) for i in range(0, 70, 7)]}, FEATURES, CARD)
    names = [path.name for path in (tmp_path / "a" / "data").iterdir()]
    assert names == ["train-00000-of-00001.parquet"]
    for name in names:
        assert (tmp_path / "a" / "data" / name).read_bytes() == (tmp_path / "b" / "data" / name).read_bytes()


def test_large_splits_become_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BYTES_PER_FILE", 5_000)
    Artefact(tmp_path, {}).save({"train": [batch(0, 100)]}, FEATURES, CARD)
    names = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert len(names) > 1
    assert names[-1] == f"train-{len(names) - 1:05d}-of-{len(names):05d}.parquet"
    assert list(load_splits(str(tmp_path))["train"]["prompt"]) == [f"p{i}" for i in range(100)]


def test_other_options_are_another_artefact(tmp_path):
    first = Artefact(tmp_path, {"seed": 0})
    first.parts("images", ("prompt",), FEATURES).write(batch(0, 2))
    other = Artefact(tmp_path, {"seed": 1})
    assert other.parts("images", ("prompt",), FEATURES).scan() == set()
    assert first.parts("images", ("prompt",), FEATURES).scan() == {("p0",), ("p1",)}
    first.save({"train": [batch(0, 2)]}, FEATURES, CARD)
    assert first.finished and not other.finished
    assert not list(tmp_path.glob("partial-*"))


def test_an_interrupted_save_leaves_the_pieces_and_is_not_finished(tmp_path):
    artefact = Artefact(tmp_path, {})
    artefact.parts("images", ("prompt",), FEATURES).write(batch(0, 2))

    def batches():
        yield batch(0, 40)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artefact.save({"train": batches()}, FEATURES, CARD)
    assert not artefact.finished
    assert artefact.parts("images", ("prompt",), FEATURES).scan()
    artefact.save({"train": [batch(0, 2)]}, FEATURES, CARD)
    assert len(load_splits(str(tmp_path))["train"]) == 2


def test_the_card_names_no_folder_of_this_machine(tmp_path):
    options = {"dataset_name": str(tmp_path), "output_dir": str(tmp_path), "models": [{"model": str(tmp_path)}]}
    text = dataclasses.replace(CARD, options=options).render({"train": 1}, FEATURES)
    made = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert made["options"] == {"dataset_name": tmp_path.name, "models": [{"model": tmp_path.name}]}
    assert str(tmp_path) not in text


def test_empty_splits_are_left_out(tmp_path):
    assert Artefact(tmp_path, {}).save({"train": [batch(0, 2)], "test": []}, FEATURES, CARD) == {"train": 2}
    assert set(load_splits(str(tmp_path))) == {"train"}


def test_paths_of_this_machine_are_shown_by_their_last_name(tmp_path):
    here = str(tmp_path)
    assert public({"a": [here, "me/model", 3], "b": None}) == {"a": [tmp_path.name, "me/model", 3], "b": None}
    assert public("/home/someone/gone/score") == "score"
    assert public("~/gone/score") == "score"
