"""The pool of models that draw the images of a prompt.

A generator is a diffusers pipeline with all that decides how it draws: steps, guidance, scheduler, other weights.
Where a list of them is asked for, an entry is a mapping with the fields of [`Generator`], or names a preset:

    generators:
      - {model: stabilityai/sdxl-turbo, num_inference_steps: [1, 4], guidance_scale: 0.0}
      - {model: stabilityai/sd-turbo, name: sd, scheduler: {name: EulerDiscreteScheduler, timestep_spacing: trailing}}
      - sdxl_lightning
      - {preset: sdxl_turbo_steps, images_per_prompt: 2}  # what stands beside `preset` overrides it

Importing this file imports no torch: the options of a stage are checked with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_diffusion_rank.options import DTYPES, did_you_mean
from trl_diffusion_rank.processes import process_state


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


REAL = "real"  # the source of the dataset's own image

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
_AT_1024 = {"height": 1024, "width": 1024, "variant": "fp16"}


def _lightning(steps: int) -> dict[str, Any]:
    """SDXL-Lightning as its authors use it (https://huggingface.co/ByteDance/SDXL-Lightning): weights per number of
    steps, Euler, trailing timesteps, no guidance."""
    return {
        "name": f"sdxl-lightning@{steps}",
        "model": SDXL,
        "unet": f"ByteDance/SDXL-Lightning/sdxl_lightning_{steps}step_unet.safetensors",
        "scheduler": {"name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
        "num_inference_steps": steps,
        "guidance_scale": 0.0,
        **_AT_1024,
    }


PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    # Four images of rising quality from one model: more steps, fewer flaws.
    "sdxl_turbo_steps": (
        {
            "model": "stabilityai/sdxl-turbo",
            "num_inference_steps": [1, 2, 3, 4],
            "guidance_scale": 0.0,
            "height": 512,
            "width": 512,
        },
    ),
    # Three images. The weights for one step predict the image instead of the noise and are called experimental by
    # their authors: left out.
    "sdxl_lightning": (_lightning(2), _lightning(4), _lightning(8)),
    # Four images from four models. Lists of one model's images taught less than those of several in RankDPO
    # (https://huggingface.co/papers/2410.18013). All draw at 1024 px: beside them a smaller image would be known by
    # its softness, and the ranking would learn that. Guidance as each model's authors advise.
    "mixed": (
        {"model": SDXL, "num_inference_steps": 30, "guidance_scale": 5.0, **_AT_1024},
        _lightning(4),
        {
            "model": "playgroundai/playground-v2.5-1024px-aesthetic",
            "num_inference_steps": 30,
            "guidance_scale": 3.0,
            **_AT_1024,
        },
        {"model": "segmind/SSD-1B", "num_inference_steps": 30, "guidance_scale": 9.0, **_AT_1024},
    ),
}
# Of a preset of several entries these tell one from another.
IDENTITY = ("model", "name", "num_inference_steps", "unet")


class Draw(NamedTuple):
    """One image that every prompt gets: the `index`-th of a generator at a number of steps."""

    source: str
    steps: int
    index: int


class WeightsFile(NamedTuple):
    """Weights beside a pipeline's own: `file` in the Hub repository or local folder `repo`."""

    repo: str
    file: str | None
    weight: float = 1.0

    def fetch(self) -> str:
        """The local path of `file`, downloaded if need be."""
        from huggingface_hub import hf_hub_download

        local = Path(self.repo, self.file)
        return str(local) if local.is_file() else hf_hub_download(self.repo, self.file)


@dataclass
class Generator:
    """
    One entry of `generators`.

    Args:
        model (`str`):
            Hub id or folder of a diffusers pipeline, or `digits` for the model in this package.
        num_inference_steps (`int` or `list[int]`, *optional*, defaults to `25`):
            Denoising steps; a list gives one image for each entry, an entry may occur twice.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance; the pipeline's own default when unset.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Images of a prompt for each entry of `num_inference_steps`.
        name (`str`, *optional*):
            What `sources` calls it. As it is when there is one number of steps, else followed by the steps, as in
            `turbo@4`. When unset the last part of `model` and the steps.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the text that the model is given. The row's `prompt` stays what it is.
        negative_prompt (`str`, *optional*):
            What guidance leads away from, for all prompts.
        scheduler (`str` or `dict`, *optional*):
            Name of a scheduler class of diffusers, or a mapping of `name` and its options. It starts from the
            pipeline's own scheduler config.
        lora (`str` or `dict`, *optional*):
            A LoRA that diffusers loads: folder, Hub id, `.safetensors` file, `org/repo/file.safetensors` on the Hub,
            or a mapping of `repo`, `file` and `weight`. Fused in float32, a layer of its own in half precision.
        unet (`str` or `dict`, *optional*):
            A `.safetensors` file of all the denoiser's weights, given in the same ways.
        dtype (`str`, *optional*), height (`int`, *optional*), width (`int`, *optional*):
            As the stage's, which hold when unset.
        revision (`str`, *optional*), variant (`str`, *optional*):
            Of the pipeline on the Hub; `variant: fp16` halves many downloads.
    """

    model: str
    num_inference_steps: int | list[int] = 25
    guidance_scale: float | None = None
    images_per_prompt: int = 1
    name: str | None = None
    prompt_column: str = "prompt"
    negative_prompt: str | None = None
    scheduler: str | dict[str, Any] | None = None
    lora: str | dict[str, Any] | None = None
    unet: str | dict[str, Any] | None = None
    dtype: str | None = None
    height: int | None = None
    width: int | None = None
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        for key in ("model", "name", "prompt_column", "negative_prompt", "dtype", "revision", "variant"):
            value = getattr(self, key)
            unset = value is None and key not in ("model", "prompt_column")
            if not unset and (not isinstance(value, str) or (not value and key != "negative_prompt")):
                raise TypeError(f"`{key}` of a generator is {value!r}; a text is expected.")
        named = self.name is not None
        self.name = self.name or self.model.rstrip("/").rsplit("/", 1)[-1]

        steps = self.num_inference_steps
        self.num_inference_steps = list(steps) if isinstance(steps, (list, tuple)) else [steps]
        for key in ("num_inference_steps", "images_per_prompt"):
            values = self.num_inference_steps if key == "num_inference_steps" else [self.images_per_prompt]
            if not values or any(type(value) is not int or value < 1 for value in values):
                raise self._wrong(key, values, "whole numbers of at least 1 are expected")
        for key in ("height", "width"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                raise self._wrong(key, value, "a number of pixels is expected")
        if (self.height is None) != (self.width is None):  # some pipelines would then draw at their own size
            raise ValueError(
                f"`height` of the generator {self.name!r} is {self.height} and `width` is {self.width}; set both or "
                "neither."
            )
        if self.guidance_scale is not None and type(self.guidance_scale) not in (int, float):
            raise self._wrong("guidance_scale", self.guidance_scale, "a number is expected")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise self._wrong("dtype", self.dtype, f"one of {', '.join(DTYPES)} is expected")
        scheduler = self.scheduler if isinstance(self.scheduler, Mapping) else {"name": self.scheduler}
        if self.scheduler is not None and not _is_class_name(scheduler.get("name")):
            expected = "the name of a scheduler class of diffusers is expected, or a mapping with the key `name`"
            raise self._wrong("scheduler", self.scheduler, expected)
        self.weights("lora")
        self.weights("unet")

        only = named and len(set(self.num_inference_steps)) == 1
        seen: Counter[int] = Counter()
        self.draws: list[Draw] = []
        for count in self.num_inference_steps:
            for _ in range(self.images_per_prompt):
                # Steps named twice count on, so that their seeds differ.
                self.draws.append(Draw(self.name if only else f"{self.name}@{count}", count, seen[count]))
                seen[count] += 1

    def weights(self, key: str) -> WeightsFile | None:
        """`lora` or `unet`, taken apart."""
        value = getattr(self, key)
        if value is None:
            return None
        if isinstance(value, str):
            if value.endswith(".safetensors"):
                path, parts = Path(value), value.split("/")
                if path.is_file() or path.is_absolute() or len(parts) < 3:
                    value = {"repo": str(path.parent), "file": path.name}
                else:
                    value = {"repo": "/".join(parts[:2]), "file": "/".join(parts[2:])}
            else:
                value = {"repo": value}
        known = ("repo", "file", "weight") if key == "lora" else ("repo", "file")
        if not isinstance(value, Mapping) or not isinstance(value.get("repo"), str) or not set(value) <= set(known):
            expected = f"a text is expected, or a mapping with the keys {', '.join(known)}"
            raise self._wrong(key, getattr(self, key), expected)
        file, weight = value.get("file"), value.get("weight", 1.0)
        if not isinstance(file, str | None) or (file is not None and not file.endswith(".safetensors")):
            raise self._wrong(key, getattr(self, key), "`file` must end in .safetensors")
        if key == "unet" and file is None:
            raise self._wrong(key, self.unet, "a .safetensors file is expected, as in org/repo/file.safetensors")
        if type(weight) not in (int, float):
            raise self._wrong(key, self.lora, "`weight` must be a number")
        return WeightsFile(value["repo"], file, float(weight))

    def _wrong(self, key: str, value: Any, expected: str) -> ValueError:
        return ValueError(f"`{key}` of the generator {self.name!r} is {value!r}; {expected}.")


def _is_class_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w*", name) is not None


# Reading the option ----------------------------------------------------


def read_generators(entries: Iterable[str | Mapping[str, Any]] | None, include_real: bool = False) -> list[Generator]:
    """
    The option `generators`, checked; nothing is loaded.

    Args:
        entries: mappings with the fields of [`Generator`] or with `preset` and what overrides it, or names of presets.
        include_real (`bool`): whether the dataset's own image is one more of the list.
    """
    if not entries:
        raise ValueError(
            "`generators` is empty; give at least one mapping, for example "
            f"{{model: digits, num_inference_steps: [2, 4]}}, or a preset: {', '.join(PRESETS)}."
        )
    known = [f.name for f in fields(Generator)]
    generators = []
    for entry in entries:
        for expanded in expand_preset(entry):
            for key in expanded:
                if key not in known:
                    raise ValueError(
                        f"An entry of `generators` has the key {key!r}, which is not known.{did_you_mean(key, known)}"
                        f" Known: preset, {', '.join(known)}."
                    )
            if "model" not in expanded:
                raise ValueError(f"An entry of `generators` names no `model` and no `preset`: {dict(expanded)}.")
            generators.append(Generator(**expanded))
    # Two entries with one name at one number of steps would share their seeds and could not be told apart in
    # `sources`.
    sources = Counter(source for g in generators for source in {draw.source for draw in g.draws})
    sources.update([REAL] if include_real else [])
    doubled = [source for source, count in sources.items() if count > 1]
    if doubled:
        besides = " (the dataset's own image is called that)" if include_real and doubled[0] == REAL else ""
        raise ValueError(
            f"Two entries of `generators` are both called {doubled[0]!r}{besides}; give one of them another `name`, "
            "or use `images_per_prompt`."
        )
    if sum(len(g.draws) for g in generators) + include_real < 2:
        raise ValueError("`generators` give one image per prompt and a ranking needs at least two of them.")
    return generators


def expand_preset(entry: str | Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """An entry of `generators` as the entries it stands for: itself, unless it names a preset."""
    if isinstance(entry, str):
        entry = {"preset": entry}
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"An entry of `generators` is {entry!r}; it must be a mapping with the key `model`, or a preset: "
            f"{', '.join(PRESETS)}."
        )
    if "preset" not in entry:
        return [entry]
    name = entry["preset"]
    if name not in PRESETS:
        raise ValueError(
            f"An entry of `generators` is the preset {name!r}, which is not known.{did_you_mean(str(name), PRESETS)}"
            f" Known: {', '.join(PRESETS)}. A model is given as {{model: {name}}}."
        )
    overrides = {key: value for key, value in entry.items() if key != "preset"}
    if len(PRESETS[name]) > 1 and not overrides.keys().isdisjoint(IDENTITY):
        key = next(key for key in overrides if key in IDENTITY)
        raise ValueError(
            f"`{key}` stands beside the preset {name!r}, whose {len(PRESETS[name])} entries it would make the same. "
            f"Leave it out, or write the entries out; {', '.join(IDENTITY)} can't be overridden together."
        )
    return [{**preset, **overrides} for preset in PRESETS[name]]


# Loading ---------------------------------------------------------------


def load_generator(generator: Generator, device: torch.device, dtype: str = "auto") -> DiffusionPipeline:
    """
    The pipeline of a generator on a device, with its scheduler and its weights.

    Args:
        dtype (`str`): for a generator that names none; `auto` is bfloat16 on an accelerator and float32 on a CPU.
    """
    from trl_diffusion_rank.diffusion.loading import load_pipeline, sampling_dtype
    from trl_diffusion_rank.diffusion.sampling import add_lora, replace_denoiser

    dtype = sampling_dtype(generator.dtype or dtype, device)
    # Passed when set only: not every custom pipeline knows them.
    source = {key: getattr(generator, key) for key in ("revision", "variant") if getattr(generator, key) is not None}
    pipe = load_pipeline(generator.model, dtype, **source)
    check_call(pipe, generator)
    pipe.set_progress_bar_config(disable=True)  # one bar over all images instead of one per batch
    if generator.scheduler is not None:
        scheduler_class, options = read_scheduler(generator)
        pipe.register_modules(scheduler=scheduler_class.from_config(pipe.scheduler.config, **options))
    unet, lora = generator.weights("unet"), generator.weights("lora")
    if unet is not None:
        option = f"`unet` of the generator {generator.name!r}"
        try:
            path = unet.fetch()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{option} is {generator.unet!r}, which is neither a file on this machine nor one on the Hub that can "
                f"be reached. ({str(error).strip().splitlines()[0]})"
            ) from error
        replace_denoiser(pipe, path, option)
    if lora is not None:
        add_lora(pipe, lora.repo, f"`lora` of the generator {generator.name!r}", lora.file, lora.weight)
    return pipe.to(device)


def check_call(pipe: DiffusionPipeline, generator: Generator) -> None:
    """Refuse options that the pipeline doesn't have; it would end in a TypeError of its own."""
    import inspect

    parameters = inspect.signature(pipe.__call__).parameters
    for key in ("guidance_scale", "negative_prompt", "height", "width"):
        if getattr(generator, key) is not None and key not in parameters:
            raise ValueError(
                f"`{key}` of the generator {generator.name!r} is {getattr(generator, key)!r}, and "
                f"{type(pipe).__name__} has no such option. Leave it out."
            )


def read_scheduler(generator: Generator) -> tuple[type, dict[str, Any]]:
    """A generator's scheduler class and its options, checked. Imports diffusers, loads nothing."""
    import inspect

    import diffusers

    options = dict(generator.scheduler) if isinstance(generator.scheduler, Mapping) else {"name": generator.scheduler}
    name = options.pop("name")
    scheduler_class = getattr(diffusers, name, None)
    if not inspect.isclass(scheduler_class) or not issubclass(scheduler_class, diffusers.SchedulerMixin):
        names = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
        raise ValueError(
            f"`scheduler` of the generator {generator.name!r} is {name!r}, which is no scheduler of diffusers."
            f"{did_you_mean(name, names)}"
        )
    known = [key for key in inspect.signature(scheduler_class).parameters if key not in ("self", "kwargs")]
    for key in options:  # diffusers would only warn
        if key not in known:
            raise ValueError(
                f"`scheduler` of the generator {generator.name!r} has the option {key!r}, which {name} does not have."
                f"{did_you_mean(key, known)} It has {', '.join(known)}."
            )
    return scheduler_class, options


def load_for_sampling(model: str, dtype: str) -> DiffusionPipeline:
    """A pipeline on this process's device. `auto` is bfloat16 on an accelerator and float32 on a CPU."""
    return load_generator(Generator(model), process_state().device, dtype)
