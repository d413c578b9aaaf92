import numpy as np
import pytest
import torch
from PIL import Image
from tiny_discriminator import (
    BACKBONES,
    CAPTION_LENGTH,
    IMAGE_SIZE,
    clip_tokenizer,
    save_tiny_backbone,
    tiny_backbone,
    tiny_image_processor,
    tiny_processor,
    tiny_tokenizer,
)
from tiny_scorers import random_images
from transformers import AutoProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil

from trl_diffusion_rank.data.images import to_pixels, to_uint8
from trl_diffusion_rank.discriminator import AestheticDiscriminatorProcessor


CAPTIONS = ["a cat", "a dog", "a cat", "hen"]
LONG = "a very long story about a cat and its dog"


@pytest.mark.parametrize("kind", BACKBONES)
def test_images_are_processed_by_the_backbones_processor(kind):
    images = random_images(2, (20, 30))
    expected = tiny_image_processor(kind)(images=images, return_tensors="pt")["pixel_values"]
    processor = tiny_processor(kind)
    assert torch.equal(processor(images=images)["pixel_values"], expected)
    assert torch.equal(processor(images=images[0])["pixel_values"], expected[:1])
    assert set(processor(images=images)) == {"pixel_values"}


@pytest.mark.parametrize("kind", BACKBONES)
def test_captions_that_are_the_same_become_one(kind):
    inputs = tiny_processor(kind)(images=random_images(4), text=CAPTIONS)
    assert inputs["caption_of"].tolist() == [0, 1, 0, 2]
    assert torch.equal(inputs["input_ids"], tiny_processor(kind)(text=["a cat", "a dog", "hen"])["input_ids"])
    # alone they are captions in a list, and keep their places
    assert len(tiny_processor(kind)(text=CAPTIONS)["input_ids"]) == 4
    assert len(tiny_processor(kind)(text="a cat")["input_ids"]) == 1


def test_captions_of_a_clip():
    """Cut to what the tower reads, but for the end of text, where CLIP pools; as long as the longest, with a mask."""
    processor, tokenizer = tiny_processor("clip"), clip_tokenizer()
    inputs = processor(text=["a cat", LONG])
    assert inputs["input_ids"].shape == (2, CAPTION_LENGTH) and inputs["input_ids"][1, -1] == tokenizer.eos_token_id
    assert inputs["attention_mask"].sum(dim=1).tolist() == [6, CAPTION_LENGTH]
    assert processor(text=["a cat"])["input_ids"].shape == (1, 6)


def test_captions_of_a_siglip():
    """Always of one length and without a mask; cut although the tokenizer has no limit of its own."""
    processor = tiny_processor("siglip")
    assert processor.tokenizer.model_max_length > 10**6
    inputs = processor(text=["a cat", LONG])
    assert set(inputs) == {"input_ids"}
    assert inputs["input_ids"].shape == (2, CAPTION_LENGTH)
    assert inputs["input_ids"][0].tolist() == [3, 2, 5, 3, 22, 1, *[0] * 6]
    assert inputs["input_ids"][1, -1] == 1
    assert processor(text=["a cat"])["input_ids"].shape == (1, CAPTION_LENGTH)


@pytest.mark.parametrize("kind", BACKBONES)
def test_case_makes_no_difference(kind):
    processor = tiny_processor(kind)
    assert torch.equal(processor(text=["A Cat"])["input_ids"], processor(text=["a cat"])["input_ids"])


@pytest.mark.parametrize("kind", BACKBONES)
def test_saved_and_loaded_by_the_auto_class(kind, tmp_path):
    processor, images = tiny_processor(kind), random_images(4, (20, 30))
    expected = processor(images=images, text=CAPTIONS)
    processor.save_pretrained(tmp_path / "first")
    AutoProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again")
    for auto_class, folder in ((AutoProcessor, "again"), (AestheticDiscriminatorProcessor, "first")):
        loaded = auto_class.from_pretrained(tmp_path / folder)
        assert type(loaded) is AestheticDiscriminatorProcessor
        assert type(loaded.image_processor).__name__.endswith("Pil")
        inputs = loaded(images=images, text=CAPTIONS)
        assert set(inputs) == set(expected)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", BACKBONES)
def test_from_a_backbone(kind, tmp_path):
    processor = AestheticDiscriminatorProcessor.from_backbone(save_tiny_backbone(kind, tmp_path))
    assert (processor.caption_length, processor.pad_to_length) == (CAPTION_LENGTH, kind == "siglip")
    assert type(processor.image_processor) is type(tiny_image_processor(kind))
    inputs, expected = processor(text=CAPTIONS), tiny_processor(kind)(text=CAPTIONS)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


def test_backbones_without_a_processor(tmp_path):
    with pytest.raises(ValueError, match=r"processor of the backbone '.*nowhere' could not be loaded; it must be the"):
        AestheticDiscriminatorProcessor.from_backbone(str(tmp_path / "nowhere"))
    tiny_backbone("clip").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"could not be loaded; it must be the folder of a CLIP or SigLIP with its im"
    ):
        AestheticDiscriminatorProcessor.from_backbone(str(tmp_path))
    tiny_backbone("clip").vision_model.save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="The backbone is of the type 'clip_vision_model'; a whole CLIP or SigLIP"):
        AestheticDiscriminatorProcessor.from_backbone(str(tmp_path / "tower"))


def test_images_and_captions_of_different_numbers():
    with pytest.raises(ValueError, match="`images` are 3 and `text` 2; one caption per image"):
        tiny_processor("clip")(images=random_images(3), text=["a", "b"])


# Differentiable preprocessing. Levels are of 8 bits: what 1 of 255 is in a saved image.

CLIP_224 = CLIPImageProcessorPil()
SIGLIP_224 = SiglipImageProcessorPil()
SIGLIP_2_224 = SiglipImageProcessorPil(resample=2)  # bilinear, as google/siglip2-base-patch16-224


def edges(height: int, width: int) -> Image.Image:
    """Blocks of 0 and 255, at which bicubic weights overshoot most."""
    blocks = np.random.default_rng(0).integers(2, size=(height // 7 + 1, width // 7 + 1, 3)) * 255
    return Image.fromarray(np.kron(blocks, np.ones((7, 7, 1)))[:height, :width].astype(np.uint8))


def both_ways(image_processor, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences (1, 3, h, w) of PIL's way and the differentiable one, in normalised units and in levels of 255."""
    processor = AestheticDiscriminatorProcessor(image_processor, clip_tokenizer())
    expected = processor(images=[image])["pixel_values"]
    got = processor.preprocess_pixels(to_pixels(to_uint8([image])))
    assert got.shape == expected.shape and got.dtype == torch.float32
    apart = (got - expected).abs()
    return apart, apart * torch.tensor(image_processor.image_std).view(3, 1, 1) * 255


@pytest.mark.parametrize("image_processor", [CLIP_224, SIGLIP_224, SIGLIP_2_224], ids=["clip", "siglip", "siglip2"])
@pytest.mark.parametrize(
    ("height", "width"), [(16, 16), (100, 150), (223, 225), (224, 224), (500, 500), (300, 1000), (768, 1027)]
)
def test_pixels_are_preprocessed_as_by_pil(image_processor, height, width):
    """
    Within the 8-bit rounding that PIL does after the resize along either side: half a level of the second, and as much
    as is left of half a level of the first.
    """
    for image in (random_images(1, (height, width))[0], edges(height, width)):
        normalised, levels = both_ways(image_processor, image)
        assert levels.mean() < 0.45 and levels.max() < 1.15
        assert normalised.mean() < 0.006 and normalised.max() < 0.018
        if (height, width) == (224, 224):
            assert levels.max() < 1e-3


@pytest.mark.parametrize(("height", "width"), [(155, 100), (768, 512)])
def test_tall_images_are_preprocessed_as_by_pil(height, width):
    image = random_images(1, (height, width))[0]
    assert both_ways(CLIP_224, image)[1].max() < 1.15
    # Pillow 13 squeezes it along the height first, which clips other pixels
    assert both_ways(SIGLIP_224, image)[1].mean() < 0.45


def test_batches_and_half_precision():
    processor = tiny_processor("clip")
    pixels = to_pixels(to_uint8(random_images(3, (20, 30))))
    batch = processor.preprocess_pixels(pixels)
    assert batch.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    for i in range(3):
        assert torch.equal(processor.preprocess_pixels(pixels[i : i + 1])[0], batch[i])
    half = processor.preprocess_pixels(pixels.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, batch, atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("size", [(20, 24), (9, 7), (IMAGE_SIZE, IMAGE_SIZE)])
def test_the_gradient_of_preprocessing(kind, size):
    """By finite differences in float64, on pixels that clipping leaves alone."""
    processor = AestheticDiscriminatorProcessor(tiny_image_processor(kind), tiny_tokenizer(kind))
    generator = torch.Generator().manual_seed(0)
    pixels = 0.8 * torch.rand(1, 3, *size, generator=generator, dtype=torch.float64) - 0.4
    assert torch.autograd.gradcheck(processor.preprocess_pixels, pixels.requires_grad_(), fast_mode=True)


def test_values_out_of_range_are_clipped():
    """A saved image can't hold them. White and black still get a gradient, what lies beyond gets none."""
    processor = tiny_processor("siglip")
    pixels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).repeat(4)[:IMAGE_SIZE].expand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    pixels = pixels.clone().requires_grad_()
    processed = processor.preprocess_pixels(pixels)  # nothing to resize; mean and deviation of 1/2 change nothing
    torch.testing.assert_close(processed, pixels.clamp(-1, 1))
    processed.sum().backward()
    assert torch.equal(pixels.grad, (pixels.abs() <= 1).float())


def test_resizing_overshoots_no_more_than_pil():
    pixels = to_pixels(to_uint8([edges(40, 40)]))
    processed = tiny_processor("siglip").preprocess_pixels(pixels)
    assert processed.min() >= -1 and processed.max() <= 1
    assert (processed == 1).any() and (processed == -1).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 1}, r"resizes with `resample` .*; only bilinear \(2\) and bicubic \(3\) have a differentiable"),
        ({"crop_size": {"height": 24, "width": 20}}, "`crop_size` 24 x 20 what it has resized to 16 x 24; its `size`"),
        (
            {"size": {"shortest_edge": 16, "longest_edge": 30}},
            "resizes to `size` .*'longest_edge': 30.*; `height` and",
        ),
    ],
)
def test_image_processors_that_cannot_be_followed(settings, message):
    options = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}} | settings
    processor = AestheticDiscriminatorProcessor(CLIPImageProcessorPil(**options), clip_tokenizer())
    with pytest.raises(ValueError, match=message):
        processor.preprocess_pixels(torch.zeros(1, 3, 20, 30))
