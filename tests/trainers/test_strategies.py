"""
All trainers under all strategies, in two processes on the CPU: they train as one process does, resume, and save what
stock libraries load.

DeepSpeed needs `pip install deepspeed` and g++, with which it compiles its communication on the first run.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import ranked_dataset, tiny_sdxl_pipeline
from tiny_discriminator import save_tiny_discriminator
from training import config, deepspeed_config, launch
from transformers import Trainer

from trl_diffusion_rank import (
    AestheticDiscriminatorTrainer,
    AestheticDiscriminatorTrainerConfig,
    DiffusionCPOConfig,
    DiffusionCPOTrainer,
    RankedDiffusionDPOConfig,
    RankedDiffusionDPOTrainer,
)
from trl_diffusion_rank.discriminator import AestheticDiscriminator
from trl_diffusion_rank.hub.comfy import SUFFIX


DDP = {}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
# What `accelerate launch` sets for TRL's preset `fsdp2`
FSDP_2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
STRATEGIES = {"ddp": DDP, "zero1": ZERO, "zero2": ZERO, "zero3": ZERO, "fsdp2": FSDP_2}
PREFERENCE = {
    "dpo": (RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig),
    "cpo": (DiffusionCPOTrainer, DiffusionCPOConfig),
}
EVERY_CASE = ("dpo_lora", "dpo_full", "dpo_precomputed", "cpo_lora", "cpo_full", "discriminator", "discriminator_lora")


def strategy_options(strategy: str) -> dict:
    """Options that bring a strategy to the CPU, and the state that belongs to them."""
    configured = {"accelerator_config": {"use_configured_state": True}}
    if strategy.startswith("zero"):
        AcceleratorState._reset_state()  # of the trainer before
        return configured | {"deepspeed": deepspeed_config(int(strategy[4:]))}  # `use_cpu` would make it DDP, silently
    if strategy == "fsdp2":
        AcceleratorState._reset_state()
        state = PartialState(cpu=True)
        # Accelerate shards nothing in processes of the kind `MULTI_CPU`; everything after this check is as on GPUs
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return configured | {"use_cpu": True}
    return {"use_cpu": True}


def make_trainer(folder: Path, strategy: str, case: str, models: Path, **options) -> Trainer:
    """Four rows a step, whatever the number of processes."""
    options |= strategy_options(strategy)
    options |= {"per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1"))}
    options |= {"max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    method, _, how = case.partition("_")
    data = ranked_dataset((4, 3, 2, 4, 3, 2, 4, 4))
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_v", "conv1"])
    if method == "discriminator":
        # The captions of one process are each other's negatives, so that loss does change with their number
        options |= {"caption_negative_weight": 0.0, "trainable_layers": None if how else 1}
        return AestheticDiscriminatorTrainer(
            model=str(models / "discriminator"),
            args=config(AestheticDiscriminatorTrainerConfig, folder, **options),
            train_dataset=data,
            peft_config=LoraConfig(r=4) if how else None,
        )
    trainer_class, config_class = PREFERENCE[method]
    # 5000 would show how differently float32 rounds the errors of another batch size
    options |= {"beta": 100.0, "gradient_checkpointing": how == "lora"}
    if (method, how) == ("cpo", "lora"):
        options |= {"normalize_error": True}  # whose running means are of all processes
    if how == "precomputed":
        options |= {"precompute_ref_log_probs": True}
    return trainer_class(
        model=str(models / "sdxl"),  # by name: what is loaded must be whole on every process
        args=config(config_class, folder, **options),
        train_dataset=data,
        eval_dataset=ranked_dataset((4, 3), seed=5),
        peft_config=lora if how == "lora" else None,
    )


def check_strategy(trainer: Trainer, strategy: str) -> None:
    """That it is in force."""
    processes = 1 if strategy == "one" else 2
    assert trainer.accelerator.num_processes == processes
    assert trainer.is_fsdp_enabled == (strategy == "fsdp2")
    assert trainer.is_deepspeed_enabled == strategy.startswith("zero")
    if trainer.is_deepspeed_enabled:
        assert trainer.model_wrapped.zero_optimization_stage() == int(strategy[4:])
    if trainer.is_fsdp_enabled:
        split = [parameter for parameter in trainer.model.parameters() if hasattr(parameter, "placements")]
        assert len(split) == len(list(trainer.model.parameters()))


def train(folder: Path, strategy: str, case: str, models: Path, resumes: bool) -> None:
    """A whole run and one resumed from its middle; the main process writes the losses to `folder`."""
    saving = {"save_strategy": "steps", "save_steps": 2} if resumes else {}
    whole = make_trainer(folder / "whole", strategy, case, models, **saving)
    whole.train()
    check_strategy(whole, strategy)
    evaluated = whole.evaluate()["eval_loss"] if whole.eval_dataset is not None else None
    whole.save_model()
    if resumes:
        resumed = make_trainer(folder / "resumed", strategy, case, models)
        resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
        resumed.save_model()
    if whole.accelerator.is_main_process:
        losses = [log["loss"] for log in whole.state.log_history if "loss" in log]
        (folder / "result.json").write_text(json.dumps({"losses": losses, "evaluated": evaluated}))
    whole.accelerator.wait_for_everyone()


def run(folder: Path, strategy: str, cases: tuple[str, ...], models: Path, resumes: bool = True) -> None:
    folder.mkdir()
    processes = 1 if strategy == "one" else 2
    how = "resumes" if resumes else ""
    launch(__file__, processes, folder, strategy, models, how, *cases, **STRATEGIES.get(strategy, {}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run saved for diffusers, or of a discriminator, read file by file."""
    found = [*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors")]
    files = [file for file in found if not file.name.endswith(SUFFIX)]
    assert len(files) == 1
    return {name.removeprefix("unet."): weight for name, weight in load_file(files[0]).items()}


def check_same(one: Path, several: Path, case: str) -> None:
    """Losses and weights of a run in several processes are those of the run in one, but for float32's rounding."""
    expected, result = (json.loads((folder / case / "result.json").read_text()) for folder in (one, several))
    # AdamW divides by the gradient's size, so where a gradient is rounding, a full step follows from it. LoRA's A is
    # hardly moved by it in four steps, all weights of a network are
    tolerance = {"rel": 1e-5, "abs": 3e-5} if case.endswith("lora") else {"rel": 2e-4}
    assert len(result["losses"]) == 4
    assert result["losses"] == pytest.approx(expected["losses"], **tolerance)
    if expected["evaluated"] is not None:
        assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-3, abs=1e-4)
    ours, theirs = weights(several / case / "whole"), weights(one / case / "whole")
    assert ours.keys() == theirs.keys()
    assert all(
        ours[name].shape == weight.shape and ours[name].dtype == weight.dtype for name, weight in theirs.items()
    )
    # Of some weights, as a key's bias in attention, the gradient is nothing but rounding: they differ by full steps
    differences = torch.cat([(ours[name] - weight).abs().flatten() for name, weight in theirs.items()])
    assert differences.mean() < 2e-5 and differences.max() < 4e-3


def check_resumed(folder: Path, case: str) -> None:
    whole, resumed = weights(folder / case / "whole"), weights(folder / case / "resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def check_loads(folder: Path, case: str, models: Path) -> None:
    """Stock libraries load what was saved completely; it was trained."""
    saved = weights(folder / case / "whole")
    if case.startswith("discriminator"):
        before = AestheticDiscriminator.from_pretrained(models / "discriminator").state_dict()
        loaded = AestheticDiscriminator.from_pretrained(folder / case / "whole").state_dict()
    elif case.endswith("lora"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(models / "sdxl")
        pipeline.load_lora_weights(folder / case / "whole")
        loaded = {name: p for name, p in pipeline.unet.named_parameters() if ".lora_" in name}
        loaded = {name.replace(".default_0.", "."): p.detach() for name, p in loaded.items()}
        before = {name: torch.zeros_like(p) for name, p in loaded.items() if "lora_B" in name}
    else:
        before = load_file(models / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors")
        loaded = UNet2DConditionModel.from_pretrained(folder / case / "whole" / "unet").state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in loaded.items())
    assert any((saved[name] - weight).abs().max() > 1e-3 for name, weight in before.items())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A pipeline and a discriminator to load by name."""
    folder = tmp_path_factory.mktemp("models")
    tiny_sdxl_pipeline().save_pretrained(folder / "sdxl")
    save_tiny_discriminator("clip", folder / "discriminator", patch_layer=1)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, models) -> Path:
    """Runs in one process, in this one."""
    folder = tmp_path_factory.mktemp("one")
    done: set[str] = set()

    def of(cases: tuple[str, ...]) -> Path:
        for case in cases:
            if case not in done:
                (folder / case).mkdir()
                train(folder / case, "one", case, models, resumes=False)
                done.add(case)
        return folder

    return of


def check(tmp_path: Path, one, strategy: str, cases: tuple[str, ...], models: Path, resumes: bool) -> None:
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed isn't installed")
    expected = one(cases)
    run(tmp_path / strategy, strategy, cases, models, resumes)
    for case in cases:
        check_same(expected, tmp_path / strategy, case)
        check_loads(tmp_path / strategy, case, models)
        if resumes:
            check_resumed(tmp_path / strategy, case)


@pytest.mark.parametrize(
    ("strategy", "cases"), [("ddp", ("dpo_lora", "cpo_lora", "discriminator")), ("zero2", ("dpo_lora",))]
)
def test_two_processes_train_as_one(tmp_path, one, models, strategy, cases):
    check(tmp_path, one, strategy, cases, models, resumes=False)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_trainer_under_every_strategy(tmp_path, one, models, strategy):
    cases = EVERY_CASE[:-1] if strategy in ("zero3", "fsdp2") else EVERY_CASE
    check(tmp_path, one, strategy, cases, models, resumes=True)


if __name__ == "__main__":
    _, folder, strategy, models, resumes, *cases = sys.argv
    if strategy.startswith("zero"):
        PartialState(backend="gloo")  # which `TrainingArguments` can't ask for beside DeepSpeed
    for case in cases:
        (Path(folder) / case).mkdir(exist_ok=True)
        train(Path(folder) / case, strategy, case, Path(models), bool(resumes))
