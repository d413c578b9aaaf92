"""What several stages need: checks of options, the process's place among others, tables."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from trl_diffusion_rank.spelling import did_you_mean


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import PartialState
    from diffusers import DiffusionPipeline
    from transformers import Trainer
    from trl import ModelConfig, ScriptArguments

    from trl_diffusion_rank.trainers.diffusion_cpo_config import DiffusionCPOConfig
    from trl_diffusion_rank.trainers.diffusion_cpo_trainer import DiffusionCPOTrainer
    from trl_diffusion_rank.trainers.ranked_diffusion_dpo_config import RankedDiffusionDPOConfig
    from trl_diffusion_rank.trainers.ranked_diffusion_dpo_trainer import RankedDiffusionDPOTrainer


# What `dtype` may be.
DTYPES = ("auto", "float32", "bfloat16", "float16")


class NameOrMapping(dict):
    """
    An entry of a list that is a name, or a mapping: in a recipe as it is, on the command line as JSON. A subclass says
    with `key` which of the mapping's keys a bare name stands for.
    """

    key: ClassVar[str] = "name"

    def __init__(self, value: str | dict[str, Any]):
        if isinstance(value, str):
            value = json.loads(value) if value.lstrip().startswith("{") else {self.key: value}
        super().__init__(value)


@dataclass
class PublishingOptions:
    """
    Options of the stages that make a dataset.

    Args:
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Upload the dataset to the Hub when it is finished.
        hub_dataset_id (`str`, *optional*):
            Where to, as `user/name`.
        hub_private_repo (`bool`, *optional*):
            Whether a new repository is private; your organisation's default when unset.
    """

    push_to_hub: bool = field(default=False, metadata={"help": "Upload the dataset to the Hub when it is finished."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Where to on the Hub, as user/name."})
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private; the owner's default when unset."}
    )

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.hub_dataset_id:
            raise ValueError("`push_to_hub` is set and `hub_dataset_id` is not: say where to, as user/name.")

    def publish(self, folder: str | Path) -> None:
        """Upload the artefact in `folder` where that was asked for."""
        if self.push_to_hub:
            from trl_diffusion_rank.data.artefact import push_dataset

            print(f"Pushed to {push_dataset(folder, self.hub_dataset_id, self.hub_private_repo)}")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown_key(f"`{option}` is", value, list(choices))


def check_at_least(least: int, **options: int | None) -> None:
    """Refuse options below `least`; unset ones are fine."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}.")


def require(stage: str, **options: Any) -> None:
    """Refuse a stage that was started by itself without one of the `options` that a `run` would have filled in."""
    for name, value in options.items():
        if value is None:
            raise ValueError(
                f"`{name}` is not set and the stage `{stage}` needs it: give --{name}, set it in the recipe's section "
                f"`{stage}`, or start the stages together with `trl-diffusion-rank run`."
            )


def unknown_key(kind: str, got: str, known: list[str]) -> ValueError:
    """The error for a name that is not known, with the nearest one that is."""
    return ValueError(f"{kind} {got!r}, which is not known.{did_you_mean(got, known)} Known: {', '.join(known)}.")


def check_bitsandbytes(options: Any) -> None:
    """Refuse a training stage's options that need the package bitsandbytes where it isn't installed."""
    import importlib.util

    asked = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(options, name)]
    if "8bit" in options.optim or "bnb" in options.optim:
        asked.append(f"optim={options.optim}")
    if asked and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"`{asked[0]}` needs the package bitsandbytes, which is not installed: "
            "pip install 'trl-diffusion-rank[quantization]', or leave the option out."
        )


def is_main_process() -> bool:
    """Whether this process writes. The launcher tells, so that no library has to be imported to ask."""
    return os.environ.get("RANK", "0") == "0"


def process_state() -> PartialState:
    """Which of how many processes this is, and its device; the first call joins them."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # `Accelerator` looks at these, `PartialState` does not: processes launched on CPUs would each take themselves for
    # the only one.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
    # Whoever is done early waits for the others, for longer than the minutes after which a group gives up by default
    return PartialState(cpu=on_cpu, timeout=timedelta(hours=6)) if several else PartialState(cpu=on_cpu)


def load_for_sampling(model: str, dtype: str) -> DiffusionPipeline:
    """A pipeline on this process's device. `auto` is bfloat16 on an accelerator and float32 on a CPU."""
    from trl_diffusion_rank.generators import Generator, load_generator

    return load_generator(Generator(model), process_state().device, dtype)


def free_memory() -> None:
    """Give back what the last model took, before the next one is loaded. Pipelines hold references in circles."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def format_table(header: list[str], rows: list[list[str]], names: int = 1) -> str:
    """
    An aligned table that reads as plain text and as Markdown: the first columns, so many as there are `names`, to the
    left, numbers to the right.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:names], widths[:names], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[names:], widths[names:], strict=True)]
        return f"| {' | '.join(left + right)} |"

    dashes = ["-" * (width + 2) if i < names else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), f"|{'|'.join(dashes)}|", *map(line, rows)])


def last_whole_checkpoint(folder: str) -> str | None:
    """The last checkpoint that was written to its end; a process that is killed may leave half of one."""
    from pathlib import Path

    from transformers.trainer_callback import TrainerState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            steps[TrainerState.load_from_json(str(path / "trainer_state.json")).global_step] = path  # written last
        except (OSError, ValueError):
            print(f"{path} was not written to its end and is left alone.")
    return str(steps[max(steps)]) if steps else None


def train(
    stage: str,
    trainer_class: type[RankedDiffusionDPOTrainer | DiffusionCPOTrainer],
    script_args: ScriptArguments,
    training_args: RankedDiffusionDPOConfig | DiffusionCPOConfig,
    model_args: ModelConfig,
) -> None:
    """What the stages `dpo` and `cpo` do: load, train, save."""
    from trl import get_peft_config, get_quantization_config

    from trl_diffusion_rank.data.loading import load_rows

    require(stage, dataset_name=script_args.dataset_name, model_name_or_path=model_args.model_name_or_path)
    if script_args.ignore_bias_buffers:
        raise ValueError("`ignore_bias_buffers` is for language models with mask buffers. Leave it out.")

    def load(split: str):
        return load_rows(
            script_args.dataset_name, split, script_args.dataset_config, streaming=script_args.dataset_streaming
        )

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load(script_args.dataset_train_split),
        eval_dataset=load(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    run_training(trainer, script_args.dataset_name)


def run_training(trainer: Trainer, dataset_name: str, measure: Callable[[], None] | None = None) -> None:
    """
    Train and save, then `measure` what came out, then publish where that is asked for. A run that was cut off goes on
    from its last checkpoint.
    """
    args = trainer.args
    checkpoint = args.resume_from_checkpoint or last_whole_checkpoint(args.output_dir)
    if checkpoint:
        trainer.accelerator.print(f"Resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir, _internal_call=True)  # which doesn't push: the card isn't written yet
    if measure is not None:
        measure()
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Model saved to {args.output_dir}")
    if args.push_to_hub:
        commit = trainer.push_to_hub(dataset_name=dataset_name)
        if commit is not None:  # the main process's
            print(f"Model pushed to {commit.repo_url}")
    trainer.end()  # close the trackers and the process group
