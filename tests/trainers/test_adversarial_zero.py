"""
A discriminator in the loss under DeepSpeed's ZeRO-2, two processes on the CPU: they train as one process without it.

Needs `pip install deepspeed` and g++, with which DeepSpeed compiles its communication on the first run.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from tiny import ranked_dataset, tiny_sdxl_pipeline
from tiny_discriminator import save_tiny_discriminator
from training import deepspeed_config, launch

from trl_diffusion_rank import RankedDiffusionDPOConfig, RankedDiffusionDPOTrainer
from trl_diffusion_rank.discriminator import AestheticDiscriminator


pytestmark = pytest.mark.slow
ADVERSARIAL = {
    "fixed": {},
    "adaptive": {
        "adversarial_adaptive": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


def make_trainer(output_dir, zero: bool, **options) -> RankedDiffusionDPOTrainer:
    """Four rows a micro-batch, whatever the number of processes."""
    AcceleratorState._reset_state()  # of the trainer before
    if zero:
        # `use_cpu` would make it plain DDP, silently
        options |= {"deepspeed": deepspeed_config(2), "accelerator_config": {"use_configured_state": True}}
    else:
        options["use_cpu"] = True
    trainer = RankedDiffusionDPOTrainer(
        model=tiny_sdxl_pipeline(),
        args=RankedDiffusionDPOConfig(
            str(output_dir),
            **{
                "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1")),
                "max_steps": 4,
                "logging_steps": 1,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine",
                "beta": 100.0,
                "bf16": False,
                "gradient_checkpointing": False,
                "report_to": "none",
                "disable_tqdm": True,
                "save_strategy": "no",
            }
            | options,
        ),
        train_dataset=ranked_dataset((4, 3, 2, 4, 3, 2, 4, 4)),
        peft_config=LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_v", "conv1"]),
    )
    assert trainer.is_deepspeed_enabled == zero
    if zero:
        assert trainer.accelerator.state.deepspeed_plugin.zero_stage == 2
    return trainer


def train(folder: str, discriminator: str, weight: str, zero: bool) -> None:
    """A whole run and, under ZeRO-2, one resumed from its middle; each process writes the outcome to `folder`."""
    options = {"adversarial_mode": "joint", "adversarial_discriminator": discriminator, **ADVERSARIAL[weight]}
    options |= {"adversarial_max_noise": 500.0, "adversarial_max_images": 100, "discriminator_learning_rate": 1e-3}
    whole = make_trainer(Path(folder, "whole"), zero, **options, save_strategy="steps", save_steps=2)
    result = {"processes": whole.accelerator.num_processes, "before": weights(whole)}
    whole.train()
    whole.save_model()
    result |= {"after": weights(whole), "logs": [log for log in whole.state.log_history if "loss" in log]}
    if zero:
        assert whole.model_wrapped.zero_optimization_stage() == 2  # of the engine
        resumed = make_trainer(Path(folder, "resumed"), zero, **options)
        resumed.train(resume_from_checkpoint=str(Path(folder, "whole", "checkpoint-2")))
        assert resumed.state.global_step == 4
        result["resumed"] = weights(resumed)
    torch.save(result, Path(folder, f"{whole.accelerator.process_index}.pt"))


def weights(trainer) -> dict[str, dict[str, torch.Tensor]]:
    """What is trained: the LoRA and the discriminator."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    lora = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = {"lora": lora, "discriminator": trainer._adversary._trained}
    return {part: {name: p.detach().clone() for name, p in named.items()} for part, named in trained.items()}


def launch_in(folder: Path, zero: bool, discriminator: str, weight: str) -> list[dict]:
    """What each process of a run wrote: two under ZeRO-2, or one without it."""
    folder.mkdir()
    processes = 2 if zero else 1
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"} if zero else {}
    launch(__file__, processes, folder, discriminator, weight, "zero" if zero else "", **environment)
    results = [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(processes)]
    assert [result["processes"] for result in results] == [processes] * processes
    return results


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_same_training(one: dict, first: dict, second: dict) -> None:
    """Two processes train what one does, agree, and come to the same weights when they are cut and resumed."""
    for part, trained in first["after"].items():
        assert not same(trained, first["before"][part]), f"{part} moved"
        assert same(trained, second["after"][part]), f"both processes have the same {part}"
        assert same(trained, first["resumed"][part]), f"{part} resumes"
        for name, weight in trained.items():
            torch.testing.assert_close(weight, one["after"][part][name], rtol=1e-2, atol=1e-4)
    assert len(first["logs"]) == len(one["logs"]) == 4
    for log, expected in zip(first["logs"], one["logs"], strict=True):
        for name in expected:
            if name in ("loss", "rewards/margins", "error/chosen") or name.startswith("adversarial/"):
                assert log[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name


def check_files(folder: Path, lora: dict[str, torch.Tensor]) -> None:
    """Stock diffusers loads the adapter, with the weights of the trained one."""
    for name in ("whole", "whole/checkpoint-4"):
        pipeline = StableDiffusionXLPipeline(**tiny_sdxl_pipeline().components)
        pipeline.load_lora_weights(folder / name)
        loaded = {name: p for name, p in pipeline.unet.named_parameters() if ".lora_" in name}
        assert sorted(p.abs().sum().item() for p in loaded.values()) == pytest.approx(
            sorted(p.abs().sum().item() for p in lora.values())
        )


@pytest.mark.parametrize("weight", ADVERSARIAL)
def test_joint_training_keeps_one_discriminator(tmp_path, weight):
    pytest.importorskip("deepspeed")
    discriminator = save_tiny_discriminator("clip", tmp_path / "discriminator", patch_layer=1)
    (one,) = launch_in(tmp_path / "one", False, discriminator, weight)
    first, second = launch_in(tmp_path / "zero", True, discriminator, weight)
    check_same_training(one, first, second)
    check_files(tmp_path / "zero", first["after"]["lora"])
    saved = AestheticDiscriminator.from_pretrained(tmp_path / "zero" / "whole" / "discriminator").state_dict()
    trained = first["after"]["discriminator"]
    assert same({name: saved[name] for name in trained}, trained)


if __name__ == "__main__":
    _, folder, discriminator, weight, zero = sys.argv
    if zero:
        from accelerate import PartialState

        PartialState(backend="gloo")  # which `TrainingArguments` can't ask for beside DeepSpeed
    train(folder, discriminator, weight, bool(zero))
