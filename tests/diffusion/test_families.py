import math

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, EulerAncestralDiscreteScheduler, UNet2DModel
from tiny import tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_vae

from trl_diffusion_rank.diffusion.denoiser import denoising_error
from trl_diffusion_rank.diffusion.families import recognise_family


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
PIPELINES = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}


def latents_and_noise(n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, n, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([10, 500, 990][:n])


@pytest.mark.parametrize("name", PIPELINES)
def test_family_is_recognised_from_the_components(name):
    family = recognise_family(PIPELINES[name]())
    assert family.name == name
    assert family.default_resolution == 16
    assert family.vae_scale_factor == 2


def test_unknown_model_is_refused_with_the_known_families():
    pipeline = DDPMPipeline(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        ),
        DDPMScheduler(),
    )
    with pytest.raises(ValueError, match=r"No family knows how to train a `DDPMPipeline`.*Known families: sd, sdxl"):
        recognise_family(pipeline)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", PIPELINES)
def test_clean_estimate_from_the_true_target_is_the_image(name, prediction_type):
    family = recognise_family(PIPELINES[name](prediction_type))
    latents, noise, timesteps = latents_and_noise()
    noisy = family.add_noise(latents, noise, timesteps)
    target = family.target(latents, noise, timesteps)
    # At t = 990 the signal is 0.07 of the noise, so float32 keeps about five digits of it
    torch.testing.assert_close(family.predict_clean(noisy, timesteps, target), latents, atol=1e-4, rtol=1e-4)


def test_epsilon_error_is_alpha_squared_times_velocity_error():
    """Of one and the same wrong denoiser: alpha^2 = 1 - sigma^2 relates the errors in the two conventions."""
    epsilon, velocity = (recognise_family(tiny_sd_pipeline(kind)) for kind in ("epsilon", "v_prediction"))
    latents, noise, timesteps = latents_and_noise()
    wrong_latents = latents + 0.1
    noisy = epsilon.add_noise(latents, noise, timesteps)
    alphas_cumprod = epsilon.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    wrong_noise = (noisy - alphas_cumprod.sqrt() * wrong_latents) / (1 - alphas_cumprod).sqrt()
    epsilon_error = denoising_error(wrong_noise, epsilon.target(latents, noise, timesteps))
    wrong_velocity = velocity.target(wrong_latents, wrong_noise, timesteps)
    velocity_error = denoising_error(wrong_velocity, velocity.target(latents, noise, timesteps))
    torch.testing.assert_close(epsilon_error, alphas_cumprod.flatten() * velocity_error, rtol=1e-4, atol=1e-6)


def test_no_clean_estimate_without_signal():
    family = recognise_family(tiny_sd_pipeline(rescale_betas_zero_snr=True))
    _, noise, _ = latents_and_noise(1)
    with pytest.raises(ValueError, match="timestep without signal"):
        family.predict_clean(noise, torch.tensor([999]), noise)


def test_noise_schedule_is_the_models_whatever_its_sampler():
    pipeline = tiny_sdxl_pipeline()
    expected = recognise_family(pipeline).scheduler.alphas_cumprod
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    family = recognise_family(pipeline)
    torch.testing.assert_close(family.scheduler.alphas_cumprod, expected)
    latents, noise, timesteps = latents_and_noise()
    noisy = family.add_noise(latents, noise, timesteps)
    alphas = expected[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, alphas.sqrt() * latents + (1 - alphas).sqrt() * noise)


def test_unknown_prediction_type_is_refused():
    pipeline = tiny_sd_pipeline()
    pipeline.scheduler = EulerAncestralDiscreteScheduler(prediction_type="flow")
    with pytest.raises(ValueError, match="`prediction_type` is 'flow'"):
        recognise_family(pipeline)


@pytest.mark.parametrize("name", PIPELINES)
def test_latents_and_prediction_are_what_the_stock_pipeline_uses(name):
    """A pipeline's own first denoising step, caught at the UNet, is what `predict` asks with the same conditioning."""
    pipeline = PIPELINES[name]()
    family = recognise_family(pipeline)
    caught = {}

    def catch(module, args, kwargs, output):
        caught.setdefault("call", (args, kwargs, output[0]))

    handle = pipeline.unet.register_forward_hook(catch, with_kwargs=True)
    pipeline("a red cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent", height=16, width=16)
    handle.remove()
    args, kwargs, expected = caught["call"]

    conditioning = family.encode_prompts(["a red cat"])
    conditioning |= family.image_conditioning([(16, 16)], [(0, 0)], 16)
    torch.testing.assert_close(kwargs["encoder_hidden_states"], conditioning["prompt_embeds"])
    prediction = family.predict(pipeline.unet, args[0], args[1].expand(1), conditioning)
    torch.testing.assert_close(prediction, expected)


@pytest.mark.parametrize("shift", [{}, {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}])
def test_encode_scales_and_decode_undoes_it(shift):
    pipeline = tiny_sd_pipeline()
    torch.manual_seed(0)
    pipeline.vae = tiny_vae(scaling_factor=0.5, **shift)
    family = recognise_family(pipeline)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = family.encode_images(pixels)
        raw = pipeline.vae.encode(pixels).latent_dist.mean
        mean = torch.tensor(shift.get("latents_mean", [0.0])).view(1, -1, 1, 1)
        std = torch.tensor(shift.get("latents_std", [1.0])).view(1, -1, 1, 1)
        torch.testing.assert_close(latents, (raw - mean) / std * 0.5)
        torch.testing.assert_close(family.decode(latents), pipeline.vae.decode(raw).sample)


def test_vae_that_overflows_in_float16_is_upcast_or_refused():
    pixels = torch.zeros(1, 3, 16, 16)
    pipeline = tiny_sdxl_pipeline()  # its VAE says `force_upcast`, as SDXL's does
    family = recognise_family(pipeline)
    pipeline.vae.half()
    with torch.no_grad():
        assert family.encode_images(pixels).dtype == torch.float32
        assert pipeline.vae.dtype == torch.float32

        pipeline.vae.register_to_config(force_upcast=False)
        pipeline.vae.encoder.conv_in.weight.data.fill_(math.inf)
        with pytest.raises(ValueError, match=r"non-finite latents in torch.float32.*sdxl-vae-fp16-fix"):
            family.encode_images(pixels)


def test_time_ids_stay_exact_in_half_precision():
    """1365 has no bfloat16: as a float it would become 1368 before it reaches the sinusoidal embedding."""
    pipeline = tiny_sdxl_pipeline()
    family = recognise_family(pipeline)
    ids = family.image_conditioning([(1365, 2047)], [(171, 3)], 1024)["add_time_ids"]
    assert ids.tolist() == [[1365, 2047, 171, 3, 1024, 1024]]
    seen = {}
    pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    pipeline.unet.to(torch.bfloat16)
    embeddings = {key: value.bfloat16() for key, value in family.encode_prompts(["a cat"]).items()}
    family.predict(
        pipeline.unet,
        torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16),
        torch.tensor([5]),
        {**embeddings, "add_time_ids": ids},
    )
    time_ids = seen["added_cond_kwargs"]["time_ids"]
    assert time_ids.dtype == torch.float32
    assert time_ids.tolist() == [[1365, 2047, 171, 3, 1024, 1024]]


def test_dropped_encoders_say_so():
    family = recognise_family(tiny_sd_pipeline())
    family.drop_encoders()
    with pytest.raises(RuntimeError, match="have left memory"):
        family.encode_prompts(["a cat"])


def test_family_of_another_package_is_found_by_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    from trl_diffusion_rank.diffusion import families

    point = EntryPoint("mine", "family_of_another_package:MyFamily", "trl_diffusion_rank.families")
    monkeypatch.setattr(families, "entry_points", lambda group: [point] if group == point.group else [])
    module = type(families)("family_of_another_package")

    class MyFamily(families.StableDiffusionFamily):
        name = "mine"

    module.MyFamily = MyFamily
    monkeypatch.setitem(__import__("sys").modules, "family_of_another_package", module)
    assert recognise_family(tiny_sd_pipeline()).name == "mine"
