import json
import shutil
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from tiny_discriminator import save_tiny_backbone
from transformers.trainer_utils import get_last_checkpoint

from trl_diffusion_rank import recipe
from trl_diffusion_rank.cli import static_help
from trl_diffusion_rank.data.caption_groups import is_held_out
from trl_diffusion_rank.digits.data import crawl
from trl_diffusion_rank.scorers.discriminator import DiscriminatorScorer
from trl_diffusion_rank.stages import discriminator


FEATURES = Features({"prompt": Value("string"), "images": List(Image()), "sources": List(Value("string"))})
OPTIONS = {
    "max_steps": "4",
    "per_device_train_batch_size": "8",
    "learning_rate": "1e-2",
    "logging_steps": "4",
    "report_to": "none",
    "bf16": "false",
    "gradient_checkpointing": "false",
    "use_cpu": "true",
    "disable_tqdm": "true",
}


def rows(captions, seed=0) -> Dataset:
    """A bright image, the real one, and two dark ones of each caption."""
    generator = np.random.default_rng(seed)

    def image(low):
        return PILImage.fromarray(generator.integers(low, low + 100, (16, 16, 3), dtype=np.uint8))

    return Dataset.from_dict(
        {
            "prompt": captions,
            "images": [[image(0), image(150), image(30)] for _ in captions],
            "sources": [["turbo@1", "real", "turbo@4"]] * len(captions),
        },
        features=FEATURES,
    )


CAPTIONS = [f"cat {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def run(tmp_path):
    """Run the stage as `python -m` would, in this process."""
    backbone = save_tiny_backbone("clip", tmp_path / "backbone")
    DatasetDict(train=rows(CAPTIONS)).save_to_disk(tmp_path / "generate")

    def run(**options):
        given = {
            "dataset_name": str(tmp_path / "generate"),
            "model_name_or_path": backbone,
            "output_dir": str(tmp_path / "out"),
            **OPTIONS,
            **options,
        }
        argv = []
        for name, value in given.items():
            argv += [f"--{name}", *([value] if isinstance(value, str) else value or [])]
        arguments = recipe.parse_stage("discriminator", argv)
        discriminator.main(*arguments)
        return tmp_path / "out"

    return run


def test_trains_measures_and_leaves_what_the_scorer_loads(run, tmp_path, capsys):
    folder = run(max_steps="30", trainable_layers="2", save_steps="30")
    metrics = json.loads((folder / "metrics.json").read_text())
    held_out = [caption for caption in CAPTIONS if is_held_out(caption, 0.2, seed=42)]
    assert metrics["rows"] == metrics["captions"] == len(held_out) > 1
    assert metrics["images"] == [3, 3] and metrics["chance"] == pytest.approx(1 / 3)
    assert metrics["top1"]["value"] == 1  # brightness is easily learned
    assert set(metrics["sources"]) == {"turbo@1", "real", "turbo@4"}
    assert len(metrics["closed"]) == 3 and len(metrics["baselines"]) == 4
    assert metrics["baselines"]["dimensions and codec of the files"]["value"] == pytest.approx(1 / 3)
    assert metrics["path"] == "original sizes, no JPEG"

    said = capsys.readouterr().out
    assert "The discriminator picks the real image in 100 % of cases [" in said
    assert "] among 3 (chance 33 %)." in said
    assert "| turbo@4 " in (folder / "table.md").read_text()
    assert PILImage.open(folder / "rows.png").width > 3 * 96
    card = (folder / "README.md").read_text()
    assert "picks the real image" in card and "![Rows of images](rows.png)" in card
    assert str(tmp_path) not in card

    scorer = DiscriminatorScorer(model=str(folder), device="cpu")
    test = rows(CAPTIONS)[CAPTIONS.index(held_out[0])]
    scores = scorer.score(test["images"], [held_out[0]] * 3)
    assert scores.argmax() == 1


def test_a_given_test_split_is_taken_and_its_captions_are_not_trained(run, tmp_path, capsys):
    splits = DatasetDict(train=rows(CAPTIONS), test=rows(["CAT a", "dog"], seed=1))
    splits.save_to_disk(tmp_path / "split")
    metrics = json.loads((run(dataset_name=str(tmp_path / "split")) / "metrics.json").read_text())
    assert (metrics["rows"], metrics["captions"]) == (2, 2)
    assert metrics["sources"]["real"]["rows"] == 2


def test_a_lora_and_equalising_from_the_command_line(run):
    folder = run(use_peft=None, lora_r="2", equalize_size="12", equalize_jpeg=["60", "80"])
    assert (folder / "model.safetensors").is_file()


def test_goes_on_from_its_last_checkpoint(run, capsys):
    folder = run(save_steps="2", max_steps="4")
    first = json.loads((folder / "metrics.json").read_text())
    assert get_last_checkpoint(str(folder)).endswith("checkpoint-4")
    shutil.rmtree(folder / "checkpoint-4")
    capsys.readouterr()
    run(save_steps="2", max_steps="4")
    assert "Resuming from" in capsys.readouterr().out
    second = json.loads((folder / "metrics.json").read_text())
    assert second["sources"]["real"]["mean_score"]["value"] == pytest.approx(
        first["sources"]["real"]["mean_score"]["value"], abs=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_streaming": True}, "`dataset_streaming` can't be used"),
        ({"ignore_bias_buffers": True}, "`ignore_bias_buffers` is for language models"),
        ({"load_in_4bit": True}, "`load_in_4bit=True` can't be set for a discriminator"),
        ({"dtype": "bfloat16"}, "`dtype='bfloat16'` can't be set"),
        ({"use_peft": True, "trainable_layers": 2}, "`use_peft` and `trainable_layers=2` both say"),
        ({"equalize_jpeg": [60]}, "`equalize_jpeg` must be the lowest and the highest quality"),
    ],
)
def test_options_are_checked_before_earlier_stages_run(options, message):
    parsed = vars(recipe.stage_parser("discriminator").parse_args(["--output_dir", "x"]))
    discriminator.check(Namespace(**parsed))
    with pytest.raises(ValueError, match=message):
        discriminator.check(Namespace(**(parsed | options)))


def test_what_is_missing_is_named(run, tmp_path):
    with pytest.raises(ValueError, match=r"`dataset_train_split` is 'other'.*has the splits train"):
        run(dataset_train_split="other")
    DatasetDict(train=rows(CAPTIONS).remove_columns("sources")).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(ValueError, match="no column `ranks` or `sources`"):
        run(dataset_name=str(tmp_path / "unlabelled"))


def test_reads_what_generate_writes_and_stands_before_score():
    stages = list(recipe.STAGES)
    assert stages.index("generate") < stages.index("discriminator") < stages.index("score")
    assert recipe.stage_inputs_of("discriminator") == {"dataset_name": ("generate",)}


def test_help_imports_no_torch():
    assert "--equalize_jpeg (list[int] | None)" in static_help("discriminator")
    code = (
        "import sys; from trl_diffusion_rank import cli; code = cli.main(['discriminator', '--help']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.monotonic() - start < 3


@pytest.mark.slow
def test_on_the_digits_world_it_finds_the_clean_scan_among_ugly_ones(run, tmp_path):
    images = crawl("train", 4000, seed=0)
    by_caption = {}
    for image, caption, clean in zip(images.images, images.captions, images.clean, strict=True):
        by_caption.setdefault(caption, ([], []))[0 if clean else 1].append(PILImage.fromarray(image))
    data = {"prompt": [], "images": [], "sources": []}
    for caption, (clean, ugly) in by_caption.items():
        for i in range(min(len(clean), len(ugly) // 4)):
            data["prompt"].append(caption)
            data["images"].append([clean[i], *ugly[4 * i : 4 * i + 4]])
            data["sources"].append(["real", *["crawl"] * 4])
    DatasetDict(train=Dataset.from_dict(data, features=FEATURES)).save_to_disk(tmp_path / "digits")
    folder = run(
        dataset_name=str(tmp_path / "digits"),
        model_name_or_path="digits",
        trainable_layers="3",
        patch_layer="1",
        max_steps="200",
        per_device_train_batch_size="16",
        learning_rate="1e-3",
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["top1"]["interval"][0] > 0.8
    assert metrics["baselines"]["dimensions and codec of the files"]["value"] == pytest.approx(0.2)
