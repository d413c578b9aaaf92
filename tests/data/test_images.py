import io

import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion_rank.data import images
from trl_diffusion_rank.data.images import as_png, decode_image, fit_image, to_pixels, to_uint8


def encoded(image: Image.Image, format: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    """Brightness rises from left to right, so that what is cut off shows."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))).convert("RGB")


def test_written_as_png_nothing_is_lost():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8))
    written = as_png(image)
    assert Image.open(io.BytesIO(written["bytes"])).format == "PNG" and written["path"] is None
    assert np.array_equal(decode_image(written), image)


def test_every_form_decodes_to_the_same_rgb(tmp_path):
    image = gradient(8, 6)
    (tmp_path / "a.png").write_bytes(encoded(image))
    forms = [
        image,
        encoded(image),
        {"bytes": encoded(image), "path": None},
        {"bytes": None, "path": tmp_path / "a.png"},
    ]
    for form in forms:
        assert np.array_equal(np.asarray(decode_image(form)), np.asarray(image))


def test_transparency_lies_on_white_and_exif_turns_upright():
    transparent = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert decode_image(encoded(transparent)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert decode_image(palette).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    assert decode_image(encoded(gradient(8, 4), "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("value", [b"", b"not an image", {"bytes": None, "path": None}, None, 3, "/no/such/file.png"])
def test_what_cannot_be_decoded_is_one_value_error(value):
    with pytest.raises(ValueError, match="the image can't be decoded"):
        decode_image(value)


def test_truncated_and_huge_images_are_refused(monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="can't be decoded"):
        decode_image(encoded(noise)[:500])
    monkeypatch.setattr(images, "MAX_PIXELS", 4095)
    with pytest.raises(ValueError, match="64 x 64 pixels are more than 4095"):
        decode_image(encoded(noise))


def test_fit_keeps_proportions_and_cuts_the_centre():
    wide, offset = fit_image(gradient(64, 16), 16)
    assert wide.size == (16, 16) and offset == (0, 24)
    values = np.asarray(wide)[0, :, 0]
    assert abs(values.mean() - 127.5) < 3 and values.min() > 80 and values.max() < 175
    tall, offset = fit_image(gradient(10, 20), 16)
    assert tall.size == (16, 16) and offset == (8, 0)
    same, offset = fit_image(gradient(16, 16), 16)
    assert np.array_equal(np.asarray(same), np.asarray(gradient(16, 16))) and offset == (0, 0)


@pytest.mark.parametrize("size", [(7, 100), (100, 7), (333, 331), (17, 16), (1, 1)])
def test_fit_always_gives_the_resolution(size):
    assert fit_image(gradient(*size), 16)[0].size == (16, 16)


def test_pixels_are_in_minus_one_to_one_with_channels_first():
    array = np.zeros((2, 4, 3), dtype=np.uint8)
    array[..., 0] = 255
    pixels = to_pixels(to_uint8([Image.fromarray(array)]))
    assert pixels.shape == (1, 3, 2, 4)
    assert torch.equal(pixels[0, 0], torch.ones(2, 4)) and torch.equal(pixels[0, 1], -torch.ones(2, 4))
