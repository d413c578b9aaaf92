import copy
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN, running_hub
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load
from tiny import ranked_dataset, tiny_sdxl_pipeline
from tiny_discriminator import save_tiny_discriminator
from training import config, images, make

from trl_diffusion_rank import (
    AestheticDiscriminator,
    AestheticDiscriminatorTrainer,
    AestheticDiscriminatorTrainerConfig,
    DiffusionCPOConfig,
    RankedDiffusionDPOConfig,
    RankedDiffusionDPOTrainer,
)


FILES = {"README.md", "pytorch_lora_weights.safetensors", "run_comfy.safetensors"}


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    with running_hub(monkeypatch, tmp_path_factory.mktemp("cache")) as hub:
        yield hub


def trainer(folder: Path, **kwargs) -> RankedDiffusionDPOTrainer:
    options = {"push_to_hub": True, "hub_model_id": "me/ranked", "save_strategy": "steps", "save_steps": 1}
    data = ranked_dataset((2, 2))
    args = (RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig, folder, tiny_sdxl_pipeline(), data)
    return make(*args, **(options | kwargs))


def without_token(folder: Path) -> bool:
    return not any(TOKEN.encode() in file.read_bytes() for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("in_environment", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_trained_lora_arrives_and_draws_the_same(tmp_path, hub, in_environment, monkeypatch, caplog, capfd):
    caplog.set_level(logging.INFO)
    if not in_environment:
        monkeypatch.delenv("HF_TOKEN")
    trained = trainer(tmp_path / "run", hub_token=None if in_environment else TOKEN, hub_private_repo=True)
    trained.train()
    (tmp_path / "run" / "stage.json").write_text("{}")
    trained.push_to_hub(dataset_name="my/lists")

    repository = hub.repositories["me/ranked"]
    assert repository.private
    assert set(repository.files) == FILES  # no checkpoints, no records of the run
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.datasets == ["my/lists"]
    assert 'load_lora_weights("me/ranked")' in card.text
    assert "[`run_comfy.safetensors`]" in card.text

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    drawn = [tiny_sdxl_pipeline() for _ in range(2)]
    drawn[0].load_lora_weights("me/ranked")  # finds its own file, although there are two
    drawn[1].load_lora_weights("me/ranked", weight_name="run_comfy.safetensors")
    np.testing.assert_allclose(images(drawn[0]), images(drawn[1]), atol=1e-5)
    assert abs(images(drawn[0]) - images(tiny_sdxl_pipeline())).max() > 1e-3

    output = capfd.readouterr()
    assert TOKEN not in caplog.text + output.out + output.err
    assert (tmp_path / "run" / "checkpoint-2" / "training_args.bin").is_file()
    assert without_token(tmp_path)


def test_every_save_pushes_the_weights_of_that_step(tmp_path, hub):
    trained = trainer(tmp_path / "run", hub_strategy="every_save", hub_always_push=True)
    states = []

    def remember(*args, push=trained._upload, **kwargs):
        job = push(*args, **kwargs)
        job.result()
        states.append(hub.repositories["me/ranked"].files["pytorch_lora_weights.safetensors"])
        return job

    trained._upload = remember
    trained.train()
    assert hub.repositories["me/ranked"].commits == [f"Training in progress, step {step}" for step in (1, 2)]
    assert set(hub.repositories["me/ranked"].files) == FILES
    for step, sent in zip((1, 2), states, strict=True):
        saved = (tmp_path / "run" / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors").read_bytes()
        for key, tensor in load(saved).items():
            assert tensor.equal(load(sent)[key])
    assert states[0] != states[1]


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("checkpoint", {"last-checkpoint"}),
        pytest.param("all_checkpoints", {"checkpoint-1", "checkpoint-2"}, marks=pytest.mark.slow),
    ],
)
def test_checkpoints_go_along_where_that_is_asked_for(tmp_path, hub, strategy, folders):
    trainer(tmp_path / "run", hub_strategy=strategy, hub_always_push=True).train()
    files = hub.repositories["me/ranked"].files
    assert FILES <= set(files)
    assert {path.split("/")[0] for path in files if "/" in path} == folders
    for folder in folders:
        assert {f"{folder}/trainer_state.json", f"{folder}/optimizer.pt"} <= set(files)


def test_a_login_that_fails_is_told_before_training(tmp_path, hub):
    with pytest.raises(
        ValueError, match=r"The model could not be pushed to 'you/x': .* \(403\)\. Use a token that may"
    ):
        trainer(tmp_path / "run", hub_model_id="you/x")


def test_a_push_that_fails_leaves_training_and_model_alone(tmp_path, hub, caplog):
    hub.faults["commit"] = [500, ...]
    trained = trainer(tmp_path / "run", hub_strategy="every_save")
    trained.train()
    assert "A push during training failed, and training goes on: " in caplog.text
    with pytest.raises(ValueError, match=r"The model in .*run could not be pushed .* trouble of its own \(500\)"):
        trained.push_to_hub()
    assert FILES <= {file.name for file in (tmp_path / "run").iterdir()}
    hub.faults.clear()
    trained.push_to_hub()
    assert set(hub.repositories["me/ranked"].files) == FILES


def test_a_discriminator_arrives_and_is_loaded(tmp_path, hub):
    rows = ranked_dataset((2, 2)).rename_column("ranks", "x").remove_columns("x")
    rows = rows.add_column("sources", [["real", "other"]] * 2)
    args = config(
        AestheticDiscriminatorTrainerConfig,
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id="me/critic",
        hub_token=TOKEN,
        max_steps=1,
    )
    model = save_tiny_discriminator("clip", tmp_path / "tiny")
    trained = AestheticDiscriminatorTrainer(model=model, args=args, train_dataset=rows)
    trained.train()
    trained.push_to_hub()
    files = set(hub.repositories["me/critic"].files)
    assert {"README.md", "config.json", "model.safetensors", "processor_config.json"} <= files
    assert not files & {"training_args.bin", "log_history.jsonl"}
    assert without_token(tmp_path)
    loaded = AestheticDiscriminator.from_pretrained(snapshot_download("me/critic"))
    for name, tensor in trained.model.state_dict().items():
        assert tensor.equal(loaded.state_dict()[name]), name


@pytest.mark.parametrize(
    "config_class", [RankedDiffusionDPOConfig, DiffusionCPOConfig, AestheticDiscriminatorTrainerConfig]
)
def test_pickled_options_have_no_token(tmp_path, config_class):
    args = config(config_class, tmp_path, hub_token=TOKEN)
    assert args.hub_token == TOKEN
    assert TOKEN.encode() not in pickle.dumps(args)
    assert pickle.loads(pickle.dumps(args)).hub_token is None
    assert copy.copy(args).learning_rate == args.learning_rate
