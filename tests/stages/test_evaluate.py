import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny_scorers import random_images, save_tiny_clip

from trl_diffusion_rank.data.artefact import Artefact
from trl_diffusion_rank.diffusion import sampling
from trl_diffusion_rank.diffusion.draws import stable_seed
from trl_diffusion_rank.evaluation import drawing, image_features, judging, outputs
from trl_diffusion_rank.evaluation.grid import GAP
from trl_diffusion_rank.evaluation.judges import ScorerJudge
from trl_diffusion_rank.evaluation.statistics import diversity, frechet_distance
from trl_diffusion_rank.recipe import parse_stage
from trl_diffusion_rank.scorers import SCORERS
from trl_diffusion_rank.stages.evaluate import EvaluateArguments, PathOrMapping, main


STEPS = [1, 2]


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    monkeypatch.setitem(SCORERS, "brightness", "tiny_judges:BrightnessScorer")
    for module in (drawing, judging):  # collecting pytest's garbage takes a second each time
        monkeypatch.setattr(module, "free_memory", lambda: None)


def tuned(pipeline: str, folder: Path, bias: float) -> str:
    """Full weights of a model whose images are other ones."""
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias += bias
    unet.save_pretrained(folder / "unet")
    return str(folder)


@pytest.fixture
def brighter(tiny_pipeline, tmp_path) -> str:
    return tuned(tiny_pipeline, tmp_path / "brighter", 2.0)


@pytest.fixture
def run(tmp_path, tiny_pipeline, prompts_folder, monkeypatch):
    """Runs the stage in a folder of its own and returns its metrics."""

    def run(*adapters, folder="run", **options):
        defaults = {"model": tiny_pipeline, "dataset_name": prompts_folder, "num_inference_steps": STEPS}
        defaults |= {"judges": ["brightness"], "output_dir": "evaluate", "images_per_prompt": 4, "batch_size": 3}
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)  # not a part of the options, so that folders can be compared
        main(EvaluateArguments(adapters=list(adapters), **(defaults | options)))
        return json.loads(Path("evaluate", "metrics.json").read_text())

    return run


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[int, int]]:
    """(number of steps, seed) of every image that is drawn, in order."""
    calls, draw_batch = [], sampling.draw_batch

    def draw(pipe, prompts, seeds, *, num_inference_steps, **options):
        calls.extend((num_inference_steps, seed) for seed in seeds)
        return draw_batch(pipe, prompts, seeds, num_inference_steps=num_inference_steps, **options)

    monkeypatch.setattr(sampling, "draw_batch", draw)
    return calls


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What comes out --------------------------------------------------------


def test_report(run, brighter, tmp_path, capsys):
    metrics = run(brighter)
    assert (metrics["num_images"], metrics["num_prompts"], metrics["adapters"]) == (8, 2, ["brighter"])
    assert metrics["options"]["seed"] == 0 and metrics["warnings"] == metrics["by_category"] == []
    assert metrics["judges"] == [{"name": "brightness", "headline": "brightness", "metrics": ["brightness"]}]
    found = [(r["adapter"], r["num_inference_steps"], r["judge"], r["metric"]) for r in metrics["results"]]
    names = [("brightness", "brightness"), (None, "diversity")]
    assert found == [("brighter", steps, *name) for steps in STEPS for name in names]
    light = metrics["results"][0]
    assert light["base"] != light["tuned"] and light["decides"] and light["category"] is None
    assert light["difference"] == pytest.approx(light["tuned"] - light["base"])
    assert light["difference_interval"][0] <= light["difference"] <= light["difference_interval"][1]
    assert [(v["adapter"], v["num_inference_steps"]) for v in metrics["verdicts"]] == [
        ("brighter", 1),
        ("brighter", 2),
    ]

    folder = tmp_path / "run" / "evaluate"
    out, table = capsys.readouterr().out, (folder / "table.md").read_text()
    assert table in out
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and len({len(line) for line in lines}) == 1  # aligned
    assert all(verdict["text"] in table for verdict in metrics["verdicts"])
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 8 * 96 and grid.height > 4 * 96


def test_the_images_are_a_dataset_with_their_scores(run, brighter, tmp_path):
    metrics = run(brighter)
    folder = tmp_path / "run" / "evaluate"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "artefact.json", "data", "grid.png", "metrics.json", "table.md")
    }
    data = load_dataset(str(folder))
    assert list(data) == ["test"]
    rows = list(data["test"])
    columns = ["prompt", "row", "category", "index", "seed", "num_inference_steps", "model", "image"]
    assert data["test"].column_names == [*columns, "score_brightness"]
    assert len(rows) == 8 * 2 * 2
    for row in rows:
        assert row["seed"] == stable_seed(0, "evaluate", row["prompt"], row["row"], row["index"])
        assert row["score_brightness"] == pytest.approx(np.asarray(row["image"].convert("L")).mean())
        assert (row["prompt"], row["row"]) in (("a hen", 3), ("a cow", 4)) and row["category"] is None
    assert [(row["model"], row["num_inference_steps"]) for row in rows[:4]] == [
        *(("base", 1), ("brighter", 1), ("base", 2), ("brighter", 2))
    ]
    for result in metrics["results"][::2]:
        for side, model in (("base", "base"), ("tuned", "brighter")):
            own = [r for r in rows if (r["model"], r["num_inference_steps"]) == (model, result["num_inference_steps"])]
            assert np.mean([row["score_brightness"] for row in own]) == pytest.approx(result[side])
    card = (folder / "README.md").read_text()
    assert "| `score_brightness` | float64 | by the judge `brightness`, higher is better |" in card
    assert "![Base above tuned](grid.png)" in card and metrics["verdicts"][0]["text"] in card
    assert str(tmp_path) not in card  # which the world may read


def test_a_model_against_itself_is_no_different(run, tiny_pipeline, capsys):
    """The folder of the base as full weights: same prompts and seeds give the same images, to the pixel."""
    metrics = run({"name": "itself", "path": tiny_pipeline})
    assert all(result["difference"] == 0 for result in metrics["results"])
    assert all(result["difference_interval"] == [0, 0] for result in metrics["results"])
    assert all(result["win_rate"] == 0.5 for result in metrics["results"] if "win_rate" in result)
    assert {verdict["verdict"] for verdict in metrics["verdicts"]} == {"no clear difference"}
    assert "\n1 steps: no clear difference" in capsys.readouterr().out


def test_several_adapters(run, brighter, tiny_pipeline, tmp_path):
    darker = tuned(tiny_pipeline, tmp_path / "darker", -2.0)
    alone, both = run(brighter, folder="one"), run(brighter, {"name": "dark", "path": darker}, folder="two")
    assert both["adapters"] == ["brighter", "dark"]
    assert [r for r in both["results"] if r["adapter"] == "brighter"] == alone["results"]
    dark = [result for result in both["results"] if result["adapter"] == "dark"]
    assert len(dark) == 4 and dark[0]["base"] == alone["results"][0]["base"] != dark[0]["tuned"]
    assert [(v["adapter"], v["text"].split(":")[0]) for v in both["verdicts"]] == [
        *(("brighter", "brighter, 1 steps"), ("brighter", "brighter, 2 steps")),
        *(("dark", "dark, 1 steps"), ("dark", "dark, 2 steps")),
    ]
    one, two = (tmp_path / name / "evaluate" for name in ("one", "two"))
    assert (two / "table.md").read_text().startswith("| adapter  | steps | metric")
    heights = [Image.open(folder / "grid.png").height for folder in (one, two)]
    assert heights[1] - heights[0] == 2 * (96 + GAP)  # a row more at each number of steps


def test_by_category(run, brighter, tmp_path):
    rows = {"prompt": ["a hen", "a cow", "blue", "x"], "Category": ["Animals", "Animals", "Abstract", None]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "parti.parquet")
    metrics = run(brighter, dataset_name=str(tmp_path / "parti.parquet"), images_per_prompt=2)
    found = [(r["category"], r["num_inference_steps"], r["metric"]) for r in metrics["by_category"]]
    assert found == [(name, steps, "brightness") for steps in STEPS for name in ("Animals", "Abstract")]
    assert all(result["category"] is None for result in metrics["results"])
    data = load_dataset(str(tmp_path / "run" / "evaluate"), split="test").to_pandas()
    own = data[(data.category == "Animals") & (data.num_inference_steps == 1)].groupby("model").score_brightness.mean()
    assert metrics["by_category"][0]["base"] == pytest.approx(own["base"])
    assert metrics["by_category"][0]["tuned"] == pytest.approx(own["brighter"])
    assert "| 1     | Abstract | brightness |" in (tmp_path / "run" / "evaluate" / "table.md").read_text()


def test_seeds_and_number_of_prompts(run, brighter):
    short = {"num_inference_steps": [1], "images_per_prompt": 2}
    first, other = run(brighter, **short), run(brighter, **short, seed=1, folder="other")
    assert first["results"][0]["base"] != other["results"][0]["base"]
    again = run(brighter, **short, batch_size=8, folder="again")
    assert again["results"][0]["base"] == pytest.approx(first["results"][0]["base"], abs=0.5)
    assert run(brighter, **short, num_prompts=1, folder="fewer")["num_prompts"] == 1


def test_without_repeated_prompts_there_is_no_diversity(run, brighter):
    metrics = run(brighter, images_per_prompt=1, num_inference_steps=[1])
    assert "diversity" not in {result["metric"] for result in metrics["results"]}


def test_diversity_is_that_of_the_images(run, brighter, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "THUMBNAILS_AT_ONCE", 1)  # one prompt at a time
    (_, result) = run(brighter, num_inference_steps=[1])["results"]
    rows = list(load_dataset(str(tmp_path / "run" / "evaluate"), split="test"))
    for side, model in (("base", "base"), ("tuned", "brighter")):
        own = [row for row in rows if row["model"] == model]
        pixels = np.stack([np.asarray(row["image"]).reshape(-1) for row in own]) / 127.5 - 1
        assert result[side] == pytest.approx(diversity(pixels, [row["prompt"] for row in own]))


# Real images -----------------------------------------------------------


@pytest.fixture
def real(tmp_path) -> dict[str, str]:
    """Options of a Frechet distance to twelve grey images."""
    images = [Image.fromarray(np.asarray(image) // 4 + 90) for image in random_images(12)]
    folder = tmp_path / "real"
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number:02d}.png")
    return {"real_images": str(folder), "feature_model": save_tiny_clip(tmp_path / "clip")}


def test_frechet_distance_to_real_images(run, brighter, real, tmp_path):
    metrics = run(brighter, **real)
    found = [r for r in metrics["results"] if r["metric"] == "frechet"]
    assert [(r["judge"], r["decides"], r["higher_is_better"]) for r in found] == [(None, True, False)] * 2
    assert [judge["name"] for judge in metrics["judges"]] == ["brightness"]
    data = load_dataset(str(tmp_path / "run" / "evaluate"), split="test")
    assert data.column_names[-1] == "score_brightness"
    network = image_features.ImageFeatures(real["feature_model"])
    reference = network([Image.open(path) for path in sorted(Path(real["real_images"]).iterdir())])
    for model, side in (("base", "base"), ("brighter", "tuned")):
        images = [row["image"] for row in data if (row["model"], row["num_inference_steps"]) == (model, 1)]
        assert found[0][side] == pytest.approx(frechet_distance(network(images), reference), rel=1e-4)
    assert "not the FID" in (tmp_path / "run" / "evaluate" / "table.md").read_text()


def test_bad_real_images_are_told_before_an_image_is_drawn(run, brighter, real, tmp_path, drawn):
    Dataset.from_dict({"picture": [1, 2]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"`real_images` is .* has 2 rows with the columns picture; at least two"):
        run(brighter, real_images=str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match=r"`real_split` is 'dev'; .* has the splits train"):
        run(brighter, **real, real_split="dev")
    with pytest.raises(ValueError, match=r"`feature_model` is .*brighter', which can't be loaded"):
        run(brighter, real_images=real["real_images"], feature_model=brighter)
    Path(real["real_images"], "07.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"Row 7 of the split 'train': the image can't be decoded"):
        run(brighter, **real)
    assert drawn == []


# What is there stays there ---------------------------------------------


class Killed(BaseException):
    """At a moment of the test's choice."""


def die_at(patch: pytest.MonkeyPatch, owner, name: str, call: int) -> None:
    function, calls = getattr(owner, name), []

    def count(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    patch.setattr(owner, name, count)


DEATHS = [
    (image_features.ImageFeatures, "__call__", 1),  # of the real images
    (sampling, "draw_batch", 2),
    (sampling, "draw_batch", 6),
    (drawing, "load_for_sampling", 1),  # the base model's images are there by now, but for what follows
    (sampling, "draw_batch", 3),
    (ScorerJudge, "judge", 3),
    (image_features.ImageFeatures, "__call__", 2),
    (outputs, "picture", 1),
    (Artefact, "save", 1),
    (shutil, "rmtree", 2),  # the images are in their place, the card isn't
]


def test_interrupted_anywhere_the_outputs_are_the_same(run, brighter, real, tmp_path, drawn, monkeypatch):
    for module in (drawing, judging):
        monkeypatch.setattr(module, "JUDGED_AT_ONCE", 3)
    run(brighter, **real, folder="whole")
    whole = sorted(drawn)
    assert len(whole) == len(set(whole)) * 2 == 32
    drawn.clear()
    for owner, name, call in DEATHS:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            die_at(patch, owner, name, call)
            run(brighter, **real, folder="killed")
    run(brighter, **real, folder="killed")
    assert sorted(drawn) == whole  # not one of them twice
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_nothing_is_loaded_for_what_is_there(run, brighter, drawn, monkeypatch, capsys):
    first = run(brighter)
    drawn.clear()
    monkeypatch.setattr(drawing, "load_for_sampling", None)
    monkeypatch.setitem(SCORERS, "brightness", "no_such_module:Scorer")
    assert run(brighter) == first and drawn == []
    assert "The comparison in evaluate is finished." in capsys.readouterr().out


def put_away(folder: Path) -> None:
    """As the runner does with an output that was made with other options."""
    (folder / ".superseded").mkdir(exist_ok=True)
    (folder / "evaluate").rename(folder / ".superseded" / "evaluate-01234567")


def test_images_are_not_drawn_again_for_other_judges_or_another_adapter(
    run, brighter, tiny_pipeline, tmp_path, drawn, monkeypatch, capsys
):
    darker = tuned(tiny_pipeline, tmp_path / "darker", -2.0)
    clip = {"name": "clip", "model": save_tiny_clip(tmp_path / "clip")}
    run(brighter)
    drawn.clear()
    put_away(tmp_path / "run")
    capsys.readouterr()
    again = run(brighter, darker, judges=["brightness", clip])
    assert len(drawn) == 16  # the second adapter's
    assert "32 images are taken over from an earlier evaluation." in capsys.readouterr().out
    assert again == run(brighter, darker, judges=["brightness", clip], folder="anew")
    assert contents(tmp_path / "run" / "evaluate") == contents(tmp_path / "anew" / "evaluate")
    drawn.clear()
    run(brighter, darker, judges=[clip])  # without the runner, in the same folder
    assert drawn == []
    run(brighter, judges=[clip], guidance_scale=3.0, num_inference_steps=[1])
    assert len(drawn) == 16


def test_the_pieces_of_an_interrupted_evaluation_are_taken_over_too(run, brighter, tmp_path, drawn, monkeypatch):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_at(patch, sampling, "draw_batch", 5)
        run(brighter)
    assert len(drawn) == 11  # 3 + 3 + 2, 3
    put_away(tmp_path / "run")
    run(brighter, judges=[{"name": "brightness", "offset": 1.0}])
    assert len(drawn) == 32


def test_weights_that_have_changed_are_drawn_again(run, brighter, tmp_path, drawn):
    run(brighter, num_inference_steps=[1])
    put_away(tmp_path / "run")
    drawn.clear()
    os.utime(Path(brighter, "unet", "diffusion_pytorch_model.safetensors"), ns=(1, 1))
    run(brighter, num_inference_steps=[1])
    assert len(drawn) == 8


def test_a_model_at_a_time(run, brighter, tiny_pipeline, tmp_path, monkeypatch):
    """The pipelines are gone before the next one is loaded, and before the judges are."""
    alive, load = [], drawing.load_for_sampling

    def load_alone(*args):
        assert not any(ref() for ref in alive)
        pipe = load(*args)
        alive.append(weakref.ref(pipe))
        return pipe

    def judge(self, *args):
        assert not any(ref() for ref in alive)
        return ask(self, *args)

    ask = ScorerJudge.judge
    monkeypatch.setattr(drawing, "free_memory", gc.collect)
    monkeypatch.setattr(drawing, "load_for_sampling", load_alone)
    monkeypatch.setattr(ScorerJudge, "judge", judge)
    run(brighter, tuned(tiny_pipeline, tmp_path / "darker", -2.0), num_inference_steps=[1])
    assert len(alive) == 3


@pytest.mark.slow  # processes that import torch and diffusers
def test_two_processes_give_what_one_gives_also_when_they_are_killed(
    brighter, tiny_pipeline, prompts_folder, real, tmp_path
):
    clip = json.dumps({"name": "clip", "model": real["feature_model"]})
    options = ["--model", tiny_pipeline, "--adapters", brighter, "--dataset_name", prompts_folder, "--judges", clip]
    options += ["--num_inference_steps", "1", "2", "--images_per_prompt", "40", "--batch_size", "3"]
    options += ["--real_images", real["real_images"], "--feature_model", real["feature_model"]]
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def start(folder: str, processes: int) -> subprocess.Popen:
        (tmp_path / folder).mkdir(exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "trl_diffusion_rank.stages.evaluate", *options, "--output_dir", "out"],
            cwd=tmp_path / folder,
            env=os.environ | environment,
            start_new_session=True,
        )

    def pieces() -> int:
        return len(list((tmp_path / "killed").glob("out/partial-*/images/*.parquet")))

    process = start("killed", 2)
    while pieces() < 6 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 6 <= pieces() < 4 * 27 and not (tmp_path / "killed" / "out" / "artefact.json").exists()
    assert start("killed", 2).wait(timeout=300) == 0
    assert start("one", 1).wait(timeout=300) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")


# What is refused -------------------------------------------------------


def test_a_model_that_draws_black_only(run, brighter):
    """Training that diverged: the tuned UNet answers NaN."""
    unet = UNet2DConditionModel.from_pretrained(brighter, subfolder="unet")
    torch.nn.init.constant_(unet.conv_out.weight, float("nan"))
    unet.save_pretrained(f"{brighter}/unet")
    message = r"All 8 images of the model brighter at 1 steps are black. `dtype` is 'auto'"
    for _ in range(2):  # black pieces aren't kept for the next attempt
        with pytest.raises(ValueError, match=message):
            run(brighter)


@pytest.fixture
def first_black(monkeypatch):
    """Has the first images of all come out black, so many of them."""

    def patch(count: int) -> None:
        drawn = iter([Image.new("RGB", (8, 8))] * count + [Image.new("RGB", (8, 8), "grey")] * 1000)
        monkeypatch.setattr(
            sampling, "draw_batch", lambda pipe, prompts, seeds, **_: ([next(drawn) for _ in prompts], [])
        )

    return patch


def test_black_images_are_counted(run, brighter, first_black, capsys):
    first_black(4)  # more than a batch
    run(brighter, num_inference_steps=[1])
    assert "4 of 8 images of the model base at 1 steps are black; they are judged." in capsys.readouterr().out


def test_black_images_stop_a_long_evaluation_early(run, brighter, first_black, tmp_path):
    first_black(18)
    with pytest.raises(ValueError, match="The first 18 of 40 images of the model base at 1 steps are black"):
        run(brighter, images_per_prompt=20)
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_prompts_that_a_judge_does_not_know_are_refused_before_an_image_is_drawn(run, brighter):
    with pytest.raises(ValueError, match=r"judge 'digits' knows the embedded world's captions alone.*'a hen'"):
        run(brighter, model="no model", judges=["digits"])


def test_adapters_that_are_none_are_refused_before_an_image_is_drawn(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"entry of `adapters` is .*empty', which holds no weights"):
        run(str(tmp_path / "empty"), model="no model")
    with pytest.raises(ValueError, match=r"entry of `adapters` is 'runs/mine/dpo', which is neither a folder"):
        run("runs/mine/dpo", model="no model")


def test_the_only_judge_ranked_the_training_images(run, brighter, tmp_path, capsys):
    """... as the records say that the runner leaves."""
    score = {"stage": "score", "options": {"scorers": [{"name": "brightness", "label": "light"}]}}
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "stage.json").write_text(json.dumps(score))
    trained = {"stage": "dpo", "options": {"dataset_name": str(tmp_path / "score")}}
    Path(brighter, "stage.json").write_text(json.dumps(trained))
    metrics = run(brighter, num_inference_steps=[1], images_per_prompt=1)
    (warning,) = metrics["warnings"]
    assert warning.startswith("The only judge, `brightness`, ranked the images that brighter was trained on.")
    assert f"Warning: {warning}\n" in capsys.readouterr().out
    table = (tmp_path / "run" / "evaluate" / "table.md").read_text()
    assert table.startswith(f"> **Warning.** {warning}\n\n| steps")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judges": None}, "`judges` is empty"),
        ({"judges": ["digit"]}, "`judges` is 'digit', which is not known. Did you mean 'digits'"),
        ({"adapters": []}, "`adapters` is empty; name at least one"),
        ({"adapters": ["a/base"]}, "would be called 'base', which is the base model's name"),
        ({"num_inference_steps": []}, "`num_inference_steps` is empty"),
        ({"num_inference_steps": [4, 0]}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": [4, 4]}, r"`num_inference_steps` is \[4, 4\]; name each number once"),
        ({"images_per_prompt": 0}, "`images_per_prompt` is 0"),
        ({"num_prompts": 0}, "`num_prompts` is 0"),
        ({"dtype": "half"}, "`dtype` is 'half'"),
        ({"real_split": "test"}, "`real_split` is set and `real_images` is not"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateArguments(**({"judges": ["digits"]} | options))


def test_what_a_run_fills_in_is_asked_for():
    with pytest.raises(ValueError, match="`adapters` is not set and the stage `evaluate` needs it"):
        main(EvaluateArguments(model="digits", dataset_name="x", judges=["digits"], output_dir="x"))


def test_names_and_mappings_from_the_command_line_and_a_recipe(tmp_path):
    assert PathOrMapping("runs/mine/dpo") == {"path": "runs/mine/dpo"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "evaluate:\n  model: digits\n  dataset_name: prompts\n"
        "  adapters: [a/dpo, {name: second, path: b/dpo}]\n"
        "  judges: [digits, {name: discriminator, model: d}]\n"
    )
    (args,) = parse_stage("evaluate", ["--recipe", str(recipe)])
    assert args.read_adapters() == {"dpo": "a/dpo", "second": "b/dpo"}
    assert [judge.name for judge in args.read_judges()] == ["digits", "discriminator"]
    flags = ["--adapters", '{"name": "x", "path": "y"}', "c/cpo", "--judges", '{"name": "clip", "label": "c"}']
    (args,) = parse_stage("evaluate", ["--recipe", str(recipe), *flags])
    assert args.read_adapters() == {"x": "y", "cpo": "c/cpo"}
    assert [judge.name for judge in args.read_judges()] == ["c"]
