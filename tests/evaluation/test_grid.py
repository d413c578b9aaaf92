import numpy as np
import pytest
from PIL import Image

from trl_diffusion_rank.evaluation.grid import GAP, MARGIN, image_grid, shown_size


def test_small_images_are_enlarged_by_whole_factors_and_large_ones_shrunk():
    assert shown_size(16, 16) == (96, 96)
    assert shown_size(10, 20) == (50, 100)
    assert shown_size(128, 128) == (128, 128)
    assert shown_size(1024, 512) == (256, 128)


def test_pixels_of_tiny_images_stay_what_they_are():
    checkers = Image.fromarray(np.uint8(np.indices((16, 16)).sum(axis=0)[..., None] % 2 * [255, 0, 0]))
    grid = image_grid([("base", [checkers]), ("tuned", [checkers])], ["a red board"])
    top = grid.height - 2 * (96 + GAP)
    shown = np.asarray(grid)[top : top + 96, MARGIN : MARGIN + 96]
    assert (shown == np.asarray(checkers).repeat(6, axis=0).repeat(6, axis=1)).all()


def test_labels_are_drawn_and_fit():
    image = Image.new("RGB", (16, 16), "blue")
    long = "a very long prompt that goes on and on " * 10
    grid = image_grid([("base, 4 steps", [image] * 3), ("tuned, 4 steps", [image] * 3)], ["short", long, "x"])
    pixels = np.asarray(grid.convert("L"))
    assert (pixels[-2 * (96 + GAP) :, :MARGIN] < 128).any()  # the row labels
    header = pixels[: grid.height - 2 * (96 + GAP)]
    assert (header < 128).any() and len(header) <= 4 * 17 + GAP  # four lines at most


def test_rows_must_fit_the_columns():
    image = Image.new("RGB", (16, 16))
    with pytest.raises(ValueError, match=r"Rows of \[1\] images do not fit 2 columns"):
        image_grid([("base", [image])], ["a", "b"])
