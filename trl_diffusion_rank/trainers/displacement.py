"""Likelihood displacement: the run degrades although its loss falls."""

from collections import deque

import numpy as np


class DisplacementMonitor:
    """
    Watches the errors of the best and of the worst images against the reference, one pair of numbers a log.

    Diffusion-DPO's loss also falls while *both* errors rise, as long as the worst rises faster; samples then turn to
    noise within a few hundred steps (https://huggingface.co/papers/2511.03317). Healthy runs keep the best image's
    error at or below the reference's.

    Args:
        patience (`int`): number of logs over which both must rise, the best one's error staying above the reference. 0
            never finds anything.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self._deltas: deque[tuple[float, float]] = deque(maxlen=max(patience, 2))

    def update(self, chosen_delta: float, rejected_delta: float) -> bool:
        """Add a log; True when displacement is seen over the last `patience` logs."""
        self._deltas.append((chosen_delta, rejected_delta))
        if not self.patience or len(self._deltas) < self._deltas.maxlen:
            return False
        deltas = np.array(self._deltas)
        slopes = np.polyfit(np.arange(len(deltas)), deltas, deg=1)[0]  # of the chosen, of the rejected
        rises = slopes * len(deltas) > 0.01 * np.abs(deltas).mean(0)  # a hundredth over the window; less is noise
        return bool((deltas[:, 0] > 0).all() and rises.all())
