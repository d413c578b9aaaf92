import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from hub_server import TOKEN, running_hub
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from tiny import ranked_dataset, tiny_sdxl_pipeline
from tiny_discriminator import save_tiny_discriminator
from training import images, make

from trl_diffusion_rank import RankedDiffusionDPOConfig, RankedDiffusionDPOTrainer
from trl_diffusion_rank.hub.cards import discriminator_card
from trl_diffusion_rank.recipe import Recipe, stage_inputs
from trl_diffusion_rank.stages import push
from trl_diffusion_rank.stages.push import PushArguments


PROMPTS = [f"a cat {number}" for number in range(9)]
RECORD = {
    "stage": "dpo",
    "status": "finished",
    "seconds": 60.0,
    "options": {"model_name_or_path": "me/base", "dataset_name": "/home/someone/score", "beta": 700},
    "versions": {"trl": "1.16.0"},
}


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    with running_hub(monkeypatch, tmp_path_factory.mktemp("cache")) as hub:
        yield hub


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """What the stage `dpo` leaves."""
    folder = tmp_path_factory.mktemp("run") / "dpo"
    args = (RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig, folder, tiny_sdxl_pipeline(), ranked_dataset((2, 2)))
    trainer = make(*args, max_steps=1, learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name="/home/someone/score")
    (folder / "stage.json").write_text(json.dumps(RECORD))
    return folder


@pytest.fixture
def run_folder(tmp_path, trained) -> Path:
    """A finished run: training, its evaluation, its ranked rows and its discriminator."""
    shutil.copytree(trained, tmp_path / "dpo")
    (tmp_path / "recipe.yaml").write_text("dpo: {model_name_or_path: me/base, dataset_name: /home/someone/score}\n")
    save_evaluation(tmp_path / "evaluate")
    (tmp_path / "score" / "data").mkdir(parents=True)
    (tmp_path / "score" / "README.md").write_text("---\ntags: [a]\n---\n\n# Ranked images\n")
    Dataset.from_dict({"prompt": PROMPTS}).to_parquet(tmp_path / "score" / "data" / "train-00000-of-00001.parquet")
    save_tiny_discriminator("clip", tmp_path / "discriminator")
    card = discriminator_card(
        name="discriminator",
        base_model="/home/someone/clip",
        real_source="real",
        tags=["trl"],
        dataset=None,
        license={},
        options={},
        sections={},
    )
    card.save(tmp_path / "discriminator" / "README.md")
    (tmp_path / "discriminator" / "training_args.bin").write_bytes(b"options")
    value = {"value": 0.9, "interval": [0.8, 1.0]}
    metrics = {"top1": value, "auc": value, "chance": 0.2, "rows": 9, "captions": 9}
    (tmp_path / "discriminator" / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path


def pixel(model: str, number: int, steps: int) -> tuple[int, int, int]:
    """The one colour of an image, which tells them all apart."""
    return (200 if model == "dpo" else 100, number, steps)


def save_evaluation(folder: Path) -> None:
    """As the stage `evaluate` leaves it: a row an image."""
    rows = [
        {"prompt": prompt, "row": number, "index": 0, "num_inference_steps": steps, "model": model}
        | {"image": PILImage.new("RGB", (16, 16), pixel(model, number, steps))}
        for model in ("base", "dpo")
        for steps in (4, 20)
        for number, prompt in enumerate(PROMPTS)
    ]
    kinds = {"prompt": "string", "row": "int64", "index": "int64", "num_inference_steps": "int64", "model": "string"}
    features = Features({name: Value(kind) for name, kind in kinds.items()} | {"image": Image()})
    (folder / "data").mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    result = {"adapter": "dpo", "num_inference_steps": 20, "category": None, "judge": "digits", "metric": "good"}
    result |= {"base": 0.4, "base_interval": [0.3, 0.5], "tuned": 0.9, "tuned_interval": [0.8, 1.0]}
    options = {"dataset_name": "prompts", "num_inference_steps": [4, 20], "guidance_scale": 2.0}
    metrics = {"options": options, "adapters": ["dpo"], "num_prompts": 9, "num_images": 9, "results": [result]}
    (folder / "metrics.json").write_text(json.dumps({**metrics, "warnings": ["the judge is also the ranker"]}))
    (folder / "table.md").write_text("| steps | good |\n|---|---|\n| 20 | 0.9 [0.8, 1.0] |\n")


def arguments(folder: Path, **kwargs) -> PushArguments:
    inputs = {"adapter": folder / "dpo", "evaluation": folder / "evaluate"}
    options = {name: str(path) for name, path in inputs.items()}
    return PushArguments(**(options | {"hub_model_id": "me/cats", "output_dir": str(folder / "push")} | kwargs))


def save_base(hub) -> None:
    """The base model, on the Hub."""
    from hub_server import Repository

    folder = Path(hub.cache, "base")
    tiny_sdxl_pipeline().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n")
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    hub.repositories["me/base"] = Repository(files=files, commits=["base"])


def test_the_adapter_arrives_and_the_cards_snippet_draws_with_it(run_folder, hub, capfd):
    save_base(hub)
    push.main(arguments(run_folder))
    files = hub.repositories["me/cats"].files
    samples = {f"samples/{number}-{label}.png" for number in range(4) for label in ("base", "tuned")}
    assert set(files) == {"README.md", "pytorch_lora_weights.safetensors", "cats_comfy.safetensors", *samples}
    record = json.loads((run_folder / "push" / "push.json").read_text())
    assert (record["model"]["repo_id"], record["model"]["url"]) == ("me/cats", f"{hub.url}/me/cats")
    assert (record["dataset"], record["discriminator"]) == (None, None)

    card = ModelCard(files["README.md"].decode())
    data = card.data
    assert (data.base_model, data.license, data.datasets) == ("me/base", "openrail++", None)
    assert {"dpo", "lora"} <= set(data.tags)
    assert data.eval_results[0].metric_name == "digits good, 20 steps [95 %: 0.8, 1]"
    assert [entry["text"] for entry in data.widget] == ["a cat 0", "a cat 3", "a cat 5", "a cat 8"]
    for text in ("Diffusion Model Alignment Using", "0.9 [0.8, 1.0]", "* the judge is also the ranker", "trl 1.16.0"):
        assert text in card.text
    assert "dataset_name: score" in card.text and "someone" not in str(card)
    for number, source in enumerate((0, 3, 5, 8)):
        for label, model in (("base", "base"), ("tuned", "dpo")):
            image = PILImage.open(io.BytesIO(files[f"samples/{number}-{label}.png"]))
            assert (image.size, image.getpixel((0, 0))) == ((128, 128), pixel(model, source, 20))

    names: dict = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)  # as anybody would, from this Hub
    assert names["image"].size == (16, 16)
    comfy = tiny_sdxl_pipeline()
    comfy.load_lora_weights("me/cats", weight_name="cats_comfy.safetensors")
    np.testing.assert_allclose(images(comfy), images(names["pipeline"]), atol=1e-5)
    assert abs(images(comfy) - images(tiny_sdxl_pipeline())).max() > 1e-3
    output = capfd.readouterr()
    assert TOKEN not in output.out + output.err
    assert not any(TOKEN.encode() in file.read_bytes() for file in run_folder.rglob("*") if file.is_file())


def test_dataset_and_discriminator_go_along_and_the_model_links_the_dataset(run_folder, hub, monkeypatch):
    save_base(hub)
    options = {"dataset": str(run_folder / "score"), "discriminator": str(run_folder / "discriminator")}
    push.main(arguments(run_folder, hub_dataset_id="me/lists", hub_discriminator_id="me/critic", **options))
    assert set(hub.repositories["me/lists"].files) == {"README.md", "data/train-00000-of-00001.parquet"}
    card = ModelCard(hub.repositories["me/cats"].files["README.md"].decode())
    assert card.data.datasets == ["me/lists"]
    critic = hub.repositories["me/critic"].files
    assert {"config.json", "model.safetensors", "metrics.json"} <= set(critic)
    assert "training_args.bin" not in critic
    card = ModelCard(critic["README.md"].decode())
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy", "roc_auc"]
    code = card.text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run_folder)
    PILImage.new("RGB", (16, 16)).save("image.png")
    names: dict = {}
    exec(code, names)
    assert len(names["scores"]) == 1
    record = json.loads((run_folder / "push" / "push.json").read_text())
    assert (record["dataset"]["repo_id"], record["dataset"]["url"]) == ("me/lists", f"{hub.url}/datasets/me/lists")
    assert record["dataset"]["commit"] == hub.repositories["me/lists"].sha
    assert record["discriminator"]["repo_id"] == "me/critic"


def test_a_refused_push_loses_nothing_and_goes_on(run_folder, hub):
    save_base(hub)
    hub.faults["commit"] = [500, ...]
    with pytest.raises(ValueError, match=r"The model in .*push.model could not be pushed to 'me/cats': .* \(500\)"):
        push.main(arguments(run_folder))
    assert (run_folder / "push" / "model" / "README.md").is_file()
    assert not (run_folder / "push" / "push.json").exists()
    sent = hub.asked.count("put")
    hub.faults.clear()
    push.main(arguments(run_folder))
    assert hub.asked.count("put") == sent
    assert (run_folder / "push" / "push.json").is_file()
    push.main(arguments(run_folder, num_samples=1))
    assert {path for path in hub.repositories["me/cats"].files if path.startswith("samples/")} == {
        "samples/0-base.png",
        "samples/0-tuned.png",
    }


def test_nobody_is_logged_in(run_folder, hub, monkeypatch):
    save_base(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"Nothing was pushed: the Hub doesn't accept the login \(401\)"):
        push.main(arguments(run_folder, base_model="digits"))
    assert (run_folder / "push" / "model" / "pytorch_lora_weights.safetensors").is_file()
    assert "create" not in hub.asked


def test_without_evaluation_or_licence(run_folder, hub, capsys):
    for file in ("stage.json", "README.md"):
        (run_folder / "dpo" / file).unlink()
    with pytest.raises(ValueError, match=r"dpo doesn't say what was trained: give .*--base_model"):
        push.main(arguments(run_folder, evaluation=None))
    tiny_sdxl_pipeline().save_pretrained(run_folder / "base")
    push.main(arguments(run_folder, evaluation=None, base_model=str(run_folder / "base")))
    assert f"The licence of {str(run_folder / 'base')!r} isn't known" in capsys.readouterr().out
    files = hub.repositories["me/cats"].files
    assert set(files) == {"README.md", "pytorch_lora_weights.safetensors", "cats_comfy.safetensors"}
    text = files["README.md"].decode()
    assert "LoRA for `base`" in text and str(run_folder) not in text and "license" not in text
    push.main(arguments(run_folder, evaluation=None, base_model=str(run_folder / "base"), license="mit"))
    assert "license: mit" in hub.repositories["me/cats"].files["README.md"].decode()


def test_full_weights(run_folder, hub):
    save_base(hub)
    (run_folder / "dpo" / "pytorch_lora_weights.safetensors").unlink()
    tiny_sdxl_pipeline().unet.save_pretrained(run_folder / "dpo" / "unet")
    push.main(arguments(run_folder, num_samples=0))
    files = hub.repositories["me/cats"].files
    assert set(files) == {"README.md", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    text = files["README.md"].decode()
    assert 'UNet2DConditionModel.from_pretrained("me/cats", subfolder="unet")' in text
    assert "base_model_relation: finetune" in text and "ComfyUI" not in text


def test_what_is_broken_is_not_uploaded(run_folder, hub):
    save_base(hub)
    weights = run_folder / "dpo" / "pytorch_lora_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors can't be read as safetensors"):
        push.main(arguments(run_folder))
    weights.write_bytes(whole[:-4] + np.float32("nan").tobytes())
    with pytest.raises(ValueError, match=r"1 of the weights in .* are not finite, unet\."):
        push.main(arguments(run_folder))
    weights.unlink()
    with pytest.raises(ValueError, match=r"`adapter` is .*dpo', which holds neither pytorch_lora"):
        push.main(arguments(run_folder))
    with pytest.raises(ValueError, match=r"`adapter` is .*nowhere', which is no folder; `hub_model_id` needs it"):
        push.main(arguments(run_folder, adapter=str(run_folder / "nowhere")))
    with pytest.raises(ValueError, match=r"`discriminator` is .*score', which is no output of the stage"):
        options = {"hub_model_id": None, "hub_discriminator_id": "me/critic"}
        push.main(arguments(run_folder, discriminator=str(run_folder / "score"), **options))
    assert "whoami" not in hub.asked


def test_an_evaluation_of_other_adapters():
    assert push.evaluated_adapter({"adapters": ["a", "dpo"]}, Path("x/dpo")) == "dpo"
    assert push.evaluated_adapter({"adapters": ["a"]}, Path("x/dpo")) == "a"
    with pytest.raises(ValueError, match="`evaluation` compares the adapters a, b, none of which is called 'dpo'"):
        push.evaluated_adapter({"adapters": ["a", "b"]}, Path("x/dpo"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Nothing to push: set `hub_model_id`, `hub_dataset_id` or `hub_discriminator_id`"),
        ({"hub_model_id": "me/a"}, "`hub_model_id` is 'me/a' and `adapter` is not set"),
        ({"hub_dataset_id": "me/a"}, "`hub_dataset_id` is 'me/a' and `dataset` is not set"),
        ({"hub_model_id": "me/a b", "adapter": "x"}, "`hub_model_id` is 'me/a b', expected user/name"),
        ({"hub_model_id": "me/a", "adapter": "x", "num_samples": -1}, "`num_samples` is -1; it must be at least 0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        PushArguments(**options)


def test_a_recipe_fills_in_what_it_has():
    recipe = Recipe(Path("r.yaml"), sections={"score": {}, "dpo": {}, "evaluate": {}, "push": {}})
    assert stage_inputs(recipe, "push", []) == {"adapter": "dpo", "evaluation": "evaluate", "dataset": "score"}
