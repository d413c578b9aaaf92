import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion_rank.digits import classifiers
from trl_diffusion_rank.digits.classifiers import DigitsClassifier, _predict, clean_logit
from trl_diffusion_rank.digits.data import DIGITS, INKS, caption, crawl


pytestmark = pytest.mark.slow  # fitting takes half a minute


@pytest.fixture(scope="module")
def unseen():
    return crawl("heldout", 3_500, seed=5, include_held_out=True)


def test_scorer_tells_clean_from_ugly(scorer, unseen):
    logits = clean_logit(scorer, unseen.images)
    assert logits.shape == (3_500,)
    assert ((logits > 0) == unseen.clean).mean() > 0.98


def test_judge_is_right_on_real_digits(judge, unseen):
    verdict = judge.judge(unseen.images, unseen.captions)
    assert (verdict["clean"] == unseen.clean).mean() > 0.98
    assert verdict["ink"].mean() > 0.99
    # Among the ugly ones some digits can't be read by anybody; `good` asks about the clean ones alone.
    assert verdict["digit"][unseen.clean].mean() > 0.98
    assert verdict["digit"].mean() > 0.92


def test_judge_compares_with_what_the_prompt_asks(judge, unseen):
    other_digit = [caption(DIGITS[(d + 1) % 10], INKS[i]) for d, i in zip(unseen.digits, unseen.inks, strict=True)]
    other_ink = [caption(DIGITS[d], INKS[(i + 1) % 6]) for d, i in zip(unseen.digits, unseen.inks, strict=True)]
    assert judge.judge(unseen.images, other_digit)["digit"].mean() < 0.05
    assert judge.judge(unseen.images, other_ink)["ink"].mean() < 0.02
    assert judge.judge(unseen.images, other_ink)["good"].mean() < 0.02


def test_good_is_all_three(judge, unseen):
    verdict = judge.judge(unseen.images, unseen.captions)
    np.testing.assert_array_equal(verdict["good"], verdict["clean"] * verdict["digit"] * verdict["ink"])
    assert all(value.dtype == np.float32 and set(np.unique(value)) <= {0, 1} for value in verdict.values())


def test_pil_and_arrays_give_the_same(judge, unseen):
    pil = [Image.fromarray(image) for image in unseen.images[:20]]
    np.testing.assert_array_equal(judge.features(pil), judge.features(unseen.images[:20]))


def test_prompts_and_images_must_match(judge, unseen):
    with pytest.raises(ValueError, match="Got 3 images and 2 prompts"):
        judge.judge(unseen.images[:3], unseen.captions[:2])


def test_reference_is_the_clean_heldout_digits(judge):
    features = judge.reference_features()
    held_out = judge.reference_features(held_out=True)
    # Each of the 350 scans in five trained inks and one held-out one.
    assert features.shape == (1_750, DigitsClassifier.num_features)
    assert held_out.shape == (350, DigitsClassifier.num_features)
    assert features.var(axis=0).mean() == pytest.approx(1, abs=1e-3)


def test_scorer_and_judge_are_different_models(scorer, judge, unseen):
    assert not np.array_equal(_predict(scorer, unseen.images)["clean"], _predict(judge.model, unseen.images)["clean"])


def test_fitting_keeps_the_callers_random_state():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = classifiers._fit("judge", seed=1, steps=3, crawl_size=200)
    assert torch.rand(1) == expected
    second = classifiers._fit("judge", seed=1, steps=3, crawl_size=200)
    again = second.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.state_dict().items())
