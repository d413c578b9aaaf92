import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from trl_diffusion_rank.digits import digits_model_path
from trl_diffusion_rank.digits.classifiers import to_pixels
from trl_diffusion_rank.digits.data import crawl, make_prompts
from trl_diffusion_rank.digits.pretrain import Budget, encode_images, pretrain, train_tokenizer


PARTS = ("text_encoder", "text_encoder_2", "vae", "unet")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    pipeline = DiffusionPipeline.from_pretrained(digits_model_path())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_same_seed_same_weights():
    budget = Budget(crawl_size=100, text_steps=2, vae_steps=2, unet_steps=3)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, again, other = pretrain(0, budget), pretrain(0, budget), pretrain(1, budget)
    # `pretrain` seeds itself and leaves the caller's random state alone.
    assert torch.rand(1) == expected
    for part in PARTS:
        weights = getattr(first, part).state_dict()
        assert all(torch.equal(weights[key], value) for key, value in getattr(again, part).state_dict().items())
        assert not all(torch.equal(weights[key], value) for key, value in getattr(other, part).state_dict().items())
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()


def test_tokenizer_has_one_token_a_word_and_knows_all_bytes():
    tokenizer = train_tokenizer()
    ids = tokenizer("A handwritten digit seven in red ink").input_ids
    assert len(ids) == 7 + 2
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.eos_token_id not in tokenizer("Übermut 42!").input_ids[:-1]


def test_shipped_model_is_a_stock_sdxl_pipeline(pipeline):
    assert type(pipeline) is StableDiffusionXLPipeline
    assert pipeline.config.force_zeros_for_empty_prompt
    assert all(p.dtype == torch.float32 for part in PARTS for p in getattr(pipeline, part).parameters())
    image = pipeline("a handwritten digit seven in red ink", num_inference_steps=2, guidance_scale=2.0).images[0]
    assert image.size == (16, 16)


def test_latents_are_white(pipeline):
    moments = encode_images(pipeline.vae, to_pixels(crawl("heldout", 350).images))
    latents = moments.chunk(2, dim=1)[0]
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.15, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.15, rtol=0)


def test_autoencoder_keeps_the_picture(pipeline):
    pixels = to_pixels(crawl("heldout", 350).images)
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - pixels).square().mean(dim=(1, 2, 3)))
    assert psnr.mean() > 27


def test_base_writes_the_right_digits_and_is_half_ugly(pipeline, judge):
    prompts = make_prompts(240, seed=123)
    generators = [torch.Generator().manual_seed(seed) for seed in range(1000, 1240)]
    images = pipeline(prompts, num_inference_steps=4, guidance_scale=2.0, generator=generators).images
    verdict = judge.judge(images, prompts)
    assert verdict["digit"].mean() > 0.95
    assert verdict["ink"].mean() > 0.95
    assert 0.25 < verdict["clean"].mean() < 0.55
    assert np.stack([np.asarray(image) for image in images]).std(axis=0).mean() > 30
