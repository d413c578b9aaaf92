"""Small image classifiers of the digits world: one ranks, the others judge.

[`fit_clean_classifier`] is a *scorer*: fitted on the real `train` scans, it ranks generated images by how clean they
look. [`DigitsJudge`] never takes part in training or ranking: other scans, another seed. Both are fitted in seconds.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from trl_diffusion_rank.digits.data import (
    DIGITS,
    HELD_OUT_COMBINATIONS,
    INKS,
    TRAINED_COMBINATIONS,
    Split,
    combinations_of,
    crawl,
    load_scans,
    render_clean,
    to_array,
)


Images = np.ndarray | Iterable[Image.Image]


def to_pixels(images: Images) -> torch.Tensor:
    """PIL images or `(N, 16, 16, 3)` uint8 to `(N, 3, 16, 16)` float32 in [-1, 1]."""
    return torch.from_numpy(to_array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class DigitsClassifier(nn.Module):
    """A small CNN: one trunk of features, and a linear head for each of clean-or-ugly, digit and ink."""

    num_features = 64

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 16, self.num_features), nn.ReLU()),
        )
        self.clean = nn.Linear(self.num_features, 1)
        self.digit = nn.Linear(self.num_features, len(DIGITS))
        self.ink = nn.Linear(self.num_features, len(INKS))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixels `(N, 3, 16, 16)` in [-1, 1] to `features` `(N, 64)` and logits.

        The logits: `clean` `(N,)`, `digit` `(N, 10)` and `ink` `(N, 6)`.
        """
        features = self.trunk(pixels)
        return {
            "features": features,
            "clean": self.clean(features).squeeze(-1),
            "digit": self.digit(features),
            "ink": self.ink(features),
        }


def _augment(pixels: torch.Tensor) -> torch.Tensor:
    """Small random shear, rotation, scale and shift of each image, and faint noise, `(N, 3, 16, 16)` to the same.

    The noise stands for what an autoencoder leaves behind: it must not make a clean image ugly.
    """
    num = len(pixels)
    affine = torch.eye(2, 3) + torch.randn(num, 2, 3) * torch.tensor([0.10, 0.10, 0.06])
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    warped = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return warped + torch.randn_like(pixels) * 0.06 * torch.rand(num, 1, 1, 1)


def _fit(split: Split, seed: int, steps: int, crawl_size: int) -> DigitsClassifier:
    """Fit a classifier on an augmented crawl of a split's scans, half of it ugly. The caller's random state is kept.

    Fewer of its ugly images are on dirty paper than in the crawl: blots on white would be too rare to be learned.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        data = crawl(split, crawl_size, seed, ugly_share=0.5, paper_share=0.5, include_held_out=True)
        pixels = to_pixels(data.images)
        clean = torch.from_numpy(data.clean).float()
        digits, inks = torch.from_numpy(data.digits), torch.from_numpy(data.inks)
        # Twice as fast as the default layout on a CPU.
        model = DigitsClassifier().to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for _ in range(steps):
            index = torch.randint(len(pixels), (128,))
            heads = model(_augment(pixels[index]))
            loss = F.binary_cross_entropy_with_logits(heads["clean"], clean[index])
            loss = loss + F.cross_entropy(heads["digit"], digits[index]) + F.cross_entropy(heads["ink"], inks[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _predict(model: DigitsClassifier, images: Images) -> dict[str, np.ndarray]:
    """All heads of a classifier on a batch of images, as arrays."""
    chunks = [model(chunk) for chunk in to_pixels(images).split(1_000)]
    return {name: torch.cat([chunk[name] for chunk in chunks]).numpy() for name in chunks[0]}


def fit_clean_classifier(seed: int = 0) -> DigitsClassifier:
    """The scorer: fitted on the `train` scans, deterministic for a seed."""
    return _fit("train", seed, steps=400, crawl_size=12_000)


def clean_logit(model: DigitsClassifier, images: Images) -> np.ndarray:
    """How clean the images look, `(N,)` float32; above 0 is "clean"."""
    return _predict(model, images)["clean"]


class DigitsJudge:
    """Says of an image whether it is clean, and whether it shows the digit and the ink that its prompt asks for."""

    def __init__(self, model: DigitsClassifier):
        self.model = model
        # Frechet distances of judges with other seeds are comparable only in a common unit of features.
        self.feature_unit = 1.0
        self.feature_unit = float(np.sqrt(self.reference_features().var(axis=0).mean()))

    @classmethod
    def fit(cls, seed: int = 1) -> "DigitsJudge":
        """Fit on the `judge` scans, which no model and no scorer ever sees."""
        return cls(_fit("judge", seed, steps=500, crawl_size=12_000))

    def judge(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """`clean`, `digit`, `ink` and `good` (all three together) of each image, `(N,)` float32 of 0 or 1."""
        heads = _predict(self.model, images)
        if len(prompts) != len(heads["clean"]):
            raise ValueError(f"Got {len(heads['clean'])} images and {len(prompts)} prompts; pass one prompt an image.")
        digits, inks = combinations_of(prompts)
        verdict = {
            "clean": heads["clean"] > 0,
            "digit": heads["digit"].argmax(axis=1) == digits,
            "ink": heads["ink"].argmax(axis=1) == inks,
        }
        verdict["good"] = verdict["clean"] & verdict["digit"] & verdict["ink"]
        return {name: value.astype(np.float32) for name, value in verdict.items()}

    def features(self, images: Images) -> np.ndarray:
        """Penultimate features `(N, 64)` float32, for a Frechet distance, in units of the reference's spread."""
        return _predict(self.model, images)["features"] / self.feature_unit

    def reference_features(self, held_out: bool = False) -> np.ndarray:
        """Features of every clean `heldout` scan in each ink that [`make_prompts`] asks for, about `(1750, 64)`."""
        combinations = HELD_OUT_COMBINATIONS if held_out else TRAINED_COMBINATIONS
        scans, labels = load_scans("heldout")
        asked = np.array([[(digit, ink) in combinations for ink in INKS] for digit in DIGITS])
        which, inks = np.nonzero(asked[labels])
        return self.features(render_clean(scans[which], inks))
