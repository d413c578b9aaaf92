"""The images of a comparison: drawn by every model from the same prompts and seeds, in pieces that stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.parquet as pq
from datasets import Features, Value
from datasets import Image as ImageFeature
from tqdm import tqdm

from trl_diffusion_rank.data.artefact import FINISHED
from trl_diffusion_rank.data.images import as_png, decode_image
from trl_diffusion_rank.data.parts import WRITERS, Key, Parts, Writer, missing_batches
from trl_diffusion_rank.diffusion import sampling
from trl_diffusion_rank.evaluation.judges import Judge, thumbnail
from trl_diffusion_rank.evaluation.provenance import weights_stamp
from trl_diffusion_rank.generators import load_for_sampling
from trl_diffusion_rank.processes import free_memory, process_state


if TYPE_CHECKING:
    from PIL.Image import Image

    from trl_diffusion_rank.stages.evaluate import EvaluateArguments


BASE = "base"
# So many black images at the start are no accident: it would go on like this for hours.
FIRST_IMAGES = 16
# Images that are decoded, judged and written at once. Their bounds decide how kernels round, so it is no option.
JUDGED_AT_ONCE = 64

IMAGE_KEY = ("drawn_by", "num_inference_steps", "seed")


class Item(NamedTuple):
    """An image that every model draws, at every number of steps."""

    prompt: str
    row: int
    category: str | None
    index: int
    seed: int


@dataclass
class Comparison:
    """
    What is compared.

    Attributes:
        args ([`EvaluateArguments`])
        items (`list[Item]`): the N images.
        adapters (`dict[str, str | None]`): name -> path of all models; the first, the base model, has none.
        drawn_by (`dict[str, str]`): name -> hash of all that decides a model's images but steps and seeds.
        images, scores ([`~data.parts.Parts`]): the finished ones.
    """

    args: EvaluateArguments
    items: list[Item]
    adapters: dict[str, str | None]
    drawn_by: dict[str, str]
    images: Parts
    scores: Parts

    def keys(
        self, name: str, steps: int, judge: Judge | None = None, places: Iterable[int] | None = None
    ) -> list[Key]:
        """Of a model's images, or of a judge's numbers about them; of all N, or of those at some places."""
        first = () if judge is None else (judge.name or "",)
        items = self.items if places is None else [self.items[place] for place in places]
        return [(*first, self.drawn_by[name], steps, item.seed) for item in items]

    @property
    def drawings(self) -> Iterator[tuple[str, int]]:
        """All models and numbers of steps."""
        return ((name, steps) for name in self.adapters for steps in self.args.num_inference_steps)

    def shares(self, keys: list[Key], done: set[Key], batch_size: int) -> list[list[int]]:
        """This process's part of what isn't done, in batches."""
        state = process_state()
        return missing_batches(keys, done, batch_size)[state.process_index :: state.num_processes]


def drawn_by(args: EvaluateArguments, adapter: str | None) -> str:
    """Hash of all that decides a model's images but the number of steps and the seeds, which prompts decide."""
    sources = [args.model, *([] if adapter is None else [adapter])]
    made_of = {
        "weights": [(source, weights_stamp(source)) for source in sources],
        **{key: getattr(args, key) for key in ("dtype", "guidance_scale", "height", "width")},
    }
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def image_kinds() -> Features:
    """Columns of a drawn image: beside it whether it is black, and its thumbnail as bytes, for the diversity."""
    return Features(
        {
            "drawn_by": Value("string"),
            "num_inference_steps": Value("int64"),
            "seed": Value("int64"),
            "image": ImageFeature(),
            "black": Value("bool"),
            "thumbnail": Value("binary"),
        }
    )


def read_images(comparison: Comparison, name: str, steps: int, places: list[int]) -> list[Image]:
    """The images of a model at some places."""
    rows = comparison.images.read(comparison.keys(name, steps, places=places), ["image"])
    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(decode_image, [row["image"] for row in rows]))


# What was drawn before -------------------------------------------------


def take_over(comparison: Comparison, earlier: list[Path], done: set[Key]) -> None:
    """Copy what is not `done` and was drawn, by the same weights with the same options, for an earlier evaluation."""
    missing = {key for name, steps in comparison.drawings for key in comparison.keys(name, steps)} - done
    count = 0
    with Writer(comparison.images, encoded) as writer:
        for folder in earlier:
            for columns in drawn_earlier(folder, missing, comparison.images):
                missing.difference_update(zip(*(columns[name] for name in comparison.images.key), strict=True))
                count += len(columns["seed"])
                writer.put(columns)
    if count:
        print(f"{count} images are taken over from an earlier evaluation.")


def drawn_earlier(folder: Path, missing: set[Key], own: Parts) -> Iterator[dict[str, list[Any]]]:
    """Batches of the images in an output folder that are `missing`: of one that is finished, or of its pieces."""
    for pieces in folder.glob("partial-*/images"):
        if pieces != own.folder:
            parts = Parts(pieces, own.key, image_kinds())
            wanted = sorted(parts.scan() & missing)
            for start in range(0, len(wanted), JUDGED_AT_ONCE):
                yield as_columns(parts.read(wanted[start : start + JUDGED_AT_ONCE], (*own.key, "image")))
    if not (folder / FINISHED).is_file() or not (folder / "metrics.json").is_file():
        return
    by_name = json.loads((folder / "metrics.json").read_text()).get("drawn_by", {})
    columns = ["model", "num_inference_steps", "seed", "image"]
    for path in sorted(folder.glob("data/*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(JUDGED_AT_ONCE, columns=columns):
            rows = [row | {"drawn_by": by_name.get(row.pop("model"))} for row in batch.to_pylist()]
            if rows := [row for row in rows if tuple(row[name] for name in own.key) in missing]:
                yield as_columns(rows)


def as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows with their images decoded, as columns."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return columns | {"image": [decode_image(image) for image in columns["image"]]}


# What is drawn ---------------------------------------------------------


def encoded(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Columns with images as the parts keep them."""
    images = columns["image"]
    return columns | {
        "image": [as_png(image) for image in images],
        "black": [sampling.is_black(image) for image in images],
        "thumbnail": [thumbnail(image).tobytes() for image in images],
    }


def draw_missing(comparison: Comparison, done: set[Key]) -> None:
    """Draw this process's share of all images that are not `done`, one model at a time."""
    shares = {
        (name, steps): comparison.shares(comparison.keys(name, steps), done, comparison.args.batch_size)
        for name, steps in comparison.drawings
    }
    total = sum(len(batch) for batches in shares.values() for batch in batches)
    quiet = not process_state().is_main_process
    with (
        Writer(comparison.images, encoded) as writer,
        tqdm(total=total, unit="image", disable=quiet or not total) as bar,
    ):
        for name in comparison.adapters:
            own = {steps: batches for (of, steps), batches in shares.items() if of == name and batches}
            if own:  # else all are there: it isn't even loaded
                draw_model(name, own, comparison, done, writer, bar)
                free_memory()


def draw_model(
    name: str, shares: dict[int, list[list[int]]], comparison: Comparison, done: set[Key], writer: Writer, bar: tqdm
) -> None:
    """Load one model, draw its batches at each number of steps and have them written."""
    args, items = comparison.args, comparison.items
    pipe = load_for_sampling(args.model, args.dtype)
    if comparison.adapters[name] is not None:  # loaded anew for each: a fused LoRA doesn't come off exactly
        sampling.load_tuned(pipe, comparison.adapters[name])
    for steps, batches in shares.items():
        bar.set_description(f"{name}, {steps} steps")
        usable = not done.isdisjoint(comparison.keys(name, steps))
        held, black = [], 0  # nothing is written before an image is usable
        for batch in batches:
            images, _ = sampling.draw_batch(
                pipe,
                [items[i].prompt for i in batch],
                [items[i].seed for i in batch],
                num_inference_steps=steps,
                guidance_scale=args.guidance_scale,
                height=args.height,
                width=args.width,
            )
            held.append(
                {
                    "drawn_by": [comparison.drawn_by[name]] * len(batch),
                    "num_inference_steps": [steps] * len(batch),
                    "seed": [items[i].seed for i in batch],
                    "image": images,
                }
            )
            usable = usable or not all(map(sampling.is_black, images))
            black += len(images)
            if not usable and black >= min(FIRST_IMAGES, len(items)):
                raise black_error(name, steps, black, len(items), args.dtype)
            for columns in held if usable else []:
                writer.put(columns)
            held = [] if usable else held
            bar.update(len(batch))
        for columns in held:
            writer.put(columns)


def black_error(name: str, steps: int, black: int, total: int, dtype: str) -> ValueError:
    which = f"All {total}" if black >= total else f"The first {black} of {total}"
    return ValueError(
        f"{which} images of the model {name} at {steps} steps are black. `dtype` is {dtype!r}: a VAE that overflows "
        "in float16 does this (use bfloat16 or float32), and so do weights that are NaN and a safety checker."
    )


def check_black(comparison: Comparison) -> None:
    """Refuse a model that draws nothing but black; single black images are counted."""
    for name, steps in comparison.drawings:
        flags = [row["black"] for row in comparison.images.read(comparison.keys(name, steps), ["black"])]
        if all(flags):
            raise black_error(name, steps, len(flags), len(flags), comparison.args.dtype)
        if any(flags) and process_state().is_main_process:
            print(
                f"{sum(flags)} of {len(flags)} images of the model {name} at {steps} steps are black; they are judged."
            )
