"""Statistics of a paired comparison: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
    mean, deviation = difference.mean(), difference.std(ddof=1) if len(difference) > 1 else 0.0
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
) -> Iterator[np.ndarray]:
    """
    Bootstrap samples of `range(num)`, as index arrays.

    With `clusters` `(num,)` whole clusters are drawn, with all their members: images of one prompt are alike, and
    drawn one by one they would pass for more evidence than they are.
    """
    labels = _cluster_labels(num, clusters)
    order, sizes = np.argsort(labels, kind="stable"), np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    for pick in _picked_clusters(len(sizes), num_resamples, seed):
        within = np.arange(sizes[pick].sum()) - np.repeat(np.cumsum(sizes[pick]) - sizes[pick], sizes[pick])
        yield order[np.repeat(starts[pick], sizes[pick]) + within]


def resampled_means(
    values: np.ndarray,
    clusters: Sequence | np.ndarray | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """
    Means of k columns `values` `(N, k)` over the bootstrap samples of [`resample_indices`], `(num_resamples, k)`: a
    cluster's sum counts as often as it is drawn, which takes a hundredth of the time that its members would.
    """
    values = np.asarray(values, dtype=np.float64)
    labels = _cluster_labels(len(values), clusters)
    sizes = np.bincount(labels)  # (G,)
    sums = np.stack([np.bincount(labels, weights=column) for column in values.T], axis=1)  # (G, k)
    means = np.empty((num_resamples, values.shape[1]))
    for resample, pick in enumerate(_picked_clusters(len(sizes), num_resamples, seed)):
        counts = np.bincount(pick, minlength=len(sizes))
        means[resample] = counts @ sums / (counts @ sizes)
    return means


def _cluster_labels(num: int, clusters: Sequence | np.ndarray | None) -> np.ndarray:
    """Numbers from 0 of the cluster of each member, `(num,)`."""
    if clusters is None:
        return np.arange(num)
    labels = np.unique(np.asarray(clusters), return_inverse=True)[1].reshape(-1)
    return np.arange(num) if len(labels) == labels.max() + 1 else labels  # clusters of one are no clusters


def _picked_clusters(num_clusters: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.integers(num_clusters, size=num_clusters) for _ in range(num_resamples))


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


class FrechetReference:
    """
    What Frechet distances are measured from: features `(M, d)`, taken for a Gaussian.

    The distance is `|m - m'|^2 + tr(S + S' - 2 sqrt(S S'))` of means and covariances (FID when the features are
    Inception's, https://huggingface.co/papers/1706.08500).
    """

    def __init__(self, features: np.ndarray):
        _check_features(features)
        features = np.asarray(features, dtype=np.float64)
        covariance = np.atleast_2d(np.cov(features, rowvar=False))
        eigenvalues, eigenvectors = np.linalg.eigh(covariance)
        # A covariance of fewer samples than features has zero eigenvalues that rounding makes negative.
        roots = np.sqrt(np.clip(eigenvalues, 0, None))
        self.mean = features.mean(axis=0)
        self.variance = np.trace(covariance)
        self.root = (eigenvectors * roots) @ eigenvectors.T  # (d, d), symmetric

    def distance(self, features: np.ndarray) -> float:
        """The Frechet distance of features `(N, d)`."""
        _check_features(features)
        mean = np.asarray(features, dtype=np.float64).mean(axis=0)
        centred = (features - mean) / np.sqrt(len(features) - 1)
        # tr sqrt(S R) = tr sqrt(R^1/2 S R^1/2), the sum of the singular values of X R^1/2: the roots of the
        # eigenvalues of whichever of its two products with itself is smaller.
        product = centred @ self.root  # (N, d)
        square = product.T @ product if len(product) > product.shape[1] else product @ product.T
        cross = np.sqrt(np.clip(np.linalg.eigvalsh(square), 0, None)).sum()
        return float(((mean - self.mean) ** 2).sum() + (centred**2).sum() + self.variance - 2 * cross)

    def resampled(
        self,
        features: np.ndarray,
        clusters: Sequence | np.ndarray | None = None,
        num_resamples: int = 500,
        seed: int = 0,
    ) -> np.ndarray:
        """
        Bootstrapped distances `(num_resamples,)` of features `(N, d)`, the reference taken as given.

        A resampled set holds duplicates and so lies farther from any reference than the set itself. That bias is
        known, it is the mean of the resampled distances minus the distance, and is taken off. Features of the same
        clusters are resampled alike: the difference of two results is that of pairs.
        """
        indices = resample_indices(len(features), clusters, num_resamples, seed)
        distances = np.array([self.distance(features[index]) for index in indices])
        return distances - (distances.mean() - self.distance(features))


def _check_features(features: np.ndarray) -> None:
    if np.ndim(features) != 2 or len(features) < 2:
        raise ValueError(f"Features have shape {np.shape(features)}; (N, d) with at least 2 rows is expected.")


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of features `(N, d)` and `(M, d)`: see [`FrechetReference`]."""
    return FrechetReference(reference).distance(features)


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
