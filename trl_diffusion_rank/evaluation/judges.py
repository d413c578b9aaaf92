"""Judges: what `evaluate` asks about images. They take no part in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from trl_diffusion_rank.options import check_choice
from trl_diffusion_rank.scorers import ScorerSpec, known_scorers, read_scorer


if TYPE_CHECKING:
    from PIL.Image import Image

    from trl_diffusion_rank.digits.classifiers import DigitsJudge
    from trl_diffusion_rank.scorers import Scorer


# Sides of the thumbnails that diversity is measured on: coarse differences are what counts
THUMBNAIL = 64


class Judge:
    """
    Numbers about each image, higher is better. What it asks is loaded at the first question.

    Attributes:
        name (`str`, *optional*):
            Its name in tables and columns; None where it has features alone.
        metrics (`tuple[str, ...]`):
            Names of its numbers.
        headline (`str`, *optional*):
            The metric that the verdict is about.
        made_of (`dict`):
            What decides its numbers.
    """

    name: str | None
    metrics: tuple[str, ...]
    headline: str | None
    made_of: dict[str, Any]

    def judge(self, images: list[Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """The metrics of N images, each `(N,)`, by name. Shares are given as 0 and 1."""
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

    def check_prompts(self, prompts: list[str]) -> None:
        """Refuse prompts that it can't judge, before any image is drawn."""

    def unload(self) -> None:
        """Give the memory back that its model takes."""

    def columns(self) -> dict[str, str]:
        """Metric -> the column of its values."""
        return {m: f"score_{m}" if m == self.name else f"score_{self.name}_{m}" for m in self.metrics}


class ScorerJudge(Judge):
    """Any scorer as a judge."""

    def __init__(self, spec: ScorerSpec):
        self.spec = spec
        self.name = self.headline = spec.label
        self.metrics = (spec.label,)
        self.made_of = asdict(spec)

    @cached_property
    def scorer(self) -> Scorer:
        return self.spec.load()

    def unload(self) -> None:
        self.__dict__.pop("scorer", None)

    def judge(self, images: list[Image], prompts: list[str]) -> dict[str, np.ndarray]:
        scores = np.asarray(self.scorer.score(images, prompts), dtype=np.float64)
        if scores.shape != (len(images),):
            raise ValueError(
                f"The judge {self.name!r} returned shape {scores.shape} for {len(images)} images; it must return one "
                "number for each."
            )
        if not np.isfinite(scores).all():
            index = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(
                f"The judge {self.name!r} gave {scores[index]} for an image of {prompts[index]!r}; every score must "
                "be a finite number."
            )
        return {self.spec.label: scores}


class DigitsWorldJudge(Judge):
    """
    The judges of the embedded world: clean, the right digit, the right ink, and good, which is all three; Frechet
    distance to clean scans. Fitted on digits that neither the base model nor any scorer has seen.
    """

    name = "digits"
    metrics = ("clean", "digit", "ink", "good")
    headline = "good"
    made_of: ClassVar[dict[str, Any]] = {"name": "digits"}

    @cached_property
    def fitted(self) -> DigitsJudge:
        from trl_diffusion_rank.digits.classifiers import DigitsJudge

        return DigitsJudge.fit(seed=1)

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

    def check_prompts(self, prompts: list[str]) -> None:
        from trl_diffusion_rank.digits.data import combinations_of

        try:
            combinations_of(prompts)
        except ValueError as error:
            raise ValueError(f"The judge 'digits' knows the embedded world's captions alone. {error}") from error


def read_judges(entries: list[Mapping[str, Any]]) -> list[Judge]:
    """
    A list of judges, checked; nothing is loaded.

    Args:
        entries: mappings with the key `name`, that of a scorer or `digits`. Those of a scorer may have a `label`, by
            default the name, and the scorer's own options.
    """
    judges = [_read_judge(entry) for entry in entries]
    names = [judge.name for judge in judges]
    columns = [column for judge in judges for column in judge.columns().values()]
    for judge in judges:
        if names.count(judge.name) > 1 or any(columns.count(column) > 1 for column in judge.columns().values()):
            raise ValueError(
                f"The judge {judge.name!r} would write columns that another one of `judges` writes too: "
                f"{', '.join(judge.columns().values())}. Keep one of them, or set another `label`, as in "
                f"{{name: {judge.name}, label: another}}."
            )
    return judges


def _read_judge(entry: Mapping[str, Any]) -> Judge:
    name = entry.get("name")
    if isinstance(name, str):
        check_choice("judges", name, ("digits", *known_scorers()))
    if name == "digits":
        if len(entry) > 1:
            raise ValueError(f"`judges` has {dict(entry)}; the judge 'digits' has no options, write `digits`.")
        return DigitsWorldJudge()
    if "weight" in entry:
        raise ValueError(f"`judges` has {dict(entry)}; judges are not averaged, so leave `weight` out.")
    spec = read_scorer(dict(entry), "judges")
    if spec.name == "discriminator" and "model" not in spec.options:
        raise ValueError(
            "`judges` has the scorer `discriminator` without a model: give its folder or Hub id, as in "
            "{name: discriminator, model: runs/mine/discriminator}. One that neither ranked the training images nor "
            "took part in the loss says more."
        )
    return ScorerJudge(spec)


def thumbnail(image: Image) -> np.ndarray:
    """Pixels `(h, w, 3)` uint8 of an image shrunk to at most [`THUMBNAIL`] a side, never enlarged."""
    image = image.convert("RGB")
    return np.asarray(image.resize((min(image.width, THUMBNAIL), min(image.height, THUMBNAIL))))


def pixel_features(thumbnails: list[np.ndarray]) -> np.ndarray:
    """Thumbnails of N images, uint8 of any shape with d elements, as pixels in [-1, 1], `(N, d)`."""
    return np.stack([pixels.reshape(-1) for pixels in thumbnails]).astype(np.float32) / 127.5 - 1
