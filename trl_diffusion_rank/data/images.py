"""Images from whatever a dataset holds, to pixels of one size."""

import io
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from torch import Tensor


MAX_PIXELS = 256 * 1024 * 1024  # PIL warns at a third of this; nobody trains on a 16k x 16k image
# What PIL reads by itself. Left to guess, it would also start Ghostscript for an EPS out of somebody's dataset
RASTER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def decode_image(value: Any) -> Image.Image:
    """
    An image as `datasets` stores it to RGB: turned upright by its EXIF, transparency laid on white.

    Args:
        value: a `PIL.Image.Image`, encoded `bytes`, a path, or datasets' undecoded `{"bytes": ..., "path": ...}`.

    Raises:
        `ValueError`: if it can't be decoded, is none of `RASTER_FORMATS` or has more than `MAX_PIXELS` pixels.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, (bytes, bytearray)):
            image = Image.open(io.BytesIO(value), formats=RASTER_FORMATS)
        elif isinstance(value, (str, Path)):
            image = Image.open(value, formats=RASTER_FORMATS)
        elif isinstance(value, Image.Image):
            image = value
        else:
            raise ValueError(f"expected an image, bytes or a path, got {type(value).__name__}")
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # damaged files: SyntaxError (PNG), struct.error (EXIF), RuntimeError (AVIF) and more
        raise ValueError(f"the image can't be decoded: {error}") from error


def as_png(image: Image.Image) -> dict[str, Any]:
    """
    An image as `datasets` stores it, without loss: JPEG eats small images, and discriminators learn to see it. Level 1
    takes a third of the default's time and a tenth more bytes.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def fit_image(image: Image.Image, resolution: int) -> tuple[Image.Image, tuple[int, int]]:
    """
    The one rule by which images become `resolution` x `resolution`: shrink or enlarge until the shorter side fits
    (Lanczos), then cut the centre. Proportions are kept; nothing is padded.

    Returns the image and the crop's (top, left) in the resized image, which SDXL is told.
    """
    scale = resolution / min(image.size)
    width, height = (max(resolution, math.floor(side * scale + 0.5)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - resolution) // 2, (width - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution)), (top, left)


def to_uint8(images: list[Image.Image]) -> Tensor:
    """N RGB images of one size to (N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) to the float32 in [-1, 1] that VAEs take."""
    return images.float() / 127.5 - 1.0


def decoded_batches(
    data: Dataset, split: str, batches: list[list[int]]
) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
    """
    Batches of rows with their columns `image` and `images` decoded; the next batch is decoded while one is at work.

    Args:
        data: of the columns to read, images undecoded (`trl_diffusion_rank.data.loading.undecoded`).
        split (`str`): as messages call it.
        batches: the numbers of their rows.

    Raises:
        `ValueError`: naming the row of an image that can't be decoded.
    """

    def read(batch: list[int]) -> tuple[list[int], dict[str, list[Any]]]:
        columns = data[batch]
        for name, decode in (("image", decode_image), ("images", lambda images: [*map(decode_image, images)])):
            for place, value in enumerate(columns.get(name, ())):
                try:
                    columns[name][place] = decode(value)
                except ValueError as error:
                    raise ValueError(f"Row {batch[place]} of the split {split!r}: {error}") from error
        return batch, columns

    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(read, batches[0]) if batches else None
        for batch in [*batches[1:], None]:
            if following is not None:
                current = following.result()
                following = None if batch is None else pool.submit(read, batch)
                yield current
