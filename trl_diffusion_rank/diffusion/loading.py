"""From what a user names as the model to a diffusers pipeline."""

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig as DenoiserQuantizationConfig
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trl_diffusion_rank.digits import digits_model_path


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """`"float32"`, `"bfloat16"`, `"float16"` or None, which is float32 as in TRL, to a `torch.dtype`."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    return DTYPES[dtype]


def sampling_dtype(dtype: str, device: torch.device) -> str:
    """What `"auto"` stands for where nothing is trained, float32 on a CPU, else bfloat16; other names as they are."""
    if dtype != "auto":
        return dtype
    return "float32" if device.type == "cpu" else "bfloat16"


def load_pipeline(
    model: str,
    dtype: str | torch.dtype | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    **kwargs: Any,
) -> DiffusionPipeline:
    """
    Load a pipeline by Hub id or folder, or the shipped small one by the name `digits`.

    Args:
        model (`str`): Hub id, folder of `save_pretrained`, or `digits`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to float32): of all components.
        quantization_config (`transformers.BitsAndBytesConfig`, *optional*): how the denoiser, and nothing else, is
            quantized while it is loaded; as `trl.get_quantization_config` makes it. Needs an accelerator.
        kwargs: for `DiffusionPipeline.from_pretrained` (`revision`, `variant`, `trust_remote_code`, ...).

    Raises:
        `ValueError`: if there is no such model, or no accelerator to quantize it on, in one sentence.
    """
    path = digits_model_path() if model == "digits" else model
    if quantization_config is not None:
        check_can_quantize()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would recommend torchvision for image processors nobody asked for
    try:
        if quantization_config is not None:
            components = DiffusionPipeline.load_config(path, revision=kwargs.get("revision"))
            kwargs["quantization_config"] = _of_denoiser(quantization_config, components)
        return DiffusionPipeline.from_pretrained(path, dtype=parse_dtype(dtype), **kwargs)
    except (OSError, ValueError) as error:
        kind = "folder" if Path(path).exists() else "Hub id"
        raise ValueError(
            f"Can't load the model {model!r} as a diffusers pipeline ({kind}): {str(error).strip().splitlines()[0]} "
            "Check the name, your connection and, for a gated model, `hf auth login`; a folder must hold a "
            "`model_index.json`."
        ) from error
    finally:
        transformers_logging.set_verbosity(level)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of that Hub id or folder, or the first one of the diffusers pipeline there, or of `digits`."""
    path = digits_model_path() if model == "digits" else model
    error: Exception | None = None
    for subfolder in ("", "tokenizer"):
        try:
            return AutoTokenizer.from_pretrained(path, subfolder=subfolder)
        except (OSError, ValueError) as reason:
            error = error or reason
    raise ValueError(
        f"No tokenizer can be loaded from {model!r}: {str(error).strip().splitlines()[0]} Name a tokenizer or a "
        "diffusers pipeline, by Hub id or folder."
    ) from error


def check_can_quantize() -> None:
    """Raise `ValueError` where diffusers would not load a quantized model."""
    if not torch.accelerator.is_available():
        raise ValueError(
            "Quantized bases (`load_in_4bit`, `load_in_8bit`, `quantization_config`) need an accelerator and there is "
            "none here: diffusers quantizes weights on a GPU. Leave the option out to train on the CPU."
        )


def _of_denoiser(config: BitsAndBytesConfig, components: dict[str, Any]) -> PipelineQuantizationConfig:
    """Transformers' config as diffusers' for whichever denoiser the pipeline has."""
    known = inspect.signature(DenoiserQuantizationConfig).parameters
    config = DenoiserQuantizationConfig(**{name: value for name, value in config.to_dict().items() if name in known})
    denoisers = [name for name in ("unet", "transformer") if name in components]
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(denoisers, config))
