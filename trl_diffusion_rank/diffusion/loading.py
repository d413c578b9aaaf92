"""From what a user names as the model to a diffusers pipeline."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
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


def load_pipeline(model: str, dtype: str | torch.dtype | None = None, **kwargs: Any) -> DiffusionPipeline:
    """
    Load a pipeline by Hub id or folder, or the shipped small one by the name `digits`.

    Args:
        model (`str`): Hub id, folder of `save_pretrained`, or `digits`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to float32): of all components.
        kwargs: for `DiffusionPipeline.from_pretrained` (`revision`, `variant`, `trust_remote_code`, ...).

    Raises:
        `ValueError`: if there is no such model, in one sentence.
    """
    path = digits_model_path() if model == "digits" else model
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would recommend torchvision for image processors nobody asked for
    try:
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
