import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from trl_diffusion_rank import scorers
from trl_diffusion_rank.data.loading import load_splits
from trl_diffusion_rank.stages.score import ScoreArguments, main, rank_rows


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
        return load_splits(str(tmp_path / "out"))["train"]

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


def test_weights_decide_between_scorers_that_disagree(run):
    data = run(REDS, scorers=["red", {"name": "dark", "weight": 3}])
    assert list(data["ranks"]) == [[1, 3, 2], [2, 2, 1], [1, 2]]
    assert data["psi"][0] == pytest.approx([0.75, 0.25, 0.5])


def test_ranks_from_one_scorer_while_others_are_recorded(run):
    data = run(REDS, scorers=["red", "dark"], rank_by="dark")
    assert list(data["ranks"]) == [[1, 3, 2], [2, 2, 1], [1, 2]]
    assert list(data["score_red"]) == REDS


def test_one_scorer_twice_with_other_labels(run):
    data = run(REDS, scorers=["red", {"name": "red", "label": "crimson"}])
    assert list(data["score_crimson"]) == list(data["score_red"]) == REDS


def test_keep_leaves_the_images_that_are_spread_best(run):
    data = run([[10, 20, 30, 40, 50], [5, 6]], keep=3)
    assert list(data["score_red"]) == [[10, 30, 50], [5, 6]]
    assert list(data["ranks"]) == [[3, 2, 1], [2, 1]]
    assert list(data["psi"]) == [[0, 0.5, 1], [0, 1]]  # against all rivals, those left out too
    assert data[0]["sources"] == ["model@0", "model@2", "model@4"]
    assert [image.getpixel((0, 0))[0] for image in data[0]["images"]] == [10, 30, 50]


def test_excluded_sources_leave_the_rows_and_their_ranks(run):
    data = run([[10, 20, 30, 40], [9, 5, 6, 1]], exclude_sources=["model@1"])
    assert list(data["score_red"]) == [[10, 30, 40], [9, 6, 1]]
    assert list(data["ranks"]) == [[3, 2, 1], [1, 2, 3]]
    assert list(data["psi"]) == [[0, 0.5, 1], [1, 0.5, 0]]  # among those that are left
    assert list(data["sources"]) == [["model@0", "model@2", "model@3"]] * 2
    assert [image.getpixel((0, 0))[0] for image in data[0]["images"]] == [10, 30, 40]
    with pytest.raises(
        ValueError, match=r"Row 1 of the split 'train' has 1 images of other sources than \['model@0'\]"
    ):
        run([[1, 2, 3], [3, 4]], exclude_sources=["model@0"])


def test_the_run_s_discriminator_is_meant_where_no_model_is_named():
    args = ScoreArguments(scorers=["red", "discriminator"], discriminator="runs/mine/discriminator")
    assert args.read_scorers()[1].options == {"model": "runs/mine/discriminator"}
    other = {"name": "discriminator", "model": "me/other"}
    assert ScoreArguments(scorers=[other], discriminator="x").read_scorers()[0].options == {"model": "me/other"}
    with pytest.raises(ValueError, match="`discriminator` is not set and the stage `score` needs it"):
        main(ScoreArguments(scorers=["discriminator"], dataset_name="x", output_dir="y"))


def test_a_run_that_was_cut_off_scores_only_what_is_missing(run, monkeypatch, tmp_path):
    whole = run(REDS, batch_size=1)
    seen = []

    class Interrupted(Red):
        def score(self, images, prompts):
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(prompts[0])
            return super().score(images, prompts)

    monkeypatch.setitem(globals(), "Red", Interrupted)
    out = str(tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        run(REDS, batch_size=1, output_dir=out)
    seen.clear()
    main(ScoreArguments(dataset_name=str(tmp_path / "in"), output_dir=out, scorers=["red"], batch_size=1))
    assert seen == ["c"]
    assert load_splits(out)["train"].to_dict() == whole.to_dict()
    main(ScoreArguments(dataset_name=str(tmp_path / "in"), output_dir=out, scorers=["red"], batch_size=1))
    assert seen == ["c"], "what is finished isn't scored again"


def test_an_image_that_can_not_be_decoded_names_its_row(tmp_path):
    features = Features({"prompt": Value("string"), "images": List(ImageFeature(decode=False))})
    broken = [{"bytes": b"no image", "path": None}] * 2
    Dataset.from_dict({"prompt": ["a"], "images": [broken]}, features=features).save_to_disk(tmp_path / "in")
    with pytest.raises(ValueError, match="Row 0 of the split 'train': the image can't be decoded"):
        main(ScoreArguments(dataset_name=str(tmp_path / "in"), output_dir=str(tmp_path / "out"), scorers=["red"]))


def test_the_card_and_the_picture(run, tmp_path):
    run(REDS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Pairs that are tied: 14.3%" in card and "| `score_red` | list of float64 | by the scorer `red`" in card
    assert "![Rows of images from best to worst](rows.png)" in card
    picture = Image.open(tmp_path / "out" / "rows.png")
    # only row 0 and 1 have three images; each is shown 96 pixels wide, the best on the left
    assert picture.size == (120 + 3 * 102, picture.height)
    middle = picture.height - 6 - 102 - 48
    reds = [picture.getpixel((120 + column * 102 + 48, middle))[0] for column in range(3)]
    assert reds == [30, 20, 10]


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


def test_scoring_again_replaces_the_columns(run, tmp_path):
    run(REDS)
    again = tmp_path / "again"
    main(ScoreArguments(dataset_name=str(tmp_path / "out"), output_dir=str(again), scorers=["red"]))
    assert list(load_splits(str(again))["train"]["ranks"]) == [[3, 1, 2], [1, 1, 2], [2, 1]]


def test_a_score_that_is_no_number_names_its_row(run):
    with pytest.raises(ValueError, match=r"Row 1 of the split 'train': the scorer 'broken' gave \[nan, nan, nan\]"):
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
    with pytest.raises(ValueError, match="Several entries of `scorers` are called 'red'"):
        ScoreArguments(scorers=["red", "red"])
    with pytest.raises(ValueError, match="`min_margin` is -1"):
        ScoreArguments(scorers=["red"], min_margin=-1)
    with pytest.raises(ValueError, match="`keep` is 1; it must be at least 2"):
        ScoreArguments(scorers=["red"], keep=1)
    with pytest.raises(ValueError, match="`rank_by` is 'blue', which is not known"):
        ScoreArguments(scorers=["red"], rank_by="blue")
    with pytest.raises(ValueError, match="`push_to_hub` is set and `hub_dataset_id` is not"):
        ScoreArguments(scorers=["red"], push_to_hub=True)
    with pytest.raises(ValueError, match="`dataset_name` is not set and the stage `score` needs it"):
        main(ScoreArguments(scorers=["red"], output_dir="x"))
