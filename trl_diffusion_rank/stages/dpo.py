"""
Train a text-to-image model on ranked images with direct preference optimization.

    trl-diffusion-rank dpo --recipe recipes/sdxl_rank4.yaml
    trl-diffusion-rank dpo --output_dir sdxl-ranked --dataset_name my/ranked-images --use_peft --lora_r 16 \
        --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0
"""

HELP = "Train a LoRA or all weights with DPO on ranked images"
INPUTS = {"dataset_name": ("score", "prompts")}
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
    from trl_diffusion_rank.stages._common import check_bitsandbytes

    _, config_class, _ = argument_classes()
    config_class.check_options(options)
    check_bitsandbytes(options)


def main(script_args, training_args, model_args) -> None:
    from trl_diffusion_rank.stages._common import train
    from trl_diffusion_rank.trainers.ranked_diffusion_dpo_trainer import RankedDiffusionDPOTrainer

    train("dpo", RankedDiffusionDPOTrainer, script_args, training_args, model_args)


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("dpo")
