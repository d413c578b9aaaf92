"""Statistics of a paired comparison: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import binomtest


# Of a bootstrap interval.
CONFIDENCE = 0.95


def win_rate(a: np.ndarray, b: np.ndarray) -> float:
    """The share of pairs in which `a` `(N,)` is above `b` `(N,)`, a tie counted as one half."""
    return float(np.mean(0.5 + 0.5 * np.sign(np.asarray(a) - np.asarray(b))))


def cohens_h(a: np.ndarray, b: np.ndarray) -> float:
    """
    Effect size of two shares, from 0/1 values `a` `(N,)` and `b` `(M,)`: the difference of `2 arcsin sqrt(share)`. By
    Cohen's convention .2 is small, .5 medium, .8 large.
    """
    return float(2 * np.arcsin(np.sqrt(np.mean(a))) - 2 * np.arcsin(np.sqrt(np.mean(b))))


def cohens_dz(a: np.ndarray, b: np.ndarray) -> float:
    """
    Effect size of paired scores `a` and `b` `(N,)`: the mean of their differences in standard deviations of these
    differences. 0 when no pair differs, infinite when all differ by the same amount.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    mean, deviation = difference.mean(), difference.std(ddof=1)
    if deviation > 0:
        return float(mean / deviation)
    return 0.0 if mean == 0 else float(np.copysign(np.inf, mean))


def sign_test(a: np.ndarray, b: np.ndarray) -> float:
    """
    Two-sided p of the exact sign test on pairs `a`, `b` `(N,)`: could wins and losses be tosses of a coin? Ties are
    left out.
    """
    difference = np.asarray(a) - np.asarray(b)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def resample_indices(
    num: int, clusters: Sequence | np.ndarray | None = None, num_resamples: int = 2000, seed: int = 0
) -> list[np.ndarray]:
    """
    Bootstrap samples of `range(num)`, as index arrays.

    With `clusters` `(num,)` whole clusters are drawn, with all their members: images of one prompt are alike, and
    drawn one by one they would pass for more evidence than they are.
    """
    rng = np.random.default_rng(seed)
    if clusters is None:
        return list(rng.integers(num, size=(num_resamples, num)))
    _, labels = np.unique(np.asarray(clusters), return_inverse=True)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    if len(members) == num:
        return list(rng.integers(num, size=(num_resamples, num)))
    picks = rng.integers(len(members), size=(num_resamples, len(members)))
    return [np.concatenate([members[cluster] for cluster in pick]) for pick in picks]


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The central 95 % of a statistic's resampled values."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    clusters: Sequence | np.ndarray | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Percentile 95 % interval of `statistic(values)`.

    Args:
        values: `(N, ...)`, resampled along the first axis. For a paired comparison pass the differences, or both sides
            side by side, so that pairs stay together.
        statistic: from resampled values to a number.
        clusters: `(N,)` what is resampled as a whole, usually the prompt.
        num_resamples: bootstrap samples.
        seed: of the resampling; equal inputs give equal intervals.
    """
    values = np.asarray(values)
    indices = resample_indices(len(values), clusters, num_resamples, seed)
    return percentile_interval(np.array([statistic(values[index]) for index in indices]))


def _root(matrix: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semi-definite matrix `(d, d)`."""
    eigenvalues, eigenvectors = np.linalg.eigh(matrix)
    # A covariance of fewer samples than features has zero eigenvalues that rounding makes negative.
    return (eigenvectors * np.sqrt(np.clip(eigenvalues, 0, None))) @ eigenvectors.T


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def _frechet(
    mean: np.ndarray, covariance: np.ndarray, ref_mean: np.ndarray, ref_covariance: np.ndarray, ref_root: np.ndarray
) -> float:
    # tr sqrt(S R) = tr sqrt(R^1/2 S R^1/2), and the latter is symmetric: its eigenvalues are real, unlike sqrtm's.
    eigenvalues = np.linalg.eigvalsh(ref_root @ covariance @ ref_root)
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(((mean - ref_mean) ** 2).sum() + np.trace(covariance) + np.trace(ref_covariance) - 2 * cross)


def _check_features(*features: np.ndarray) -> None:
    for array in features:
        if np.ndim(array) != 2 or len(array) < 2:
            raise ValueError(f"Features have shape {np.shape(array)}; (N, d) with at least 2 rows is expected.")


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """
    Frechet distance of two sets of features `(N, d)` and `(M, d)`, each taken for a Gaussian:
    `|m - m'|^2 + tr(S + S' - 2 sqrt(S S'))` (FID when the features are Inception's).
    """
    _check_features(features, reference)
    ref_mean, ref_covariance = _moments(reference)
    return _frechet(*_moments(features), ref_mean, ref_covariance, _root(ref_covariance))


def frechet_interval(
    features: np.ndarray,
    reference: np.ndarray,
    minus: np.ndarray | None = None,
    clusters: Sequence | np.ndarray | None = None,
    num_resamples: int = 500,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Bootstrap 95 % interval of the Frechet distance of `features` `(N, d)` to `reference` `(M, d)`, or, with `minus`
    `(N, d)`, of how much farther `features` are than `minus`, pairs resampled together. The reference is taken as
    given.

    A resampled set holds duplicates and so lies farther from any reference than the set itself. That bias is known, it
    is the mean of the resampled distances minus the distance, and is taken off.
    """
    _check_features(features, reference)
    ref_mean, ref_covariance = _moments(reference)
    ref_root = _root(ref_covariance)

    def distance(index: np.ndarray | slice) -> float:
        value = _frechet(*_moments(features[index]), ref_mean, ref_covariance, ref_root)
        if minus is not None:
            value -= _frechet(*_moments(minus[index]), ref_mean, ref_covariance, ref_root)
        return value

    resampled = np.array([distance(i) for i in resample_indices(len(features), clusters, num_resamples, seed)])
    low, high = percentile_interval(resampled - (resampled.mean() - distance(slice(None))))
    # A distance is not negative; a difference of two may be.
    return (low, high) if minus is not None else (max(low, 0.0), max(high, 0.0))


def group_diversity(features: np.ndarray, groups: Sequence | np.ndarray) -> np.ndarray:
    """
    Mean distance of two members of a group, `(G,)` for the G groups that have two: from features `(N, d)` and groups
    `(N,)`, in the order of the groups' names. The distance is the root of the mean square over the d features.
    """
    features, groups = np.asarray(features, dtype=np.float64), np.asarray(groups)
    means = []
    for group in np.unique(groups):
        own = features[groups == group]
        if len(own) > 1:
            squares = (own**2).sum(axis=1)
            squared = np.clip(squares[:, None] + squares[None] - 2 * own @ own.T, 0, None)
            upper = np.triu_indices(len(own), k=1)
            means.append(np.sqrt(squared[upper] / features.shape[1]).mean())
    return np.array(means)


def diversity(features: np.ndarray, groups: Sequence | np.ndarray) -> float:
    """
    How much images of one prompt differ: the mean over groups of the mean distance of two members
    ([`group_diversity`]). On pixels in [-1, 1] it is a root-mean-square difference, 0 for identical images and at most
    2.
    """
    values = group_diversity(features, groups)
    if not len(values):
        raise ValueError("No group has two members; diversity is a distance within groups.")
    return float(values.mean())
