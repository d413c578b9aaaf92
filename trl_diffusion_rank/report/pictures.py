"""Images as a page carries them: WebP, in base64, within a number of bytes."""

import base64
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image


class Rung(NamedTuple):
    """The longest side in pixels, and WebP's quality."""

    side: int
    quality: int


# Thumbnails from fine to coarse; on the page they are about 180 pixels wide, and wider in the dialog
LADDER = (
    Rung(448, 75),
    Rung(352, 70),
    Rung(256, 70),
    Rung(224, 60),
    Rung(192, 50),
    Rung(160, 45),
    Rung(128, 40),
    Rung(112, 30),
)
# Whole pictures (rows, grids), as wide as the page and narrower
PICTURE_LADDER = (Rung(2000, 80), Rung(1400, 75), Rung(1000, 65), Rung(700, 50), Rung(500, 30))

# Images of up to this many pixels a side are kept pixel by pixel, and enlarged by the browser
TINY = 64


def encode(image: Image.Image, rung: Rung) -> bytes:
    """WebP, shrunk to the rung; never enlarged, and without loss where the image is tiny."""
    image = image.convert("RGB")
    target = io.BytesIO()
    if max(image.size) <= TINY:
        image.save(target, "WEBP", lossless=True, quality=80)
    else:
        image.thumbnail((rung.side, rung.side), Image.Resampling.LANCZOS)
        image.save(target, "WEBP", quality=rung.quality, method=4)
    return target.getvalue()


def encode_all(files: Iterable[bytes], rung: Rung) -> Iterator[bytes]:
    """The images of `files` in their order, a few at a time on all cores: Pillow works without the GIL."""

    def one(file: bytes) -> bytes:
        return encode(Image.open(io.BytesIO(file)), rung)

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[bytes] = []
        for file in files:
            waiting.append(file)
            if len(waiting) == 16 * workers:
                yield from pool.map(one, waiting)
                waiting = []
        yield from pool.map(one, waiting)


def encode_picture(path: Path, max_bytes: int) -> bytes | None:
    """The picture at the finest rung that fits, at the last one if none does; None when it can't be read."""
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        return None
    for rung in PICTURE_LADDER:
        encoded = encode(image, rung)
        if len(encoded) <= max_bytes:
            break
    return encoded


def to_base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")


def data_uri(image: bytes) -> str:
    return f"data:image/webp;base64,{to_base64(image)}"


def evenly(count: int, keep: int) -> list[int]:
    """`keep` of the places 0 ... `count` - 1, the first and the last among them, evenly spread."""
    if keep >= count:
        return list(range(count))
    if keep == 1:
        return [0]
    return [round(place * (count - 1) / (keep - 1)) for place in range(keep)]
