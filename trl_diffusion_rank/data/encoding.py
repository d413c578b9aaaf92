"""
Encoding is to images what tokenizing is to text: rows become latents and embeddings once, on disk, before training.

The tables are Arrow files in the datasets cache, found again by the fingerprint of data, encoders and options, and
read by memory mapping. Tensors lie in them as half-precision bytes: nested lists of floats take minutes to read back.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from torch import Tensor
from tqdm.auto import tqdm

from trl_diffusion_rank.data.images import decode_image, fit_image, to_pixels, to_uint8
from trl_diffusion_rank.data.ranked_rows import BadRowError, RankedRow, read_row
from trl_diffusion_rank.diffusion.draws import stable_seed
from trl_diffusion_rank.diffusion.families.base import Family


logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # part of the fingerprint: raise it when what is written changes
TENSOR = {"data": Value("large_binary"), "shape": List(Value("int64")), "dtype": Value("string")}
IMAGE_CONDITIONING = "image_conditioning."  # prefix of the columns of `Family.image_conditioning`


def pack(tensor: Tensor) -> dict[str, Any]:
    """
    A tensor as a `TENSOR` cell. Floats are halved: to float16, or to bfloat16 where a value lies beyond float16, as
    states of T5 in bfloat16 may. Raises `ValueError` for what is not finite in either.
    """
    tensor = tensor.cpu()
    if tensor.is_floating_point():
        half = tensor.to(torch.float16)
        if not torch.isfinite(half).all():
            half = tensor.to(torch.bfloat16)
            if not torch.isfinite(half).all():
                raise ValueError("an encoder's output is not finite in half precision, in which it is cached")
            return {"data": half.view(torch.int16).numpy().tobytes(), "shape": list(half.shape), "dtype": "bfloat16"}
        tensor = half
    array = tensor.numpy()
    return {"data": array.tobytes(), "shape": list(array.shape), "dtype": array.dtype.name}


def unpack(cell: dict[str, Any]) -> Tensor:
    """The inverse of [`pack`]."""
    is_bfloat16 = cell["dtype"] == "bfloat16"  # which NumPy doesn't know: read as the integers of its bits
    array = np.frombuffer(bytearray(cell["data"]), dtype="int16" if is_bfloat16 else cell["dtype"])
    tensor = torch.from_numpy(array.reshape(cell["shape"]))
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


@dataclass
class RowImages:
    """The pixels of a row: `images` (n, 3, H, W) uint8, and what the family tells the model of each image's size."""

    images: Tensor
    conditioning: dict[str, Tensor]

    def seed(self, prompt: str) -> int:
        """The row's own seed, from what it shows: wherever the row stands, its noise stays the same."""
        return stable_seed(prompt, self.images.numpy().tobytes())


def load_images(row: RankedRow, family: Family, resolution: int, where: str) -> RowImages:
    """Decode a row's images and bring them to one size. Raises [`BadRowError`] naming the row and the image."""
    images, original_sizes, crop_offsets = [], [], []
    for position, value in enumerate(row.images):
        try:
            image = decode_image(value)
        except ValueError as error:
            raise BadRowError(f"{where}, image {position}: {error}.") from error
        original_sizes.append((image.height, image.width))
        image, offset = fit_image(image, resolution)
        images.append(image)
        crop_offsets.append(offset)
    conditioning = family.image_conditioning(original_sizes, crop_offsets, resolution)
    return RowImages(to_uint8(images), conditioning)


@torch.no_grad()
def encode_prompts(family: Family, prompts: list[str], name: str, fingerprint: str, batch_size: int) -> Dataset:
    """
    A table with one row for each of the (distinct) `prompts`: its conditioning tensors as `TENSOR` columns, and the
    text itself as `prompt`, which a discriminator reads with its own text tower.
    """
    keys = list(family.encode_prompts(prompts[:1]))

    def rows() -> Iterator[dict[str, Any]]:
        with tqdm(total=len(prompts), desc=f"Encoding the prompts of {name}", unit="prompt") as progress:
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                embeddings = family.encode_prompts(batch)
                for position, prompt in enumerate(batch):
                    yield {"prompt": prompt, **{key: pack(embeddings[key][position]) for key in keys}}
                progress.update(len(batch))

    features = Features({"prompt": Value("string"), **dict.fromkeys(keys, TENSOR)})
    return _cached_table(rows, features, Hasher.hash((fingerprint, "prompts")))


@torch.no_grad()
def encode_rows(
    dataset: Dataset,
    family: Family,
    *,
    name: str,
    resolution: int,
    fingerprint: str,
    batch_size: int,
    skip_bad_rows: bool,
) -> tuple[Dataset, Dataset]:
    """
    Encode checked rows: the images once each, the prompts once for each distinct one.

    Args:
        dataset: of [`to_ranked`], only the rows that [`check_rows`] keeps.
        resolution: side in pixels that every image is brought to.
        fingerprint: of the data, the encoders and the options; a table that has it is read from the cache.
        batch_size: images and prompts in one pass of an encoder.
        skip_bad_rows: count rows with an image that can't be decoded instead of stopping.

    Returns:
        the rows (`latents`, `ranks`, `psi`, `row_seed`, `prompt_index`, `image_conditioning.*`) and the table
        of prompts that `prompt_index` points into.
    """
    prompts = list(dict.fromkeys(dataset["prompt"]))
    prompt_index = {prompt: index for index, prompt in enumerate(prompts)}
    device = next(family.encoders["vae"].parameters()).device
    image_keys = list(family.image_conditioning([(1, 1)], [(0, 0)], resolution))
    features = Features(
        {
            "latents": TENSOR,
            "ranks": List(Value("int32")),
            "psi": List(Value("float32")),
            "row_seed": Value("int64"),
            "prompt_index": Value("int32"),
            **{IMAGE_CONDITIONING + key: TENSOR for key in image_keys},
        }
    )

    def decode(item: tuple[int, dict[str, Any]]) -> tuple[RankedRow, RowImages] | BadRowError:
        index, example = item
        where = f"Row {index} of the {name} dataset"
        try:
            row = read_row(example, where)
            return row, load_images(row, family, resolution, where)
        except BadRowError as error:
            return error

    def rows() -> Iterator[dict[str, Any]]:
        skipped: list[BadRowError] = []
        rows_at_once = max(1, batch_size // 4)
        with (
            ThreadPoolExecutor() as pool,  # PIL lets go of the interpreter lock while it decodes and resizes
            tqdm(total=len(dataset), desc=f"Encoding the images of {name}", unit="row") as progress,
        ):
            for start in range(0, len(dataset), rows_at_once):
                stop = min(start + rows_at_once, len(dataset))
                decoded = list(pool.map(decode, ((index, dataset[index]) for index in range(start, stop))))
                faults = [item for item in decoded if isinstance(item, BadRowError)]
                if faults and not skip_bad_rows:
                    raise faults[0]
                skipped += faults
                good = [item for item in decoded if not isinstance(item, BadRowError)]
                if good:
                    images = torch.cat([row_images.images for _, row_images in good])
                    latents = [
                        family.encode_images(to_pixels(part.to(device))).cpu() for part in images.split(batch_size)
                    ]
                    per_row = torch.cat(latents).split([len(row.images) for row, _ in good])
                    for (row, row_images), row_latents in zip(good, per_row, strict=True):
                        yield {
                            "latents": pack(row_latents),
                            "ranks": row.ranks,
                            "psi": row.psi,
                            "row_seed": row_images.seed(row.prompt),
                            "prompt_index": prompt_index[row.prompt],
                            **{IMAGE_CONDITIONING + key: pack(row_images.conditioning[key]) for key in image_keys},
                        }
                progress.update(stop - start)
        if skipped:
            logger.warning(f"Skipped {len(skipped)} rows of the {name} dataset (`on_bad_row='skip'`): {skipped[0]}")
        if len(skipped) == len(dataset):
            raise ValueError(f"No image of the {name} dataset can be decoded. First: {skipped[0]}")

    encoded = _cached_table(rows, features, Hasher.hash((fingerprint, "rows")))
    return encoded, encode_prompts(family, prompts, name, fingerprint, batch_size)


def _cached_table(rows: Callable[[], Iterator[dict[str, Any]]], features: Features, fingerprint: str) -> Dataset:
    with _quiet_datasets():
        try:
            return Dataset.from_generator(rows, features=features, fingerprint=fingerprint)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None  # our own sentence, not "an error occurred while generating"
            raise


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Our progress bars say what is done and how much is left; datasets' own would count the same rows again."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
