"""
Caption groups, what a discriminator learns from: a caption, one or more real images and several generated ones.

A row is `prompt`, `images` and `sources`, the source of each image, one of which is called `real`, as the stage
`generate` writes them with `include_real`. Without `sources` it has `ranks`, 1 the best, and what is said here of real
and generated images is said of the best and of the others.
"""

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from PIL import Image, ImageOps
from torch import Tensor

from trl_diffusion_rank.data.images import decode_image, fit_image
from trl_diffusion_rank.data.loading import undecoded
from trl_diffusion_rank.data.ranked_rows import dense_ranks, image_counts
from trl_diffusion_rank.discriminator import AestheticDiscriminatorProcessor


logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "images", "sources", "ranks")


def same_caption(caption: str) -> str:
    """What two captions share that say the same, as far as spelling shows: neither case nor spaces count."""
    return " ".join(caption.lower().split())


def group_ranks(row: dict[str, Any], real_source: str) -> list[int]:
    """Of each image of a row 1 if it is real and 2 if not, or its rank where there are no sources."""
    if "sources" in row:
        return [1 if source == real_source else 2 for source in row["sources"]]
    return dense_ranks([-rank for rank in row["ranks"]])


def group_sources(row: dict[str, Any]) -> list[str]:
    """The names of a row's images in tables: their sources, or their ranks."""
    if "sources" in row:
        return list(row["sources"])
    return [f"rank {rank}" for rank in dense_ranks([-rank for rank in row["ranks"]])]


def read_groups(dataset: Dataset, name: str, real_source: str = "real") -> Dataset:
    """
    The rows of a dataset that are caption groups, with their images undecoded. Applying it twice does no harm.

    Rows without a real image or without a generated one are left out and counted in a warning.

    Args:
        dataset: with the columns `prompt`, `images` and `sources` or `ranks`.
        name (`str`): how messages name it, `train`.
        real_source (`str`): what `sources` calls the real images.

    Raises:
        `ValueError`: naming the column or the row and what is wrong, or if no row is left.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"The {name} dataset is a stream, whose captions can't be split and checked before training. Load it "
            "without streaming."
        )
    labels = "sources" if "sources" in dataset.column_names else "ranks"
    for column in ("prompt", "images", labels):
        if column not in dataset.column_names:
            hint = " or `sources`" if column == "ranks" else ""
            raise ValueError(
                f"The {name} dataset has no column `{column}`{hint}; its columns are "
                f"{', '.join(dataset.column_names)}. The stage `generate` writes them, with `include_real: true`."
            )
    dataset = undecoded(dataset.select_columns(["prompt", "images", labels]))
    counts = image_counts(dataset, "images")
    kept, seen = [], set()
    for index, row in enumerate(dataset.select_columns(["prompt", labels])):
        if not isinstance(row["prompt"], str):
            raise ValueError(f"Row {index} of the {name} dataset: `prompt` must be a string, got {row['prompt']!r}.")
        if not isinstance(row[labels], list) or len(row[labels]) != counts[index]:
            raise ValueError(
                f"Row {index} of the {name} dataset: `{labels}` is {row[labels]!r} for {counts[index]} images; there "
                "must be one for each."
            )
        if labels == "sources":
            seen.update(row["sources"])
        elif any(type(rank) is not int for rank in row["ranks"]):
            raise ValueError(f"Row {index} of the {name} dataset: `ranks` must be integers, got {row['ranks']!r}.")
        if len(set(group_ranks(row, real_source))) > 1:
            kept.append(index)
    if not kept:
        found = (
            f"`real_source` is {real_source!r} and the sources are {sorted(seen)}" if seen else "all ranks are tied"
        )
        raise ValueError(
            f"No row of the {name} dataset has both a real and a generated image: {found}. Generate with "
            "`include_real: true`, set `real_source`, or leave the column `sources` out to learn the order of `ranks`."
        )
    left_out = len(dataset) - len(kept)
    if left_out:
        logger.warning(
            f"{left_out} of {len(dataset)} rows of the {name} dataset lack a real or a generated image and are left "
            "out."
        )
        dataset = dataset.select(kept)
    return dataset


# Split -----------------------------------------------------------------


def is_held_out(caption: str, test_share: float, seed: int) -> bool:
    """Whether a caption is one that tests. Its own text decides, so rows that are added later move no other."""
    digest = hashlib.sha256(f"{seed}\n{same_caption(caption)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < test_share * 2**64


def split_by_caption(dataset: Dataset, test_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Train and test rows of which no caption is in both; rows of one caption go together."""
    held_out = [is_held_out(caption, test_share, seed) for caption in dataset["prompt"]]
    train = [index for index, held in enumerate(held_out) if not held]
    test = [index for index, held in enumerate(held_out) if held]
    if not train or not test:
        captions = len({same_caption(caption) for caption in dataset["prompt"]})
        raise ValueError(
            f"With `test_share={test_share}` and `seed={seed}` {len(train)} rows would train and {len(test)} test, of "
            f"{captions} captions: change `test_share`, or give more captions."
        )
    return dataset.select(train), dataset.select(test)


def without_captions_of(train: Dataset, test: Dataset) -> Dataset:
    """The train rows whose caption isn't a test row's; the others are counted in a warning."""
    tested = {same_caption(caption) for caption in test["prompt"]}
    kept = [index for index, caption in enumerate(train["prompt"]) if same_caption(caption) not in tested]
    if not kept:
        raise ValueError("Every caption of the train split is in the test split too, so that none is left to learn.")
    if len(kept) == len(train):
        return train
    logger.warning(f"{len(train) - len(kept)} train rows are left out: their captions are in the test split.")
    return train.select(kept)


# Equalising and collating ----------------------------------------------


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """What JPEG leaves of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


@dataclass(frozen=True)
class Equalizer:
    """
    The one path by which all images come before the processor, so that nothing but what they show differs.

    Args:
        size (`int`, *optional*): side of the square that an image is brought to; as it is when unset.
        jpeg (`int`, *optional*): quality at which it passes through JPEG; not at all when unset.
    """

    size: int | None = None
    jpeg: int | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.size is not None:
            image, _ = fit_image(image, self.size)
        return image if self.jpeg is None else through_jpeg(image, self.jpeg)

    def __str__(self) -> str:
        size = "original sizes" if self.size is None else f"{self.size} x {self.size} pixels"
        return f"{size}, {'no JPEG' if self.jpeg is None else f'JPEG of quality {self.jpeg}'}"


def middle(bounds: Sequence[int] | None) -> int | None:
    """The quality of evaluation among those of training."""
    return None if bounds is None else (bounds[0] + bounds[1]) // 2


@dataclass
class CaptionGroupCollator:
    """
    Rows to one batch of B captions with n images at most, M in all.

    Args:
        processor ([`AestheticDiscriminatorProcessor`]): makes tensors of images and captions.
        real_source (`str`): what `sources` calls the real images.
        size (`int`, *optional*): see [`Equalizer`].
        jpeg (`(int, int)`, *optional*): lowest and highest quality.
        random_flip (`bool`): mirror all images of a row, or none.
        seed (`int`): of what is random. Drawn anew for each batch from its captions in their order, and not from a
            generator that runs on: a run that is resumed, or has other workers, sees the same.
    """

    processor: AestheticDiscriminatorProcessor
    real_source: str = "real"
    size: int | None = None
    jpeg: tuple[int, int] | None = None
    random_flip: bool = False
    seed: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """
        `ranks` and `mask` (B, n), 1 for real images and padded with 0, and the model's inputs: `pixel_values`
        (M, 3, h, w), `input_ids` and `attention_mask` (T, L) of the T different captions, `caption_of` (M,).
        """
        captions = [same_caption(row["prompt"]) for row in rows]
        digest = hashlib.sha256("\n".join([str(self.seed), *captions]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        quality = self.jpeg and int(torch.randint(self.jpeg[0], self.jpeg[1] + 1, (), generator=generator))
        flips = (
            (torch.rand(len(rows), generator=generator) < 0.5).tolist() if self.random_flip else [False] * len(rows)
        )
        equalize = Equalizer(self.size, quality)
        images = []
        for row, flip in zip(rows, flips, strict=True):
            images += [equalize(ImageOps.mirror(image) if flip else image) for image in decode_row(row)]

        ranks = [group_ranks(row, self.real_source) for row in rows]
        sizes = torch.tensor([len(row) for row in ranks])
        mask = torch.arange(int(sizes.max())) < sizes.unsqueeze(1)  # (B, n)
        flat = torch.tensor([rank for row in ranks for rank in row])
        texts = [caption for caption, row in zip(captions, ranks, strict=True) for _ in row]
        return {
            "ranks": torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, flat),
            "mask": mask,
            **self.processor(images=images, text=texts),
        }


def decode_row(row: dict[str, Any]) -> list[Image.Image]:
    """The images of a row; one that can't be decoded is an error that names its caption and place."""
    images = []
    for place, value in enumerate(row["images"]):
        try:
            images.append(decode_image(value))
        except ValueError as error:
            raise ValueError(f"Image {place} of the row with the caption {row['prompt']!r}: {error}") from error
    return images
