"""Scorers: an image and its caption to one number, higher is better.

A scorer has a `name` and a method `score(images, prompts)`. Built in are the names in `SCORERS`; any installed package
can add others by the entry-point group `trl_diffusion_rank.scorers`:

    [project.entry-points."trl_diffusion_rank.scorers"]
    my_scorer = "my_package.module:MyScorer"
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol


if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


__all__ = ["SCORERS", "Scorer", "check_scorer", "known_scorers", "load_scorer"]

ENTRY_POINT_GROUP = "trl_diffusion_rank.scorers"

# Paths and not classes, so that a scorer's libraries are imported when it is used.
SCORERS = {
    "clip": "trl_diffusion_rank.scorers.clip:CLIPScorer",
    "pickscore": "trl_diffusion_rank.scorers.clip:PickScoreScorer",
    "digits_clean": "trl_diffusion_rank.scorers.digits:DigitsCleanScorer",
}


class Scorer(Protocol):
    """What a scorer has. Its numbers need no common scale: rankings use their order within one prompt."""

    name: str

    def score(self, images: list[Image], prompts: list[str]) -> np.ndarray:
        """Scores `(N,)` of N images, each for the caption at its place."""
        ...


def known_scorers() -> dict[str, str]:
    """Where each scorer's class is, built in and from installed packages, by name."""
    return SCORERS | {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def check_scorer(name: str) -> None:
    """Refuse a name that is not that of a scorer. Loads nothing."""
    known = known_scorers()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"The scorer {name!r} is not known.{hint} Known: {', '.join(sorted(known))}.")


def load_scorer(name: str, **options: Any) -> Scorer:
    """The scorer called `name`, built with its own `options`."""
    check_scorer(name)
    module, _, attribute = known_scorers()[name].partition(":")
    return getattr(import_module(module), attribute)(**options)
