"""From the scores of one prompt's images to their ranks: pure functions."""

from __future__ import annotations

import numpy as np


def win_counts(scores: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """
    Twice the wins of each image, over all scorers and rivals; a tie is one, so that the counts stay whole numbers.

    Args:
        scores: `(S, n)`, S scorers and n images of one prompt.
        margins: `(S,)`, differences up to here are ties.

    Returns:
        `(n,)` int.
    """
    difference = scores[:, :, None] - scores[:, None, :]  # (S, n, n)
    wins = difference > margins[:, None, None]
    losses = difference < -margins[:, None, None]
    # An image ties with itself; that one does not count.
    return (1 + wins.astype(int) - losses.astype(int)).sum(axis=(0, 2)) - len(scores)


def win_shares(scores: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """
    `psi` `(n,)`: the share of scorers and rivals that an image wins against, ties one half, from scores `(S, n)`.
    """
    num_scorers, n = scores.shape
    return win_counts(scores, margins) / (2 * num_scorers * (n - 1))
