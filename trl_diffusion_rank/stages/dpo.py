"""
Train a text-to-image model on ranked images with direct preference optimization.

    trl-diffusion-rank dpo --recipe recipes/sdxl_rank4.yaml
    trl-diffusion-rank dpo --output_dir sdxl-ranked --dataset_name my/ranked-images --use_peft --lora_r 16 \
        --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0
"""

HELP = "Train a LoRA or all weights with DPO on ranked images"
INPUTS = {"dataset_name": "score"}
# What `--help` reads without importing torch
CONFIG_FILES = (
    "trl_diffusion_rank.trainers.ranked_diffusion_dpo_config",
    "trl_diffusion_rank.trainers.diffusion_options",
)


def argument_classes() -> tuple[type, ...]:
    from trl import ModelConfig, ScriptArguments

    from trl_diffusion_rank.trainers.ranked_diffusion_dpo_config import RankedDiffusionDPOConfig

    return ScriptArguments, RankedDiffusionDPOConfig, ModelConfig


def check(options) -> None:
    """Refuse what the config would refuse, before earlier stages have run for hours."""
    _, config_class, _ = argument_classes()
    config_class.check_options(options)


def main(script_args, training_args, model_args) -> None:
    from transformers.trainer_utils import get_last_checkpoint
    from trl import get_peft_config, get_quantization_config

    from trl_diffusion_rank.data.loading import load_rows
    from trl_diffusion_rank.stages._common import require
    from trl_diffusion_rank.trainers.ranked_diffusion_dpo_trainer import RankedDiffusionDPOTrainer

    require("dpo", dataset_name=script_args.dataset_name, model_name_or_path=model_args.model_name_or_path)
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
    trainer = RankedDiffusionDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load(script_args.dataset_train_split),
        eval_dataset=load(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    # A run that was cut off goes on from its last checkpoint
    checkpoint = training_args.resume_from_checkpoint or get_last_checkpoint(training_args.output_dir)
    if checkpoint:
        trainer.accelerator.print(f"Resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}")
    trainer.end()  # close the trackers and the process group


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("dpo")
