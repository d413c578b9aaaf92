import numpy as np
from PIL import Image

from trl_diffusion_rank.digits.data import crawl
from trl_diffusion_rank.scorers import load_scorer


def test_clean_scans_score_above_ugly_ones():
    world = crawl("heldout", 200, seed=7)
    images = [Image.fromarray(image) for image in world.images]
    scorer = load_scorer("digits_clean")
    scores = scorer.score(images, world.captions)
    assert scores.shape == (200,)
    assert np.mean((scores > 0) == world.clean) > 0.95
    # captions play no part
    assert (scorer.score(images, ["x"] * 200) == scores).all()
