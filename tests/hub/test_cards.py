import json

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny import tiny_sdxl_pipeline

from trl_diffusion_rank.hub import cards
from trl_diffusion_rank.hub.cards import (
    DiffusionCard,
    Sample,
    discrimination_results,
    discriminator_card,
    evaluation_results,
    introduction,
    license_of,
    renamed,
    training_sections,
)


RESULT = {
    "adapter": "dpo",
    "num_inference_steps": 4,
    "category": None,
    "judge": "digits",
    "metric": "good",
    "decides": True,
    "higher_is_better": True,
    "base": 0.4583333333,
    "base_interval": [0.39, 0.53],
    "tuned": 0.9041666667,
    "tuned_interval": [0.8619246, 0.9406779],
    "difference": 0.446,
    "difference_interval": [0.37, 0.52],
    "win_rate": 0.72,
    "win_rate_interval": [0.68, 0.76],
    "effect_size": 1.02,
    "effect_size_kind": "cohens_h",
    "sign_test_p": 2e-25,
}
METRICS = {
    "options": {"dataset_name": "/home/someone/runs/prompts", "dataset_split": "test"},
    "num_prompts": 118,
    "num_images": 240,
    "results": [
        RESULT,
        {**RESULT, "num_inference_steps": 20},
        {**RESULT, "judge": None, "metric": "diversity", "effect_size": None},
        {**RESULT, "adapter": "cpo"},
        {**RESULT, "category": "Animals"},
    ],
}


def card(**kwargs) -> DiffusionCard:
    base = kwargs.pop("base_model", "a/base-model")
    denoiser = kwargs.pop("denoiser", None)
    options = {"name": "me/ranked", "introduction": introduction(base, denoiser is None), "tags": ["dpo"]}
    return DiffusionCard(base_model=base, denoiser=denoiser, **(options | kwargs))


def parsed(text: ModelCard, tmp_path) -> ModelCard:
    """As the Hub and its client read it."""
    text.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def snippet(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("denoiser", [None, ("unet", "UNet2DConditionModel")])
def test_card_says_what_the_hub_reads_and_how_to_load(tmp_path, denoiser):
    loaded = parsed(card(denoiser=denoiser, dataset="my/data", license={"license": "openrail++"}).render(), tmp_path)
    data, code = loaded.data, snippet(loaded.text)
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "text-to-image", "openrail++")
    assert (data.base_model, data.datasets) == ("a/base-model", ["my/data"])
    assert data.base_model_relation == ("adapter" if denoiser is None else "finetune")
    assert {"dpo", "text-to-image"} <= set(data.tags)
    assert ({"lora", "template:diffusion-lora"} <= set(data.tags)) == (denoiser is None)
    compile(code, "card", "exec")
    assert ('load_lora_weights("me/ranked")' in code) == (denoiser is None)
    assert ('UNet2DConditionModel.from_pretrained("me/ranked", subfolder="unet")' in code) != (denoiser is None)


def test_no_folder_of_this_machine_is_named(tmp_path):
    text = str(card(base_model="/home/someone/sdxl", dataset="/home/someone/score").render())
    assert "someone" not in text
    assert "base_model" not in text and "datasets" not in text
    assert 'from_pretrained("sdxl")' in text
    text = str(card(base_model="digits").render())
    assert 'load_pipeline("digits")' in text and "base_model" not in text


def test_samples_are_a_gallery_and_a_table(tmp_path):
    samples = [Sample("a cat | a\nhat", "samples/0-base.png", "samples/0-tuned.png")]
    call = {"num_inference_steps": 20, "guidance_scale": 2.0}
    loaded = parsed(card(samples=samples, call=call, comfy_file="ranked_comfy.safetensors").render(), tmp_path)
    assert loaded.data.widget == [{"text": "a cat | a\nhat", "output": {"url": "samples/0-tuned.png"}}]
    assert "taken evenly over the evaluation's, not chosen." in loaded.text
    assert "| a cat \\| a hat | ![base](samples/0-base.png) | ![tuned](samples/0-tuned.png) |" in loaded.text
    assert 'pipeline("a cat | a\\nhat", num_inference_steps=20, guidance_scale=2.0).images[0]' in loaded.text
    assert "[`ranked_comfy.safetensors`](ranked_comfy.safetensors) into `models/loras`" in loaded.text


def test_metrics_come_back_with_their_intervals(tmp_path):
    loaded = parsed(card(results=evaluation_results(METRICS, "dpo")).render(), tmp_path)
    results = loaded.data.eval_results
    assert loaded.data.model_name == "ranked"
    assert [result.metric_name for result in results] == [
        "digits good, 4 steps [95 %: 0.8619, 0.9407]",
        "digits good, 20 steps [95 %: 0.8619, 0.9407]",
        "diversity, 4 steps [95 %: 0.8619, 0.9407]",
    ]
    first = results[0]
    assert (first.metric_type, first.metric_value, first.task_type) == ("good", 0.9042, "text-to-image")
    assert (first.dataset_type, first.dataset_split) == ("prompts", "test")
    assert first.dataset_name == "118 prompts, 240 images"
    assert first.metric_args["tuned_interval"] == [0.8619, 0.9407]
    assert (first.metric_args["base"], first.metric_args["win_rate"]) == (0.4583, 0.72)
    assert "someone" not in str(loaded)


def test_licence_of_a_folder_and_of_nobody(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.y\n---\n")
    assert license_of(str(tmp_path)) == {"license": "other", "license_name": "mine", "license_link": "https://x.y"}
    assert license_of("digits") == license_of(None) == {}


def test_recipe_and_machine_are_told_without_folders(tmp_path):
    recipe = {
        "shared": {"seed": 0},
        "dpo": {"beta": 700, "dataset_name": "/home/someone/x/score", "hub_model_id": "me/a", "hub_token": "hf_x"},
        "evaluate": None,
        "push": {"hub_model_id": "me/a"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    record = {
        "stage": "dpo",
        "seconds": 90.0,
        "options": {"beta": 700},
        "versions": {"trl": "1.16.0"},
        "hardware": {"cpu": "a CPU", "gpus": [{"name": "NVIDIA X", "memory_gb": 80.0}]},
    }
    sections = training_sections(record, tmp_path / "recipe.yaml")
    assert sections["Training"] == "1.5 minutes on NVIDIA X (80 GB). Versions: trl 1.16.0."
    told = yaml.safe_load(sections["Recipe"].removeprefix("```yaml").removesuffix("```"))
    assert told == {"shared": {"seed": 0}, "dpo": {"beta": 700, "dataset_name": "score"}, "evaluate": {}}
    sections = training_sections(record | {"hardware": {"cpu": "a CPU", "gpus": []}}, tmp_path / "none.yaml")
    assert sections["Training"].startswith("1.5 minutes on a CPU.")
    assert yaml.safe_load(sections["Recipe"].removeprefix("```yaml").removesuffix("```")) == {"dpo": {"beta": 700}}


def test_discriminator_card_is_renamed_and_has_its_metrics(tmp_path):
    text = discriminator_card(
        name="discriminator",
        base_model="/home/someone/clip",
        real_source="real",
        tags=["trl"],
        dataset="my/rows",
        license={},
        options={"test_share": 0.2},
        sections={"Shortcuts": "none"},
    )
    renamed(text, "me/critic")
    interval = {"value": 0.967741935, "interval": [0.92, 1.0]}
    text.data["model_name"] = "critic"
    text.data["eval_results"] = discrimination_results(
        {"top1": interval, "auc": interval, "chance": 0.2, "rows": 93, "captions": 37}
    )
    loaded = parsed(text, tmp_path)
    assert loaded.text.strip().startswith("# me/critic")
    assert 'DiscriminatorScorer(model="me/critic")' in snippet(loaded.text)
    assert "someone" not in str(loaded) and "## Shortcuts" in loaded.text
    assert (loaded.data.library_name, loaded.data.datasets) == ("transformers", ["my/rows"])
    assert [(r.metric_type, r.metric_value, r.metric_name) for r in loaded.data.eval_results] == [
        ("accuracy", 0.9677, "real image first [95 %: 0.92, 1]"),
        ("roc_auc", 0.9677, "AUC [95 %: 0.92, 1]"),
    ]
    assert loaded.data.eval_results[0].metric_args == {"interval": [0.92, 1.0], "chance": 0.2}


def test_snippet_of_full_weights_runs(tmp_path):
    """The ids of the card stand for folders here; otherwise the snippet is run as it is."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tiny_sdxl_pipeline().save_pretrained(base)
    tiny_sdxl_pipeline().unet.save_pretrained(tuned / "unet")
    text = str(card(denoiser=("unet", "UNet2DConditionModel"), call={"num_inference_steps": 1}).render())
    code = (
        snippet(text).replace('"a/base-model"', json.dumps(str(base))).replace('"me/ranked"', json.dumps(str(tuned)))
    )
    names: dict = {}
    exec(code, names)
    assert names["image"].size == (16, 16)
    assert cards.public(str(base)) == "base"
