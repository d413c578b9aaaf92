import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_rank.digits import data
from trl_diffusion_rank.digits.data import DIGITS, HELD_OUT_COMBINATIONS, INKS, TRAINED_COMBINATIONS


def test_splits_are_disjoint_complete_and_stratified():
    indices = data._split_indices()
    assert {name: len(index) for name, index in indices.items()} == data.SPLIT_SIZES
    assert sorted(np.concatenate(list(indices.values()))) == list(range(1797))
    for split, size in data.SPLIT_SIZES.items():
        scans, labels = data.load_scans(split)
        assert scans.shape == (size, 8, 8) and scans.dtype == np.float32
        assert scans.min() == 0 and scans.max() == 1
        counts = np.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 0.1 * size / 10


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"`split` is 'test'; it must be one of \['train', 'judge', 'heldout'\]"):
        data.load_scans("test")


def test_each_digit_misses_one_ink():
    assert sorted(digit for digit, _ in HELD_OUT_COMBINATIONS) == sorted(DIGITS)
    assert {ink for _, ink in HELD_OUT_COMBINATIONS} == set(INKS)
    assert len(TRAINED_COMBINATIONS) == 50


def test_captions_and_back():
    assert data.caption("seven", "red", 0) == "a handwritten digit seven in red ink"
    assert data.caption("seven", "orange", 1) == "an orange handwritten seven"
    assert data.caption("seven", "red", 2) == "the number seven written in red"
    for digit in DIGITS:
        for ink in INKS:
            for template in range(3):
                assert data.parse_caption(data.caption(digit, ink, template)) == (digit, ink)
    assert data.parse_caption("A Blue three, please.") == ("three", "blue")


@pytest.mark.parametrize("text", ["a red letter", "a seven", "a red seven and a green seven"])
def test_caption_that_is_not_one_digit_and_ink_is_refused(text):
    with pytest.raises(ValueError, match="exactly one digit"):
        data.parse_caption(text)


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_cover_their_combinations_and_no_other(held_out):
    prompts = data.make_prompts(1_000, seed=3, held_out=held_out)
    expected = HELD_OUT_COMBINATIONS if held_out else set(TRAINED_COMBINATIONS)
    assert {data.parse_caption(prompt) for prompt in prompts} == expected
    assert prompts == data.make_prompts(1_000, seed=3, held_out=held_out)
    assert prompts != data.make_prompts(1_000, seed=4, held_out=held_out)


def test_bicubic_matches_pillow():
    scans, _ = data.load_scans("train")
    pillow = [np.asarray(Image.fromarray(scan).resize((16, 16), Image.Resampling.BICUBIC)) for scan in scans[:20]]
    np.testing.assert_allclose(data.ink_coverage(scans[:20]), np.clip(pillow, 0, 1), atol=1e-5)


def test_clean_images_are_ink_on_white():
    scans = np.zeros((2, 8, 8), dtype=np.float32)
    scans[:, 3:5, 3:5] = 1
    images = data.render_clean(scans, np.array([INKS.index("blue"), INKS.index("black")]))
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    assert (images[:, 0, 0] == 255).all()
    np.testing.assert_array_equal(images[0, 8, 8], np.round(np.array(data.INK_COLOURS["blue"]) * 255))


def test_ugly_images_differ_visibly_from_clean_ones():
    scans, labels = data.load_scans("heldout")
    clean = data.render_clean(scans, labels % 6).astype(float)
    ugly = data.make_ugly(scans, labels % 6, np.random.default_rng(0)).astype(float)
    # Root mean square of a pixel's change: the faintest fault, a short line over a corner, still shows.
    assert np.sqrt(((clean - ugly) ** 2).mean(axis=(1, 2, 3))).min() > 5


def test_paper_is_forced_without_blot_or_line():
    blank = np.zeros((500, 8, 8), dtype=np.float32)
    ugly = data.make_ugly(blank, np.zeros(500, dtype=int), np.random.default_rng(0), paper_share=0.0)
    # Neither blot nor line: .5 * .7 = .35, and low contrast greys .12 of the rest; all others keep their white paper.
    coloured = np.median(ugly.reshape(500, -1), axis=1) < 250
    assert coloured.mean() == pytest.approx(0.35 + 0.65 * 0.12, abs=0.05)


def test_crawl_is_captioned_seeded_and_half_ugly():
    first, again = data.crawl("train", 2_000, seed=5), data.crawl("train", 2_000, seed=5)
    np.testing.assert_array_equal(first.images, again.images)
    assert first.captions == again.captions
    assert 1 - first.clean.mean() == pytest.approx(data.UGLY_SHARE, abs=0.04)
    named = [data.parse_caption(text) for text in first.captions]
    assert named == [(DIGITS[d], INKS[i]) for d, i in zip(first.digits, first.inks, strict=True)]
    assert set(named) == set(TRAINED_COMBINATIONS)


def test_crawl_options():
    collection = data.crawl("judge", 700, ugly_share=0.0, include_held_out=True)
    assert collection.clean.all()
    assert set(map(data.parse_caption, collection.captions)) > HELD_OUT_COMBINATIONS
    # Every scan twice: 700 images of 350 scans.
    _, labels = data.load_scans("judge")
    np.testing.assert_array_equal(np.bincount(collection.digits), 2 * np.bincount(labels))


def test_images_come_as_pil_or_arrays():
    images = data.crawl("heldout", 3).images
    np.testing.assert_array_equal(data.to_array([Image.fromarray(image) for image in images]), images)
    assert data.to_array([Image.new("L", (32, 32))]).shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match=r"array of float32 and shape \(1, 16, 16, 3\)"):
        data.to_array(np.zeros((1, 16, 16, 3), dtype=np.float32))


def test_model_path_imports_no_torch():
    code = "import sys; from trl_diffusion_rank.digits import digits_model_path, data; digits_model_path(); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
