"""Images and captions of the digits world.

The handwriting is real: scikit-learn's 1,797 scans of 8x8 pixels, enlarged to 16x16 and tinted with one of six inks on
white paper. That is a *clean* image. An *ugly* one is the same scan as an unfiltered crawl of the web would hold it:
on dirty or coloured paper, with blots, lines, washed-out ink or blur. Captions name the digit and the ink, never the
quality.

Conventions: a batch of images is `uint8` of shape `(N, 16, 16, 3)`; inside the rendering functions colours are floats
in [0, 1]. Inks are indices into [`INKS`]. All randomness comes from a seed or a `numpy.random.Generator`.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np


Split = Literal["train", "judge", "heldout"]

IMAGE_SIZE = 16
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK_COLOURS = {
    "red": (0.82, 0.08, 0.10),
    "green": (0.05, 0.52, 0.15),
    "blue": (0.10, 0.20, 0.85),
    "purple": (0.55, 0.08, 0.65),
    "orange": (0.96, 0.50, 0.05),
    "black": (0.08, 0.08, 0.08),
}
INKS = tuple(INK_COLOURS)
CAPTION_TEMPLATES = (
    "a handwritten digit {digit} in {ink} ink",
    "{article} {ink} handwritten {digit}",
    "the number {digit} written in {ink}",
)

# One ink per digit is never shown in training: whether a model combines what it knows can be asked with these.
HELD_OUT_COMBINATIONS = frozenset((digit, INKS[index % len(INKS)]) for index, digit in enumerate(DIGITS))
TRAINED_COMBINATIONS = tuple((d, i) for d in DIGITS for i in INKS if (d, i) not in HELD_OUT_COMBINATIONS)

# train: base model and scorer; judge: the judges alone; heldout: the reference of the Frechet distance.
SPLIT_SIZES: dict[Split, int] = {"train": 1097, "judge": 350, "heldout": 350}
UGLY_SHARE = 0.55
PAPER_SHARE = 0.85  # of the ugly images, before paper is forced on those with neither blot nor line

# Tan, dark tan, olive, blue and pink paper.
PAPER_HUES = ((0.85, 0.74, 0.52), (0.70, 0.56, 0.36), (0.64, 0.66, 0.38), (0.58, 0.70, 0.84), (0.90, 0.66, 0.70))


class Crawl(NamedTuple):
    """Captioned images with what is true about them.

    `images`: `(N, 16, 16, 3)` uint8; `captions`: N strings; `clean`: `(N,)` bool; `digits`: `(N,)` int in 0..9;
    `inks`: `(N,)` int, indices into `INKS`.
    """

    images: np.ndarray
    captions: list[str]
    clean: np.ndarray
    digits: np.ndarray
    inks: np.ndarray


# ---------------------------------------------------------------------------------------------------------- scans


@lru_cache(maxsize=1)
def _all_scans() -> tuple[np.ndarray, np.ndarray]:
    # scikit-learn takes a second to import and only the scans need it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


@lru_cache(maxsize=1)
def _split_indices() -> dict[str, np.ndarray]:
    """Indices of each split, the ten digits in equal proportion everywhere."""
    _, labels = _all_scans()
    rng = np.random.default_rng(0)
    position = np.empty(len(labels))  # each scan's place in (0, 1) within a shuffle of its own digit
    for digit in range(len(DIGITS)):
        members = rng.permutation(np.flatnonzero(labels == digit))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    bounds = np.cumsum(list(SPLIT_SIZES.values()))[:-1]
    return dict(zip(SPLIT_SIZES, np.split(np.argsort(position, kind="stable"), bounds), strict=True))


def load_scans(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The scans of a split: ink coverage `(N, 8, 8)` float32 in [0, 1], and their digits `(N,)` int64."""
    if split not in SPLIT_SIZES:
        raise ValueError(f"`split` is {split!r}; it must be one of {list(SPLIT_SIZES)}.")
    scans, labels = _all_scans()
    indices = _split_indices()[split]
    return scans[indices], labels[indices]


# ------------------------------------------------------------------------------------------------------- captions


def caption(digit: str, ink: str, template: int = 0) -> str:
    """The caption of a digit word in an ink, by one of the three templates."""
    return CAPTION_TEMPLATES[template].format(digit=digit, ink=ink, article="an" if ink[0] in "aeiou" else "a")


def parse_caption(text: str) -> tuple[str, str]:
    """What a caption asks for: `(digit, ink)` as words. It must name exactly one of each."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    digits = [word for word in words if word in DIGITS]
    inks = [word for word in words if word in INKS]
    if len(digits) != 1 or len(inks) != 1:
        raise ValueError(
            f"The caption {text!r} names the digits {digits} and the inks {inks}; it must name exactly one digit of "
            f"{list(DIGITS)} and one ink of {list(INKS)}."
        )
    return digits[0], inks[0]


def make_prompts(num: int, seed: int = 0, held_out: bool = False) -> list[str]:
    """`num` captions drawn with replacement over the trained combinations (or the ten held-out ones) and templates."""
    combinations = sorted(HELD_OUT_COMBINATIONS) if held_out else TRAINED_COMBINATIONS
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(combinations), size=num)
    templates = rng.integers(len(CAPTION_TEMPLATES), size=num)
    return [caption(*combinations[c], template=t) for c, t in zip(chosen, templates, strict=True)]


# ------------------------------------------------------------------------------------------------------ rendering


@lru_cache
def _bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Linear map `(size_out, size_in)` of a bicubic enlargement of one axis (Keys' kernel, a = -0.5, as Pillow's)."""
    centre = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    x = np.abs(centre[:, None] - np.arange(size_in))
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _enlarge(maps: np.ndarray) -> np.ndarray:
    """Bicubic enlargement of `(N, s, s)` to `(N, 16, 16)`."""
    matrix = _bicubic_matrix(maps.shape[-1], IMAGE_SIZE)
    return matrix @ maps @ matrix.T


def ink_coverage(scans: np.ndarray) -> np.ndarray:
    """Scans `(N, 8, 8)` to ink coverage `(N, 16, 16)` in [0, 1]: 0 is bare paper, 1 full ink."""
    return np.clip(_enlarge(scans), 0.0, 1.0)


def _ink(coverage: np.ndarray, inks: np.ndarray, paper: np.ndarray) -> np.ndarray:
    """Lay transparent ink on `paper` `(N, 16, 16, 3)`: light passes through both, so their colours multiply."""
    colours = np.array(list(INK_COLOURS.values()), dtype=np.float32)[inks][:, None, None, :]
    return paper * (1 - coverage[..., None] * (1 - colours))


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return np.round(np.clip(images, 0.0, 1.0) * 255).astype(np.uint8)


def render_clean(scans: np.ndarray, inks: np.ndarray) -> np.ndarray:
    """Scans `(N, 8, 8)` in the inks `(N,)` on white paper, `(N, 16, 16, 3)` uint8."""
    coverage = ink_coverage(scans)
    return _to_uint8(_ink(coverage, inks, np.ones((*coverage.shape, 3), dtype=np.float32)))


def _smear(coverage: np.ndarray) -> np.ndarray:
    """Thicken strokes by a pixel, `(N, 16, 16)` to the same; two pixels would close the loops of an eight."""
    padded = np.pad(coverage, ((0, 0), (1, 0), (1, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, (2, 2), axis=(1, 2)).max(axis=(-2, -1))


def _dirty_paper(num: int, rng: np.random.Generator) -> np.ndarray:
    """`(num, 16, 16, 3)`: 40 % grey of .45-.80, else a hue of `PAPER_HUES`, with cloudy brightness (4x4 noise)."""
    grey = rng.uniform(0.45, 0.80, size=(num, 1)).repeat(3, axis=1)
    hue = np.array(PAPER_HUES)[rng.integers(len(PAPER_HUES), size=num)]
    colour = np.where(rng.random((num, 1)) < 0.4, grey, hue)
    clouds = _enlarge(rng.normal(0.0, 0.10, size=(num, 4, 4)).astype(np.float32))
    return (colour[:, None, None, :] + clouds[..., None]).astype(np.float32)


def _blots(num: int, rng: np.random.Generator) -> np.ndarray:
    """Opacity `(num, 16, 16)` of one or two soft discs."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float32)
    centre = rng.uniform(1, IMAGE_SIZE - 2, size=(num, 2, 2, 1, 1))
    radius = rng.uniform(1.2, 2.8, size=(num, 2, 1, 1))
    distance = np.hypot(y - centre[:, :, 0], x - centre[:, :, 1])
    discs = np.clip(radius - distance + 0.5, 0.0, 1.0)
    discs[:, 1] *= rng.random((num, 1, 1)) < 0.5
    return discs.max(axis=1) * rng.uniform(0.75, 0.95, size=(num, 1, 1))


def _lines(num: int, rng: np.random.Generator) -> np.ndarray:
    """Opacity `(num, 16, 16)` of one straight line about a pixel wide."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] - (IMAGE_SIZE - 1) / 2
    angle = rng.uniform(0, np.pi, size=(num, 1, 1))
    distance = np.abs(x * np.sin(angle) - y * np.cos(angle) - rng.uniform(-5, 5, size=(num, 1, 1)))
    return np.clip(1.1 - distance, 0.0, 1.0) * rng.uniform(0.65, 0.9, size=(num, 1, 1))


def _blur(images: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Gaussian blur of `(N, 16, 16, 3)` by each image's own `sigma` `(N,)`, in pixels."""
    offset = np.subtract.outer(np.arange(IMAGE_SIZE), np.arange(IMAGE_SIZE))
    kernel = np.exp(-0.5 * (offset / sigma[:, None, None]) ** 2)
    kernel /= kernel.sum(axis=2, keepdims=True)  # renormalised at the border, so that paper does not darken there
    return np.einsum("nij,njkc,nlk->nilc", kernel, images, kernel, optimize=True)


def make_ugly(
    scans: np.ndarray, inks: np.ndarray, rng: np.random.Generator, paper_share: float = PAPER_SHARE
) -> np.ndarray:
    """Scans `(N, 8, 8)` in the inks `(N,)` as an unfiltered crawl holds them, `(N, 16, 16, 3)` uint8.

    Each fault comes by its own chance: dirty paper `paper_share`, blots .5, a line .3, washed-out ink .4, blur .25,
    smeared ink .2, low contrast .12. Paper is forced where there is neither blot nor line, so every image is visibly
    ugly; nearly all stay legible (with grain on every pixel and more blur, a base model never learns the digits).
    """
    num = len(scans)
    blot, line, washed, blur, smear, pale = (rng.random(num) < p for p in (0.5, 0.3, 0.4, 0.25, 0.2, 0.12))
    dirty = (rng.random(num) < paper_share) | ~(blot | line)

    def only(where: np.ndarray, changed: np.ndarray, unchanged: np.ndarray) -> np.ndarray:
        return np.where(where.reshape(num, *[1] * (changed.ndim - 1)), changed, unchanged)

    coverage = ink_coverage(scans)
    coverage = only(smear, _smear(coverage), coverage)
    coverage = only(washed, coverage * rng.uniform(0.45, 0.75, size=(num, 1, 1)), coverage)

    paper = _dirty_paper(num, rng)
    images = _ink(coverage, inks, only(dirty, paper, np.ones_like(paper)))
    dark = rng.uniform(0.05, 0.30, size=(num, 1, 1, 1))
    for present, opacity in ((blot, _blots(num, rng)), (line, _lines(num, rng))):
        images = only(present, images + opacity[..., None] * (dark - images), images)

    mean = images.mean(axis=(1, 2), keepdims=True)
    images = only(pale, mean + rng.uniform(0.45, 0.7, size=(num, 1, 1, 1)) * (images - mean), images)
    return _to_uint8(only(blur, _blur(images, rng.uniform(0.8, 1.5, size=num)), images))


def _draw_inks(labels: np.ndarray, rng: np.random.Generator, held_out: bool) -> np.ndarray:
    """An ink index for each digit, over the trained combinations, or over all sixty with `held_out=True`."""
    allowed = np.array([[held_out or (d, i) not in HELD_OUT_COMBINATIONS for i in INKS] for d in DIGITS])[labels]
    return np.where(allowed, rng.random(allowed.shape), -1.0).argmax(axis=1)


def crawl(
    split: Split,
    num: int,
    seed: int = 0,
    ugly_share: float = UGLY_SHARE,
    paper_share: float = PAPER_SHARE,
    include_held_out: bool = False,
) -> Crawl:
    """`num` captioned images of a split's scans, a share of them ugly; `ugly_share=0` gives the clean collection.

    Every scan comes up equally often (give or take one). `include_held_out=True` draws from all sixty
    combinations of digit and ink: judges must know them all, models only the trained ones.
    """
    rng = np.random.default_rng(seed)
    scans, labels = load_scans(split)
    order = np.concatenate([rng.permutation(len(scans)) for _ in range(-(-num // len(scans)))])[:num]
    scans, labels = scans[order], labels[order]
    inks = _draw_inks(labels, rng, include_held_out)
    clean = rng.random(num) >= ugly_share
    images = np.where(clean[:, None, None, None], render_clean(scans, inks), make_ugly(scans, inks, rng, paper_share))
    templates = rng.integers(len(CAPTION_TEMPLATES), size=num)
    captions = [caption(DIGITS[d], INKS[i], t) for d, i, t in zip(labels, inks, templates, strict=True)]
    return Crawl(images, captions, clean, labels, inks)


def make_clean_images(prompts: Sequence[str], seed: int = 0) -> np.ndarray:
    """
    For each of N prompts a clean image of what it asks for, `(N, 16, 16, 3)` uint8: a scan of the training split,
    drawn at random among those of its digit.
    """
    rng = np.random.default_rng(seed)
    scans, labels = load_scans("train")
    digits, inks = combinations_of(prompts)
    chosen = np.array([rng.choice(np.flatnonzero(labels == digit)) for digit in digits])
    return render_clean(scans[chosen], inks)


def to_array(images: np.ndarray | Iterable) -> np.ndarray:
    """PIL images, or an array already, to `(N, 16, 16, 3)` uint8. Other sizes are resampled by Pillow's bicubic."""
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(
                f"Got an array of {images.dtype} and shape {images.shape}; pass uint8 (N, 16, 16, 3) or PIL images."
            )
        return images
    size = (IMAGE_SIZE, IMAGE_SIZE)
    rgb = (image.convert("RGB") for image in images)
    return np.stack([np.asarray(image if image.size == size else image.resize(size)) for image in rgb])


def combinations_of(prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """What prompts ask for, as indices: digits `(N,)` and inks `(N,)`."""
    digits, inks = zip(*map(parse_caption, prompts), strict=True)
    return np.array([DIGITS.index(d) for d in digits]), np.array([INKS.index(i) for i in inks])
