"""What several stages need: to require what a run fills in, to publish, to train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import Trainer
    from trl import ModelConfig, ScriptArguments

    from trl_diffusion_rank.trainers.diffusion_cpo_config import DiffusionCPOConfig
    from trl_diffusion_rank.trainers.diffusion_cpo_trainer import DiffusionCPOTrainer
    from trl_diffusion_rank.trainers.ranked_diffusion_dpo_config import RankedDiffusionDPOConfig
    from trl_diffusion_rank.trainers.ranked_diffusion_dpo_trainer import RankedDiffusionDPOTrainer


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


def require(stage: str, **options: Any) -> None:
    """Refuse a stage that was started by itself without one of the `options` that a `run` would have filled in."""
    for name, value in options.items():
        if value is None:
            raise ValueError(
                f"`{name}` is not set and the stage `{stage}` needs it: give --{name}, set it in the recipe's section "
                f"`{stage}`, or start the stages together with `trl-diffusion-rank run`."
            )


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
    trainer.accelerator.wait_for_everyone()  # a process that left while the main one saves could hang or fail the run
    trainer.end()  # close the trackers and the process group
