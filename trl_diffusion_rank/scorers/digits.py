"""The scorer of the embedded world."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from PIL.Image import Image


class DigitsCleanScorer:
    """
    The logit of "a clean scan", by a small classifier fitted on the training digits when it is loaded (seconds). It
    looks at the paper alone and never at the caption. The judges of `evaluate` are other models, fitted on other
    digits.
    """

    name = "digits_clean"

    def __init__(self, seed: int = 0):
        from trl_diffusion_rank.digits.classifiers import fit_clean_classifier

        self.model = fit_clean_classifier(seed=seed)

    def score(self, images: list[Image], prompts: list[str]) -> np.ndarray:
        """Scores `(N,)` of N images."""
        from trl_diffusion_rank.digits.classifiers import clean_logit

        return np.asarray(clean_logit(self.model, images), dtype=np.float64)
