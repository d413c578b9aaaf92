"""The shipped recipes: every one is read with its stages' own parsers, and the digits one is run."""

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from trl_diffusion_rank import digits_model_path
from trl_diffusion_rank.cli import main
from trl_diffusion_rank.data.loading import load_splits
from trl_diffusion_rank.recipe import check_shared, check_stage, load_recipe, stage_actions, stage_parser


RECIPES = Path(__file__).parents[1] / "recipes"
DIGITS = str(RECIPES / "digits_rank4.yaml")
SMALL = [
    *("--prompts.num_prompts", "12", "--prompts.num_test_prompts", "8"),
    *("--dpo.max_steps", "2", "--dpo.per_device_train_batch_size", "4", "--dpo.save_steps", "1"),
    *("--dpo.logging_steps", "1", "--evaluate.num_inference_steps", "2"),
]
SMALL_CPO = [option.replace("--dpo.", "--cpo.") for option in SMALL]
SMALL += ["--discriminator.max_steps", "2", "--discriminator.per_device_train_batch_size", "4"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_complete_and_every_value_is_accepted(path, tmp_path):
    recipe = load_recipe(path)
    check_shared(recipe, lambda stage, name: name in stage_actions(stage_parser(stage)))
    for stage in recipe.sections:
        check_stage(stage, recipe, tmp_path)
    training = "cpo" if "_cpo_" in path.stem else "dpo"
    stages = ["prompts", "generate", "score", training, "evaluate"]
    if path.stem == "digits_rank4":
        stages.insert(2, "discriminator")
    if path.stem == "coyo_discriminator":
        stages = ["prompts", "caption", "generate", "discriminator"]
    assert list(recipe.sections) == stages


def test_small_digits_run_from_prompts_to_report(tmp_path, capfd):
    """Every stage for real, at a size that takes seconds; then all of it is skipped."""
    run = ["run", "--recipe", DIGITS, "--output_dir", str(tmp_path / "run"), *SMALL]
    assert main(run) == 0
    output = capfd.readouterr().out
    assert "| good" in output or "digits good" in output, "base against tuned is printed"
    assert "The discriminator picks the real image in" in output
    assert "real" not in {
        source for row in load_splits(str(tmp_path / "run/score"))["train"]["sources"] for source in row
    }
    metrics = json.loads((tmp_path / "run/evaluate/metrics.json").read_text())
    assert {result["metric"] for result in metrics["results"]} >= {"clean", "digit", "ink", "good", "frechet"}
    assert Image.open(tmp_path / "run/evaluate/grid.png").width > 300
    pipeline = DiffusionPipeline.from_pretrained(digits_model_path())
    pipeline.load_lora_weights(str(tmp_path / "run/dpo"))
    assert pipeline.get_active_adapters()

    assert main(run) == 0
    assert capfd.readouterr().out.count("unchanged, skipped") == 6


@pytest.mark.slow
def test_small_digits_run_without_a_reference(tmp_path):
    """`evaluate` takes what `cpo` wrote, also when the errors are normalized."""
    run = ["run", "--recipe", str(RECIPES / "digits_cpo_rank4.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main([*run, *SMALL_CPO]) == 0
    record = json.loads((tmp_path / "run/evaluate/stage.json").read_text())
    assert record["inputs"]["adapters"]["stage"] == ["cpo"]
    assert main([*run, *SMALL_CPO, "--cpo.normalize_error", "true"]) == 0
    assert (tmp_path / "run/cpo/checkpoint-2/error_scale.pt").is_file()


@pytest.mark.slow
def test_digits_recipe_makes_the_model_better(tmp_path):
    """The README's first command. Thresholds leave room for another machine's rounding, not for another method."""
    assert main(["run", "--recipe", DIGITS, "--output_dir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run/evaluate/metrics.json").read_text())
    results = {(result["num_inference_steps"], result["metric"]): result for result in metrics["results"]}
    for steps in (4, 20):
        for metric in ("clean", "good"):
            result = results[steps, metric]
            assert 0.25 < result["base"] < 0.55 and result["tuned"] > 0.8, (steps, metric)
            assert result["difference_interval"][0] > 0.25 and result["win_rate_interval"][0] > 0.6
        frechet = results[steps, "frechet"]
        assert frechet["difference_interval"][1] < 0 and frechet["tuned"] < 0.4 * frechet["base"]
        assert results[steps, "digit"]["tuned"] > 0.9


@pytest.mark.slow
def test_digits_cpo_recipe_makes_the_model_better(tmp_path):
    """Without a reference; the diversity that it costs is in recipes/README.md."""
    recipe = str(RECIPES / "digits_cpo_rank4.yaml")
    assert main(["run", "--recipe", recipe, "--output_dir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run/evaluate/metrics.json").read_text())
    results = {(result["num_inference_steps"], result["metric"]): result for result in metrics["results"]}
    for steps in (4, 20):
        good = results[steps, "good"]
        assert good["base"] < 0.55 and good["tuned"] > 0.75 and good["difference_interval"][0] > 0.2
        assert results[steps, "frechet"]["difference_interval"][1] < 0
        assert results[steps, "digit"]["tuned"] > 0.9
