"""Adapters and denoisers as files that stock diffusers loads."""

from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from trl_diffusion_rank.diffusion.denoiser import DenoiserModel
from trl_diffusion_rank.diffusion.families.base import Family


PEFT_PREFIX = "base_model.model.denoiser."  # PeftModel -> LoraModel -> DenoiserModel -> the diffusers denoiser


def lora_state_dict(model: PeftModel, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """
    The adapter's tensors by the denoiser's own module names.

    The keys of PEFT are used as they are: `convert_state_dict_to_diffusers` silently loses the LoRA of convolutions
    and feed-forward layers. Every adapted module must be in the result.

    Args:
        model: a [`DenoiserModel`] wrapped by PEFT.
        state_dict: the gathered state dict where the parameters are sharded.

    Raises:
        `RuntimeError`: naming what a diffusers LoRA file can't hold or what is missing.
    """
    tensors = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    foreign = sorted(key for key in tensors if ".lora_" not in key or not key.startswith(PEFT_PREFIX))
    if foreign:
        raise RuntimeError(
            f"A diffusers LoRA file holds LoRA weights only, but the adapter also has {', '.join(foreign[:3])}"
            f"{' ...' if len(foreign) > 3 else ''}. Train without `modules_to_save` and with `bias='none'`."
        )
    tensors = {key.removeprefix(PEFT_PREFIX): tensor.contiguous() for key, tensor in tensors.items()}
    missing = adapted_modules(model) - saved_modules(tensors)
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(adapted_modules(model))} LoRA modules have no weights to save, the first being "
            f"`{sorted(missing)[0]}`; a file without them would not be the trained model."
        )
    return tensors


def adapted_modules(model: PeftModel) -> set[str]:
    """Names of the denoiser's modules that carry a LoRA."""
    denoiser = model.get_base_model().denoiser
    return {name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}


def saved_modules(keys: Any) -> set[str]:
    """Names of the modules that the keys of a LoRA state dict belong to."""
    return {key.split(".lora_")[0] for key in keys}


def save_lora(
    model: PeftModel, family: Family, folder: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """
    Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` loads completely.

    The adapter's config goes into the file's metadata, or `lora_alpha`, where it isn't `r`, would be lost; its targets
    are written as the full names of the adapted modules, so that no pattern has to be matched again.
    """
    tensors = lora_state_dict(model, state_dict)
    metadata = model.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(saved_modules(tensors))
    metadata["lora_dropout"] = 0.0  # diffusers builds it in training mode: whoever loads the file would draw with it
    metadata = {key: value for key, value in metadata.items() if value is not None}
    family.pipeline_class.save_lora_weights(
        save_directory=str(folder),
        safe_serialization=True,
        **{
            f"{family.denoiser_name}_lora_layers": tensors,
            f"{family.denoiser_name}_lora_adapter_metadata": metadata,
        },
    )


def save_denoiser(
    model: DenoiserModel, family: Family, folder: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """
    Write fully trained weights as the pipeline's own subfolder (`unet/`), as diffusers' `from_pretrained` reads.

    Args:
        state_dict: the gathered state dict of `model` where the parameters are sharded; diffusers' `save_pretrained`
            takes none.
    """
    folder = Path(folder) / family.denoiser_name
    if state_dict is None:
        model.denoiser.save_pretrained(folder, safe_serialization=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    model.denoiser.save_config(folder)
    tensors = {name.removeprefix(f"{model.base_model_prefix}."): tensor for name, tensor in state_dict.items()}
    save_torch_state_dict(tensors, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
