"""Images of every prompt from one or several models: the lists that the next stage ranks.

    trl-diffusion-rank generate --dataset_name runs/mine/prompts --output_dir runs/mine/generate \\
        --generators '{"model": "stabilityai/stable-diffusion-xl-base-1.0", "num_inference_steps": [20, 40]}'

In a recipe:

    generate:
      generators:
        - {model: stabilityai/stable-diffusion-xl-base-1.0, num_inference_steps: [20, 40], guidance_scale: 5.0}
        - {model: stabilityai/sdxl-turbo, num_inference_steps: 1, guidance_scale: 0.0, images_per_prompt: 2}

gives four images of each prompt; `generators: [sdxl_turbo_steps]`, `[sdxl_lightning]` and `[mixed]` are presets (see
`trl_diffusion_rank/generators.py`). One model is in memory at a time.

An image's seed is made of the run's seed, its prompt and row, and its generator alone, so batch size and number of
processes do not change it. Every batch is written when it is finished, and a stage that was interrupted makes what is
missing. An image that comes out black or that a safety checker has replaced is drawn once more with another seed; if
that fails too it is left out of its row and listed in `failures.jsonl`.

The images of a row should have one size. Training fits all to `resolution`, and one that was enlarged for that is soft
beside the others: the ranking would learn the size. Set `height` and `width`, for all generators or for each.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import IO, TYPE_CHECKING, Any

from trl_diffusion_rank.generators import REAL, Draw, Generator, read_generators
from trl_diffusion_rank.options import DTYPES, NameOrMapping, check_at_least, check_choice
from trl_diffusion_rank.processes import free_memory, process_state
from trl_diffusion_rank.stages._common import PublishingOptions, require
from trl_diffusion_rank.tables import format_table


if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from tqdm import tqdm

    from trl_diffusion_rank.data.artefact import Artefact
    from trl_diffusion_rank.data.parts import Key, Parts, Writer


HELP = "generate images of the prompts, from one or several models"
INPUTS = {"dataset_name": ("caption", "prompts")}

KEY = ("source", "index", "row")  # of an image, beside the prompt
OWN_COLUMNS = ("prompt", "images", "sources", "seeds", "row")
# So many images of a model in a row that are all unusable are no accident: it would go on like this for hours.
FIRST_IMAGES = 16
# Rows that are in memory at once while the dataset is put together.
ROWS_AT_ONCE = 32
# Failures that the card lists; the file has all.
LISTED = 50


class PresetOrMapping(NameOrMapping):
    """An entry of `generators`."""

    key = "preset"


@dataclass
class GenerateArguments(PublishingOptions):
    """
    Arguments of the stage `generate`, and those of [`~stages._common.PublishingOptions`].

    Args:
        dataset_name (`str`, *optional*):
            Dataset with a column `prompt`; in a run the prompts of the stage `prompts`.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split. Prompts of the test split are for `evaluate` and get no images here.
        generators (`list[dict]`, *optional*):
            The pool: mappings with the fields of [`~generators.Generator`], or names of presets. On the command line
            each is a piece of JSON, or a preset's name.
        include_real (`bool`, *optional*, defaults to `False`):
            Make the dataset's own `image` the first one of each list, as it is in the dataset, with the source `real`
            and the seed -1.
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
    generators: list[PresetOrMapping] | None = field(
        default=None,
        metadata={
            "help": "Presets (sdxl_turbo_steps, sdxl_lightning, mixed) or mappings (JSON on the command line) with "
            "the keys model, num_inference_steps (a number or a list), guidance_scale, images_per_prompt, name, "
            "prompt_column, negative_prompt, scheduler, lora, unet, dtype, height, width, revision, variant."
        },
    )
    include_real: bool = field(
        default=False, metadata={"help": "Make the dataset's own `image` the first one of each list."}
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
        super().__post_init__()
        # Here and not in `main`: a run then refuses them before its first stage.
        read_generators(self.generators, self.include_real)
        check_choice("dtype", self.dtype, DTYPES)
        check_at_least(1, batch_size=self.batch_size, height=self.height, width=self.width)
        if (self.height is None) != (self.width is None):  # some pipelines would then draw at their own size
            raise ValueError(f"`height` is {self.height} and `width` is {self.width}; set both or neither.")


def argument_classes() -> tuple[type, ...]:
    return (GenerateArguments,)


# What is read ----------------------------------------------------------


def load_prompts(args: GenerateArguments, generators: list[Generator]) -> tuple[Dataset, list[int]]:
    """The rows, with images as they are stored, and their numbers; all that is needed of them is there."""
    from trl_diffusion_rank.data.loading import load_rows, undecoded
    from trl_diffusion_rank.data.prompts import check_row_numbers

    data = undecoded(load_rows(args.dataset_name, args.dataset_split, columns=("prompt",)))
    columns = {g.prompt_column: f"`prompt_column` of the generator {g.name!r}" for g in generators}
    if args.include_real:
        columns["image"] = "`include_real`"
    columns.pop("prompt", None)
    for column, option in columns.items():
        if column not in data.column_names:
            raise ValueError(
                f"{option} asks for the column {column!r}; the columns of {args.dataset_name!r} are "
                f"{', '.join(data.column_names)}."
            )
    for column, option in {"prompt": "the stage `generate`", **columns}.items():
        missing = first_missing_image(data) if column == "image" else first_missing_text(data, column)
        if missing is not None:
            what = "image" if column == "image" else "text"
            raise ValueError(
                f"Row {missing} of {args.dataset_name!r} has no {what} in the column {column!r}, which {option} "
                "reads: leave the row out or fill it."
            )

    if "row" not in data.column_names:
        return data, list(range(len(data)))
    rows = list(data["row"])
    check_row_numbers(rows, args.dataset_name)
    return data, rows


def first_missing_text(data: Dataset, column: str) -> int | None:
    """The first row without a text."""
    texts = (text for batch in data.select_columns([column]).iter(1000) for text in batch[column])
    return next((i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()), None)


def first_missing_image(data: Dataset) -> int | None:
    """The first row whose `image` is not there, neither in the dataset nor where its path points."""
    import os

    import pyarrow.compute as pc

    first = 0
    for batch in data.select_columns(["image"]).with_format("arrow").iter(1000):
        inside = pc.struct_field(batch["image"], "bytes").is_valid().to_pylist()
        paths = pc.struct_field(batch["image"], "path").to_pylist()
        for index, (is_inside, path) in enumerate(zip(inside, paths, strict=True), start=first):
            if not is_inside and not os.path.isfile(path or ""):
                return index
        first += len(batch)
    return None


# What is drawn ---------------------------------------------------------


def attempt_seeds(seed: int, prompt: str, row: int, draw: Draw) -> tuple[int, int]:
    """The seed of an image, and the one it gets when the first gave an unusable image."""
    from trl_diffusion_rank.diffusion.draws import stable_seed

    parts = (prompt, row, draw.source, draw.index)
    return stable_seed(seed, *parts), stable_seed(seed, *parts, "retry")


def missing_images(
    generator: Generator, rows: list[int], done: set[Key], batch_size: int
) -> Iterator[list[tuple[Draw, int]]]:
    """What isn't done of a generator, as (draw, place of the row), in batches of one number of steps."""
    from trl_diffusion_rank.data.parts import missing_batches

    for steps in dict.fromkeys(generator.num_inference_steps):
        draws = [draw for draw in generator.draws if draw.steps == steps]
        keys = ((draw.source, draw.index, row) for row in rows for draw in draws)
        for batch in missing_batches(keys, done, batch_size):
            yield [(draws[i % len(draws)], i // len(draws)) for i in batch]


def draw_missing(
    generators: list[Generator], data: Dataset, rows: list[int], done: set[Key], parts: Parts, args: GenerateArguments
) -> None:
    """Draw this process's share of all images that are not `done`, one model at a time."""
    from tqdm import tqdm

    from trl_diffusion_rank.data.parts import Writer

    state = process_state()

    def share(generator: Generator) -> Iterator[list[tuple[Draw, int]]]:
        batches = missing_images(generator, rows, done, args.batch_size)
        return islice(batches, state.process_index, None, state.num_processes)

    total = sum(len(batch) for generator in generators for batch in share(generator))
    with (
        Writer(parts, encoded) as writer,
        tqdm(total=total, unit="image", disable=not state.is_main_process) as bar,
    ):
        for generator in generators:
            batches = share(generator)
            first = next(batches, None)
            if first is None:  # all there: not even loaded
                continue
            bar.set_description(generator.name)
            draw_generator(generator, chain([first], batches), data, rows, writer, args, bar)
            free_memory()


def draw_generator(
    generator: Generator,
    batches: Iterable[list[tuple[Draw, int]]],
    data: Dataset,
    rows: list[int],
    writer: Writer,
    args: GenerateArguments,
    bar: tqdm,
) -> None:
    """Load one model, draw its `batches` and have them written."""
    from trl_diffusion_rank.generators import load_generator

    pipe = load_generator(generator, process_state().device, args.dtype)
    texts = data.select_columns(sorted({"prompt", generator.prompt_column}))
    # Nothing is written before an image is usable: if all are refused, the next attempt begins anew.
    held: list[dict[str, list[Any]]] = []
    reasons: Counter[str] = Counter()
    for batch in batches:
        held.append(draw_usable(pipe, generator, batch, texts[[place for _, place in batch]], rows, args))
        reasons.update(held[-1]["status"])
        if reasons["ok"]:
            for columns in held:
                writer.put(columns)
            held = []
        elif reasons.total() >= min(FIRST_IMAGES, len(generator.draws) * len(rows)):
            raise ValueError(
                f"All {reasons.total()} images that {generator.name} drew first are unusable ({counted(reasons)}), "
                f"with two seeds each. `dtype` is {generator.dtype or args.dtype!r}: a VAE that overflows in float16 "
                "draws black (use bfloat16 or float32), and so do weights that are NaN; a safety checker replaces "
                f"what it takes for nudity. The last prompt was {texts[batch[-1][1]]['prompt']!r}."
            )
        bar.update(len(batch))
    for columns in held:
        writer.put(columns)


def draw_usable(
    pipe: DiffusionPipeline,
    generator: Generator,
    batch: list[tuple[Draw, int]],
    texts: dict[str, list[str]],
    rows: list[int],
    args: GenerateArguments,
) -> dict[str, list[Any]]:
    """A batch of images, the unusable ones drawn twice, as columns of the parts; images not yet encoded."""
    from trl_diffusion_rank.diffusion.sampling import draw_batch, is_black

    seeds = [
        attempt_seeds(args.seed, prompt, rows[place], draw)
        for (draw, place), prompt in zip(batch, texts["prompt"], strict=True)
    ]
    columns: dict[str, list[Any]] = {
        "source": [draw.source for draw, _ in batch],
        "index": [draw.index for draw, _ in batch],
        "row": [rows[place] for _, place in batch],
        "seed": [0] * len(batch),
        "status": [""] * len(batch),
        "image": [None] * len(batch),
    }
    waiting = list(range(len(batch)))
    for attempt in (0, 1):
        own = [seeds[i][attempt] for i in waiting]
        images, replaced = draw_batch(
            pipe,
            [texts[generator.prompt_column][i] for i in waiting],
            own,
            num_inference_steps=batch[0][0].steps,
            guidance_scale=generator.guidance_scale,
            negative_prompt=generator.negative_prompt,
            height=generator.height or args.height,
            width=generator.width or args.width,
        )
        for i, seed, image, is_replaced in zip(waiting, own, images, replaced, strict=True):
            status = "nsfw" if is_replaced else "black" if is_black(image) else "ok"
            columns["seed"][i], columns["status"][i] = seed, status
            columns["image"][i] = image if status == "ok" else None
        waiting = [i for i in waiting if columns["status"][i] != "ok"]
        if not waiting:
            break
    return columns


def encoded(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns of [`draw_usable`] as the parts keep them."""
    from trl_diffusion_rank.data.images import as_png

    images = columns["image"]
    return columns | {
        "width": [image and image.width for image in images],
        "height": [image and image.height for image in images],
        "image": [image and as_png(image) for image in images],
    }


# What is left behind ---------------------------------------------------


@dataclass
class Summary:
    """What the rows were made of, counted while they are written."""

    rows: int = 0
    left_out: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by source and status
    sizes: dict[str, set[tuple[int, int]]] = field(default_factory=dict)  # (width, height) by source
    failures: list[dict[str, Any]] = field(default_factory=list)  # the first ones

    @property
    def images(self) -> int:
        return sum(n for (_, status), n in self.outcomes.items() if status == "ok")

    @property
    def reasons(self) -> Counter[str]:
        """How many images failed, by reason."""
        reasons: Counter[str] = Counter()
        for (_, status), n in self.outcomes.items():
            if status != "ok":
                reasons[status] += n
        return reasons

    def sections(self) -> dict[str, str]:
        """The parts of the card that tell about sources and failures."""
        rows = []
        for source in dict.fromkeys(source for source, _ in self.outcomes):
            sizes = self.sizes.get(source, set())
            size = " x ".join(map(str, next(iter(sizes)))) if len(sizes) == 1 else f"{len(sizes)} sizes"
            failed = Counter({status: n for (own, status), n in self.outcomes.items() if own == source})
            rows.append([source, f"{failed.pop('ok', 0):,}", size, counted(failed) or "none"])
        sections = {"Sources": format_table(["source", "images", "width x height", "unusable"], rows)}
        if self.reasons:
            cells = [[f["source"], str(f["row"]), f["reason"], str(f["seed"]), f["prompt"]] for f in self.failures]
            table = format_table(
                ["source", "row", "reason", "last seed", "prompt"],
                [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells],
                names=5,
            )
            more = self.reasons.total() - len(self.failures)
            sections["Failed images"] = (
                f"{self.reasons.total():,} images were unusable with two seeds and are left out of their rows "
                f"({counted(self.reasons)}); {self.left_out:,} rows were left with fewer than two images and are left "
                f"out.\n\n{table}" + (f"\n\nand {more:,} more." if more else "")
            )
        return sections


def counted(reasons: Counter[str]) -> str:
    """`black: 2, nsfw: 1`."""
    return ", ".join(f"{reason}: {n:,}" for reason, n in sorted(reasons.items()) if n)


def read_lists(
    parts: Parts,
    draws: list[Draw],
    data: Dataset,
    rows: list[int],
    kept: list[str],
    include_real: bool,
    summary: Summary,
    failures: IO[str],
) -> Iterator[dict[str, list[Any]]]:
    """The dataset's rows, a few at a time. What failed is written to `failures`, a line of JSON each."""
    from trl_diffusion_rank.data.loading import embedded

    data = data.select_columns(["prompt", *kept, *(["image"] if include_real else [])])
    for start in range(0, len(rows), ROWS_AT_ONCE):
        places = range(start, min(start + ROWS_AT_ONCE, len(rows)))
        given = data[places.start : places.stop]
        drawn = iter(parts.read([(draw.source, draw.index, rows[place]) for place in places for draw in draws]))
        columns: dict[str, list[Any]] = {name: [] for name in (*OWN_COLUMNS, *kept)}
        for i, place in enumerate(places):
            results = list(islice(drawn, len(draws)))
            if include_real:
                image = embedded(given["image"][i])
                results.insert(0, {"source": REAL, "index": 0, "seed": -1, "image": image, **examined(image)})
            for result in results:
                source, status = result["source"], result["status"]
                summary.outcomes[source, status] += 1
                if status == "ok":
                    summary.sizes.setdefault(source, set()).add((result["width"], result["height"]))
                    continue
                failure = {"prompt": given["prompt"][i], "row": rows[place], "source": source}
                failure |= {"index": result["index"], "seed": result["seed"], "reason": status}
                failures.write(json.dumps(failure, ensure_ascii=False) + "\n")
                if len(summary.failures) < LISTED:
                    summary.failures.append(failure)
            usable = [result for result in results if result["status"] == "ok"]
            if len(usable) < 2:
                summary.left_out += 1
                continue
            summary.rows += 1
            columns["prompt"].append(given["prompt"][i])
            columns["images"].append([result["image"] for result in usable])
            columns["sources"].append([result["source"] for result in usable])
            columns["seeds"].append([result["seed"] for result in usable])
            columns["row"].append(rows[place])
            for name in kept:
                columns[name].append(given[name][i])
        yield columns


def examined(image: dict[str, Any]) -> dict[str, Any]:
    """Status and size of a real image, by its head alone: to decode all of them would take long."""
    from PIL import Image

    from trl_diffusion_rank.data.images import RASTER_FORMATS

    try:
        width, height = Image.open(io.BytesIO(image["bytes"]), formats=RASTER_FORMATS).size
    except Exception:  # damaged files: SyntaxError (PNG), struct.error (EXIF) and more
        return {"status": "damaged", "width": None, "height": None}
    return {"status": "ok", "width": width, "height": height}


def save_lists(
    artefact: Artefact,
    parts: Parts,
    generators: list[Generator],
    data: Dataset,
    rows: list[int],
    args: GenerateArguments,
    fingerprint: str,
) -> None:
    """Put the finished images together as the dataset, and say what became of them."""
    from datasets import Features, Image, List, Value

    from trl_diffusion_rank.data.artefact import Card

    draws = [draw for generator in generators for draw in generator.draws]
    found = parts.scan()
    missing = sum((draw.source, draw.index, row) not in found for row in rows for draw in draws)
    if missing:
        raise ValueError(
            f"{missing} of {len(rows) * len(draws)} images are not in {parts.folder}, though all were written: did "
            "another run or a full disk interfere? The same command draws them again."
        )

    kept = {name: kind for name, kind in data.features.items() if isinstance(kind, Value) and name not in OWN_COLUMNS}
    features = Features(
        {
            "prompt": Value("string"),
            "images": List(Image()),
            "sources": List(Value("string")),
            "seeds": List(Value("int64")),
            "row": Value("int64"),
            **kept,
        }
    )
    sources = list(dict.fromkeys([REAL] * args.include_real + [draw.source for draw in draws]))
    card = Card(
        title="Images of prompts, to be ranked",
        text=f"Every row holds a prompt and its images, from {', '.join(sources)}. They are not ranked yet.",
        columns={
            "prompt": "what the row's images are of",
            "images": "the images, PNG without loss; a real one as it came",
            "sources": "of each image the generator",
            "seeds": "of each image the seed of its noise, -1 for a real one",
            "row": "number of the prompt",
            **dict.fromkeys(kept, "from the prompts"),
        },
        stage="generate",
        options={
            **asdict(args),
            "generators": [
                {key: value for key, value in asdict(generator).items() if value is not None}
                for generator in generators
            ],
            "dataset_fingerprint": fingerprint,
        },
        tags=["text-to-image"],
    )
    summary = Summary()
    path = artefact.folder / "failures.jsonl"
    with open(path, "w", encoding="utf-8") as failures:

        def batches() -> Iterator[dict[str, list[Any]]]:
            yield from read_lists(parts, draws, data, rows, list(kept), args.include_real, summary, failures)
            if not summary.rows:
                raise ValueError(
                    f"No prompt has two usable images ({counted(summary.reasons)}), so there is nothing to rank; "
                    f"{path} lists them. Look at `dtype` and at the models' safety checkers."
                )
            card.sections.update(summary.sections())  # the card is written after the rows

        artefact.save({"train": batches()}, features, card)

    if summary.reasons:
        print(
            f"{summary.reasons.total()} images were unusable with two seeds ({counted(summary.reasons)}) and are left "
            f"out of their rows; {path} lists them."
        )
    else:
        path.unlink()
    if summary.left_out:
        print(f"{summary.left_out} of {len(rows)} prompts are left out: fewer than two images of them are usable.")
    sizes = {source: size for source in sources if source != REAL for size in summary.sizes.get(source, ())}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{source} {width} x {height}" for source, (width, height) in sizes.items())
        print(
            f"The generators drew different sizes ({listed}). Training fits all to `resolution`, and the ranking may "
            "learn the size; `height` and `width` set it."
        )
    print(f"{summary.images} images of {summary.rows} prompts, in {args.output_dir}")


def main(args: GenerateArguments) -> None:
    require("generate", dataset_name=args.dataset_name, output_dir=args.output_dir)
    generators = read_generators(args.generators, args.include_real)
    data, rows = load_prompts(args, generators)

    from datasets import Features, Image, Value

    from trl_diffusion_rank.data.artefact import Artefact
    from trl_diffusion_rank.generators import read_scheduler

    for generator in generators:
        if generator.scheduler is not None:
            read_scheduler(generator)  # a wrong name is told before the first model is loaded
    state = process_state()
    made_of = {
        "dataset": data._fingerprint,
        "generators": [asdict(generator) for generator in generators],
        **{key: getattr(args, key) for key in ("include_real", "dtype", "height", "width", "seed")},
    }
    artefact = Artefact(args.output_dir, made_of)
    if not artefact.finished:
        numbers = ("index", "row", "seed", "width", "height")
        parts = artefact.parts(
            "images",
            KEY,
            Features(
                {name: Value("string") for name in ("source", "status")}
                | {name: Value("int64") for name in numbers}
                | {"image": Image()}
            ),
        )
        done = parts.scan()
        if done and state.is_main_process:
            total = len(rows) * sum(len(generator.draws) for generator in generators)
            print(f"{len(done)} of {total} images are there already.")
        state.wait_for_everyone()  # all must see the same rest before one of them adds to it
        draw_missing(generators, data, rows, done, parts, args)
        state.wait_for_everyone()
        if state.is_main_process:
            save_lists(artefact, parts, generators, data, rows, args, data._fingerprint)
    elif state.is_main_process:
        print(f"{args.output_dir} is finished, with these options from this dataset.")
    if state.is_main_process:
        args.publish(args.output_dir)


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("generate")
