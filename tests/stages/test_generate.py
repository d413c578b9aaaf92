import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from datasets import Image as ImageFeature
from datasets import List, load_from_disk
from PIL import Image

from trl_diffusion_rank.diffusion import sampling
from trl_diffusion_rank.stages import generate
from trl_diffusion_rank.stages.generate import GenerateArguments, JsonMapping, draws_of, main, read_generators


@pytest.fixture
def run(tmp_path, tiny_pipeline, prompts_folder):
    def run(name="out", **options):
        generators = [{"model": tiny_pipeline, "num_inference_steps": [1, 2, 2], "name": "tiny"}]
        defaults = {"dataset_name": prompts_folder, "generators": generators, "output_dir": str(tmp_path / name)}
        main(GenerateArguments(**(defaults | options)))
        return load_from_disk(str(tmp_path / name))

    return run


def pixels(row):
    return [np.asarray(image).astype(int) for image in row["images"]]


def largest_difference(first, second):
    """Of two datasets with the same rows, in levels of 255."""
    return max(
        np.abs(a - b).max()
        for row, other in zip(first, second, strict=True)
        for a, b in zip(pixels(row), pixels(other), strict=True)
    )


def test_rows(run, tmp_path):
    splits = run()
    assert list(splits) == ["train"] and list(splits["train"]["prompt"]) == ["a cat", "a dog", "a cat"]
    for row in splits["train"]:
        assert row["sources"] == ["tiny@1", "tiny@2", "tiny@2"]
        assert all(image.size == (16, 16) and image.mode == "RGB" for image in row["images"])
    seeds = [seed for row in splits["train"] for seed in row["seeds"]]
    assert len(set(seeds)) == 9  # equal prompts in two rows have other seeds, and so have equal steps in one row
    first, _, third = (pixels(row) for row in splits["train"])
    assert np.abs(first[1] - first[2]).max() > 1 and np.abs(first[0] - third[0]).max() > 1


def test_images_are_kept_as_png_bytes(run, tmp_path):
    data = run()["train"].cast_column("images", List(ImageFeature(decode=False)))
    assert Image.open(io.BytesIO(data[0]["images"][0]["bytes"])).format == "PNG"
    assert not list((tmp_path / "out").glob("partial-*"))


def test_an_image_can_be_drawn_again_from_its_row(run, tiny_pipeline):
    from diffusers import DiffusionPipeline

    row = run(batch_size=4)["train"][1]
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline)
    again = sampling.sample_images(pipe, [row["prompt"]], row["seeds"][2:], num_inference_steps=2, progress=None)
    assert np.abs(np.asarray(again[0]).astype(int) - pixels(row)[2]).max() <= 1


def test_the_batch_size_changes_nothing_and_the_seed_everything(run):
    one, four = run("one", batch_size=1)["train"], run("four", batch_size=4)["train"]
    assert [row["seeds"] for row in one] == [row["seeds"] for row in four]
    assert largest_difference(one, four) <= 1
    other = run("other", seed=1)["train"]
    assert not {s for row in one for s in row["seeds"]} & {s for row in other for s in row["seeds"]}


def test_several_generators(run, tiny_pipeline):
    generators = [
        {"model": tiny_pipeline, "num_inference_steps": 1, "name": "one", "guidance_scale": 0.0},
        {"model": tiny_pipeline, "num_inference_steps": [1, 2], "name": "two", "images_per_prompt": 2},
    ]
    row = run(generators=generators, height=16, width=24)["train"][0]
    assert row["sources"] == ["one@1", "two@1", "two@1", "two@2", "two@2"]
    assert len(set(row["seeds"])) == 5 and row["images"][0].size == (24, 16)


@pytest.mark.slow  # three Python processes that import torch and diffusers
def test_two_processes_share_the_work_and_draw_the_same(run, tiny_pipeline, prompts_folder, tmp_path):
    generators = [{"model": tiny_pipeline, "num_inference_steps": [1, 2], "name": "tiny"}]
    alone = run("alone", generators=generators)["train"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["trl_diffusion_rank.stages.generate", "--dataset_name", prompts_folder]
    command += ["--generators", json.dumps(generators[0]), "--output_dir", str(tmp_path / "two")]
    # Without an accelerator, as on the machines these tests run on.
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "4/4" in result.stderr and "6/6" not in result.stderr  # the first process draws two of three prompts
    two = load_from_disk(str(tmp_path / "two"))["train"]
    assert list(two["seeds"]) == list(alone["seeds"]) and list(two["prompt"]) == list(alone["prompt"])
    assert largest_difference(two, alone) <= 1


def test_an_interrupted_stage_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    whole = run("whole")["train"]
    drawn = []
    sample = sampling.sample_images

    def stop_after_five(pipe, prompts, seeds, **options):
        if len(drawn) + len(prompts) > 5:
            raise KeyboardInterrupt
        drawn.extend(seeds)
        return sample(pipe, prompts, seeds, **options)

    monkeypatch.setattr(sampling, "sample_images", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        run()
    (partial,) = (tmp_path / "out").glob("partial-*")
    assert len(list(partial.glob("*.png"))) == len(drawn) == 3

    def count(pipe, prompts, seeds, **options):
        drawn.extend(seeds)
        return sample(pipe, prompts, seeds, **options)

    monkeypatch.setattr(sampling, "sample_images", count)
    resumed = run()["train"]
    assert len(drawn) == len(set(drawn)) == 9  # no image was drawn twice
    assert [row["seeds"] for row in resumed] == [row["seeds"] for row in whole]
    assert largest_difference(resumed, whole) <= 1


def test_images_left_by_other_options_are_not_taken(run, tmp_path, monkeypatch, tiny_pipeline):
    """Guidance is no part of a seed, so the files have the same names: only the folder tells them apart."""
    generator = {"model": tiny_pipeline, "num_inference_steps": [1, 2]}
    weak = [{**generator, "guidance_scale": 1.5}]
    strong = [{**generator, "guidance_scale": 50.0}]
    expected = run("expected", generators=strong)["train"]
    monkeypatch.setattr(generate.shutil, "rmtree", lambda folder: None)  # as if interrupted before the end
    before = list(run(generators=weak)["train"])  # read before the next run replaces it
    assert list((tmp_path / "out").glob("partial-*/*.png"))
    monkeypatch.undo()
    after = run(generators=strong)["train"]
    assert before[0]["seeds"] == after[0]["seeds"]
    assert largest_difference(before, after) > 1 >= largest_difference(expected, after)
    assert not list((tmp_path / "out").glob("partial-*"))


def test_a_black_image_is_drawn_again_with_another_seed(run, monkeypatch, capsys):
    calls = []
    sample = sampling.sample_images

    def first_is_black(pipe, prompts, seeds, **options):
        images = sample(pipe, prompts, seeds, **options)
        calls.append(len(prompts))
        return [Image.new("RGB", (16, 16)), *images[1:]] if len(calls) == 1 else images

    whole = run("whole")["train"]
    monkeypatch.setattr(sampling, "sample_images", first_is_black)
    data = run()["train"]
    assert calls[:2] == [3, 1]
    changed = np.concatenate(data["seeds"]) != np.concatenate(whole["seeds"])
    assert changed.tolist() == [True] + [False] * 8
    assert not any(sampling.is_black(image) for row in data for image in row["images"])
    assert "left out" not in capsys.readouterr().out


def test_an_image_that_stays_black_is_left_out_and_counted(run, monkeypatch, capsys):
    sample = sampling.sample_images

    def dogs_are_black(pipe, prompts, seeds, *, num_inference_steps, **options):
        images = sample(pipe, prompts, seeds, num_inference_steps=num_inference_steps, **options)
        black = [prompt == "a dog" and num_inference_steps == 2 for prompt in prompts]
        return [Image.new("RGB", (16, 16)) if b else image for b, image in zip(black, images, strict=True)]

    monkeypatch.setattr(sampling, "sample_images", dogs_are_black)
    data = run()["train"]
    out = capsys.readouterr().out
    assert "2 images were black with two seeds and are left out" in out
    # one image of a dog remains, and nothing can be ranked with it
    assert "1 of 3 prompts are left out" in out and list(data["prompt"]) == ["a cat", "a cat"]


def test_a_model_that_draws_black_only_is_refused(run, black_pipeline):
    generators = [{"model": black_pipeline, "num_inference_steps": [1, 2], "name": "nan"}]
    with pytest.raises(ValueError, match=r"All 3 images that nan@1 drew are black.*`dtype` is 'auto'.*'a cat'"):
        run(generators=generators)


def test_draws():
    (generator,) = read_generators([{"model": "org/some-model", "num_inference_steps": [4, 8, 8]}])
    assert draws_of(generator) == [("some-model@4", 4, 0), ("some-model@8", 8, 0), ("some-model@8", 8, 1)]


def test_json_on_the_command_line():
    assert JsonMapping('{"model": "x", "num_inference_steps": [1, 2]}') == {
        "model": "x",
        "num_inference_steps": [1, 2],
    }


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        (None, "`generators` is empty"),
        ([], "`generators` is empty"),
        ([{"num_inference_steps": 4}], "names no `model`"),
        ([{"model": "x", "num_inference_step": 4}], r"has the key 'num_inference_step'.*mean 'num_inference_steps'"),
        ([{"model": "x", "num_inference_steps": 0}], r"`num_inference_steps` of the generator 'x' is \[0\]"),
        ([{"model": "x", "num_inference_steps": []}], r"`num_inference_steps` of the generator 'x' is \[\]"),
        ([{"model": "x", "num_inference_steps": [2.5]}], r"is \[2.5\]; whole numbers of at least 1"),
        ([{"model": "x", "images_per_prompt": 0}], r"`images_per_prompt` of the generator 'x' is \[0\]"),
        ([{"model": "x"}], "one image per prompt and a ranking needs at least two"),
        ([{"model": "a/x"}, {"model": "b/x"}], "both called 'x@25'; give one of them another `name`"),
    ],
)
def test_generators_are_checked_before_a_model_is_loaded(generators, message):
    with pytest.raises(ValueError, match=message):
        GenerateArguments(generators=generators)


def test_generators_must_be_mappings():
    with pytest.raises(TypeError, match="An entry of `generators` is 'digits'; it must be a mapping"):
        GenerateArguments(generators=["digits"])


def test_other_options_are_checked():
    generators = [{"model": "x", "images_per_prompt": 2}]
    with pytest.raises(ValueError, match=r"`dtype` is 'bf16', which is not known. Did you mean 'bfloat16'"):
        GenerateArguments(generators=generators, dtype="bf16")
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        GenerateArguments(generators=generators, batch_size=0)
    with pytest.raises(ValueError, match="`dataset_name` is not set and the stage `generate` needs it"):
        main(GenerateArguments(generators=generators, output_dir="x"))


def test_a_model_that_does_not_exist(run, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        run(generators=[{"model": str(tmp_path / "nowhere"), "images_per_prompt": 2}])
