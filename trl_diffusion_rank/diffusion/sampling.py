"""Images from a stock diffusers pipeline, each drawn from its own seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


def sample_images(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    progress: str | tqdm | None = "sampling",
) -> list[Image]:
    """
    One image per prompt from a stock pipeline.

    Every image has a generator of its own, on the CPU, so that it depends on its prompt and seed alone: not on the
    batch size, on the images beside it, on the number of processes or on the kind of accelerator that draws it (up to
    the rounding of the kernels).

    Args:
        pipe (`DiffusionPipeline`):
            Text-to-image pipeline, already on its device.
        prompts (`list[str]`):
            N prompts.
        seeds (`list[int]`):
            N seeds.
        num_inference_steps (`int`):
            Denoising steps.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance; the pipeline's own default when unset.
        batch_size (`int`, *optional*, defaults to `8`):
            Images drawn at once.
        height (`int`, *optional*), width (`int`, *optional*):
            Size in pixels; the model's own size when unset.
        progress (`str` or `tqdm`, *optional*, defaults to `"sampling"`):
            Title of the progress bar, a bar to advance, or `None` for silence.

    Returns:
        `list[PIL.Image.Image]`: N images.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"Got {len(prompts)} prompts and {len(seeds)} seeds; pass one seed per prompt.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "height": height, "width": width}
    options = {key: value for key, value in options.items() if value is not None}
    own_bar = isinstance(progress, str)
    bar = tqdm(total=len(prompts), desc=progress, unit="image") if own_bar else progress
    images: list[Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        images += pipe(
            prompts[batch],
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]],
            **options,
        ).images
        if bar is not None:
            bar.update(len(prompts[batch]))
    if own_bar:
        bar.close()
    return images


def is_black(image: Image) -> bool:
    """Whether an image is black throughout: what a pipeline returns for NaN latents or a raised safety flag."""
    return image.convert("L").getextrema() == (0, 0)


def load_tuned(pipe: DiffusionPipeline, adapter: str) -> None:
    """
    Give `pipe` the trained weights: a LoRA, as `load_lora_weights` takes it (folder or Hub id), or full weights, from
    a folder that holds the denoiser under its diffusers name (`unet/` or `transformer/`).

    In float32 a LoRA is fused, which halves the time of a small model's step; bfloat16 would round it away.
    """
    folder = Path(adapter)
    for component in ("unet", "transformer"):
        denoiser = getattr(pipe, component, None)
        if denoiser is not None and (folder / component / "config.json").is_file():
            tuned = type(denoiser).from_pretrained(adapter, subfolder=component, dtype=denoiser.dtype)
            pipe.register_modules(**{component: tuned.to(denoiser.device)})
            return
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it would warn that the text encoders have no LoRA, which is as it should
    try:
        pipe.load_lora_weights(adapter)
    except (OSError, ValueError, StopIteration) as error:
        raise ValueError(
            f"`adapter` is {adapter!r}: no weights could be loaded from it. It must hold a LoRA that diffusers loads "
            f"(pytorch_lora_weights.safetensors) or full weights in unet/ or transformer/. ({error})"
        ) from error
    finally:
        diffusers_logging.set_verbosity(level)
    if not pipe.get_list_adapters():
        raise ValueError(f"`adapter` is {adapter!r}: none of its weights belongs to a layer of {type(pipe).__name__}.")
    if pipe.dtype == torch.float32:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
