import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from trl_diffusion_rank.diffusion import sampling
from trl_diffusion_rank.evaluation import judges
from trl_diffusion_rank.scorers import SCORERS
from trl_diffusion_rank.stages.evaluate import EvaluateArguments, main


class Bright(judges.Judge):
    """Brightness, whether it is above the middle, and features with a white reference."""

    name, headline = "bright", "light"

    def judge(self, images, prompts):
        light = np.array([np.asarray(image.convert("L")).mean() for image in images])
        return {"light": light, "above": (light > 128).astype(float)}

    def features(self, images):
        return np.stack([np.asarray(image).mean(axis=(0, 1)) for image in images])

    def reference_features(self):
        return 250 + np.random.default_rng(0).normal(size=(50, 3))


@pytest.fixture(autouse=True)
def bright(monkeypatch):
    monkeypatch.setattr(judges, "load_judge", lambda name: Bright())
    monkeypatch.setitem(SCORERS, "bright", "")


@pytest.fixture
def brighter(tiny_pipeline, tmp_path) -> str:
    """Full weights of a model whose images are brighter in every pixel... as far as a random UNet allows."""
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 2
    pipe.unet.save_pretrained(tmp_path / "tuned" / "unet")
    return str(tmp_path / "tuned")


@pytest.fixture
def run(tmp_path, tiny_pipeline, prompts_folder):
    def run(adapter, **options):
        defaults = {"model": tiny_pipeline, "dataset_name": prompts_folder, "num_inference_steps": [1, 2]}
        defaults |= {"judges": ["bright"], "output_dir": str(tmp_path / "out"), "images_per_prompt": 4}
        main(EvaluateArguments(adapter=adapter, **(defaults | options)))
        return json.loads((tmp_path / "out" / "metrics.json").read_text())

    return run


def test_report(run, brighter, tmp_path, capsys):
    metrics = run(brighter)
    assert (metrics["num_images"], metrics["num_prompts"]) == (8, 2)
    assert metrics["options"]["seed"] == 0
    found = [(r["num_inference_steps"], r["judge"], r["metric"]) for r in metrics["results"]]
    names = [("bright", "light"), ("bright", "above"), ("bright", "frechet"), (None, "diversity")]
    assert found == [(steps, *name) for steps in (1, 2) for name in names]
    light = metrics["results"][0]
    assert light["base"] != light["tuned"]
    assert light["difference"] == pytest.approx(light["tuned"] - light["base"])
    assert light["difference_interval"][0] <= light["difference"] <= light["difference_interval"][1]
    assert set(metrics["verdicts"]) == {"1", "2"}

    out, table = capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text()
    assert table in out
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 8 and len({len(line) for line in lines}) == 1  # aligned
    for steps in ("1", "2"):
        assert metrics["verdicts"][steps]["text"] in table
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > 8 * 96 and grid.height > 4 * 96


def test_a_model_against_itself_is_no_different(run, tiny_pipeline, capsys):
    """The folder of the base as full weights: same prompts and seeds give the same images, to the pixel."""
    metrics = run(tiny_pipeline)
    assert all(result["difference"] == 0 for result in metrics["results"])
    assert all(result["win_rate"] == 0.5 for result in metrics["results"] if "win_rate" in result)
    assert {verdict["verdict"] for verdict in metrics["verdicts"].values()} == {"no clear difference"}
    assert "1 steps: no clear difference" in capsys.readouterr().out


def test_seeds_and_number_of_prompts(run, brighter):
    first, other = run(brighter), run(brighter, seed=1)
    assert first["results"][0]["base"] != other["results"][0]["base"]
    assert run(brighter, batch_size=3)["results"][0]["base"] == pytest.approx(first["results"][0]["base"], abs=0.5)
    assert run(brighter, num_prompts=1)["num_prompts"] == 1


def test_without_repeated_prompts_there_is_no_diversity(run, brighter):
    metrics = run(brighter, images_per_prompt=1)
    assert "diversity" not in {result["metric"] for result in metrics["results"]}


def test_a_model_that_draws_black_only(run, brighter):
    """Training that diverged: the tuned UNet answers NaN."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(brighter, subfolder="unet")
    torch.nn.init.constant_(unet.conv_out.weight, float("nan"))
    unet.save_pretrained(f"{brighter}/unet")
    with pytest.raises(ValueError, match=r"All images of the tuned model at 1 steps are black. `dtype` is 'auto'"):
        run(brighter)


def test_black_images_are_counted(run, brighter, monkeypatch, capsys):
    drawn = iter([Image.new("RGB", (8, 8))] * 3 + [Image.new("RGB", (8, 8), "grey")] * 29)
    monkeypatch.setattr(sampling, "sample_images", lambda pipe, prompts, seeds, **_: [next(drawn) for _ in prompts])
    run(brighter)
    assert "3 of 8 images of the base model at 1 steps are black; they are judged." in capsys.readouterr().out


def test_more_prompts_than_there_are(run, brighter):
    with pytest.raises(ValueError, match="`num_prompts` is 3 and the split 'test' has 2"):
        run(brighter, num_prompts=3)


def test_prompts_that_a_judge_does_not_know_are_refused_before_an_image_is_drawn(run):
    with pytest.raises(ValueError, match=r"judge 'digits' knows the embedded world's captions alone.*'a hen'"):
        run("no adapter", model="no model", judges=["digits"])


def test_an_adapter_that_is_none(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`adapter` is .*empty.*no weights could be loaded"):
        run(str(tmp_path / "empty"))


def test_options_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="`judges` is empty"):
        EvaluateArguments()
    with pytest.raises(ValueError, match=r"`judges` is 'digit', which is not known. Did you mean 'digits'"):
        EvaluateArguments(judges=["digit"])
    with pytest.raises(ValueError, match="`num_inference_steps` is empty"):
        EvaluateArguments(judges=["digits"], num_inference_steps=[])
    with pytest.raises(ValueError, match="`num_inference_steps` is 0"):
        EvaluateArguments(judges=["digits"], num_inference_steps=[4, 0])
    with pytest.raises(ValueError, match="`images_per_prompt` is 0"):
        EvaluateArguments(judges=["digits"], images_per_prompt=0)
    with pytest.raises(ValueError, match="`dtype` is 'half'"):
        EvaluateArguments(judges=["digits"], dtype="half")
    with pytest.raises(ValueError, match="`adapter` is not set and the stage `evaluate` needs it"):
        main(EvaluateArguments(model="digits", dataset_name="x", judges=["digits"], output_dir="x"))
