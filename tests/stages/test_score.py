import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from trl_diffusion_rank import scorers
from trl_diffusion_rank.stages.score import ScoreArguments, agreement, main, rank_rows


class Red:
    """How red an image is: its red channel."""

    name = "red"

    def score(self, images, prompts):
        return [np.asarray(image)[..., 0].mean() for image in images]


class Dark(Red):
    """The reverse, on another scale."""

    name = "dark"

    def score(self, images, prompts):
        return [-1000 * value for value in super().score(images, prompts)]


class Broken(Red):
    name = "broken"

    def score(self, images, prompts):
        return [float("nan") if prompt == "b" else 1.0 for prompt in prompts]


class Short(Red):
    name = "short"

    def score(self, images, prompts):
        return [1.0]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    for cls in (Red, Dark, Broken, Short):
        monkeypatch.setitem(scorers.SCORERS, cls.name, f"scorers_of_test_score:{cls.__name__}")
    monkeypatch.setattr(scorers, "import_module", lambda name: __import__("types").SimpleNamespace(**globals()))


@pytest.fixture
def run(tmp_path):
    """Score rows given as lists of red values."""

    def run(reds, **options):
        rows = {
            "prompt": [chr(ord("a") + i) for i in range(len(reds))],
            "images": [[Image.new("RGB", (4, 4), (red, 9, 9)) for red in row] for row in reds],
            "sources": [[f"model@{i}" for i in range(len(row))] for row in reds],
        }
        features = Features(
            {"prompt": Value("string"), "images": List(ImageFeature()), "sources": List(Value("string"))}
        )
        DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "in")
        defaults = {"dataset_name": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), "scorers": ["red"]}
        main(ScoreArguments(**(defaults | options)))
        return load_from_disk(str(tmp_path / "out"))["train"]

    return run


REDS = [[10, 30, 20], [50, 50, 0], [7, 8]]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_one_scorer(run, batch_size):
    data = run(REDS, batch_size=batch_size)
    assert list(data["score_red"]) == REDS
    assert list(data["ranks"]) == [[3, 1, 2], [1, 1, 2], [2, 1]]
    assert list(data["psi"]) == [[0, 1, 0.5], [0.75, 0.75, 0], [0, 1]]
    assert data.column_names == ["prompt", "images", "sources", "score_red", "psi", "ranks"]
    assert data[0]["images"][0].size == (4, 4)


def test_two_scorers_that_disagree(run):
    """Whatever one prefers the other does not: all tied, except where a margin lets one of them abstain."""
    with pytest.raises(
        ValueError, match=r"All images of every row of the split 'train' are tied.*`scorers` is \['red'"
    ):
        run(REDS, scorers=["red", "dark"])


def test_margin_is_in_standard_deviations(run):
    # values 0, 1, 100, 200 and their deviation, about 83: half of it makes 0 and 1 tie and nothing else
    data = run([[0, 1, 100, 200]], min_margin=0.5)
    assert list(data["ranks"]) == [[3, 3, 2, 1]]
    with pytest.raises(ValueError, match=r"tied.*`min_margin` is 9"):
        run([[0, 1, 100, 200]], min_margin=9.0)


def test_rank_rows_gives_each_scorer_its_own_margin():
    first, second = [[0.0, 1.0], [0.0, 10.0]], [[5000.0, 0.0], [0.0, 0.1]]
    psi, ranks = rank_rows([first, second], min_margin=0.25)
    # the first scorer's margin (1.05) makes a tie of row 0, where the second decides; in row 1 it is reversed
    assert psi == [[0.75, 0.25], [0.25, 0.75]] and ranks == [[1, 2], [2, 1]]


def test_summary(run, capsys):
    run(REDS)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("| model@0"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["model@0", "3", "22.333", "2.00"]
    assert "Pairs that are tied: 14.3%" in out  # 1 of 3 + 3 + 1
    assert "Kendall" not in out


def test_summary_of_two_scorers(run, capsys, monkeypatch):
    monkeypatch.setattr(Dark, "score", lambda self, images, prompts: [-1.0 if p == "a" else 0.0 for p in prompts])
    run(REDS, scorers=["red", "dark"])
    assert "Kendall tau of red and dark, mean over rows: nan" in capsys.readouterr().out


def test_agreement_is_the_mean_tau():
    assert agreement([[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [3, 2, 1]]) == pytest.approx(0)
    assert agreement([[1, 2, 3], [1, 1, 1]], [[1, 2, 3], [3, 2, 1]]) == pytest.approx(1)  # row 1 tells nothing


def test_scoring_again_replaces_the_columns(run, tmp_path):
    run(REDS)
    again = tmp_path / "again"
    main(ScoreArguments(dataset_name=str(tmp_path / "out"), output_dir=str(again), scorers=["red"]))
    assert list(load_from_disk(str(again))["train"]["ranks"]) == [[3, 1, 2], [1, 1, 2], [2, 1]]


def test_a_score_that_is_no_number_names_its_row(run):
    with pytest.raises(ValueError, match=r"Row 1: the scorer 'broken' gave \[nan, nan, nan\]"):
        run(REDS, scorers=["broken"], batch_size=3)


def test_a_scorer_must_return_a_number_for_each_image(run):
    with pytest.raises(ValueError, match=r"'short' returned shape \(1,\) for 8 images"):
        run(REDS, scorers=["short"])


def test_rows_with_one_image(run):
    with pytest.raises(ValueError, match="Row 1 of the split 'train' has 1 images; a ranking needs at least two"):
        run([[1, 2], [3]])


def test_missing_columns(tmp_path):
    Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "in")
    with pytest.raises(ValueError, match="no column 'images' in the split 'train'; its columns are prompt"):
        main(ScoreArguments(dataset_name=str(tmp_path / "in"), output_dir="x", scorers=["red"]))


def test_options_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="`scorers` is empty"):
        ScoreArguments()
    with pytest.raises(ValueError, match=r"'reds' is not known. Did you mean 'red'"):
        ScoreArguments(scorers=["reds"])
    with pytest.raises(ValueError, match="each may be named once"):
        ScoreArguments(scorers=["red", "red"])
    with pytest.raises(ValueError, match="`min_margin` is -1"):
        ScoreArguments(scorers=["red"], min_margin=-1)
    with pytest.raises(ValueError, match="`dataset_name` is not set and the stage `score` needs it"):
        main(ScoreArguments(scorers=["red"], output_dir="x"))
