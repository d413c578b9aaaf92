"""The denoiser as TRL's trainers want to see a model, and the error it makes."""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from trl_diffusion_rank.diffusion.families.base import Family


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """
    Mean squared error of each image over its latent elements, in float32: (M, C, h, w), (M, C, h, w) -> (M,).

    Mean, not sum, so that a `beta` of 5000 is the 5000 of the published SDXL runs
    (https://huggingface.co/papers/2311.12908).
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def compile_blocks(model: nn.Module, names: list[str], **kwargs) -> None:
    """
    Compile every block of `model` whose class has one of `names`, in place: hooks and the weights' names stay.

    As diffusers' `compile_repeated_blocks`, which SD3's transformer doesn't have. The blocks share their code, and so
    its limit of compiled versions, 8 by default: SD 1.5 has blocks of four shapes, each asked with the adapter,
    without it and without gradients. Beyond the limit nothing would be compiled any more.

    Args:
        kwargs: for `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if type(module).__name__ in names:
            module.compile(**kwargs)


class DenoiserConfig(PreTrainedConfig):
    """What TRL and Transformers read of a denoiser: the family, and where it was loaded from (`_name_or_path`)."""

    model_type = "trl_diffusion_rank_denoiser"

    def __init__(self, family: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.family = family


class DenoiserModel(PreTrainedModel):
    """
    A diffusers denoiser (UNet or transformer) in the shape of a Transformers model.

    With it `trl.DPOTrainer.__init__` can be called whole: PEFT wrapping, gradient checkpointing, DeepSpeed and FSDP
    preparation, checkpoints come from TRL and Transformers.

    Args:
        denoiser (`torch.nn.Module`): the diffusers model, not copied.
        family ([`Family`]): how the denoiser is asked.
        name_or_path (`str`): the base model's id, for the model card.
    """

    config_class = DenoiserConfig
    base_model_prefix = "denoiser"
    main_input_name = "noisy_latents"
    supports_gradient_checkpointing = True

    def __init__(self, denoiser: nn.Module, family: Family, name_or_path: str = ""):
        super().__init__(DenoiserConfig(family=family.name, name_or_path=name_or_path))
        self.denoiser = denoiser
        self.family = family
        self.generation_config = GenerationConfig()  # TRL writes the tokenizer's pad token into it
        # Transformers looks for blocks that are never split here; diffusers keeps the list on the denoiser
        self._no_split_modules = getattr(denoiser, "_no_split_modules", None)
        if getattr(denoiser, "is_quantized", False):
            # What TRL, PEFT and the Trainer ask a quantized model for
            self.is_quantized, self.hf_quantizer = True, denoiser.hf_quantizer
            self.quantization_method = denoiser.quantization_method
            self.is_loaded_in_4bit = getattr(denoiser, "is_loaded_in_4bit", False)
            self.is_loaded_in_8bit = getattr(denoiser, "is_loaded_in_8bit", False)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """(M, C, h, w), (M,), {name: (M, ...)} -> the prediction (M, C, h, w), in the convention of its scheduler."""
        return self.family.predict(self.denoiser, noisy_latents, timesteps, conditioning)

    def get_input_embeddings(self) -> nn.Module:
        # With LoRA and reentrant checkpointing the first layer's output must require gradients
        return self.family.input_layer(self.denoiser)

    def get_output_embeddings(self) -> None:
        return None

    def _init_weights(self, module: nn.Module) -> None:
        pass  # the denoiser arrives trained
