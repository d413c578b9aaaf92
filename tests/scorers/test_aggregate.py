from itertools import combinations, pairwise
from math import comb

import numpy as np
import pytest

from trl_diffusion_rank.scorers.aggregate import agreement, spread_best, whole_weights, win_counts, win_shares


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
    with pytest.raises(ValueError, match="zip"):
        win_counts(scores, np.zeros(2))


def test_shares_of_a_row_have_mean_one_half():
    scores = np.random.default_rng(0).integers(4, size=(3, 6)).astype(float)
    assert win_shares(scores, np.zeros(3)).mean() == pytest.approx(0.5)
    assert win_shares(scores, np.zeros(3), [0.2, 5, 1]).mean() == pytest.approx(0.5)


def test_weights():
    # the second scorer sees the reverse order and counts three times: (1 * (0, 1/2, 1) + 3 * (1, 1/2, 0)) / 4
    scores = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert win_shares(scores, np.zeros(2), [0.5, 1.5]).tolist() == [0.75, 0.5, 0.25]
    # whatever their scale
    assert win_shares(scores, np.zeros(2), [1e-300, 3e-300]).tolist() == [0.75, 0.5, 0.25]


def test_equal_weights_are_no_weights():
    scores = np.random.default_rng(1).normal(size=(3, 7))
    assert (win_shares(scores, np.zeros(3), [0.7] * 3) == win_shares(scores, np.zeros(3))).all()


def test_even_images_tie_exactly_with_weights():
    """
    a wins for scorers 1 and 2, b for scorer 3; the weights say that they are even, and 0.1 + 0.2 == 0.3 is false in
    floats. c loses everywhere.
    """
    scores = np.array([[3.0, 2, 1], [3, 2, 1], [2, 3, 1]])
    psi = win_shares(scores, np.zeros(3), [0.1, 0.2, 0.3])
    assert psi[0] == psi[1] == 0.75 and psi[2] == 0
    # a little more weight in the twelfth digit is a difference all the same
    assert win_shares(scores, np.zeros(3), [0.1, 0.2, 0.300000000001])[1] > 0.75


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.1, 0.7, 0.2], [1 / 3, 2 / 3, 0.123456789012345]])
def test_images_with_the_same_scores_have_the_same_psi(weights):
    """For every number of images, since sums over an axis may be ordered by where in memory a number is."""
    rng = np.random.default_rng(2)
    for n in range(2, 40):
        scores = rng.normal(size=(3, n))
        scores = np.concatenate([scores, scores[:, :1], scores[:, rng.permutation(n)]], axis=1)
        psi = win_shares(scores, np.zeros(3), weights)
        for image in range(scores.shape[1]):
            same = (scores == scores[:, image : image + 1]).all(axis=0)
            assert (psi[same] == psi[image]).all()


def test_rows_in_a_batch():
    """Each row as by itself, by comparing pair by pair."""
    rng = np.random.default_rng(3)
    scores, margins, weights = rng.normal(size=(2, 5, 3, 4)), np.array([0, 0.3, 1]), [2, 1, 0.5]
    psi = win_shares(scores, margins, weights)
    assert psi.shape == (2, 5, 4)
    for row in np.ndindex(2, 5):
        for a in range(4):
            won = 0.0
            for s in range(3):
                for b in {0, 1, 2, 3} - {a}:
                    difference = scores[row][s, a] - scores[row][s, b]
                    won += weights[s] * (0.5 if abs(difference) <= margins[s] else difference > 0)
            assert psi[row][a] == pytest.approx(won / (3 * sum(weights)))


def test_counts_of_many_images():
    # 300 images in order: the i-th wins against i, more than a byte holds
    assert win_counts(np.arange(300.0)[None], NO_MARGIN).tolist() == [list(range(0, 600, 2))]


def test_whole_weights():
    assert whole_weights([1, 1]) == [1, 1]
    assert whole_weights([0.1, 0.2, 0.3]) == [1, 2, 3]
    assert whole_weights([2.5, 1e-3]) == [2500, 1]
    assert whole_weights([np.float64(4), 6]) == [2, 3]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_that_are_none(weight):
    with pytest.raises(ValueError, match="each must be a finite number above 0"):
        win_shares(np.zeros((2, 3)), np.zeros(2), [1, weight])


def test_a_weight_for_each_scorer():
    with pytest.raises(ValueError, match="`weights` has 1 entries for 2 scorers"):
        win_shares(np.zeros((2, 3)), np.zeros(2), [1])


def by_trying_all(psi: np.ndarray, keep: int) -> tuple[int, ...]:
    """The best of all choices: fewest ties, then the widest smallest gap, then the earliest images."""

    def quality(choice: tuple[int, ...]) -> tuple[int, float, tuple[int, ...]]:
        values = sorted(psi[list(choice)].tolist())
        ties = sum(comb(values.count(value), 2) for value in set(values))
        smallest = min((round(b - a, 9) for a, b in pairwise(values) if a != b), default=0.0)
        return ties, -smallest, choice

    choices = combinations(range(len(psi)), keep)
    return min((c for c in choices if {psi.min(), psi.max()} <= set(psi[list(c)].tolist())), key=quality)


@pytest.mark.parametrize("kind", ["any", "steps", "ties", "twelfths"])
def test_spread_best_is_the_best_of_all_choices(kind):
    rng = np.random.default_rng(4)
    for _ in range(150):
        n = int(rng.integers(2, 10))
        psi = {
            "any": rng.random(n),
            "steps": rng.integers(0, 30, size=n) / 64,  # many gaps are the same, exactly
            "ties": rng.integers(0, 4, size=n) / 4,
            "twelfths": rng.integers(0, 13, size=n) / 12,  # many gaps are the same, but for the last bit
        }[kind]
        for keep in range(2, n):
            assert tuple(spread_best(psi, keep)) == by_trying_all(psi, keep), (psi.tolist(), keep)


def test_spread_best_by_hand():
    # .9 is closer to 1 than .5 is to either end
    assert spread_best(np.array([0.9, 1.0, 0.5, 0.0]), 3).tolist() == [1, 2, 3]
    # four of eight by one scorer: psi is i / 7. The smallest gap is 2 / 7 at best; images 0, 2, 4 and 7 come first.
    assert spread_best(np.arange(8) / 7, 4).tolist() == [0, 2, 4, 7]
    # the best and the worst of those that tie is the earliest
    assert spread_best(np.array([1.0, 0, 1, 0, 0.5]), 2).tolist() == [0, 1]


def test_spread_best_with_fewer_values_than_places():
    # a value that is alone stays, though it comes last; the places that are left go to the earliest images
    assert spread_best(np.array([0.5, 0.5, 0.5, 0.5, 0, 1, 0.25]), 5).tolist() == [0, 1, 4, 5, 6]
    # each value once more before any a third time
    assert spread_best(np.array([0.0, 0, 0, 0, 1, 1, 1]), 4).tolist() == [0, 1, 4, 5]
    assert spread_best(np.full(9, 0.5), 4).tolist() == [0, 1, 2, 3]


def test_spread_best_keeps_all_of_a_short_row():
    assert spread_best(np.array([0.0, 1.0, 0.5]), 3).tolist() == [0, 1, 2]
    assert spread_best(np.array([0.0, 1.0]), 8).tolist() == [0, 1]


@pytest.mark.parametrize("keep", [1, 0, -3])
def test_spread_best_needs_two(keep):
    with pytest.raises(ValueError, match=f"`keep` is {keep}; a ranking needs at least 2"):
        spread_best(np.arange(4) / 3, keep)


def test_spread_best_of_many():
    """More than can be tried. Properties alone, and no gap that a simple greedy choice would beat."""
    rng = np.random.default_rng(5)
    for n, keep in ((300, 4), (300, 40), (300, 299), (500, 100)):
        psi = rng.random(n)
        chosen = spread_best(psi, keep)
        assert len(set(chosen.tolist())) == keep and (np.diff(chosen) > 0).all()
        values = np.sort(psi[chosen])
        assert values[0] == psi.min() and values[-1] == psi.max()
        # farthest-point selection is within a factor of two of the best (Gonzalez 1985), and never above it
        greedy = [int(psi.argmin()), int(psi.argmax())]
        while len(greedy) < keep:
            greedy.append(int(np.abs(psi[:, None] - psi[greedy]).min(axis=1).argmax()))
        smallest = np.diff(np.sort(psi[greedy])).min()
        assert smallest - 1e-9 <= np.diff(values).min() <= 2 * smallest + 1e-9


def test_agreement_is_the_mean_tau():
    assert agreement([[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [3, 2, 1]]) == pytest.approx(0)
    assert agreement([[1, 2, 3], [1, 1, 1]], [[1, 2, 3], [3, 2, 1]]) == pytest.approx(1)  # row 1 tells nothing
