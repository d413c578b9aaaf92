"""Images from whatever a dataset holds, to pixels of one size."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


MAX_PIXELS = 256 * 1024 * 1024  # PIL warns at a third of this; nobody trains on a 16k x 16k image


def decode_image(value: Any) -> Image.Image:
    """
    An image as `datasets` stores it to RGB: turned upright by its EXIF, transparency laid on white.

    Args:
        value: a `PIL.Image.Image`, encoded `bytes`, a path, or datasets' undecoded `{"bytes": ..., "path": ...}`.

    Raises:
        `ValueError`: if it can't be decoded or has more than `MAX_PIXELS` pixels.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, (bytes, bytearray)):
            image = Image.open(io.BytesIO(value))
        elif isinstance(value, (str, Path)):
            image = Image.open(value)
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
    except (OSError, SyntaxError, Image.DecompressionBombError, ValueError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"the image can't be decoded: {error}") from error


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
