import numpy as np
import pytest
from PIL import Image

from trl_diffusion_rank.digits.data import caption, crawl
from trl_diffusion_rank.evaluation.judges import DigitsWorldJudge, pixel_features, read_judges, thumbnail
from trl_diffusion_rank.evaluation.statistics import diversity, frechet_distance
from trl_diffusion_rank.scorers import SCORERS


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    monkeypatch.setitem(SCORERS, "brightness", "tiny_judges:BrightnessScorer")
    monkeypatch.setitem(SCORERS, "half", "tiny_judges:HalfScorer")


def test_any_scorer_is_a_judge():
    images = [Image.new("RGB", (4, 4), colour) for colour in ("black", "white")]
    plain, moved = read_judges([{"name": "brightness"}, {"name": "brightness", "label": "moved", "offset": 1.0}])
    assert (plain.name, plain.headline, plain.metrics) == ("brightness", "brightness", ("brightness",))
    assert plain.judge(images, ["a", "b"])["brightness"].tolist() == [0, 255]
    assert moved.judge(images, ["a", "b"])["moved"].tolist() == [1, 256]
    assert moved.columns() == {"moved": "score_moved"}
    assert plain.reference_features() is None and plain.features(images) is None
    assert plain.groups(["a", "b", "a"]) == ["a", "b", "a"]


def test_a_judge_is_loaded_at_its_first_question_and_can_be_unloaded():
    (judge,) = read_judges([{"name": "brightness"}])
    assert "scorer" not in vars(judge)
    judge.judge([Image.new("RGB", (4, 4))], ["a"])
    assert "scorer" in vars(judge)
    judge.unload()
    assert "scorer" not in vars(judge)
    judge.unload()  # nothing is left to give back


def test_a_scorer_that_gives_no_number():
    (judge,) = read_judges([{"name": "brightness"}])
    with pytest.raises(ValueError, match="judge 'brightness' gave nan for an image of 'nothing'"):
        judge.judge([Image.new("RGB", (4, 4))] * 2, ["a", "nothing"])
    (judge,) = read_judges([{"name": "half"}])
    with pytest.raises(ValueError, match=r"judge 'half' returned shape \(1,\) for 2 images"):
        judge.judge([Image.new("RGB", (4, 4))] * 2, ["a", "b"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "brightnes"}], r"`judges` is 'brightnes', which is not known. Did you mean 'brightness'"),
        ([{"model": "x"}], r"An entry of `judges` is .*the key `name`"),
        ([{"name": "digits", "seed": 3}], "the judge 'digits' has no options"),
        ([{"name": "brightness", "weight": 2}], "judges are not averaged, so leave `weight` out"),
        ([{"name": "discriminator"}], "`discriminator` without a model: give its folder or Hub id"),
        ([{"name": "clip", "modle": "x"}], "scorer 'clip' has no option 'modle'. Did you mean 'model'"),
        ([{"name": "digits"}, {"name": "digits"}], "judge 'digits' would write columns that another"),
        ([{"name": "brightness"}] * 2, "set another `label`, as in {name: brightness, label: another}"),
        # the column `score_digits_clean`
        ([{"name": "digits"}, {"name": "digits_clean"}], "'digits' would write columns that another one"),
    ],
)
def test_entries_that_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        read_judges(entries)


def test_columns_of_the_digits_judge():
    digits, _ = read_judges([{"name": "digits"}, {"name": "digits_clean", "label": "clean"}])
    names = ("clean", "digit", "ink", "good")
    assert digits.columns() == {name: f"score_digits_{name}" for name in names}


def test_pixel_features_are_scaled_and_shrunk():
    images = [Image.new("RGB", (200, 100), colour) for colour in ("black", "white")]
    features = pixel_features([thumbnail(image) for image in images])
    assert features.shape == (2, 64 * 64 * 3)
    assert features.min() == -1 and features.max() == 1
    assert diversity(features, ["a", "a"]) == pytest.approx(2)
    assert thumbnail(Image.new("RGB", (16, 16))).shape == (16, 16, 3)  # never enlarged


@pytest.mark.slow
def test_digits_judge(judge, monkeypatch):
    monkeypatch.setattr("trl_diffusion_rank.digits.classifiers.DigitsJudge.fit", lambda seed: judge)
    digits_judge = DigitsWorldJudge()
    world = crawl("heldout", 300, seed=3)
    images = [Image.fromarray(image) for image in world.images]
    metrics = digits_judge.judge(images, world.captions)
    assert set(metrics) == {"clean", "digit", "ink", "good"} and digits_judge.headline == "good"
    assert np.mean(metrics["clean"] == world.clean) > 0.95
    reference = digits_judge.reference_features()
    clean = [image for image, is_clean in zip(images, world.clean, strict=True) if is_clean]
    ugly = [image for image, is_clean in zip(images, world.clean, strict=True) if not is_clean]
    assert frechet_distance(digits_judge.features(clean), reference) < 0.2 * frechet_distance(
        digits_judge.features(ugly), reference
    )


def test_digits_groups_are_wishes_not_wordings():
    wordings = [caption("seven", "red", template) for template in range(3)]
    assert len(set(wordings)) == 3
    assert DigitsWorldJudge().groups([*wordings, caption("six", "red")]) == ["seven red"] * 3 + ["six red"]


def test_digits_judge_knows_its_world_alone():
    digits_judge = DigitsWorldJudge()
    digits_judge.check_prompts([caption("seven", "red")])
    with pytest.raises(ValueError, match=r"knows the embedded world's captions alone.*'a hen'"):
        digits_judge.check_prompts([caption("seven", "red"), "a hen"])
