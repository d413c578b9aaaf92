import json

import numpy as np
import pytest

from trl_diffusion_rank.evaluation.comparison import (
    Distance,
    compare_diversity,
    compare_frechet,
    compare_metric,
    direction,
    frechet,
    results_table,
    verdict,
)
from trl_diffusion_rank.evaluation.statistics import FrechetReference, group_diversity


def make(metric, low, high, higher_is_better=True, decides=True):
    result = {"judge": "j", "metric": metric, "decides": decides, "higher_is_better": higher_is_better}
    return {**result, "base": 0.4, "tuned": 0.9, "difference_interval": [low, high]}


def test_compare_metric_of_shares():
    base = np.array([0, 0, 0, 1] * 30)
    tuned = np.array([1, 1, 0, 1] * 30)
    result = compare_metric(base, tuned, np.arange(120))
    assert (result["base"], result["tuned"], result["difference"]) == pytest.approx((0.25, 0.75, 0.5))
    assert result["win_rate"] == pytest.approx(0.75)  # half win, half tie
    assert result["effect_size_kind"] == "cohens_h" and result["effect_size"] == pytest.approx(np.pi / 3)
    assert result["sign_test_p"] == pytest.approx(2 * 0.5**60)
    low, high = result["difference_interval"]
    # 1.96 standard errors of a mean of 120 differences with standard deviation 1/2
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.5 / np.sqrt(120), 0.5 + 1.96 * 0.5 / np.sqrt(120)), abs=0.02)
    # every win rate is 1/2 + difference / 2 here, in each resample too
    assert result["win_rate_interval"] == pytest.approx([0.5 + low / 2, 0.5 + high / 2])


def test_compare_metric_of_scores():
    rng = np.random.default_rng(0)
    base = rng.normal(size=50)
    result = compare_metric(base, base + rng.normal(1, 0.5, size=50), np.arange(50))
    assert result["effect_size_kind"] == "d_z" and result["effect_size"] > 1
    assert direction(result) == "better"


def test_results_can_be_written_as_json_without_infinities():
    result = compare_metric(np.zeros(5), np.full(5, 2.0), np.arange(5))
    assert result["effect_size"] is None
    json.dumps(result, allow_nan=False)


@pytest.fixture(scope="module")
def distances() -> dict[str, Distance]:
    rng = np.random.default_rng(0)
    reference = FrechetReference(rng.normal(size=(100, 3)))
    return {
        "far": frechet(rng.normal(size=(80, 3)) + 2, reference, np.arange(80), seed=0),
        "near": frechet(rng.normal(size=(80, 3)), reference, np.arange(80), seed=0),
    }


def test_lower_frechet_is_better(distances):
    result = compare_frechet(distances["far"], distances["near"])
    assert result["difference"] == result["tuned"] - result["base"] < 0 and direction(result) == "better"
    assert result["base_interval"][0] < result["base"] < result["base_interval"][1]
    assert direction(compare_frechet(distances["near"], distances["far"])) == "worse"


def test_no_interval_of_a_frechet_distance_is_negative(distances):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 3))
    nothing = frechet(features, FrechetReference(features), np.arange(30), seed=0)
    result = compare_frechet(distances["far"], nothing)
    assert result["tuned"] == pytest.approx(0, abs=1e-9) and result["tuned_interval"][0] == 0
    null = compare_frechet(nothing, nothing)
    assert null["difference_interval"] == [0, 0] and direction(null) == "no clear difference"


def test_diversity_has_no_better():
    groups = ["a", "a", "b", "b", "c", "c"]
    base = np.random.default_rng(0).normal(size=(6, 4))
    result = compare_diversity(group_diversity(base, groups), group_diversity(base * 0.5, groups))
    assert result["tuned"] == pytest.approx(result["base"] / 2)
    assert direction(result) == "lower"
    assert compare_diversity(np.empty(0), np.empty(0)) is None


# No change -------------------------------------------------------------


def clustered_scores(rng: np.random.Generator, prompts: int, images: int, steps: int) -> np.ndarray:
    """
    Scores `(prompts * images,)` of a model. A model draws some prompts well and others badly, so the images of a
    prompt are alike; a scorer of few steps gives ties.
    """
    of_prompt = np.repeat(rng.normal(size=prompts), images)
    return np.round((of_prompt + 0.7 * rng.normal(size=prompts * images)) * steps) / steps


def test_base_against_itself_wins_half_and_nothing_else():
    scores = clustered_scores(np.random.default_rng(0), prompts=50, images=4, steps=8)
    result = compare_metric(scores, scores.copy(), np.repeat(np.arange(50), 4))
    assert result["win_rate"] == 0.5 and result["win_rate_interval"] == [0.5, 0.5]
    assert result["difference"] == 0 and result["difference_interval"] == [0, 0]
    assert (result["effect_size"], result["sign_test_p"]) == (0, 1)
    assert direction(result) == "no clear difference"


def count_covered(repetitions: int, clustered: bool = True) -> tuple[int, int]:
    """Of how many null comparisons the intervals of win rate and difference hold 1/2 and 0."""
    prompts = np.repeat(np.arange(60), 4)
    win_rates = differences = 0
    for repetition in range(repetitions):
        rng = np.random.default_rng(repetition)
        base, tuned = (clustered_scores(rng, prompts=60, images=4, steps=4) for _ in range(2))
        clusters = prompts if clustered else np.arange(len(prompts))
        result = compare_metric(base, tuned, clusters, seed=repetition, num_resamples=500)
        win_rates += result["win_rate_interval"][0] <= 0.5 <= result["win_rate_interval"][1]
        differences += result["difference_interval"][0] <= 0 <= result["difference_interval"][1]
    return win_rates, differences


def test_interval_of_a_null_comparison_covers_one_half():
    """
    Two models of equal quality, 100 times over: 240 images of 60 prompts, those of a prompt alike. A percentile
    bootstrap of 60 clusters covers in a little less than its 95 %: in 941 and 940 of 1000 repetitions.
    """
    win_rates, differences = count_covered(100)
    assert win_rates >= 90 and differences >= 90


def test_without_clusters_the_intervals_would_be_too_narrow():
    """Of 1000 repetitions they cover in 779 and 730."""
    assert max(count_covered(100, clustered=False)) < 88


# In words --------------------------------------------------------------


def test_direction_needs_an_interval_without_zero():
    assert direction(make("m", 0.01, 0.2)) == "better"
    assert direction(make("m", -0.2, -0.01)) == "worse"
    assert direction(make("m", -0.1, 0.1)) == "no clear difference"
    assert direction(make("m", 0.0, 0.0)) == "no clear difference"


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([make("good", 0.1, 0.2)], "better"),
        ([make("good", -0.2, -0.1)], "worse"),
        ([make("good", -0.2, 0.1)], "no clear difference"),
        ([make("good", 0.1, 0.2), make("frechet", -2, -1, higher_is_better=False)], "better"),
        ([make("good", 0.1, 0.2), make("frechet", 1, 2, higher_is_better=False)], "mixed"),
        ([make("good", -0.1, 0.2), make("frechet", 1, 2, higher_is_better=False)], "worse"),
        # what decides nothing is told and not counted
        ([make("good", 0.1, 0.2), make("digit", -0.2, -0.1, decides=False)], "better"),
    ],
)
def test_verdict(results, expected):
    word, sentence = verdict(results)
    assert word == expected and sentence.startswith(expected)
    assert all(f"{result['metric']} 0.4 -> 0.9" in sentence for result in results)


def test_table(distances):
    metric = compare_metric(np.zeros(20), np.array([0, 1] * 10), np.arange(20))
    head = {"adapter": "dpo", "num_inference_steps": 4, "category": None, "judge": "digits"}
    results = [
        {**head, "metric": "good", **metric},
        {**head, "metric": "frechet", **compare_frechet(distances["far"], distances["near"])},
    ]
    table = cells(results_table(results))
    assert table[0][:4] == ["steps", "metric", "base", "tuned"]
    assert table[1][:4] == ["4", "digits good", "0.000", "0.500"]
    assert table[1][4].startswith("+0.500 [") and table[1][6] == "h +1.57" and table[1][7] == "0.002"
    assert table[2][1] == "digits frechet (lower is better)" and table[2][-3:] == ["", "", ""]


def test_adapters_and_categories_have_columns_where_there_are_some():
    metric = compare_metric(np.zeros(20), np.array([0, 1] * 10), np.arange(20))
    head = {"num_inference_steps": 4, "judge": "pickscore", "metric": "pickscore", **metric}
    results = [{"adapter": name, "category": None, **head} for name in ("dpo", "cpo")]
    table = cells(results_table(results))
    assert [row[:3] for row in table] == [
        ["adapter", "steps", "metric"],
        ["dpo", "4", "pickscore"],
        ["cpo", "4", "pickscore"],
    ]
    table = cells(results_table([{"adapter": "dpo", "category": "Arts | Crafts", **head}]))
    assert table[1][:3] == ["4", r"Arts \| Crafts", "pickscore"]


def cells(table: str) -> list[list[str]]:
    """Of each line of a Markdown table but the dashes."""
    header, _, *rows = table.splitlines()
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in (header, *rows)]
