import numpy as np
import pytest
import tiny_run

from trl_diffusion_rank.report.dataset import Lists, read_lists
from trl_diffusion_rank.report.run import read_run


@pytest.fixture
def lists() -> Lists:
    """Two rows, of three and of two images."""
    return Lists(
        stage="score",
        counts=np.array([3, 2]),
        sources=np.array(["a", "b", "b", "a", "b"]),
        ranks=np.array([1, 2, 3, 2, 1]),
        scores={"x": np.array([3.0, 2.0, 1.0, 0.0, 5.0]), "y": np.array([0.3, 0.1, 0.2, 2.0, 1.0])},
    )


def test_sources_by_their_mean_rank(lists):
    header, rows = lists.source_table()
    assert header == ["source", "images", "mean rank", "x", "y"]
    assert rows == [
        ["a", "2", "1.50", "1.500", "1.150"],  # ranks 1, 2; x 3, 0; y 0.3, 2.0
        ["b", "3", "2.00", "2.667", "0.433"],
    ]


def test_shares_of_a_source_sum_to_one(lists):
    edges, shares = lists.histograms("x")
    assert edges[0] == pytest.approx(0, abs=0.01)
    assert edges[-1] == pytest.approx(5, abs=0.01)
    assert {source: share.sum() for source, share in shares.items()} == {"a": pytest.approx(1), "b": pytest.approx(1)}
    # Of b's three images one has the highest score of all
    assert shares["b"][-1] == pytest.approx(1 / 3)


def test_scores_that_are_all_the_same(lists):
    lists.scores["x"][:] = 2
    edges, shares = lists.histograms("x")
    assert (edges[0], edges[-1]) == (1.5, 2.5)
    assert shares["a"].sum() == 1


def test_agreement_by_hand(lists):
    # First row: of the pairs (0,1), (0,2), (1,2) the last is the other way round: tau = 1/3. Second: the opposite, -1
    assert lists.agreements() == pytest.approx(np.array([[1, -1 / 3], [-1 / 3, 1]]))


def test_reads_what_score_left(tmp_path):
    tiny_run.write_score(tmp_path, rows=4)
    lists = read_lists(read_run(tmp_path).lists)
    assert lists.rows == 4
    assert lists.counts.tolist() == [3, 3, 3, 3]
    assert lists.source_names == ["a<b>", "b"]
    assert list(lists.scores) == ["pickscore", "clip"]
    assert lists.scores["clip"] == pytest.approx(-lists.scores["pickscore"])
    assert lists.agreements()[0, 1] == pytest.approx(-1)
