"""Judges: what `evaluate` asks about images. They take no part in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trl_diffusion_rank.scorers import load_scorer


if TYPE_CHECKING:
    from PIL.Image import Image


class Judge:
    """
    Numbers about each image, higher is better.

    Attributes:
        name (`str`):
            Its name in tables.
        headline (`str`):
            The metric that the verdict is about.
    """

    name: str
    headline: str

    def judge(self, images: list[Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """Metrics of N images, each `(N,)`, by name. Shares are given as 0 and 1."""
        raise NotImplementedError

    def features(self, images: list[Image]) -> np.ndarray | None:
        """
        Features `(N, d)` for the Frechet distance to [`reference_features`], or `None` where there is no reference.
        """
        return None

    def reference_features(self) -> np.ndarray | None:
        """Features `(M, d)` of the images one would like to have."""
        return None

    def groups(self, prompts: list[str]) -> list[str]:
        """Which prompts `(N,)` ask for the same, for the diversity within."""
        return prompts


class ScorerJudge(Judge):
    """Any scorer as a judge."""

    def __init__(self, name: str):
        self.name = self.headline = name
        self.scorer = load_scorer(name)

    def judge(self, images: list[Image], prompts: list[str]) -> dict[str, np.ndarray]:
        scores = np.asarray(self.scorer.score(images, prompts), dtype=np.float64)
        if not np.isfinite(scores).all():
            index = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(
                f"The judge {self.name!r} gave {scores[index]} for an image of {prompts[index]!r}; every score must "
                "be a finite number."
            )
        return {self.name: scores}


class DigitsWorldJudge(Judge):
    """
    The judges of the embedded world: clean, the right digit, the right ink, and good, which is all three; Frechet
    distance to clean scans. Fitted on digits that neither the base model nor any scorer has seen.
    """

    name = "digits"
    headline = "good"

    def __init__(self, seed: int = 1):
        from trl_diffusion_rank.digits.classifiers import DigitsJudge

        self.fitted = DigitsJudge.fit(seed=seed)

    def judge(self, images: list[Image], prompts: list[str]) -> dict[str, np.ndarray]:
        return self.fitted.judge(images, prompts)

    def features(self, images: list[Image]) -> np.ndarray:
        return self.fitted.features(images)

    def reference_features(self) -> np.ndarray:
        return self.fitted.reference_features()

    def groups(self, prompts: list[str]) -> list[str]:
        """A digit in an ink is the same wish in each of the three wordings."""
        from trl_diffusion_rank.digits.data import parse_caption

        return [" ".join(parse_caption(prompt)) for prompt in prompts]


def check_prompts(name: str, prompts: list[str]) -> None:
    """Refuse prompts that the judge called `name` can't judge, before any image is drawn."""
    if name == "digits":
        from trl_diffusion_rank.digits.data import combinations_of

        try:
            combinations_of(prompts)
        except ValueError as error:
            raise ValueError(f"The judge 'digits' knows the embedded world's captions alone. {error}") from error


def load_judge(name: str) -> Judge:
    """The judge called `name`: `digits`, or the name of any scorer."""
    return DigitsWorldJudge() if name == "digits" else ScorerJudge(name)


def pixel_features(images: list[Image], size: int = 64) -> np.ndarray:
    """
    Pixels in [-1, 1], `(N, d)`, of images shrunk to at most `size` pixels a side: coarse differences are what counts.
    """
    rows = []
    for image in images:
        image = image.convert("RGB")
        image = image.resize((min(image.width, size), min(image.height, size)))
        rows.append(np.asarray(image, dtype=np.float32).reshape(-1) / 127.5 - 1)
    return np.stack(rows)
