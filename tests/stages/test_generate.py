import gc
import io
import json
import os
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub import DatasetCard
from PIL import Image

from trl_diffusion_rank import generators as pool
from trl_diffusion_rank.data import artefact as artefact_module
from trl_diffusion_rank.data.loading import load_splits, undecoded
from trl_diffusion_rank.data.parts import Parts
from trl_diffusion_rank.diffusion import sampling
from trl_diffusion_rank.diffusion.draws import stable_seed
from trl_diffusion_rank.recipe import parse_stage
from trl_diffusion_rank.stages.generate import GenerateArguments, PresetOrMapping, main


@pytest.fixture
def run(tmp_path, tiny_pipeline, prompts_folder):
    def run(name="out", **options):
        generators = [{"model": tiny_pipeline, "num_inference_steps": [1, 2, 2], "name": "tiny"}]
        defaults = {"dataset_name": prompts_folder, "generators": generators, "output_dir": str(tmp_path / name)}
        main(GenerateArguments(**(defaults | options)))
        return load_splits(str(tmp_path / name))["train"]

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The seeds of all images that are drawn, in their order."""
    seeds = []
    draw_batch = sampling.draw_batch

    def record(pipe, prompts, own, **options):
        seeds.extend(own)
        return draw_batch(pipe, prompts, own, **options)

    monkeypatch.setattr(sampling, "draw_batch", record)
    return seeds


def blacken(monkeypatch, is_black):
    """Make images black; `is_black(prompt, seed, steps)` decides which."""
    draw_batch = sampling.draw_batch

    def draw(pipe, prompts, seeds, **options):
        images, replaced = draw_batch(pipe, prompts, seeds, **options)
        black = [is_black(*item, options["num_inference_steps"]) for item in zip(prompts, seeds, strict=True)]
        return [Image.new("RGB", image.size) if b else image for image, b in zip(images, black, strict=True)], replaced

    monkeypatch.setattr(sampling, "draw_batch", draw)


def save_rows(folder, columns, features=None) -> str:
    Dataset.from_dict(columns, features=features).save_to_disk(folder)
    return str(folder)


def pixels(row):
    return [np.asarray(image).astype(int) for image in row["images"]]


def largest_difference(first, second):
    """Of two datasets with the same rows, in levels of 255."""
    return max(
        np.abs(a - b).max()
        for row, other in zip(first, second, strict=True)
        for a, b in zip(pixels(row), pixels(other), strict=True)
    )


def raw(data):
    """All columns of all rows, images as bytes."""
    return undecoded(data).to_list()


# The rows


def test_rows(run, tmp_path, capsys):
    data = run()
    assert list(data["prompt"]) == ["a cat", "a dog", "a cat"] and list(data["row"]) == [0, 1, 2]
    for row in data:
        assert row["sources"] == ["tiny@1", "tiny@2", "tiny@2"]
        assert all(image.size == (16, 16) and image.mode == "RGB" for image in row["images"])
    first, _, third = (pixels(row) for row in data)
    assert np.abs(first[1] - first[2]).max() > 1 and np.abs(first[0] - third[0]).max() > 1
    assert Image.open(io.BytesIO(raw(data)[0]["images"][0]["bytes"])).format == "PNG"
    assert not list((tmp_path / "out").glob("partial-*")) and not (tmp_path / "out" / "failures.jsonl").exists()
    out = capsys.readouterr().out
    assert f"9 images of 3 prompts, in {tmp_path / 'out'}" in out and "left out" not in out and "sizes" not in out
    again = load_dataset(str(tmp_path / "out"))
    assert list(again) == ["train"] and raw(again["train"]) == raw(data)


def test_a_seed_is_made_of_run_prompt_row_source_and_index(run):
    """The formula of the first release: images of old runs can be drawn again."""
    for row in run(seed=5):
        draws = [("tiny@1", 0), ("tiny@2", 0), ("tiny@2", 1)]
        assert row["seeds"] == [stable_seed(5, row["prompt"], row["row"], *draw) for draw in draws]


def test_an_image_can_be_drawn_again_from_its_row(run, tiny_pipeline):
    from diffusers import DiffusionPipeline

    row = run(batch_size=4)[1]
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline)
    again = sampling.sample_images(pipe, [row["prompt"]], row["seeds"][2:], num_inference_steps=2, progress=None)
    assert np.abs(np.asarray(again[0]).astype(int) - pixels(row)[2]).max() <= 1


def test_the_batch_size_changes_nothing_and_the_seed_everything(run):
    one, three, eight = (run(f"{size}", batch_size=size) for size in (1, 3, 8))
    for other in (three, eight):
        assert one.remove_columns("images").to_list() == other.remove_columns("images").to_list()
        assert largest_difference(one, other) <= 1  # kernels round differently at another batch size
    other = run("other", seed=1)
    assert not {s for row in one for s in row["seeds"]} & {s for row in other for s in row["seeds"]}


def test_several_generators(run, tiny_pipeline, capsys):
    generators = [
        {"model": tiny_pipeline, "num_inference_steps": 1, "name": "one", "guidance_scale": 0.0},
        {"model": tiny_pipeline, "num_inference_steps": [1, 2], "name": "two", "images_per_prompt": 2},
    ]
    row = run(generators=generators, height=16, width=24)[0]
    assert row["sources"] == ["one", "two@1", "two@1", "two@2", "two@2"]
    assert len(set(row["seeds"])) == 5 and {image.size for image in row["images"]} == {(24, 16)}
    assert "different sizes" not in capsys.readouterr().out


def test_a_generator_has_its_own_size_and_dtype(run, tiny_pipeline, monkeypatch, capsys):
    dtypes = []
    monkeypatch.setattr(pool, "load_generator", lambda *args: dtypes.append((pipe := load(*args)).unet.dtype) or pipe)
    generators = [
        {"model": tiny_pipeline, "num_inference_steps": 1, "name": "a"},
        {"model": tiny_pipeline, "num_inference_steps": 1, "name": "b", "dtype": "bfloat16"},
    ]
    generators[1] |= {"height": 8, "width": 24}
    row = run(generators=generators, height=16, width=24)[0]
    assert [image.size for image in row["images"]] == [(24, 16), (24, 8)]
    assert dtypes == [torch.float32, torch.bfloat16]
    assert "different sizes (a 24 x 16, b 24 x 8)" in capsys.readouterr().out


load = pool.load_generator


def test_a_generator_reads_its_own_column(run, tmp_path, tiny_pipeline):
    texts = {"prompt": ["a cat", "a dog"], "caption": ["two red suns", "a blue house"], "url": ["u1", "u2"]}
    texts |= {"width": [3, 4]}
    generators = [
        {"model": tiny_pipeline, "num_inference_steps": 2, "name": "alt"},
        {"model": tiny_pipeline, "num_inference_steps": 2, "name": "caption", "prompt_column": "caption"},
    ]
    data = run(generators=generators, dataset_name=save_rows(tmp_path / "texts", texts), batch_size=1)
    row = data[1]
    assert row["seeds"] == [stable_seed(0, "a dog", 1, name, 0) for name in ("alt", "caption")]  # by the prompt
    pipe = load(pool.Generator(tiny_pipeline), torch.device("cpu"))
    for text, image, seed in zip(("a dog", "a blue house"), pixels(row), row["seeds"], strict=True):
        again = sampling.sample_images(pipe, [text], [seed], num_inference_steps=2, progress=None)[0]
        assert np.abs(np.asarray(again).astype(int) - image).max() <= 1
    # other columns of the prompts stay with them
    assert (row["prompt"], row["caption"], row["url"], row["width"]) == ("a dog", "a blue house", "u2", 4)


# Interruptions and processes


def test_missing_images_alone_are_drawn(run, tmp_path, drawn, monkeypatch):
    whole = run("whole", batch_size=2)
    drawn.clear()
    count_and_draw = sampling.draw_batch

    def stop_after_five(pipe, prompts, seeds, **options):
        if len(drawn) + len(prompts) > 5:
            raise KeyboardInterrupt
        return count_and_draw(pipe, prompts, seeds, **options)

    monkeypatch.setattr(sampling, "draw_batch", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=2)
    assert len(drawn) == 5 and len(list((tmp_path / "out").glob("partial-*/images/*.parquet"))) == 3
    monkeypatch.setattr(sampling, "draw_batch", count_and_draw)
    resumed = run(batch_size=3)
    assert len(drawn) == len(set(drawn)) == 9  # no image was drawn twice
    assert [row["seeds"] for row in resumed] == [row["seeds"] for row in whole]
    assert largest_difference(resumed, whole) <= 1


# Runs the stage in forks of one process that has imported everything, and kills three of them.
KILLED = """
    import os, signal, sys, time
    from pathlib import Path
    import torch
    import trl_diffusion_rank.data.artefact, trl_diffusion_rank.data.loading, trl_diffusion_rank.diffusion.sampling
    from trl_diffusion_rank.stages.generate import GenerateArguments, main
    torch.set_num_threads(1)
    options = dict(dataset_name=sys.argv[1], batch_size=2, include_real=True, generators=[
        {"model": sys.argv[2], "num_inference_steps": [1, 2], "name": "a"},
        {"model": sys.argv[2], "num_inference_steps": 1, "images_per_prompt": 2, "name": "b"},
    ])
    def start(folder):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                main(GenerateArguments(**options, output_dir=folder))
                code = 0
            finally:
                os._exit(code)
        return child
    parts = lambda: sorted(Path(sys.argv[4]).glob("partial-*/images/*.parquet"))
    kept = []
    for wanted in (4, 17, 30):
        child = start(sys.argv[4])
        while len(parts()) < wanted:
            time.sleep(0.002)
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended before it was killed"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not Path(sys.argv[4], "data").exists()
        assert set(kept) < set(parts())
        kept = parts()
    for folder in sys.argv[3:]:
        child = start(folder)
        assert os.waitpid(child, 0)[1] == 0
"""


def test_killed_at_any_moment_the_dataset_is_the_same(tmp_path, tiny_pipeline):
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (9, 7, 3), dtype=np.uint8)) for _ in range(20)]
    columns = {"prompt": [f"a {name} cat" for name in "abcdefghijklmnopqrst"], "image": images}
    rows = save_rows(tmp_path / "rows", columns, Features({"prompt": Value("string"), "image": ImageFeature()}))
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), rows, tiny_pipeline, whole, killed],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "of 80 images are there already." in result.stdout  # the last attempt went on where the third stopped
    first, second = (load_splits(folder)["train"] for folder in (whole, killed))
    assert len(first) == 20 and all(len(row["images"]) == 5 for row in first)
    assert raw(first) == raw(second)
    assert not list((tmp_path / "killed").glob("partial-*"))


@pytest.mark.slow  # three Python processes that import torch and diffusers
def test_two_processes_share_the_work_and_draw_the_same(run, tiny_pipeline, prompts_folder, tmp_path):
    generators = [{"model": tiny_pipeline, "num_inference_steps": [1, 2], "name": "tiny"}]
    alone = run("alone", generators=generators, batch_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["trl_diffusion_rank.stages.generate", "--dataset_name", prompts_folder, "--batch_size", "2"]
    command += ["--generators", json.dumps(generators[0]), "--output_dir", str(tmp_path / "two")]
    # Without an accelerator, as on the machines these tests run on.
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    # batches of 2, 1 and 2, 1 images: the first process has the first of each number of steps
    assert "4/4" in result.stderr and "6/6" not in result.stderr
    assert result.stdout.count("6 images of 3 prompts") == 1
    assert raw(load_splits(str(tmp_path / "two"))["train"]) == raw(alone)


def test_images_of_other_options_are_not_taken(run, tmp_path, monkeypatch, tiny_pipeline):
    """Guidance is no part of a seed: the keys of the pieces are the same, and only their folder tells them apart."""
    generator = {"model": tiny_pipeline, "num_inference_steps": [1, 2], "name": "tiny"}
    strong = [{**generator, "guidance_scale": 50.0}]
    expected = run("expected", generators=strong)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*args):
            raise KeyboardInterrupt

        patch.setattr(artefact_module.Artefact, "save", stop)
        run(generators=[{**generator, "guidance_scale": 1.5}])
    (partial,) = (tmp_path / "out").glob("partial-*")
    assert Parts(partial / "images", ("source", "index", "row"), Features({"row": Value("int64")})).scan()
    after = run(generators=strong)
    assert largest_difference(expected, after) <= 1
    assert not list((tmp_path / "out").glob("partial-*"))


def test_what_is_finished_is_only_published(run, drawn, monkeypatch, capsys, tmp_path):
    pushed = []
    monkeypatch.setattr(artefact_module, "push_dataset", lambda *args: pushed.append(args) or "https://there")
    run()
    assert len(drawn) == 9 and not pushed
    capsys.readouterr()
    run(push_to_hub=True, hub_dataset_id="me/images", batch_size=2)
    assert len(drawn) == 9 and pushed == [(str(tmp_path / "out"), "me/images", None)]
    out = capsys.readouterr().out
    assert "out is finished, with these options" in out and "Pushed to https://there" in out
    run(seed=1, push_to_hub=True, hub_dataset_id="me/images")
    assert len(drawn) == 18 and len(pushed) == 2


def test_one_model_is_in_memory_and_a_finished_one_is_not_loaded(run, tiny_pipeline, monkeypatch):
    generators = [{"model": tiny_pipeline, "num_inference_steps": 1, "name": name} for name in ("a", "b", "c")]
    loaded, alive = [], []

    def load_and_watch(generator, *args):
        gc.disable()  # what the stage frees, it has to free by itself
        assert [ref() for ref in alive] == [None] * len(alive)
        if generator.name == "c" and "c" not in loaded:
            loaded.append("c")
            raise KeyboardInterrupt
        pipe = load(generator, *args)
        alive.append(weakref.ref(pipe.unet))
        pipe.unet.itself = [pipe.unet]  # a circle: reference counts alone don't free it
        loaded.append(generator.name)
        return pipe

    monkeypatch.setattr(pool, "load_generator", load_and_watch)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(generators=generators)
        assert loaded == ["a", "b", "c"] and len(alive) == 2
        assert run(generators=generators)[0]["sources"] == ["a", "b", "c"]
        assert loaded == ["a", "b", "c", "c"]
    finally:
        gc.enable()


def test_an_error_of_the_writer_ends_the_stage(run, monkeypatch, drawn):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(Parts, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run(batch_size=1)
    assert 0 < len(drawn) < 9  # it was not told after the last image


def test_images_that_vanish_are_missed(run, monkeypatch):
    monkeypatch.setattr(Parts, "write", lambda self, columns: None)
    with pytest.raises(ValueError, match=r"9 of 9 images are not in .*images, though all were written"):
        run()


def test_progress_is_shown_for_what_is_missing(run, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no more"):

        def refuse(generator, *args):
            if generator.name == "b":
                raise ValueError("no more")
            return load(generator, *args)

        patch.setattr(pool, "load_generator", refuse)
        model = GenerateArguments(generators=[{"model": "digits", "num_inference_steps": [1, 2]}]).generators[0]
        generators = [{**model, "name": name, "num_inference_steps": 1} for name in ("a", "b")]
        run(generators=generators)
    assert "3/6" in capsys.readouterr().err
    run(generators=generators)
    shown = capsys.readouterr()
    assert "3 of 6 images are there already." in shown.out
    assert "b: 100%" in shown.err and "3/3" in shown.err and "image/s" in shown.err


# Unusable images


def test_a_black_image_is_drawn_again_with_another_seed(run, monkeypatch, drawn, tmp_path):
    whole = run("whole")
    drawn.clear()
    blacken(monkeypatch, lambda prompt, seed, steps: seed == whole[0]["seeds"][1])
    data = run()
    assert len(drawn) == 10
    assert data[0]["seeds"][1] == stable_seed(0, "a cat", 0, "tiny@2", 0, "retry")
    changed = np.concatenate(data["seeds"]) != np.concatenate(whole["seeds"])
    assert changed.tolist() == [False, True] + [False] * 7
    assert not any(sampling.is_black(image) for row in data for image in row["images"])
    assert not (tmp_path / "out" / "failures.jsonl").exists()


def test_an_image_that_stays_black_is_left_out_and_recorded(run, monkeypatch, capsys, tmp_path, drawn):
    blacken(monkeypatch, lambda prompt, seed, steps: prompt == "a dog" and steps == 2)
    data = run()
    out = capsys.readouterr().out
    assert "2 images were unusable with two seeds (black: 2) and are left out" in out
    # one image of a dog remains, and nothing can be ranked with it
    assert "1 of 3 prompts are left out" in out and list(data["prompt"]) == ["a cat", "a cat"]
    assert f"6 images of 2 prompts, in {tmp_path / 'out'}" not in out and "7 images" in out
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert failures == [
        {"prompt": "a dog", "row": 1, "source": "tiny@2", "index": index, "reason": "black"}
        | {"seed": stable_seed(0, "a dog", 1, "tiny@2", index, "retry")}
        for index in (0, 1)
    ]
    card = DatasetCard.load(tmp_path / "out" / "README.md").text
    assert "2 images were unusable with two seeds and are left out of their rows (black: 2)" in card
    assert "1 rows were left with fewer than two images" in card and "a dog" in card.split("## Failed images")[1]
    assert len(drawn) == 9 + 2


def test_an_image_that_a_safety_checker_replaced_is_drawn_again(run, monkeypatch, tmp_path, capsys):
    """With the pipeline's own safety checker's place taken; what it gives for `a dog` is always refused."""
    from diffusers import StableDiffusionPipeline

    encode_prompt = StableDiffusionPipeline.encode_prompt
    prompts, calls = [], []

    def remember(self, prompt, *args, **kwargs):
        prompts[:] = prompt
        return encode_prompt(self, prompt, *args, **kwargs)

    def refuse(self, image, device, dtype):
        calls.append(len(image))
        flags = [prompt == "a dog" or len(calls) == 1 for prompt in prompts]
        image = torch.stack([torch.full_like(one, 0.3) if f else one for one, f in zip(image, flags, strict=True)])
        return image, flags

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", remember)
    monkeypatch.setattr(StableDiffusionPipeline, "run_safety_checker", refuse)
    data = run(batch_size=3)
    assert calls == [3, 3, 3, 1, 3, 1]
    assert [row["seeds"][0] for row in data] == [stable_seed(0, "a cat", row, "tiny@1", 0, "retry") for row in (0, 2)]
    assert "(nsfw: 3)" in capsys.readouterr().out
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert {failure["reason"] for failure in failures} == {"nsfw"} and len(failures) == 3


def test_a_model_that_draws_black_only_is_refused(run, black_pipeline, drawn, tmp_path):
    """NaN in its VAE, as float16 gives; with many prompts it is refused early, and nothing is kept of it."""
    generators = [{"model": black_pipeline, "num_inference_steps": [1, 2], "name": "nan"}]
    message = r"All 6 images that nan drew first are unusable \(black: 6\).*`dtype` is 'auto'.*'a cat'"
    with pytest.raises(ValueError, match=message):
        run(generators=generators)
    drawn.clear()
    many = save_rows(tmp_path / "many", {"prompt": [f"a {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]})
    with pytest.raises(ValueError, match="All 20 images that nan drew first"):
        run("many-out", generators=generators, dataset_name=many, batch_size=5)
    assert len(drawn) == 40
    assert not list((tmp_path / "many-out").glob("partial-*/images/*"))


def test_a_few_refused_images_at_the_start_are_no_reason_to_stop(run, monkeypatch):
    blacken(monkeypatch, lambda prompt, seed, steps: prompt == "a cat" and steps == 1)
    data = run(batch_size=1)
    assert [row["sources"] for row in data] == [["tiny@2"] * 2, ["tiny@1", "tiny@2", "tiny@2"], ["tiny@2"] * 2]


def test_no_rows_are_an_error(run, monkeypatch, tmp_path):
    blacken(monkeypatch, lambda prompt, seed, steps: steps == 2)
    with pytest.raises(ValueError, match=r"No prompt has two usable images \(black: 6\).*failures.jsonl lists them"):
        run()
    assert not (tmp_path / "out" / "artefact.json").exists()
    assert len((tmp_path / "out" / "failures.jsonl").read_text().splitlines()) == 6


def test_out_of_memory_names_the_batch_size_and_keeps_what_is_finished(run, monkeypatch, tmp_path):
    from diffusers import StableDiffusionPipeline

    call = StableDiffusionPipeline.__call__

    def overflow(self, *args, num_inference_steps, **kwargs):
        if num_inference_steps == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
        return call(self, *args, num_inference_steps=num_inference_steps, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", overflow)
    with pytest.raises(ValueError, match=r"while 3 images were drawn at once: lower `batch_size`.*Tried to allocate"):
        run(batch_size=3)
    assert len(list((tmp_path / "out").glob("partial-*/images/*.parquet"))) == 1


# Real images


PHOTOS = Features({"prompt": Value("string"), "row": Value("int64"), "image": ImageFeature()})


@pytest.fixture
def photos(tmp_path):
    """Three rows with a JPEG each, the last one in a file beside the dataset; and the files' bytes."""
    files = []
    for index, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (30 + index, 20), color).save(tmp_path / f"{index}.jpg", quality=40)
        files.append((tmp_path / f"{index}.jpg").read_bytes())
    images = [{"bytes": files[0], "path": "a.jpg"}, {"bytes": files[1], "path": None}]
    images.append({"bytes": None, "path": str(tmp_path / "2.jpg")})
    columns = zip(("red", "green", "blue"), (7, 8, 9), images, strict=True)
    return [{"prompt": prompt, "row": row, "image": image} for prompt, row, image in columns], files


def save_photos(folder, rows) -> str:
    """Written by hand: `to_parquet` would take the file's bytes into the dataset."""
    pq.write_table(pa.Table.from_pylist(rows, schema=PHOTOS.arrow_schema), folder / "photos.parquet")
    return str(folder / "photos.parquet")


def test_the_real_image_comes_first_and_as_it_is(run, photos, tmp_path, tiny_pipeline):
    rows, files = photos
    generators = [{"model": tiny_pipeline, "num_inference_steps": 1, "name": "tiny"}]  # one and the real one: two
    data = run(dataset_name=save_photos(tmp_path, rows), generators=generators, include_real=True)
    assert "image" not in data.column_names and list(data["row"]) == [7, 8, 9]
    for index, row in enumerate(raw(data)):
        assert row["sources"] == ["real", "tiny"] and row["seeds"][0] == -1
        assert row["images"][0]["bytes"] == files[index]
        assert Image.open(io.BytesIO(row["images"][1]["bytes"])).format == "PNG"
    card = DatasetCard.load(tmp_path / "out" / "README.md").text
    assert "| real" in card and "3 sizes" in card


def test_a_damaged_real_image_is_left_out_and_recorded(run, photos, tmp_path):
    rows, _ = photos
    rows[1]["image"] = {"bytes": b"no image", "path": None}
    data = run(dataset_name=save_photos(tmp_path, rows), include_real=True)
    assert [row["sources"][0] for row in data] == ["real", "tiny@1", "real"]
    (failure,) = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert json.loads(failure) == {
        "prompt": "green",
        "row": 8,
        "source": "real",
        "index": 0,
        "seed": -1,
        "reason": "damaged",
    }


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": None}, {"bytes": None, "path": "nowhere.jpg"}])
def test_a_row_without_image_is_named(run, photos, tmp_path, image, drawn):
    rows, _ = photos
    rows[1]["image"] = image
    with pytest.raises(
        ValueError, match=r"Row 1 of .* has no image in the column 'image', which `include_real` reads"
    ):
        run(dataset_name=save_photos(tmp_path, rows), include_real=True)
    assert not drawn


# The card


def test_the_card_says_how_it_was_made(run, tmp_path, tiny_pipeline):
    generators = [
        {"model": tiny_pipeline, "num_inference_steps": [1, 2], "name": "tiny", "guidance_scale": 3.0},
    ]
    run(generators=generators, seed=4)
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == ["text-to-image", "trl-diffusion-rank"]
    assert "Rows: 3 in `train`." in card.text
    made = json.loads(card.text.split("```json\n")[1].split("\n```")[0])
    assert made["stage"] == "generate" and made["options"]["seed"] == 4 and made["options"]["batch_size"] == 8
    assert made["options"]["generators"][0]["guidance_scale"] == 3.0
    assert made["options"]["generators"][0]["num_inference_steps"] == [1, 2]
    assert "lora" not in made["options"]["generators"][0]
    assert len(made["options"]["dataset_fingerprint"]) == 16 and "diffusers" in made["versions"]
    table = card.text.split("## Sources\n\n")[1].split("\n\n")[0].splitlines()
    assert [[cell.strip() for cell in line.strip("| ").split("|")] for line in table[2:]] == [
        ["tiny@1", "3", "16 x 16", "none"],
        ["tiny@2", "3", "16 x 16", "none"],
    ]
    assert "Failed images" not in card.text
    assert "-1 for a real one" in card.text


# Options


def test_json_or_a_preset_on_the_command_line():
    assert PresetOrMapping('{"model": "x", "num_inference_steps": [1, 2]}') == {
        "model": "x",
        "num_inference_steps": [1, 2],
    }
    assert PresetOrMapping("sdxl_lightning") == {"preset": "sdxl_lightning"}
    assert PresetOrMapping({"model": "x"}) == {"model": "x"}
    with pytest.raises(ValueError):
        PresetOrMapping('{"model": "x"')


def test_presets_and_mappings_from_the_command_line_and_a_recipe(tmp_path):
    models = '{"model": "x", "num_inference_steps": [1, 2], "scheduler": {"name": "DDIMScheduler", "eta": 0}}'
    flags = ["--generators", "sdxl_turbo_steps", models, "--output_dir", str(tmp_path), "--include_real"]
    (args,) = parse_stage("generate", flags)
    assert [g.model for g in pool.read_generators(args.generators)] == ["stabilityai/sdxl-turbo", "x"]
    assert args.include_real
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("generate: {generators: [sdxl_lightning, {preset: sdxl_turbo_steps, images_per_prompt: 2}]}")
    (args,) = parse_stage("generate", ["--recipe", str(recipe)])
    assert [len(g.draws) for g in pool.read_generators(args.generators)] == [1, 1, 1, 8]
    recipe.write_text("generate: {generators: sdxl_lightnin}")
    with pytest.raises(SystemExit):
        parse_stage("generate", ["--recipe", str(recipe)])


def test_options_are_checked():
    generators = [{"model": "x", "images_per_prompt": 2}]
    GenerateArguments(generators=[{"model": "x"}], include_real=True)
    with pytest.raises(ValueError, match="one image per prompt and a ranking needs at least two"):
        GenerateArguments(generators=[{"model": "x"}])
    with pytest.raises(ValueError, match=r"`dtype` is 'bf16', which is not known. Did you mean 'bfloat16'"):
        GenerateArguments(generators=generators, dtype="bf16")
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        GenerateArguments(generators=generators, batch_size=0)
    with pytest.raises(ValueError, match="`height` is None and `width` is 64; set both or neither"):
        GenerateArguments(generators=generators, width=64)
    with pytest.raises(ValueError, match="`push_to_hub` is set and `hub_dataset_id` is not"):
        GenerateArguments(generators=generators, push_to_hub=True)
    with pytest.raises(ValueError, match="`dataset_name` is not set and the stage `generate` needs it"):
        main(GenerateArguments(generators=generators, output_dir="x"))


def test_a_scheduler_that_does_not_exist_is_told_before_a_model_is_loaded(run, monkeypatch, tiny_pipeline):
    monkeypatch.setattr(pool, "load_generator", lambda *args: pytest.fail("a model was loaded"))
    generators = [{"model": tiny_pipeline}, {"model": tiny_pipeline, "name": "b", "scheduler": "EulerScheduler"}]
    with pytest.raises(
        ValueError, match=r"`scheduler` of the generator 'b' is 'EulerScheduler', which is no scheduler"
    ):
        run(generators=generators)


def test_a_model_that_does_not_exist(run, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        run(generators=[{"model": str(tmp_path / "nowhere"), "images_per_prompt": 2}])


@pytest.mark.parametrize(
    ("columns", "option", "message"),
    [
        (
            {"prompt": ["a", "b"]},
            {"prompt_column": "caption"},
            r"`prompt_column` of the generator 'x' asks for .*'capt",
        ),
        ({"prompt": ["a", None]}, {}, "Row 1 of .* has no text in the column 'prompt', which the stage `generate`"),
        (
            {"prompt": ["a", "b"], "caption": ["c", " "]},
            {"prompt_column": "caption"},
            "Row 1 .* 'caption', which `pro",
        ),
        ({"prompt": ["a", "b"], "row": [3, 3]}, {}, r"The column 'row' of .* holds 3 twice\. It numbers the rows"),
        ({"prompt": ["a", "b"], "row": ["x", "y"]}, {}, r"The column 'row' of .* holds 'x'\. It numbers the rows"),
    ],
)
def test_faults_of_the_dataset_are_named(run, tmp_path, columns, option, message):
    generators = [{"model": "nowhere", "name": "x", "images_per_prompt": 2, **option}]
    with pytest.raises(ValueError, match=message):
        run(dataset_name=save_rows(tmp_path / "faulty", columns), generators=generators)


def test_a_dataset_without_the_real_images(run, prompts_folder):
    with pytest.raises(ValueError, match=r"`include_real` asks for the column 'image'; the columns of .* prompt, row"):
        run(include_real=True)
