import numpy as np
import pytest
from PIL import Image

from trl_diffusion_rank import scorers
from trl_diffusion_rank.digits.data import caption, crawl
from trl_diffusion_rank.evaluation.judges import load_judge, pixel_features
from trl_diffusion_rank.evaluation.statistics import diversity, frechet_distance


class Brightness:
    name = "brightness"

    def score(self, images, prompts):
        values = [np.asarray(image.convert("L")).mean() for image in images]
        return [np.nan if prompt == "nothing" else value for value, prompt in zip(values, prompts, strict=True)]


@pytest.fixture
def brightness(monkeypatch):
    monkeypatch.setattr(scorers, "load_scorer", lambda name: Brightness())
    monkeypatch.setattr("trl_diffusion_rank.evaluation.judges.load_scorer", lambda name: Brightness())
    return load_judge("brightness")


def test_any_scorer_is_a_judge(brightness):
    images = [Image.new("RGB", (4, 4), colour) for colour in ("black", "white")]
    assert brightness.headline == "brightness"
    assert brightness.judge(images, ["a", "b"])["brightness"].tolist() == [0, 255]
    assert brightness.reference_features() is None and brightness.features(images) is None
    assert brightness.groups(["a", "b", "a"]) == ["a", "b", "a"]


def test_a_scorer_that_gives_no_number(brightness):
    with pytest.raises(ValueError, match="judge 'brightness' gave nan for an image of 'nothing'"):
        brightness.judge([Image.new("RGB", (4, 4))] * 2, ["a", "nothing"])


def test_unknown_judge():
    with pytest.raises(ValueError, match="'brightnes' is not known"):
        load_judge("brightnes")


def test_pixel_features_are_scaled_and_shrunk():
    images = [Image.new("RGB", (200, 100), colour) for colour in ("black", "white")]
    features = pixel_features(images, size=8)
    assert features.shape == (2, 8 * 8 * 3)
    assert features.min() == -1 and features.max() == 1
    assert diversity(features, ["a", "a"]) == pytest.approx(2)
    assert pixel_features([Image.new("RGB", (16, 16))]).shape == (1, 16 * 16 * 3)  # never enlarged


@pytest.fixture
def digits_judge(judge, monkeypatch):
    monkeypatch.setattr("trl_diffusion_rank.digits.classifiers.DigitsJudge.fit", lambda seed: judge)
    return load_judge("digits")


def test_digits_judge(digits_judge):
    judge = digits_judge
    world = crawl("heldout", 300, seed=3)
    images = [Image.fromarray(image) for image in world.images]
    metrics = judge.judge(images, world.captions)
    assert set(metrics) == {"clean", "digit", "ink", "good"} and judge.headline == "good"
    assert np.mean(metrics["clean"] == world.clean) > 0.95
    reference = judge.reference_features()
    clean = [image for image, is_clean in zip(images, world.clean, strict=True) if is_clean]
    ugly = [image for image, is_clean in zip(images, world.clean, strict=True) if not is_clean]
    assert frechet_distance(judge.features(clean), reference) < 0.2 * frechet_distance(judge.features(ugly), reference)


def test_digits_groups_are_wishes_not_wordings(digits_judge):
    wordings = [caption("seven", "red", template) for template in range(3)]
    assert len(set(wordings)) == 3
    assert digits_judge.groups([*wordings, caption("six", "red")]) == ["seven red"] * 3 + ["six red"]
