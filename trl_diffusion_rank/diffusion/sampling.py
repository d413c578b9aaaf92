"""Images from a stock diffusers pipeline, each drawn from its own seed."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from trl_diffusion_rank.diffusion.families.base import Family


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
    own_bar = isinstance(progress, str)
    bar = tqdm(total=len(prompts), desc=progress, unit="image") if own_bar else progress
    images: list[Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        images += draw_batch(
            pipe,
            prompts[batch],
            seeds[batch],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
        )[0]
        if bar is not None:
            bar.update(len(prompts[batch]))
    if own_bar:
        bar.close()
    return images


def draw_batch(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
) -> tuple[list[Image], list[bool]]:
    """
    One batch of [`sample_images`]: B images, and of each whether the pipeline's safety checker has replaced it.

    Raises:
        `ValueError`: if the accelerator's memory doesn't hold the batch.
    """
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "height": height, "width": width}
    if negative_prompt is not None:
        options["negative_prompt"] = [negative_prompt] * len(prompts)
    try:
        output = pipe(
            prompts,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **{key: value for key, value in options.items() if value is not None},
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"Out of memory while {len(prompts)} images were drawn at once: lower `batch_size` (or `height` and "
            f"`width`) and run the same command again. ({str(error).strip().splitlines()[0]})"
        ) from error
    flags = getattr(output, "nsfw_content_detected", None)  # pipelines that have no safety checker don't have it
    return output.images, [bool(flag) for flag in flags] if flags else [False] * len(prompts)


class TrainingSampler:
    """
    Images of fixed prompts from a denoiser in training, by the stock pipeline around it.

    The prompts are encoded here, once: afterwards the text encoders may leave memory. The denoiser is the one that is
    trained, with its LoRA as it is at each call; the scheduler is a copy of the pipeline's own. The VAE comes to the
    denoiser's device for decoding, and goes back to where it was.

    Args:
        family ([`Family`]): with its pipeline, whose other components are left alone.
        denoiser (`torch.nn.Module`): on the device that draws, when it comes to that.
        prompts (`list[str]`): P prompts.
        resolution (`int`): side of the images in pixels.
        num_inference_steps (`int`): denoising steps.
        guidance_scale (`float`, *optional*): classifier-free guidance; the pipeline's own default when unset.
        encode_batch_size (`int`, *optional*, defaults to `16`): prompts in one pass of the text encoders.
    """

    @torch.no_grad()
    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        prompts: list[str],
        *,
        resolution: int,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        encode_batch_size: int = 16,
    ):
        pipeline = family.pipeline
        self.denoiser = denoiser
        self.options: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "height": resolution,
            "width": resolution,
            **({} if guidance_scale is None else {"guidance_scale": guidance_scale}),
        }
        starts = range(0, len(prompts), encode_batch_size)
        batches = [family.encode_prompts(prompts[start : start + encode_batch_size]) for start in starts]
        self._embeddings = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
        unconditional = family.encode_unconditional()  # {name: (1, ...)}
        self._unconditional = {name: tensor.cpu() for name, tensor in unconditional.items()}

        # Without the VAE and the text encoders: a pipeline works on the device of the first module that it finds
        self.pipe = copy.copy(pipeline)
        modules = {name: None for name, component in pipeline.components.items() if isinstance(component, nn.Module)}
        modules[family.denoiser_name] = denoiser
        self.pipe.register_modules(**modules, scheduler=copy.deepcopy(pipeline.scheduler))
        self.pipe.set_progress_bar_config(disable=True)
        self.family = copy.copy(family)
        self.family.pipeline = SimpleNamespace(vae=pipeline.vae)  # all that `decode` asks it for

    @torch.no_grad()
    def draw(self, positions: list[int], seeds: list[int]) -> list[Image]:
        """One batch: N images of the prompts at `positions`, each from its own seed. What isn't finite is black."""
        latents = self.pipe(
            **self._conditioning(positions),
            **self.options,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
        latents = self.family.sampled_latents(latents, self.options["height"])  # (N, C, h, w)
        pixels = torch.nan_to_num(self._decode(latents).float().cpu(), nan=-1.0)
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")

    def _conditioning(self, positions: list[int]) -> dict[str, Tensor]:
        """The pipeline's arguments in the place of prompts, and of no negative ones, {name: (N, ...)}."""
        like = {"device": self.denoiser.device, "dtype": self.denoiser.dtype}
        embeddings = {name: tensor[positions].to(**like) for name, tensor in self._embeddings.items()}
        for name, tensor in self._unconditional.items():
            embeddings[f"negative_{name}"] = tensor.to(**like).expand(len(positions), *tensor.shape[1:])
        return embeddings

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.family.pipeline.vae
        home, is_half = vae.device, vae.dtype == torch.float16
        vae.to(latents.device)
        try:
            if is_half:
                vae.to(torch.float32)  # SDXL's overflows in float16
            with torch.autocast(latents.device.type, enabled=False):  # the VAE's own dtype says how it is to run
                return self.family.decode(latents)
        finally:
            if is_half:
                vae.to(torch.float16)
            vae.to(home)


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
    add_lora(pipe, adapter, "An entry of `adapters`", hint=" or full weights in unet/ or transformer/")


def add_lora(
    pipe: DiffusionPipeline, lora: str, option: str, file: str | None = None, weight: float = 1.0, hint: str = ""
) -> None:
    """
    Give `pipe` a LoRA: Hub id or folder, in it `file` or the one that diffusers finds, times `weight`. Errors call it
    `option`.

    In float32 it is fused, which halves the time of a small model's step; bfloat16 would round it away.
    """
    where = repr(lora if file is None else f"{lora}/{file}")
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it would warn that the text encoders have no LoRA, which is as it should
    try:
        pipe.load_lora_weights(lora, weight_name=file, adapter_name="lora")
    except (OSError, ValueError, StopIteration) as error:
        raise ValueError(
            f"{option} is {where}: no weights could be loaded from it. It must hold a LoRA that diffusers loads "
            f"(pytorch_lora_weights.safetensors){hint}. ({error})"
        ) from error
    finally:
        diffusers_logging.set_verbosity(level)
    if not pipe.get_list_adapters():
        raise ValueError(f"{option} is {where}: none of its weights belongs to a layer of {type(pipe).__name__}.")
    if pipe.dtype == torch.float32:
        pipe.fuse_lora(lora_scale=weight)
        pipe.unload_lora_weights()
        return
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()  # diffusers leaves a LoRA's own dropout on
    if weight != 1.0:
        pipe.set_adapters("lora", weight)


def replace_denoiser(pipe: DiffusionPipeline, path: str, option: str) -> None:
    """Put the weights of a safetensors file, all of them and no others, into the denoiser of `pipe`. Errors call it
    `option`."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    own, new = denoiser.state_dict(), load_file(path)
    missing, unexpected = sorted(own.keys() - new.keys()), sorted(new.keys() - own.keys())
    reshaped = sorted(key for key in own.keys() & new.keys() if own[key].shape != new[key].shape)
    for fault, keys in (("lacks", missing), ("has too many", unexpected), ("has of another shape", reshaped)):
        if keys:
            raise ValueError(
                f"{option}, {path}, does not fit the {type(denoiser).__name__} of {type(pipe).__name__}: of "
                f"{len(own)} tensors it {fault} {len(keys)}, {keys[0]!r} for one. Use the weights of this kind of "
                "model, without VAE and text encoders."
            )
    denoiser.load_state_dict(new)
