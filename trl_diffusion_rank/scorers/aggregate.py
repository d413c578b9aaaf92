"""From the scores of one prompt's images to their ranks, and which of the images to keep: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np


def win_counts(scores: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """
    Twice the wins of each image over its rivals, for each scorer; a tie is one, so that the counts are whole numbers.

    Args:
        scores: `(..., S, n)`, S scorers and n images of one prompt, for any number of prompts.
        margins: `(S,)`, differences up to here are ties.

    Returns:
        `(..., S, n)` int, each from 0 to 2 (n - 1).
    """
    counts = np.empty(scores.shape, dtype=np.int64)
    for s, (own, margin) in enumerate(zip(np.moveaxis(scores, -2, 0), margins, strict=True)):
        difference = own[..., :, None] - own[..., None, :]  # (..., n, n)
        wins, losses = difference > margin, difference < -margin
        # An image ties with itself; that one does not count.
        counts[..., s, :] = (1 + wins.astype(np.int8) - losses.astype(np.int8)).sum(axis=-1) - 1
    return counts


def win_shares(scores: np.ndarray, margins: np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    """
    `psi`: the share of its rivals that an image wins against, ties one half, in the (weighted) mean over scorers.

    It is a ratio of whole numbers, so that images which are even have exactly the same one.

    Args:
        scores: `(..., S, n)`, S scorers and n images of one prompt, for any number of prompts.
        margins: `(S,)`, differences up to here are ties.
        weights: `(S,)` of the scorers, above 0; by default they count the same.

    Returns:
        `(..., n)` from 0 to 1.
    """
    num_scorers, n = scores.shape[-2:]
    weights = whole_weights(weights) if weights is not None else [1] * num_scorers
    if len(weights) != num_scorers:
        raise ValueError(f"`weights` has {len(weights)} entries for {num_scorers} scorers; give one to each.")
    total = 2 * (n - 1) * sum(weights)
    # Weights of many digits make whole numbers that no float or int64 holds; Python's own hold any.
    dtype = np.int64 if total < 2**53 else object
    counts = win_counts(scores, margins).astype(dtype)  # (..., S, n)
    return ((counts * np.array(weights, dtype=dtype)[:, None]).sum(axis=-2) / total).astype(np.float64)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """
    The least whole numbers in the proportions of the `weights`, read as the decimals they are written as: 0.1, 0.2 and
    0.3 give 1, 2 and 3. In floats 0.1 + 0.2 and 0.3 differ, and an even match would not be a tie.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"`weights` are {list(weights)}; each must be a finite number above 0.")
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * denominator) for fraction in fractions]
    divisor = math.gcd(*whole)
    return [weight // divisor for weight in whole]


def spread_best(psi: np.ndarray, keep: int) -> np.ndarray:
    """
    The `keep` images whose `psi` are spread best: with as few ties as can be, and of these choices the one whose
    smallest gap between neighbours is widest. It always holds one of the best and one of the worst images. Of choices
    that are equal so far, it is the one with the earliest images.

    Args:
        psi: `(n,)`, from 0 to 1.
        keep: how many, at least 2; all of them where there are no more.

    Returns:
        `(min(keep, n),)` int, ascending.
    """
    if keep < 2:
        raise ValueError(f"`keep` is {keep}; a ranking needs at least 2 images.")
    if keep >= len(psi):
        return np.arange(len(psi))
    # Nine digits: 1/3 - 1/6 and 1/6 - 0 are the same gap, whatever their last bits say.
    levels, first, level_of = np.unique(np.round(psi, 9), return_index=True, return_inverse=True)
    if len(levels) <= keep:
        return np.sort(np.argsort(occurrences(level_of), kind="stable")[:keep])

    levels = psi[first]
    gaps = np.rint((levels[None, :] - levels[:, None]) * 1e9).astype(np.int64)  # (m, m) from row to column
    ends = [0, len(levels) - 1]
    widths = np.unique(gaps[np.triu_indices(len(levels), k=1)]).tolist()
    gaps = gaps.tolist()
    low, high = 0, len(widths)  # the widest that leaves room for `keep` levels is in widths[low:high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if longest_chain(gaps, ends, widths[middle]) >= keep else (low, middle)

    chosen = ends
    for level in np.argsort(first).tolist():  # the earliest images first: what can stay, stays
        extended = sorted({*chosen, level})
        if len(extended) <= keep <= longest_chain(gaps, extended, widths[low]):
            chosen = extended
    return np.sort(first[chosen])


def occurrences(values: np.ndarray) -> np.ndarray:
    """How many times each of the `values` `(n,)` came before."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    counts = np.empty_like(order)
    counts[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return counts


def longest_chain(gaps: list[list[int]], fixed: list[int], width: int) -> int:
    """
    How many of m ascending levels can be chosen, the `fixed` ones among them, with no gap below `width`; 0 where the
    fixed ones are themselves too close. `fixed` is ascending and holds the first and the last level.
    """
    length = 1
    for start, end in pairwise(fixed):
        if gaps[start][end] < width:
            return 0
        last = start
        for level in range(start + 1, end):  # the earliest that fits leaves most room
            if gaps[last][level] >= width and gaps[level][end] >= width:
                last = level
                length += 1
        length += 1
    return length


def agreement(first: list[list[float]], second: list[list[float]]) -> float:
    """Mean Kendall tau-b of two scorers over the rows, those left out in which one of them sees no difference."""
    from scipy.stats import kendalltau

    varied = [(a, b) for a, b in zip(first, second, strict=True) if len(set(a)) > 1 and len(set(b)) > 1]
    return float(np.mean([kendalltau(a, b).statistic for a, b in varied])) if varied else float("nan")
