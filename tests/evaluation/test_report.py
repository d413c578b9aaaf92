import json

import numpy as np
import pytest

from trl_diffusion_rank.evaluation.report import (
    HEADER,
    compare_diversity,
    compare_frechet,
    compare_metric,
    direction,
    table_rows,
    verdict,
)


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


def test_lower_frechet_is_better():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(100, 3))
    result = compare_frechet(rng.normal(size=(80, 3)) + 2, rng.normal(size=(80, 3)), reference, np.arange(80))
    assert result["difference"] < 0 and direction(result) == "better"
    assert direction({**result, "difference_interval": [0.1, 0.2]}) == "worse"


def test_diversity_has_no_better():
    groups = ["a", "a", "b", "b", "c", "c"]
    base = np.random.default_rng(0).normal(size=(6, 4))
    result = compare_diversity(base, base * 0.5, groups)
    assert result["tuned"] == pytest.approx(result["base"] / 2)
    assert direction(result) == "lower"
    assert compare_diversity(base, base, list("abcdef")) is None


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


def test_table_rows_fit_the_header():
    metric = compare_metric(np.zeros(20), np.array([0, 1] * 10), np.arange(20))
    rng = np.random.default_rng(0)
    frechet = compare_frechet(rng.normal(size=(20, 2)), rng.normal(size=(20, 2)), rng.normal(size=(30, 2)), range(20))
    rows = table_rows(
        [
            {"num_inference_steps": 4, "judge": "digits", "metric": "good", **metric},
            {"num_inference_steps": 4, "judge": "digits", "metric": "frechet", **frechet},
        ]
    )
    assert [len(row) for row in rows] == [len(HEADER)] * 2
    assert rows[0][:4] == ["4", "digits good", "0.000", "0.500"]
    assert rows[0][4].startswith("+0.500 [") and rows[0][6] == "h +1.57" and rows[0][7] == "0.002"
    assert rows[1][1] == "digits frechet (lower is better)"
