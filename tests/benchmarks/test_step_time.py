"""The benchmark of a step runs from end to end, and its models are the published ones."""

import contextlib
import importlib
import io
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def step_time():
    return importlib.import_module("step_time")


@pytest.fixture
def random_models():
    return importlib.import_module("random_models")


@pytest.mark.parametrize(
    ("size", "millions"),
    [("sd15", [859.52, 83.65, 123.06]), ("sdxl", [2567.46, 83.65, 123.06, 694.66])],
)
def test_models_have_the_published_numbers_of_parameters(random_models, size, millions):
    """UNet, VAE and text encoders of Stable Diffusion 1.5 and XL."""
    with torch.device("meta"):
        modules = [random_models.unet(size), random_models.vae(size), *random_models.text_encoders(size)]
    counts = [sum(parameter.numel() for parameter in module.parameters()) / 1e6 for module in modules]
    assert counts == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("size", "resolution", "tera"), [("sd15", 512, 0.80), ("sdxl", 512, 1.59), ("sdxl", 1024, 6.76)]
)
def test_forward_passes_have_the_published_flops(random_models, size, resolution, tera):
    assert random_models.forward_flops(size, resolution)["unet"] / 1e12 == pytest.approx(tera, abs=0.005)


@pytest.mark.slow
def test_tiny_has_the_proportions_of_sdxl(random_models):
    tiny, sdxl = random_models.forward_flops("tiny", 256), random_models.forward_flops("sdxl", 1024)
    for part in ("vae", "text"):
        assert tiny[part] / tiny["unet"] == pytest.approx(sdxl[part] / sdxl["unet"], rel=0.1), part


@pytest.mark.slow
def test_benchmark_runs_and_goes_on_from_its_file(step_time, tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # the benchmark sets its own

    def here(*arguments: str) -> dict:
        """The measurement in this process: importing everything again takes longer than it."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            step_time.main(list(arguments))
        return json.loads(output.getvalue().splitlines()[-1])

    monkeypatch.setattr(step_time, "in_a_process", here)
    names = ["script", "ours"]
    small = ["--resolution", "32", "--steps", "1", "--warm_up", "1", "--repetitions", "1"]
    command = [*small, "--only", *names, "--output", str(tmp_path / "result.json")]
    step_time.main(command)
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "result.json").read_text())
    assert list(results["runs"]) == list(results["parts"]) == names
    for name in names:
        (run,) = results["runs"][name]
        assert run["seconds"] > 0 and run["memory"] > 2**20
        assert f"\n| {name} | {run['seconds']:.3g} [" in shown
        assert sum(results["parts"][name]["shares"].values()) == pytest.approx(1)
    shares = {name: results["parts"][name]["shares"] for name in names}
    assert shares["script"]["encoding"] > 0 and shares["ours"]["encoding"] == 0
    assert all(shares[name][part] > 0 for name in names for part in ("data", "forward", "reference", "backward"))

    monkeypatch.setattr(step_time, "in_a_process", None)  # nothing is left to measure
    step_time.main(command)
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="remove it, or name another file with --output"):
        step_time.main([*command, "--rows", "2"])


def test_what_does_not_fit_is_a_row_of_the_table(step_time, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step_time, "run_ours", too_much)
    run = step_time.measure("ours", "tiny", 64, 1, 1, 1, False)
    machine = {"hardware": "CPU", "dtype": "float32", "ceiling": 1e12}
    machine["flops"] = {"unet": 1e9, "vae": 1e9, "text": 1e9}
    results = {"machine": machine, "runs": {"ours": [run]}, "parts": {"ours": run}}
    settings = {"size": "tiny", "resolution": 64, "rows": 1}
    assert step_time.table(results, settings).count("| ours | out of memory |") == 2


def test_ratios_and_the_share_of_the_ceiling(step_time):
    """
    By hand: a row in 4 s against 1 s is 4 times as fast, twelve images in 4 s against four in 1 s 4 / 3 times. 10
    GFLOP an image: 3 * 4 * 10 in 1 s of 1 TFLOP/s is 12 %, 3 * 12 * 10 in 4 s 9 %,
    and without the reference 2 * 4 * 10 in 1 s 8 %.
    """
    runs = {
        "script": [{"seconds": 4.0, "memory": 2**20}],
        "ours": [{"seconds": second, "memory": 2**20, "before": 0.5} for second in (0.9, 1.0, 1.2)],
        "ours, reference in advance": [{"seconds": 1.0, "memory": 2**20, "before": 0.5}],
    }
    machine = {"hardware": "CPU", "dtype": "float32", "ceiling": 1e12}
    machine["flops"] = {"unet": 1e10, "vae": 1e9, "text": 1e9}
    settings = {"size": "tiny", "resolution": 64, "rows": 1}
    lines = step_time.table({"machine": machine, "runs": runs, "parts": {}}, settings).splitlines()
    assert "| script | 4 [4, 4] | 0.25 | 1.00 | 3 | 1.00 | 9% | 1 |  |" in lines
    assert "| ours | 1 [0.9, 1.2] | 1 | 4.00 | 4 | 1.33 | 12% | 1 | 0.5 |" in lines
    assert "| ours, reference in advance | 1 [1, 1] | 1 | 4.00 | 4 | 1.33 | 8% | 1 | 0.5 |" in lines
