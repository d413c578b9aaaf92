"""The comparison of base and tuned in numbers, as a table and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trl_diffusion_rank.evaluation import statistics


# One line of the report: a metric at a number of steps. `json` takes it as it is.
Result = dict[str, Any]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows neither infinity nor NaN


def compare_metric(base: np.ndarray, tuned: np.ndarray, clusters: Sequence, seed: int = 0) -> Result:
    """
    A metric of N pairs of images, `base` and `tuned` `(N,)`, higher better, with 95 % intervals by resampling the
    `clusters` `(N,)`. Effect size is Cohen's h where the metric is a share (all values 0 or 1), else the paired d_z.
    """
    base, tuned = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    both = np.stack([base, tuned, tuned - base, 0.5 + 0.5 * np.sign(tuned - base)], axis=1)  # (N, 4)
    # One resampling for all four means, so that they belong together.
    indices = statistics.resample_indices(len(both), clusters, seed=seed)
    means = np.array([both[index].mean(axis=0) for index in indices])
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


def compare_frechet(
    base: np.ndarray, tuned: np.ndarray, reference: np.ndarray, clusters: Sequence, seed: int = 0
) -> Result:
    """Frechet distances to `reference` `(M, d)` of the features `base` and `tuned` `(N, d)`; lower is better."""
    distances = [statistics.frechet_distance(features, reference) for features in (base, tuned)]
    options: dict[str, Any] = {"clusters": clusters, "seed": seed}
    return {
        "higher_is_better": False,
        "base": distances[0],
        "base_interval": list(statistics.frechet_interval(base, reference, **options)),
        "tuned": distances[1],
        "tuned_interval": list(statistics.frechet_interval(tuned, reference, **options)),
        "difference": distances[1] - distances[0],
        "difference_interval": list(statistics.frechet_interval(tuned, reference, minus=base, **options)),
    }


def compare_diversity(base: np.ndarray, tuned: np.ndarray, groups: Sequence, seed: int = 0) -> Result | None:
    """
    Diversity within `groups` `(N,)` of the features `base` and `tuned` `(N, d)`. Neither direction is better: some of
    it is lost with the ugly images, all of it in a collapse. `None` when no group has two images.
    """
    pairs = np.stack(
        [statistics.group_diversity(base, groups), statistics.group_diversity(tuned, groups)], axis=1
    )  # (G, 2)
    if not len(pairs):
        return None
    columns = np.column_stack([pairs, pairs[:, 1] - pairs[:, 0]])
    intervals = [list(statistics.bootstrap_interval(column, seed=seed)) for column in columns.T]
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
    One word and one sentence about the results at one number of steps.

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


HEADER = ["steps", "metric", "base", "tuned", "difference [95 %]", "win rate [95 %]", "effect size", "sign test p"]


def table_rows(results: list[Result]) -> list[list[str]]:
    """Cells under [`HEADER`], a line for each result."""
    rows = []
    for result in results:
        judge = f"{result['judge']} " if result["judge"] not in (None, result["metric"]) else ""
        cells = [
            str(result["num_inference_steps"]),
            f"{judge}{result['metric']}" + (" (lower is better)" if result["higher_is_better"] is False else ""),
            _number(result["base"]),
            _number(result["tuned"]),
            _with_interval(result["difference"], result["difference_interval"], sign=True),
        ]
        if "win_rate" in result:
            kind = "h" if result["effect_size_kind"] == "cohens_h" else "d_z"
            effect, p = result["effect_size"], result["sign_test_p"]
            cells += [
                _with_interval(result["win_rate"], result["win_rate_interval"]),
                f"{kind} " + ("inf" if effect is None else f"{effect:+.2f}"),
                f"{p:.3f}" if p >= 0.001 else f"{p:.0e}",
            ]
        else:
            cells += ["", "", ""]
        rows.append(cells)
    return rows
