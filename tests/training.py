"""What the tests of the trainers share: options for tiny runs, launched ones, and looks at what a run did."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import Trainer, TrainerCallback


EVERY_KIND_OF_LAYER = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "proj_in"]
# Arguments of a trainer; everything else that `make` is given is an option of its config
ARGUMENTS = (
    *("ref_model", "eval_dataset", "processing_class", "callbacks", "compute_metrics", "data_collator", "model_init"),
    *("quantization_config", "peft_config"),
)


def config(config_class: type, output_dir: Any, **kwargs: Any) -> Any:
    """Two steps of two rows, logged, without files."""
    options = {
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
    }
    return config_class(str(output_dir), **(options | kwargs))


def make(trainer_class: type, config_class: type, output_dir: Any, model: Any, data: Any, **kwargs: Any) -> Trainer:
    """A trainer for a tiny run, with a LoRA on every kind of layer unless `peft_config` says otherwise."""
    peft_config = kwargs.pop("peft_config", "lora")
    return trainer_class(
        model=model,
        args=config(config_class, output_dir, **{key: value for key, value in kwargs.items() if key not in ARGUMENTS}),
        train_dataset=data,
        peft_config=lora() if peft_config == "lora" else peft_config,
        **{key: value for key, value in kwargs.items() if key in ARGUMENTS},
    )


def launch(script: str, processes: int, *arguments: Any, **environment: str) -> None:
    """Run a file of tests as a program, in so many processes, with `environment` added to this process's own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--num_cpu_threads_per_process", "1", "--mixed_precision", "no"]
    command += ["--main_process_port", "0"]  # a free one: other tests may run beside
    command += ["--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else []), script]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **environment, "PYTHONPATH": path}
    subprocess.run([*command, *map(str, arguments)], check=True, env=environment, timeout=600)


def lora(**kwargs: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 12, "target_modules": EVERY_KIND_OF_LAYER} | kwargs))


def adapter(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of the LoRA's weights."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


def first_batch(trainer: Trainer, rows: int | None = None) -> dict[str, Any]:
    """The first rows of the train dataset, all of them by default, as the trainer's loss gets them."""
    examples = [trainer.train_dataset[index] for index in range(rows or len(trainer.train_dataset))]
    return trainer._prepare_inputs(trainer.data_collator(examples))


def images(pipeline: DiffusionPipeline) -> np.ndarray:
    """What a pipeline draws for two prompts, (2, 16, 16, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        ["a red cat", "a blue dog"],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        height=16,
        width=16,
    ).images


class RecordedGradients(TrainerCallback):
    """The gradients of each optimizer step."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]


def check_gradient_checkpointing(make_trainer: Callable[..., Trainer], atol: float = 1e-6) -> None:
    """Trainers made with `gradient_checkpointing` on and off have the same loss and gradients at the first step."""
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(gradient_checkpointing=checkpointing, max_steps=1)
        gradients = RecordedGradients()
        trainer.add_callback(gradients)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        results.append((trainer.state.log_history[0]["loss"], gradients.seen))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert len(results[0][1]) == len(results[1][1]) > 0
    for plain, checkpointed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=atol)


def deepspeed_config(stage: int) -> dict[str, Any]:
    """ZeRO of that stage, on the CPU too."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "optimizer": {  # PyTorch's own: DeepSpeed's would have to be compiled
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
        },
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
    }
