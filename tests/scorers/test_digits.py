import numpy as np
import pytest
from PIL import Image

from trl_diffusion_rank.digits.data import crawl
from trl_diffusion_rank.scorers import load_scorer


@pytest.mark.slow
def test_clean_scans_score_above_ugly_ones(scorer, monkeypatch):
    monkeypatch.setattr("trl_diffusion_rank.digits.classifiers.fit_clean_classifier", lambda seed: scorer)
    world = crawl("heldout", 200, seed=7)
    images = [Image.fromarray(image) for image in world.images]
    digits_clean = load_scorer("digits_clean")
    scores = digits_clean.score(images, world.captions)
    assert scores.shape == (200,)
    assert np.mean((scores > 0) == world.clean) > 0.95
    # captions play no part
    assert (digits_clean.score(images, ["x"] * 200) == scores).all()
