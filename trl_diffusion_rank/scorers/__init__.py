"""Scorers: an image and its caption to one number, higher is better.

A scorer has a `name` and a method `score(images, prompts)`. Built in are the names in `SCORERS`; any installed package
can add others by the entry-point group `trl_diffusion_rank.scorers`:

    [project.entry-points."trl_diffusion_rank.scorers"]
    my_scorer = "my_package.module:MyScorer"

Where a list of scorers is asked for, an entry is a name, or a mapping with options:

    scorers:
      - pickscore
      - {name: clip, model: openai/clip-vit-base-patch16, label: clip_b16, weight: 0.5}
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from trl_diffusion_rank.options import did_you_mean


if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


__all__ = [
    "SCORERS",
    "Scorer",
    "ScorerSpec",
    "check_scorer",
    "known_scorers",
    "load_scorer",
    "read_scorer",
    "read_scorers",
]

ENTRY_POINT_GROUP = "trl_diffusion_rank.scorers"

# Paths and not classes, so that a scorer's libraries are imported when it is used.
IMSCORE_SCORERS = {
    "imscore_cyclereward": "trl_diffusion_rank.scorers.imscore:CycleRewardScorer",
    "imscore_hpsv2": "trl_diffusion_rank.scorers.imscore:HPSv2Scorer",
    "imscore_imagereward": "trl_diffusion_rank.scorers.imscore:ImageRewardScorer",
    "imscore_mps": "trl_diffusion_rank.scorers.imscore:MPSScorer",
}
SCORERS = {
    "clip": "trl_diffusion_rank.scorers.clip:CLIPScorer",
    "pickscore": "trl_diffusion_rank.scorers.clip:PickScoreScorer",
    "laion_aesthetic": "trl_diffusion_rank.scorers.aesthetic:LaionAestheticScorer",
    "digits_clean": "trl_diffusion_rank.scorers.digits:DigitsCleanScorer",
    "discriminator": "trl_diffusion_rank.scorers.discriminator:DiscriminatorScorer",
    **IMSCORE_SCORERS,
}

# What the built-in ones can be given, so that a misspelt option is refused before anything is imported.
TRANSFORMERS_OPTIONS = ("model", "processor", "batch_size", "device", "dtype")
IMSCORE_OPTIONS = ("model", "batch_size", "device")
OPTIONS = {
    "clip": TRANSFORMERS_OPTIONS,
    "pickscore": TRANSFORMERS_OPTIONS,
    "laion_aesthetic": TRANSFORMERS_OPTIONS,
    "digits_clean": ("seed",),
    "discriminator": ("model", "batch_size", "device", "dtype"),
    **dict.fromkeys(IMSCORE_SCORERS, IMSCORE_OPTIONS),
}


class Scorer(Protocol):
    """What a scorer has. Its numbers need no common scale: rankings use their order within one prompt."""

    name: str

    def score(self, images: list[Image], prompts: list[str]) -> np.ndarray:
        """Scores `(N,)` of N images, each for the caption at its place."""
        ...


@dataclass(frozen=True)
class ScorerSpec:
    """
    One entry of a list of scorers.

    Args:
        name (`str`):
            Name of the scorer, built in or of an installed package.
        label (`str`):
            What its column is called, as in `score_<label>`.
        weight (`float`, *optional*, defaults to `1.0`):
            Of its wins in the mean over scorers.
        options (`dict`, *optional*):
            What the scorer is built with.
    """

    name: str
    label: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Scorer:
        return load_scorer(self.name, **self.options)


def known_scorers() -> dict[str, str]:
    """Where each scorer's class is, built in and from installed packages, by name."""
    return SCORERS | {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def check_scorer(name: str) -> None:
    """Refuse a name that is not that of a scorer, or whose package is not installed. Loads nothing."""
    known = known_scorers()
    if name not in known:
        raise ValueError(f"The scorer {name!r} is not known.{did_you_mean(name, known)} Known: {join(known)}.")
    if known[name] == IMSCORE_SCORERS.get(name) and find_spec("imscore") is None:
        raise ImportError(
            f"The scorer {name!r} needs the package imscore, which is not installed: "
            "`pip install trl-diffusion-rank[scorers]`."
        )


def read_scorers(entries: list[str | dict[str, Any]]) -> list[ScorerSpec]:
    """
    A list of scorers, checked; nothing is loaded.

    Args:
        entries: names of scorers, or mappings with the keys `name`, `label` (by default the name), `weight` and the
            scorer's own options. A mapping may be a string of JSON, as the command line gives it.
    """
    if not isinstance(entries, (list, tuple)) or not entries:
        raise ValueError(f"`scorers` is {entries!r}; give a list of at least one, for example [pickscore].")
    specs = [read_scorer(entry) for entry in entries]
    labels = [spec.label for spec in specs]
    for spec in specs:
        if labels.count(spec.label) > 1:
            raise ValueError(
                f"Several entries of `scorers` are called {spec.label!r}, which is the name of a column; keep one "
                f"of them, or set another `label` in the others, as in {{name: {spec.name}, label: another}}."
            )
    return specs


def read_scorer(entry: str | dict[str, Any], option: str = "scorers") -> ScorerSpec:
    """One entry of a list of scorers, which errors call `option`, checked."""
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        try:
            entry = json.loads(entry)
        except json.JSONDecodeError as error:
            raise ValueError(f"An entry of `{option}` starts as JSON and is none: {entry} ({error})") from error
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f"An entry of `{option}` is {entry!r}; it must be a name or a mapping with the key `name`.")

    options = dict(entry)
    name = options.pop("name")
    label = options.pop("label", name)
    weight = options.pop("weight", 1.0)
    check_scorer(name)
    if not isinstance(label, str) or not re.fullmatch(r"[\w.-]+", label):
        raise ValueError(
            f"`label` of the scorer {name!r} is {label!r}; a word of letters, digits, `_`, `.` and `-` is expected, "
            "since it names a column."
        )
    if type(weight) not in (int, float) or not (math.isfinite(weight) and weight > 0):
        raise ValueError(
            f"`weight` of the scorer {label!r} is {weight!r}; a finite number above 0 is expected. Leave a scorer "
            "out that is to have none."
        )
    # The options of other packages' scorers are known once they are imported: see `load_scorer`.
    if known_scorers()[name] == SCORERS.get(name) and name in OPTIONS:
        for option in options:
            if option not in OPTIONS[name]:
                keys = ["label", "weight", *OPTIONS[name]]
                raise ValueError(
                    f"The scorer {name!r} has no option {option!r}.{did_you_mean(option, keys)} It takes {join(keys)}."
                )
    return ScorerSpec(name, label, float(weight), options)


def load_scorer(name: str, **options: Any) -> Scorer:
    """The scorer called `name`, built with its own `options`."""
    check_scorer(name)
    path = known_scorers()[name]
    module, _, attribute = path.partition(":")
    try:
        scorer_class = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"The scorer {name!r} is registered as {path!r}, which can't be loaded: {error}.") from error
    signature = inspect.signature(scorer_class)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(
            f"The scorer {name!r} can't be built with the options {options}: {error}. It takes "
            f"{join(signature.parameters) or 'none'}."
        ) from error
    scorer = scorer_class(**options)
    if not callable(getattr(scorer, "score", None)):
        raise TypeError(
            f"The scorer {name!r} ({path}) is a {type(scorer).__name__} without a method `score(images, prompts)`; "
            "see `trl_diffusion_rank.scorers.Scorer` for what a scorer has."
        )
    return scorer


def join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
