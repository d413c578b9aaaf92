"""The comparison of base and tuned in numbers, as a table and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trl_diffusion_rank.evaluation import statistics
from trl_diffusion_rank.tables import format_table


# One line of the report: a metric of an adapter at a number of steps. `json` takes it as it is.
Result = dict[str, Any]


class Distance(NamedTuple):
    """A Frechet distance, and what it was in bootstrap samples `(R,)`."""

    value: float
    resampled: np.ndarray


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows neither infinity nor NaN


def compare_metric(
    base: np.ndarray, tuned: np.ndarray, clusters: Sequence, seed: int = 0, num_resamples: int = 2000
) -> Result:
    """
    A metric of N pairs of images, `base` and `tuned` `(N,)`, higher better, with 95 % intervals by resampling the
    `clusters` `(N,)`. Effect size is Cohen's h where the metric is a share (all values 0 or 1), else the paired d_z,
    which is `None` where it is infinite or there is one pair only.
    """
    base, tuned = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    both = np.stack([base, tuned, tuned - base, 0.5 + 0.5 * np.sign(tuned - base)], axis=1)  # (N, 4)
    # One resampling for all four means, so that they belong together.
    means = statistics.resampled_means(both, clusters, num_resamples, seed)
    intervals = [list(statistics.percentile_interval(column)) for column in means.T]
    is_share = bool(np.isin(both[:, :2], (0, 1)).all())
    effect = statistics.cohens_h(tuned, base) if is_share else statistics.cohens_dz(tuned, base)
    return {
        "higher_is_better": True,
        "base": float(base.mean()),
        "base_interval": intervals[0],
        "tuned": float(tuned.mean()),
        "tuned_interval": intervals[1],
        "difference": float((tuned - base).mean()),
        "difference_interval": intervals[2],
        "win_rate": statistics.win_rate(tuned, base),
        "win_rate_interval": intervals[3],
        "effect_size": _finite(effect),
        "effect_size_kind": "cohens_h" if is_share else "d_z",
        "sign_test_p": statistics.sign_test(tuned, base),
    }


def frechet(features: np.ndarray, reference: statistics.FrechetReference, clusters: Sequence, seed: int) -> Distance:
    """The Frechet distance of features `(N, d)`, to be compared."""
    return Distance(reference.distance(features), reference.resampled(features, clusters, seed=seed))


def compare_frechet(base: Distance, tuned: Distance) -> Result:
    """Two Frechet distances to one reference, resampled by the same clusters and seed; lower is better."""

    def interval(distance: Distance) -> list[float]:
        return [max(end, 0.0) for end in statistics.percentile_interval(distance.resampled)]

    return {
        "higher_is_better": False,
        "base": base.value,
        "base_interval": interval(base),
        "tuned": tuned.value,
        "tuned_interval": interval(tuned),
        "difference": tuned.value - base.value,
        "difference_interval": list(statistics.percentile_interval(tuned.resampled - base.resampled)),
    }


def compare_diversity(base: np.ndarray, tuned: np.ndarray, seed: int = 0) -> Result | None:
    """
    The diversity within each of G groups, `(G,)` by [`~statistics.group_diversity`]. Neither direction is better: some
    of it is lost with the ugly images, all of it in a collapse. `None` when no group has two images.
    """
    if not len(base):
        return None
    columns = np.column_stack([base, tuned, tuned - base])
    resampled = statistics.resampled_means(columns, seed=seed)
    intervals = [list(statistics.percentile_interval(column)) for column in resampled.T]
    means = columns.mean(axis=0)
    return {
        "higher_is_better": None,
        "base": float(means[0]),
        "base_interval": intervals[0],
        "tuned": float(means[1]),
        "tuned_interval": intervals[1],
        "difference": float(means[2]),
        "difference_interval": intervals[2],
    }


def direction(result: Result) -> str:
    """What the interval of a result's difference says: better, worse (higher, lower), or no clear difference."""
    low, high = result["difference_interval"]
    if low <= 0 <= high:
        return "no clear difference"
    up = low > 0
    if result["higher_is_better"] is None:
        return "higher" if up else "lower"
    return "better" if up == result["higher_is_better"] else "worse"


def verdict(results: list[Result]) -> tuple[str, str]:
    """
    One word and one sentence about an adapter's results at one number of steps.

    The word is decided by the results marked `decides` (each judge's headline metric and the Frechet distance): better
    or worse when some are and none the other way, mixed when they disagree. Neither alone is enough: a collapsed model
    can have clean images, all the same.
    """
    words = [direction(result) for result in results if result["decides"]]
    if "better" in words and "worse" in words:
        word = "mixed"
    else:
        word = next((w for w in ("better", "worse") if w in words), "no clear difference")
    parts = []
    for kind in dict.fromkeys([word, "better", "worse", "higher", "lower", "no clear difference"]):
        names = [
            f"{result['metric']} {result['base']:.3g} -> {result['tuned']:.3g}"
            for result in results
            if direction(result) == kind
        ]
        if names:
            label = "" if kind == word else f"{kind}: "
            parts.append(label + ", ".join(names))
    return word, f"{word} ({'; '.join(parts)})"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _with_interval(value: float, interval: Sequence[float], sign: bool = False) -> str:
    plus = "+" if sign and value > 0 else ""
    return f"{plus}{_number(value)} [{_number(interval[0])}, {_number(interval[1])}]"


def results_table(results: list[Result]) -> str:
    """
    Results as Markdown, a line for each. Adapters have a column where there is more than one, categories where there
    are some.
    """
    several = len({result["adapter"] for result in results}) > 1
    categories = any(result["category"] is not None for result in results)
    names = ["adapter"] * several + ["steps"] + ["category"] * categories + ["metric"]
    header = [*names, "base", "tuned", "difference [95 %]", "win rate [95 %]", "effect size", "sign test p"]
    return format_table(header, [_cells(result, several, categories) for result in results], names=len(names))


def _cells(result: Result, several: bool, categories: bool) -> list[str]:
    judge = f"{result['judge']} " if result["judge"] not in (None, result["metric"]) else ""
    cells = [result["adapter"]] if several else []
    cells.append(str(result["num_inference_steps"]))
    if categories:
        cells.append(result["category"].replace("|", "\\|"))
    cells += [
        f"{judge}{result['metric']}" + (" (lower is better)" if result["higher_is_better"] is False else ""),
        _number(result["base"]),
        _number(result["tuned"]),
        _with_interval(result["difference"], result["difference_interval"], sign=True),
    ]
    if "win_rate" not in result:
        return [*cells, "", "", ""]
    kind = "h" if result["effect_size_kind"] == "cohens_h" else "d_z"
    effect, p = result["effect_size"], result["sign_test_p"]
    return [
        *cells,
        _with_interval(result["win_rate"], result["win_rate_interval"]),
        f"{kind} " + ("inf" if effect is None else f"{effect:+.2f}"),
        f"{p:.3f}" if p >= 0.001 else f"{p:.0e}",
    ]
