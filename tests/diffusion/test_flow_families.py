import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from scipy.special import expit
from scipy.stats import norm
from tiny import ranked_dataset, tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sd_pipeline
from training import check_gradient_checkpointing, images, lora, make

from trl_diffusion_rank import RankedDiffusionDPOConfig, RankedDiffusionDPOTrainer
from trl_diffusion_rank.diffusion.denoiser import denoising_error
from trl_diffusion_rank.diffusion.draws import draw_rows
from trl_diffusion_rank.diffusion.families import recognise_family
from trl_diffusion_rank.diffusion.timesteps import logit_normal, shift_sigmas


PIPELINES = {
    "sd3": tiny_sd3_pipeline,
    "sd3 without t5": lambda: tiny_sd3_pipeline(t5=False),
    "flux": tiny_flux_pipeline,
    "flux without guidance": lambda: tiny_flux_pipeline(guidance_embeds=False),
}
TRAINED = {name: PIPELINES[name] for name in ("sd3", "flux")}
EVEN = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # quantiles instead of draws


def latents_noise_timesteps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents, noise = torch.randn(2, 3, 16, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return latents, noise, torch.tensor([12.5, 500.0, 987.6], dtype=torch.float64)


# What kind of model it is


@pytest.mark.parametrize("name", PIPELINES)
def test_family_is_recognised_from_the_components(name):
    pipeline = PIPELINES[name]()
    family = recognise_family(pipeline)
    assert family.name == name.split()[0]
    assert family.denoiser_name == "transformer"
    assert family.vae_scale_factor == 2
    assert family.resolution_multiple == 4, "a token is 2 by 2 latents"
    # FLUX learns no positions: its size is the pipeline's 128 latents
    assert family.default_resolution == {"sd3": 16, "flux": 256}[family.name]
    assert (family.default_beta, family.default_beta_linear) == (500.0, 500.0)
    assert family.input_layer(pipeline.transformer).weight.shape[1] in (16, 64), "the latents' or a token's channels"


def test_flux_for_another_task_is_not_recognised():
    pipeline = tiny_flux_pipeline()
    pipeline.transformer.register_to_config(in_channels=128)  # FLUX.1-Canny is given a picture beside the latents
    with pytest.raises(ValueError, match="No family knows how to train a `FluxPipeline`"):
        recognise_family(pipeline)


def test_shift_is_the_models_whatever_its_sampler():
    pipeline = tiny_sd3_pipeline()
    config = pipeline.scheduler.config
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, use_flow_sigmas=True, flow_shift=2.0)
    assert recognise_family(pipeline).shift() == 3.0
    pipeline.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"`EulerDiscreteScheduler` without a `shift`.*FlowMatchEulerDiscrete"):
        recognise_family(pipeline)


# The noise process


@pytest.mark.parametrize("name", TRAINED)
def test_clean_estimate_from_the_true_target_is_the_image(name):
    family = recognise_family(TRAINED[name]())
    latents, noise, timesteps = latents_noise_timesteps()
    noisy = family.add_noise(latents, noise, timesteps)
    target = family.target(latents, noise, timesteps)
    torch.testing.assert_close(family.predict_clean(noisy, timesteps, target), latents)
    torch.testing.assert_close(target, noise - latents)
    at_the_ends = torch.tensor([0.0, 500.0, 1000.0])
    noisy = family.add_noise(latents, noise, at_the_ends)
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[2], noise[2])


def test_noise_is_added_as_the_scheduler_adds_it():
    family = recognise_family(tiny_sd3_pipeline())
    latents, noise, _ = latents_noise_timesteps()
    timesteps = family.scheduler.timesteps[[3, 500, 998]]
    expected = family.scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(family.add_noise(latents, noise, timesteps), expected, rtol=1e-6, atol=1e-6)


def test_epsilon_error_is_the_signal_squared_times_velocity_error():
    """Of one and the same wrong estimate of the image: (1 - sigma)^2 relates the errors in the two conventions."""
    family = recognise_family(tiny_sd3_pipeline())
    latents, noise, timesteps = latents_noise_timesteps()
    noisy = family.add_noise(latents, noise, timesteps)
    sigma = (timesteps / 1000).view(-1, 1, 1, 1)
    wrong_velocity = family.target(latents, noise, timesteps) + 0.1
    wrong_latents = family.predict_clean(noisy, timesteps, wrong_velocity)
    wrong_noise = (noisy - (1 - sigma) * wrong_latents) / sigma
    velocity_error = denoising_error(wrong_velocity, family.target(latents, noise, timesteps))
    epsilon_error = denoising_error(wrong_noise, noise)
    torch.testing.assert_close(epsilon_error, (1 - sigma.flatten().float()) ** 2 * velocity_error, rtol=1e-4, atol=0)


# Timesteps


def test_logit_normal_is_the_sigmoid_of_a_standard_normal():
    sigmas = logit_normal(EVEN).numpy()
    for quantile in (0.01, 0.25, 0.5, 0.75, 0.99):
        assert np.quantile(sigmas, quantile) == pytest.approx(expit(norm.ppf(quantile)), abs=1e-4)
    assert sigmas.std() == pytest.approx(np.sqrt(norm.expect(lambda x: (expit(x) - 0.5) ** 2)), abs=1e-4)
    assert torch.isfinite(logit_normal(torch.tensor([0.0, 1 - 2**-24]))).all(), "the ends of what `torch.rand` gives"


def test_logit_normal_timesteps_carry_the_schedulers_shift():
    family = recognise_family(tiny_sd3_pipeline())
    timesteps = family.sample_timesteps(EVEN, "logit_normal", None).numpy()

    def shifted(x):
        return 1000 * 3 * expit(x) / (1 + 2 * expit(x))

    for quantile in (0.01, 0.25, 0.5, 0.75, 0.99):
        assert np.quantile(timesteps, quantile) == pytest.approx(shifted(norm.ppf(quantile)), abs=0.1)
    assert np.median(timesteps) == pytest.approx(750, abs=0.1), "odds of noise 3 : 1"
    assert timesteps.mean() == pytest.approx(norm.expect(shifted), abs=0.1)


def test_uniform_timesteps_are_the_schedulers_own():
    family = recognise_family(tiny_sd3_pipeline())
    u = torch.arange(1, 1001) / 1000  # the scheduler's grid before its shift
    timesteps = family.sample_timesteps(u, "uniform", None)
    torch.testing.assert_close(timesteps, family.scheduler.timesteps.flip(0))
    assert timesteps.dtype == torch.float32


@pytest.mark.parametrize("resolution", [16, 32])
def test_dynamic_shift_is_that_of_the_stock_pipeline(resolution):
    pipeline = tiny_flux_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        "a red cat",
        num_inference_steps=4,
        height=resolution,
        width=resolution,
        output_type="latent",
        max_sequence_length=24,
    )
    family = recognise_family(pipeline)
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(
        pipeline.scheduler.timesteps, family.sample_timesteps(sigmas, "uniform", None, resolution)
    )
    assert family.shift() == family.shift(256) > family.shift(32) > family.shift(16) > 1


def test_linear_dynamic_shift_is_the_schedulers():
    pipeline = tiny_flux_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_shift=1.5, max_shift=3.0
    )
    family = recognise_family(pipeline)
    assert family.shift(64) == 1.5, "64 pixels are 256 tokens, where the base shift holds"
    sigmas = torch.tensor([0.9, 0.2])
    torch.testing.assert_close(shift_sigmas(sigmas, 1.5), family.scheduler.time_shift(1.5, 1.0, sigmas))


def test_discrete_timesteps_are_those_the_model_is_told():
    family = recognise_family(tiny_flux_pipeline())
    grid = family.timestep_grid("discrete", [1000, 750, 0])
    timesteps = family.sample_timesteps(torch.tensor([0.0, 0.4, 0.99]), "discrete", grid)
    assert timesteps.tolist() == [1000.0, 750.0, 0.0]
    assert timesteps.dtype == torch.float32
    with pytest.raises(ValueError, match=r"between 0 and 1000.*got \[1001\]"):
        family.timestep_grid("discrete", [1001])


def test_sampling_that_does_not_fit_the_family_is_refused():
    flow, diffusion = recognise_family(tiny_sd3_pipeline()), recognise_family(tiny_sd_pipeline())
    with pytest.raises(ValueError, match=r"'turbo'` doesn't fit the `sd3` family.*logit_normal, uniform, discrete"):
        flow.timestep_grid("turbo", None)
    with pytest.raises(ValueError, match=r"'logit_normal'` doesn't fit the `sd` family.*uniform, turbo, discrete"):
        diffusion.timestep_grid("logit_normal", None)
    with pytest.raises(ValueError, match="Unknown `timestep_sampling` 'normal'"):
        flow.timestep_grid("normal", None)
    assert flow.timestep_grid("logit_normal", None) is None
    assert diffusion.timestep_grid("turbo", None) == [249, 499, 749]
    assert (flow.default_timestep_sampling, diffusion.default_timestep_sampling) == ("logit_normal", "uniform")


def test_timesteps_of_diffusion_are_whole_numbers_as_before():
    family = recognise_family(tiny_sd_pipeline())
    u = torch.tensor([0.0, 0.5, 0.9999])
    assert family.sample_timesteps(u, "uniform", None).tolist() == [0, 500, 999]
    assert family.sample_timesteps(u, "turbo", family.timestep_grid("turbo", None)).tolist() == [249, 499, 749]


# Asking the model


@pytest.mark.parametrize("name", PIPELINES)
def test_latents_and_prediction_are_what_the_stock_pipeline_uses(name):
    """A pipeline's own denoising step, caught at the transformer, is what `predict` asks."""
    pipeline = PIPELINES[name]()
    family = recognise_family(pipeline)
    calls = []

    def catch(module, args, kwargs, output):
        calls.append((kwargs, output[0]))

    handle = pipeline.transformer.register_forward_hook(catch, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    length = 256 if name == "sd3 without t5" else 24  # of zeros; and where the tiny tokenizer ends
    denoised = pipeline(
        ["a red cat", "a dog"],
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        height=16,
        width=16,
        max_sequence_length=length,
    ).images
    handle.remove()
    kwargs, expected = calls[1]
    if family.name == "flux":  # packed
        latents, expected, denoised = (
            pipeline._unpack_latents(packed, 16, 16, 2) for packed in (kwargs["hidden_states"], expected, denoised)
        )
        timesteps = kwargs["timestep"] * 1000
    else:
        latents, timesteps = kwargs["hidden_states"], kwargs["timestep"]

    conditioning = family.encode_prompts(["a red cat", "a dog"])
    torch.testing.assert_close(kwargs["encoder_hidden_states"], conditioning["prompt_embeds"])
    torch.testing.assert_close(kwargs["pooled_projections"], conditioning["pooled_prompt_embeds"])
    prediction = family.predict(pipeline.transformer, latents, timesteps, conditioning)
    assert prediction.shape == latents.shape == (2, 16, 8, 8)
    torch.testing.assert_close(prediction, expected)
    # The last step of Euler's method goes to sigma = 0: the pipeline's own clean estimate
    torch.testing.assert_close(family.predict_clean(latents, timesteps, prediction), denoised, rtol=1e-4, atol=1e-4)


def test_flux_is_told_the_training_guidance_if_it_is_distilled():
    told = []
    for guidance_embeds in (True, False):
        pipeline = tiny_flux_pipeline(guidance_embeds)
        family = recognise_family(pipeline)
        pipeline.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: told.append(kwargs["guidance"]), with_kwargs=True
        )
        family.predict(
            pipeline.transformer, torch.zeros(2, 16, 8, 8), torch.tensor([500, 500]), family.encode_prompts(["a", "b"])
        )
    assert told[0].tolist() == [1.0, 1.0]
    assert told[1] is None


@pytest.mark.parametrize("name", TRAINED)
def test_prediction_in_bfloat16_is_that_of_float32_rounded(name):
    pipeline = TRAINED[name]()
    family = recognise_family(pipeline)
    latents, _, timesteps = (tensor.float() for tensor in latents_noise_timesteps())
    conditioning = family.encode_prompts(["a cat", "a dog", "red"])
    expected = family.predict(pipeline.transformer, latents, timesteps, conditioning)
    pipeline.transformer.to(torch.bfloat16)
    halved = {key: value.bfloat16() for key, value in conditioning.items()}
    prediction = family.predict(pipeline.transformer, latents.bfloat16(), timesteps, halved)
    assert prediction.dtype == torch.bfloat16
    assert denoising_error(prediction, expected).max() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize("name", TRAINED)
def test_encode_shifts_and_scales_and_decode_undoes_it(name):
    pipeline = TRAINED[name]()
    family = recognise_family(pipeline)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = family.encode_images(pixels)
        raw = pipeline.vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(latents, (raw - 0.06) * 1.5)
        torch.testing.assert_close(family.decode(latents), pipeline.vae.decode(raw).sample)


# Training


def make_trainer(output_dir, pipeline, **kwargs) -> RankedDiffusionDPOTrainer:
    kwargs = {"resolution": 16, "peft_config": "lora"} | kwargs
    if kwargs["peft_config"] == "lora":
        kwargs["peft_config"] = lora(target_modules=None)  # the family's own
    return make(RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig, output_dir, pipeline, ranked_dataset(), **kwargs)


@pytest.mark.parametrize("name", TRAINED)
def test_lora_trains_and_stock_diffusers_loads_all_of_it(tmp_path, name):
    pipeline = TRAINED[name]()
    before = copy.deepcopy(pipeline.transformer.state_dict())
    untouched = images(TRAINED[name]())
    trainer = make_trainer(tmp_path, pipeline)
    assert trainer.beta == 500
    initial = {key: value.clone() for key, value in trainer.model.named_parameters() if "lora_" in key}
    trainer.train()
    trainer.save_model()

    trained = {key: value for key, value in trainer.model.named_parameters() if "lora_" in key}
    same = [key for key in trained if torch.equal(trained[key], initial[key])]
    # What SD3's last block makes of the text is thrown away, so nothing asks with its queries
    assert all("transformer_blocks.1.attn.add_q_proj" in key for key in same)
    assert len(same) == (2 if name == "sd3" else 0)
    for target in trainer.family.lora_target_modules:
        assert any(f".attn.{target}." in key for key in trained), target
    base = {
        key.replace(".base_layer", ""): value
        for key, value in trainer.model.get_base_model().denoiser.state_dict().items()
    }
    for key, value in before.items():
        assert torch.equal(base[key], value), key

    loaded = TRAINED[name]()
    loaded.load_lora_weights(str(tmp_path))
    assert loaded.transformer.peft_config["default_0"].lora_alpha == 12
    in_memory = TRAINED[name]()
    in_memory.transformer = trainer.model.get_base_model().denoiser.eval()
    expected = images(in_memory)
    np.testing.assert_allclose(images(loaded), expected, atol=1e-4)
    assert np.abs(expected - untouched).max() > 1e-3, "training changed nothing that could be lost"


@pytest.mark.parametrize("name", TRAINED)
def test_full_weights_train_and_stock_diffusers_loads_them(tmp_path, name):
    pipeline = TRAINED[name]()
    trainer = make_trainer(tmp_path, pipeline, peft_config=None, learning_rate=1e-4)
    trainer.train()
    trainer.save_model()
    loaded = TRAINED[name]()
    model_class = {"sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel}[name]
    loaded.transformer = model_class.from_pretrained(tmp_path, subfolder="transformer")
    np.testing.assert_allclose(images(loaded), images(pipeline), atol=1e-5)
    assert np.abs(images(loaded) - images(TRAINED[name]())).max() > 1e-4


@pytest.mark.parametrize("peft_config", ["lora", None])
@pytest.mark.parametrize("name", TRAINED)
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(tmp_path, name, peft_config):
    check_gradient_checkpointing(
        lambda **options: make_trainer(tmp_path, TRAINED[name](), peft_config=peft_config, beta=100.0, **options)
    )


@pytest.mark.parametrize("name", TRAINED)
def test_trainer_draws_the_familys_timesteps_at_its_resolution(tmp_path, name):
    trainer = make_trainer(tmp_path, TRAINED[name]())
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(2)]))
    asked = []
    original = trainer.family.predict

    def predict(denoiser, noisy_latents, timesteps, conditioning):
        asked.append(timesteps)
        return original(denoiser, noisy_latents, timesteps, conditioning)

    trainer.family.predict = predict
    trainer._compute_loss(trainer.model, batch, return_outputs=False)
    u, _ = draw_rows(trainer.args.seed, batch["row_seeds"].tolist(), 0, (16, 8, 8))
    expected = trainer.family.sample_timesteps(u, "logit_normal", None, resolution=16)
    for timesteps in asked:  # of the reference and of the trained model: 4 images a row
        torch.testing.assert_close(timesteps, expected.repeat_interleave(4))


def test_trainer_refuses_what_does_not_fit_flow_matching(tmp_path):
    with pytest.raises(ValueError, match="'turbo'` doesn't fit the `sd3` family"):
        make_trainer(tmp_path, tiny_sd3_pipeline(), timestep_sampling="turbo")
    with pytest.raises(ValueError, match=r"`resolution=18` must be a multiple of 4"):
        make_trainer(tmp_path, tiny_sd3_pipeline(), resolution=18)
