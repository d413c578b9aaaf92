"""Likelihood displacement: the run degrades although its loss falls."""

from collections import deque

import numpy as np


# Every run with a reference displaces a little. On the embedded world runs that ended well (benchmarks/objectives.py)
# had the best images' error up to a third above the reference's, those that lost digits or ink at few steps nearly a
# half, those that collapsed two and a half times and more.
TOLERANCE = 0.5


class DisplacementMonitor:
    """
    Watches the errors of the best and of the worst images against the reference, one pair of numbers a log.

    Diffusion-DPO's loss also falls while *both* errors rise, as long as the worst rises faster; samples then turn to
    noise within a few hundred steps (https://huggingface.co/papers/2511.03317).

    Args:
        patience (`int`): number of logs over which both must rise, the best images' error being on average more than
            half above the reference's. 0 never finds anything.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self._rises: deque[tuple[float, float]] = deque(maxlen=max(patience, 2))

    def update(self, chosen_rise: float, rejected_delta: float) -> bool:
        """
        Add a log; True when displacement is seen over the last `patience` logs.

        Args:
            chosen_rise: how much the best images' error is above the reference's, as a share of it; below 0 it fell.
            rejected_delta: what the worst images' error exceeds the reference's.
        """
        self._rises.append((chosen_rise, rejected_delta))
        if not self.patience or len(self._rises) < self._rises.maxlen:
            return False
        rises = np.array(self._rises)
        slopes = np.polyfit(np.arange(len(rises)), rises, deg=1)[0]  # of the chosen, of the rejected
        rising = slopes * len(rises) > 0.01 * np.abs(rises).mean(0)  # a hundredth over the window; less is noise
        return bool(rises[:, 0].mean() > TOLERANCE and rising.all())
