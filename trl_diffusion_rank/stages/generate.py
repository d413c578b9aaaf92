"""Images of every prompt from one or several models: the lists that the next stage ranks.

    trl-diffusion-rank generate --dataset_name runs/mine/prompts --output_dir runs/mine/generate \\
        --generators '{"model": "stabilityai/stable-diffusion-xl-base-1.0", "num_inference_steps": [20, 40]}'

In a recipe:

    generate:
      generators:
        - {model: stabilityai/stable-diffusion-xl-base-1.0, num_inference_steps: [20, 40], guidance_scale: 5.0}
        - {model: stabilityai/sdxl-turbo, num_inference_steps: 1, guidance_scale: 0.0, images_per_prompt: 2}

gives four images of each prompt. One model is in memory at a time. An image depends on the run's seed, its prompt and
row, and its generator alone, so batch size and number of processes do not change it. Images are written as they come,
and a stage that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_diffusion_rank.stages._common import (
    DTYPES,
    check_at_least,
    check_choice,
    load_for_sampling,
    process_state,
    require,
    unknown_key,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from tqdm import tqdm


HELP = "generate images of the prompts, from one or several models"
INPUTS = {"dataset_name": "prompts"}

# Prompts between two writes to disk. Bounds both memory and what an interruption costs.
PROMPTS_PER_CHUNK = 64


class JsonMapping(dict):
    """A mapping that a recipe gives as it is and the command line as JSON."""

    def __init__(self, value: str | dict[str, Any]):
        super().__init__(json.loads(value) if isinstance(value, str) else value)


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
            What `sources` calls it, as in `sdxl-turbo@1`; the last part of `model` when unset.
    """

    model: str
    num_inference_steps: int | list[int] = 25
    guidance_scale: float | None = None
    images_per_prompt: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        self.name = self.name or self.model.rstrip("/").rsplit("/", 1)[-1]
        steps = self.num_inference_steps
        self.num_inference_steps = list(steps) if isinstance(steps, (list, tuple)) else [steps]
        for key in ("num_inference_steps", "images_per_prompt"):
            values = self.num_inference_steps if key == "num_inference_steps" else [self.images_per_prompt]
            if not values or any(type(value) is not int or value < 1 for value in values):
                raise ValueError(
                    f"`{key}` of the generator {self.name!r} is {values}; whole numbers of at least 1 are expected."
                )


@dataclass
class GenerateArguments:
    """
    Arguments of the stage `generate`.

    Args:
        dataset_name (`str`, *optional*):
            Dataset with a column `prompt`; in a run the prompts of the stage `prompts`.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split. Prompts of the test split are for `evaluate` and get no images here.
        generators (`list[dict]`, *optional*):
            Mappings with the keys `model`, `num_inference_steps` (a number or a list), `guidance_scale`,
            `images_per_prompt` and `name`. On the command line each is a piece of JSON.
        batch_size (`int`, *optional*, defaults to `8`):
            Images drawn at once.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on an accelerator, float32 on a CPU.
        height (`int`, *optional*), width (`int`, *optional*):
            Size in pixels; the model's own size when unset.
        seed (`int`, *optional*, defaults to `0`):
            Every image's own seed is made of this one, its prompt, its row and its generator.
        output_dir (`str`, *optional*):
            Folder the images are saved to.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset with a column `prompt`; in a run the output of `prompts`."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the prompts."})
    generators: list[JsonMapping] | None = field(
        default=None,
        metadata={
            "help": "Mappings (JSON on the command line) with the keys model, num_inference_steps (a number or a "
            "list), guidance_scale, images_per_prompt, name."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Images drawn at once."})
    dtype: str = field(
        default="auto", metadata={"help": "float32, bfloat16, float16, or auto (bfloat16 on an accelerator)."}
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels; the model's own when unset."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels; the model's own when unset."})
    seed: int = field(default=0, metadata={"help": "Seed of the run; every image gets its own one, made of it."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder the images are saved to."})

    def __post_init__(self) -> None:
        read_generators(self.generators)  # here and not in `main`: a run then refuses them before its first stage
        check_choice("dtype", self.dtype, DTYPES)
        check_at_least(1, batch_size=self.batch_size, height=self.height, width=self.width)


class Draw(NamedTuple):
    """One image that every prompt gets: the `index`-th of a generator at a number of steps."""

    source: str
    steps: int
    index: int


def argument_classes() -> tuple[type, ...]:
    return (GenerateArguments,)


def read_generators(entries: list[dict[str, Any]] | None) -> list[Generator]:
    """The option `generators`, checked: this comes before any model is loaded."""
    if not entries:
        raise ValueError(
            "`generators` is empty; give at least one mapping, for example "
            "{model: digits, num_inference_steps: [2, 4]}."
        )
    known = [f.name for f in fields(Generator)]
    generators = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise TypeError(f"An entry of `generators` is {entry!r}; it must be a mapping with the key `model`.")
        for key in entry:
            if key not in known:
                raise unknown_key("An entry of `generators` has the key", key, known)
        if "model" not in entry:
            raise ValueError(f"An entry of `generators` names no `model`: {dict(entry)}.")
        generators.append(Generator(**entry))
    # Two entries with one name at one number of steps would share their seeds and could not be told apart in
    # `sources`.
    sources = Counter(source for g in generators for source in {f"{g.name}@{s}" for s in g.num_inference_steps})
    doubled = [source for source, count in sources.items() if count > 1]
    if doubled:
        raise ValueError(
            f"Two entries of `generators` are both called {doubled[0]!r}; give one of them another `name`, or use "
            "`images_per_prompt`."
        )
    if sum(len(g.num_inference_steps) * g.images_per_prompt for g in generators) < 2:
        raise ValueError("`generators` give one image per prompt and a ranking needs at least two of them.")
    return generators


def draws_of(generator: Generator) -> list[Draw]:
    """The images a prompt gets from one generator. Steps named twice count on, so that their seeds differ."""
    seen: Counter[int] = Counter()
    draws = []
    for steps in generator.num_inference_steps:
        for _ in range(generator.images_per_prompt):
            draws.append(Draw(f"{generator.name}@{steps}", steps, seen[steps]))
            seen[steps] += 1
    return draws


def generate_images(
    pipe: DiffusionPipeline,
    generator: Generator,
    prompts: list[str],
    rows: list[int],
    folder: Path,
    args: GenerateArguments,
    bar: tqdm,
) -> int:
    """
    Write one generator's images of all prompts into `folder` as `<row>-<seed>.png`, leaving alone what is there
    already. Returns how many were black even with a second seed and are left out.
    """
    from trl_diffusion_rank.diffusion.sampling import is_black, sample_images

    black = 0
    for draw in draws_of(generator):
        for start in range(0, len(prompts), PROMPTS_PER_CHUNK):
            chunk = range(start, min(start + PROMPTS_PER_CHUNK, len(prompts)))
            waiting = [i for i in chunk if find_image(folder, args.seed, prompts[i], rows[i], draw) is None]
            bar.update(len(chunk) - len(waiting))
            for attempt in (0, 1):
                seeds = [attempt_seeds(args.seed, prompts[i], rows[i], draw)[attempt] for i in waiting]
                images = sample_images(
                    pipe,
                    [prompts[i] for i in waiting],
                    seeds,
                    num_inference_steps=draw.steps,
                    guidance_scale=generator.guidance_scale,
                    batch_size=args.batch_size,
                    height=args.height,
                    width=args.width,
                    progress=bar if attempt == 0 else None,
                )
                failed = []
                for i, seed, image in zip(waiting, seeds, images, strict=True):
                    if is_black(image):
                        failed.append(i)
                    else:
                        # Renamed when complete: an interrupted write leaves no half image behind. PNG, because JPEG
                        # eats small images and discriminators learn to see it.
                        path = image_path(folder, rows[i], seed)
                        image.save(path.with_suffix(".tmp"), format="PNG")
                        path.with_suffix(".tmp").rename(path)
                if len(failed) == len(waiting) > 0 and attempt == 1 and len(waiting) == len(chunk):
                    raise ValueError(
                        f"All {len(failed)} images that {draw.source} drew are black, with two seeds each. `dtype` is "
                        f"{args.dtype!r}: a VAE that overflows in float16 does this (use bfloat16 or float32), and so "
                        f"does a safety checker. The first prompt is {prompts[failed[0]]!r}."
                    )
                waiting = failed
            black += len(waiting)
    return black


def attempt_seeds(seed: int, prompt: str, row: int, draw: Draw) -> tuple[int, int]:
    """The seed of an image, and the one it gets when the first gave a black image."""
    from trl_diffusion_rank.diffusion.draws import stable_seed

    parts = (prompt, row, draw.source, draw.index)
    return stable_seed(seed, *parts), stable_seed(seed, *parts, "retry")


def image_path(folder: Path, row: int, seed: int) -> Path:
    # The seed is a hash of all that tells images apart; the row in front keeps a folder readable.
    return folder / f"{row:07d}-{seed:016x}.png"


def find_image(folder: Path, seed: int, prompt: str, row: int, draw: Draw) -> tuple[Path, int] | None:
    """The image of a draw and the seed it came from, when it has been written."""
    for own_seed in attempt_seeds(seed, prompt, row, draw):
        path = image_path(folder, row, own_seed)
        if path.is_file():
            return path, own_seed
    return None


def main(args: GenerateArguments) -> None:
    require("generate", dataset_name=args.dataset_name, output_dir=args.output_dir)
    generators = read_generators(args.generators)
    from trl_diffusion_rank.data.loading import load_rows

    data = load_rows(args.dataset_name, args.dataset_split, columns=("prompt",))
    prompts = list(data["prompt"])
    rows = list(data["row"]) if "row" in data.column_names else list(range(len(prompts)))

    import torch
    from datasets import Dataset, DatasetDict, Features, Image, List, Value
    from tqdm import tqdm

    state = process_state()
    # Images of other options must not be taken for these, so the folder is named after all that makes an image.
    made_of = {key: value for key, value in asdict(args).items() if key not in ("output_dir", "batch_size")}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(args.output_dir) / f"partial-{digest}"
    folder.mkdir(parents=True, exist_ok=True)

    mine = slice(state.process_index, None, state.num_processes)
    total = sum(len(draws_of(generator)) for generator in generators) * len(prompts[mine])
    black = 0
    with tqdm(total=total, unit="image", disable=not state.is_main_process) as bar:
        for generator in generators:
            bar.set_description(generator.name)
            pipe = load_for_sampling(generator.model, args.dtype)
            black += generate_images(pipe, generator, prompts[mine], rows[mine], folder, args, bar)
            del pipe  # one model in memory at a time
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if black:
        print(f"{black} images were black with two seeds and are left out of their rows.")
    state.wait_for_everyone()
    if not state.is_main_process:
        return

    columns: dict[str, list] = {"prompt": [], "images": [], "sources": [], "seeds": []}
    for prompt, row in zip(prompts, rows, strict=True):
        drawn = [
            (found, draw.source)
            for generator in generators
            for draw in draws_of(generator)
            if (found := find_image(folder, args.seed, prompt, row, draw)) is not None
        ]
        if len(drawn) < 2:
            continue
        columns["prompt"].append(prompt)
        columns["images"].append([str(path) for (path, _), _ in drawn])
        columns["sources"].append([source for _, source in drawn])
        columns["seeds"].append([seed for (_, seed), _ in drawn])
    left_out = len(prompts) - len(columns["prompt"])
    if left_out:
        print(f"{left_out} of {len(prompts)} prompts are left out: fewer than two images of them are usable.")
    features = Features(
        {
            "prompt": Value("string"),
            "images": List(Image()),
            "sources": List(Value("string")),
            "seeds": List(Value("int64")),
        }
    )
    # Saving embeds the files' bytes, so the partial folder can go.
    DatasetDict(train=Dataset.from_dict(columns, features=features)).save_to_disk(args.output_dir)
    for partial in Path(args.output_dir).glob("partial-*"):
        shutil.rmtree(partial)
    print(f"{sum(map(len, columns['images']))} images of {len(columns['prompt'])} prompts, in {args.output_dir}")


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("generate")
