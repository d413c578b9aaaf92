"""Fine-tune text-to-image diffusion models on ranked images: listwise DPO as a plug-in for Hugging Face TRL."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl_diffusion_rank.diffusion.families import recognise_family
    from trl_diffusion_rank.diffusion.loading import load_pipeline
    from trl_diffusion_rank.digits import digits_model_path
    from trl_diffusion_rank.discriminator import AestheticDiscriminator, AestheticDiscriminatorProcessor
    from trl_diffusion_rank.hub.comfy import save_comfy_lora
    from trl_diffusion_rank.trainers.aesthetic_discriminator_config import AestheticDiscriminatorTrainerConfig
    from trl_diffusion_rank.trainers.aesthetic_discriminator_trainer import AestheticDiscriminatorTrainer
    from trl_diffusion_rank.trainers.diffusion_cpo_config import DiffusionCPOConfig
    from trl_diffusion_rank.trainers.diffusion_cpo_trainer import DiffusionCPOTrainer
    from trl_diffusion_rank.trainers.ranked_diffusion_dpo_config import RankedDiffusionDPOConfig
    from trl_diffusion_rank.trainers.ranked_diffusion_dpo_trainer import RankedDiffusionDPOTrainer

# Imported when first asked for: the command line's --help must not wait for torch
_EXPORTS = {
    "AestheticDiscriminator": "trl_diffusion_rank.discriminator",
    "AestheticDiscriminatorProcessor": "trl_diffusion_rank.discriminator",
    "AestheticDiscriminatorTrainer": "trl_diffusion_rank.trainers.aesthetic_discriminator_trainer",
    "AestheticDiscriminatorTrainerConfig": "trl_diffusion_rank.trainers.aesthetic_discriminator_config",
    "DiffusionCPOConfig": "trl_diffusion_rank.trainers.diffusion_cpo_config",
    "DiffusionCPOTrainer": "trl_diffusion_rank.trainers.diffusion_cpo_trainer",
    "RankedDiffusionDPOConfig": "trl_diffusion_rank.trainers.ranked_diffusion_dpo_config",
    "RankedDiffusionDPOTrainer": "trl_diffusion_rank.trainers.ranked_diffusion_dpo_trainer",
    "digits_model_path": "trl_diffusion_rank.digits",
    "load_pipeline": "trl_diffusion_rank.diffusion.loading",
    "recognise_family": "trl_diffusion_rank.diffusion.families",
    "save_comfy_lora": "trl_diffusion_rank.hub.comfy",
}
__all__ = [
    "AestheticDiscriminator",
    "AestheticDiscriminatorProcessor",
    "AestheticDiscriminatorTrainer",
    "AestheticDiscriminatorTrainerConfig",
    "DiffusionCPOConfig",
    "DiffusionCPOTrainer",
    "RankedDiffusionDPOConfig",
    "RankedDiffusionDPOTrainer",
    "digits_model_path",
    "load_pipeline",
    "recognise_family",
    "save_comfy_lora",
]
__version__ = version("trl-diffusion-rank")


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
