import numpy as np
import pytest

from trl_diffusion_rank.scorers.aggregate import win_shares


NO_MARGIN = np.zeros(1)


def test_one_scorer_gives_its_order():
    # wins against 3 rivals: 1, 3, 0, 2
    assert win_shares(np.array([[0.3, 0.9, 0.1, 0.5]]), NO_MARGIN) == pytest.approx([1 / 3, 1, 0, 2 / 3])


def test_ties_count_one_half():
    # b and c tie and both beat a: (0, 1 + 1/2, 1 + 1/2) / 2
    assert win_shares(np.array([[1.0, 2.0, 2.0]]), NO_MARGIN) == pytest.approx([0, 0.75, 0.75])
    assert win_shares(np.full((1, 4), 7.0), NO_MARGIN) == pytest.approx([0.5] * 4)


def test_scorers_of_any_scale_count_the_same():
    # the second sees the reverse and in thousands: all are even
    scores = np.array([[0.1, 0.2, 0.3], [3000.0, 2000.0, 1000.0]])
    assert win_shares(scores, np.zeros(2)) == pytest.approx([0.5] * 3)
    # a third sides with the first: (0 + 2 + 0, 1 + 1 + 1, 2 + 0 + 2) / 6
    scores = np.vstack([scores, [5.0, 6.0, 7.0]])
    assert win_shares(scores, np.zeros(3)) == pytest.approx([2 / 6, 3 / 6, 4 / 6])


def test_margins_make_near_ties():
    scores = np.array([[0.0, 0.4, 1.0]])
    # 0 and .4 tie; both lose against 1
    assert win_shares(scores, np.array([0.5])) == pytest.approx([0.25, 0.25, 1])
    # every scorer has its own margin; at the margin itself it is a tie
    assert win_shares(np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([1.0, 0.5])) == pytest.approx([0.25, 0.75])


def test_shares_of_a_row_have_mean_one_half():
    scores = np.random.default_rng(0).integers(4, size=(3, 6)).astype(float)
    assert win_shares(scores, np.zeros(3)).mean() == pytest.approx(0.5)
