import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub import DatasetCard
from PIL import Image
from tiny import random_image
from tiny_vlm import tiny_llava

from trl_diffusion_rank import captions as captions_module
from trl_diffusion_rank.captions import Captioner, clean_caption, token_counter
from trl_diffusion_rank.data import artefact as artefact_module
from trl_diffusion_rank.data.artefact import Artefact, Card
from trl_diffusion_rank.data.images import decode_image
from trl_diffusion_rank.data.loading import load_splits, undecoded
from trl_diffusion_rank.diffusion.loading import load_tokenizer
from trl_diffusion_rank.stages.caption import FIRST_IMAGES, CaptionArguments, main


SIZES = {"train": ((8, 8), (20, 6), (6, 20), (16, 16), (30, 7)), "test": ((9, 9), (7, 11))}
FEATURES = Features(
    {"prompt": Value("string"), "row": Value("int64"), "image": ImageFeature(), "url": Value("string")}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_llava(tmp_path_factory.mktemp("tiny_llava"))


def encoded(image: Image.Image, kind: str) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def rows() -> dict[str, dict[str, list]]:
    """Columns of both splits as the stage `prompts` makes them, with a column that it was asked to keep."""
    generator = np.random.default_rng(0)
    splits, number = {}, 0
    for split, sizes in SIZES.items():
        numbers = range(number, number + len(sizes))
        splits[split] = {
            "prompt": [f"prompt {i}" for i in numbers],
            "row": list(numbers),
            "image": [
                encoded(random_image(generator, size), kind)
                for size, kind in zip(sizes, ["PNG", "JPEG", "WEBP", "PNG", "JPEG"], strict=False)
            ],
            "url": [f"https://example.org/{i}" for i in numbers],
        }
        number = numbers.stop
    return splits


@pytest.fixture
def prompts(rows, tmp_path) -> str:
    """The artefact of the stage `prompts`."""
    folder = tmp_path / "prompts"
    Artefact(folder, {}).save(
        {split: [columns] for split, columns in rows.items()}, FEATURES, Card("Prompts", "", {}, "prompts", {}, {})
    )
    return str(folder)


def save_rows(folder, features=None, **splits) -> str:
    DatasetDict({name: Dataset.from_dict(of, features=features) for name, of in splits.items()}).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def run(model, prompts, tmp_path):
    def run(**options):
        defaults = {"dataset_name": prompts, "output_dir": str(tmp_path / "out"), "model": model}
        defaults |= {"tokenizer": "digits", "max_new_tokens": 12, "batch_size": 2}
        main(CaptionArguments(**(defaults | options)))
        return load_splits(str(tmp_path / "out"))

    return run


@pytest.fixture
def seen(monkeypatch):
    """How many images each call of a captioner was given; "loaded" for each model that was loaded."""
    calls = []

    class Watched(Captioner):
        def __init__(self, *args, **options):
            calls.append("loaded")
            super().__init__(*args, **options)

        def caption(self, images):
            calls.append(len(images))
            return super().caption(images)

    monkeypatch.setattr(captions_module, "Captioner", Watched)
    return calls


@pytest.fixture
def say(monkeypatch):
    """Make the model say these texts, one after the other."""

    def say(*texts):
        left = iter(texts)
        monkeypatch.setattr(Captioner, "caption", lambda self, images: [next(left) for _ in images])

    return say


# The rows


def test_rows_get_captions(run, rows, model, tmp_path):
    data = run()
    captioner = Captioner(model, max_new_tokens=12)
    tokenizer = load_tokenizer("digits")
    longest = 0
    assert set(data) == {"train", "test"}
    for split, columns in rows.items():
        captioned = undecoded(data[split])
        assert captioned.column_names == ["prompt", "row", "image", "url", "caption", "caption_clean"]
        assert captioned.remove_columns(["caption", "caption_clean"]).to_dict() == columns  # images' bytes among them
        for row in captioned:
            assert row["caption"] == captioner.caption([decode_image(row["image"])])[0]
            assert row["caption_clean"] == clean_caption(row["caption"], token_counter(tokenizer), 16)
            assert row["caption"].startswith(row["caption_clean"])
            longest = max(longest, len(tokenizer(row["caption"])["input_ids"]))
            assert len(tokenizer(row["caption_clean"])["input_ids"]) <= 16
    assert longest > 16  # else the limit would have nothing to do
    assert len({caption for split in data.values() for caption in split["caption"]}) > 3
    again = load_dataset(str(tmp_path / "out"))
    assert again["train"].features == FEATURES | {"caption": Value("string"), "caption_clean": Value("string")}
    assert again["train"][1]["image"].size == (20, 6)
    assert not list((tmp_path / "out").glob("partial-*"))


def test_clean_captions_are_prompts(run, say):
    say("The image shows a red cat. It sits under a green tree. Overall, it conveys calm.", *["A cat."] * 6)
    data = run(max_tokens=14)["train"]
    assert data[0]["caption"].startswith("The image shows") and data[0]["caption"].endswith("calm.")
    assert data[0]["caption_clean"] == "a red cat."  # the second sentence doesn't fit


def test_an_empty_caption_is_left_out_and_counted(run, say, capsys, tmp_path):
    say("one", "", "three", "four", "", "", "seven")
    data = run()
    assert list(data["train"]["caption"]) == ["one", "three", "four"]
    assert list(data["train"]["row"]) == [0, 2, 3] and list(data["test"]["row"]) == [6]
    text = "3 of 7 images got an empty caption and are left out."
    out = capsys.readouterr().out
    assert text in out and "4 captioned prompts, in" in out
    assert f"## Left out\n\n{text}" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_that_says_nothing_is_an_error(run, say, tmp_path):
    say(*[""] * 7)
    with pytest.raises(
        ValueError, match=r"has said nothing of 7 images: every caption is empty\. `instruction` is 'x'"
    ):
        run(instruction="x")
    assert not (tmp_path / "out" / "data").exists()


def test_a_model_that_says_nothing_is_stopped_early(run, rows, say, tmp_path):
    many = {name: values * 10 for name, values in rows["train"].items()}
    say(*[""] * 50)
    with pytest.raises(ValueError, match=f"has said nothing of {FIRST_IMAGES} images"):
        run(dataset_name=save_rows(tmp_path / "many", FEATURES, train=many))


def test_the_card(run, model, tmp_path):
    run(instruction="a cat")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == ["text-to-image", "trl-diffusion-rank"]
    assert "Rows: 5 in `train`, 2 in `test`." in card.text
    assert f"captioned by `{Path(model).name}`" in card.text and model not in card.text
    assert '"instruction": "a cat"' in card.text
    assert "| `caption_clean` | string | in the form of a prompt |" in card.text
    assert "| `url` | string |  |" in card.text and "Left out" not in card.text


def test_images_from_files_are_taken_along(run, tmp_path):
    """A folder of images has paths; what is pushed must hold the images, every column of them."""
    for name in "abc":
        random_image(np.random.default_rng(0), (9, 7)).save(tmp_path / f"{name}.png")
    columns = {
        "prompt": ["a", "b"],
        "image": [str(tmp_path / f"{name}.png") for name in "ab"],
        "thumbnail": [str(tmp_path / "c.png"), None],
    }
    features = Features({"prompt": Value("string"), "image": ImageFeature(), "thumbnail": ImageFeature()})
    data = run(dataset_name=save_rows(tmp_path / "in", features, train=columns))["train"]
    assert data.features["thumbnail"] == ImageFeature() and data[0]["thumbnail"].size == (9, 7)
    raw = undecoded(data)
    for column, name in (("image", "a"), ("thumbnail", "c")):
        assert raw[0][column] == {"bytes": (tmp_path / f"{name}.png").read_bytes(), "path": None}
    assert raw[1]["thumbnail"] is None


def test_captions_there_are_replaced(run, rows, tmp_path):
    first = run()["train"]
    columns = {**rows["train"], "caption": ["old"] * 5}
    again = save_rows(tmp_path / "again", Features(FEATURES | {"caption": Value("string")}), train=columns)
    assert list(run(dataset_name=again)["train"]["caption"]) == list(first["caption"])


# What is made when


def test_what_is_finished_is_not_captioned_again(run, seen, monkeypatch, capsys, tmp_path):
    first = {split: undecoded(data).to_list() for split, data in run().items()}
    assert seen == ["loaded", 2, 2, 1, 2]
    seen.clear()
    capsys.readouterr()
    monkeypatch.delattr("trl_diffusion_rank.diffusion.loading.load_tokenizer")  # no more than the model
    again = run(batch_size=3)
    assert seen == [] and f"The captioned prompts in {tmp_path / 'out'} are finished." in capsys.readouterr().out
    assert {split: undecoded(data).to_list() for split, data in again.items()} == first


@pytest.mark.parametrize(
    ("option", "value", "column"),
    [
        ("instruction", "a blue dog", "caption"),
        ("max_new_tokens", 3, "caption"),
        ("max_tokens", 5, "caption_clean"),
        ("dtype", "bfloat16", None),
    ],
)
def test_other_options_caption_again(run, seen, option, value, column):
    first = run()
    seen.clear()
    again = run(**{option: value})
    assert seen == ["loaded", 2, 2, 1, 2]
    assert column is None or [*again["train"][column]] != [*first["train"][column]]


def test_other_images_are_captioned_again(run, rows, seen, tmp_path):
    run()
    seen.clear()
    rows["train"]["image"].reverse()
    run(dataset_name=save_rows(tmp_path / "other", FEATURES, **rows))
    assert seen == ["loaded", 2, 2, 1, 2]


def test_only_what_is_missing_is_captioned(run, seen, monkeypatch, tmp_path):
    whole = {split: undecoded(data).to_list() for split, data in run().items()}
    seen.clear()
    watched = captions_module.Captioner.caption

    def stop(self, images):
        if len(seen) == 3:
            raise KeyboardInterrupt
        return watched(self, images)

    (tmp_path / "out" / "artefact.json").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(captions_module.Captioner, "caption", stop)
        run()
    assert seen == ["loaded", 2, 2]
    seen.clear()
    again = run()
    assert seen == ["loaded", 1, 2]
    assert {split: undecoded(data).to_list() for split, data in again.items()} == whole


def test_it_is_published_where_asked(run, seen, monkeypatch, capsys, tmp_path):
    pushed = []
    monkeypatch.setattr(artefact_module, "push_dataset", lambda *args: pushed.append(args) or "https://there")
    run()
    assert pushed == []
    seen.clear()
    for private in (None, True):
        run(push_to_hub=True, hub_dataset_id="me/captions", hub_private_repo=private)
    assert pushed == [(str(tmp_path / "out"), "me/captions", private) for private in (None, True)]
    assert seen == [] and "Pushed to https://there" in capsys.readouterr().out
    run(instruction="a cat", push_to_hub=True, hub_dataset_id="me/captions")
    assert len(pushed) == 3


# What can't be done


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": ["a"], "url": ["u"]},
            "no column 'image' in the split 'train'; its columns are prompt, url. The stage `prompts` keeps images "
            "with `keep_images: true`",
        ),
        ({"image": ["a"]}, "no column 'prompt' in the split 'train'; its columns are image.$"),
        ({"prompt": ["a"], "image": [b"b"]}, r"'image' of the split 'train' holds Value\('binary'\), not images: use"),
    ],
)
def test_datasets_without_images_are_refused_before_a_model_is_loaded(run, seen, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(dataset_name=save_rows(tmp_path / "in", train=columns))
    assert seen == []


@pytest.mark.parametrize("image", [{"bytes": b"no image", "path": None}, None])
def test_an_image_that_can_not_be_decoded_names_its_row(run, rows, image, tmp_path):
    rows["test"]["image"][1] = image
    with pytest.raises(ValueError, match="Row 1 of the split 'test': the image can't be decoded"):
        run(dataset_name=save_rows(tmp_path / "in", FEATURES, **rows))


def test_a_tokenizer_must_know_its_limit(run, seen, tmp_path):
    tokenizer = load_tokenizer("digits")
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"endless' doesn't say how much is read: set `max_tokens`\."):
        run(tokenizer=str(tmp_path / "endless"))
    assert seen == []
    run(tokenizer=str(tmp_path / "endless"), max_tokens=9)


def test_options_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="`dtype` is 'float8', which is not known"):
        CaptionArguments(dtype="float8")
    for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("max_tokens", 3)):
        with pytest.raises(ValueError, match=f"`{name}` is 0; it must be at least {least}"):
            CaptionArguments(**{name: 0})
    with pytest.raises(ValueError, match="`push_to_hub` is set and `hub_dataset_id` is not"):
        CaptionArguments(push_to_hub=True)
    with pytest.raises(ValueError, match="`dataset_name` is not set and the stage `caption` needs it"):
        main(CaptionArguments(output_dir="x"))


def test_the_options_are_known_without_torch():
    code = "import sys; from trl_diffusion_rank.recipe import stage_parser; stage_parser('caption').format_help()"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)
