import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from tiny import ranked_dataset, tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_vae
from tiny_discriminator import save_tiny_discriminator, tiny_discriminator, tiny_processor
from training import config, first_batch, launch
from transformers import TrainerCallback

from trl_diffusion_rank import (
    DiffusionCPOConfig,
    DiffusionCPOTrainer,
    RankedDiffusionDPOConfig,
    RankedDiffusionDPOTrainer,
)
from trl_diffusion_rank.diffusion.families import recognise_family
from trl_diffusion_rank.discriminator import AestheticDiscriminator, AestheticDiscriminatorProcessor
from trl_diffusion_rank.trainers.adversarial import decoding_family, noise_limit


METHODS = {
    "dpo": (RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig),
    "cpo": (DiffusionCPOTrainer, DiffusionCPOConfig),
}
PIPELINES = {
    "sd": tiny_sd_pipeline,
    "sd-v": lambda: tiny_sd_pipeline("v_prediction"),
    "sdxl": tiny_sdxl_pipeline,
    "sdxl-v": lambda: tiny_sdxl_pipeline("v_prediction"),
    "sdxl-sample": lambda: tiny_sdxl_pipeline("sample"),
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
}
ALL_TIMES = {"adversarial_max_noise": 500.0, "adversarial_max_images": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_discriminator("clip", tmp_path_factory.mktemp("discriminator"), patch_layer=1)


@pytest.fixture(scope="module")
def tiny_vae_folder(tmp_path_factory) -> str:
    return save_tiny_vae(tmp_path_factory.mktemp("taesd"))


def save_tiny_vae(folder, latent_channels: int = 4) -> str:
    torch.manual_seed(3)
    layers = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(latent_channels=latent_channels, **layers, **blocks).save_pretrained(folder)
    return str(folder)


def make_trainer(output_dir, method="dpo", model=None, data=None, peft_config="lora", callbacks=None, **options):
    trainer_class, config_class = METHODS[method]
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    return trainer_class(
        model=tiny_sdxl_pipeline() if model is None else model,
        args=config(config_class, output_dir, **({"beta": 100.0} | options)),
        train_dataset=ranked_dataset() if data is None else data,
        peft_config=lora if peft_config == "lora" else peft_config,
        callbacks=callbacks,
    )


def loss_and_logs(trainer, batch=None):
    batch = first_batch(trainer) if batch is None else batch
    if isinstance(trainer, DiffusionCPOTrainer):
        trainer._stored_metrics["train"].clear()
        loss, adversarial = trainer.get_batch_loss_metrics(trainer.model, batch)
        trainer._read_metrics()
        return loss, adversarial | {name: values[0] for name, values in trainer._stored_metrics["train"].items()}
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    trainer._read_metrics()
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def gradients(trainer, loss) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


def state(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class _StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# The clean estimate and its decoding


@pytest.mark.parametrize("name", PIPELINES)
def test_the_true_answer_decodes_to_the_image(name):
    pipeline = PIPELINES[name]()
    family = recognise_family(pipeline)
    decoder = decoding_family(family, None, bf16=False)
    with torch.no_grad():
        latents = family.encode_images(torch.rand(3, 3, 16, 16) * 2 - 1)
        expected = family.decode(latents)
        noise = torch.randn_like(latents)
        timesteps = torch.tensor([1, 200, 500]).to(torch.float32 if name in ("sd3", "flux") else torch.long)
        noisy, target = family.add_noise(latents, noise, timesteps), family.target(latents, noise, timesteps)
        torch.testing.assert_close(decoder.decode(decoder.predict_clean(noisy, timesteps, target)), expected)
    assert decoder.pipeline.vae.encoder is None and pipeline.vae.encoder is not None, "the user's VAE stays whole"


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_tiny_vae_decodes_as_in_the_stock_pipeline(name, tiny_vae_folder):
    """The pipeline divides by the VAE's own scaling factor, which is 1 for a tiny VAE."""
    stock = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[name]
    pipeline = PIPELINES[name]()
    decoder = decoding_family(recognise_family(pipeline), tiny_vae_folder, bf16=False)
    with_tiny = stock(**{**pipeline.components, "vae": AutoencoderTiny.from_pretrained(tiny_vae_folder)})
    with_tiny.set_progress_bar_config(disable=True)
    seen = []
    arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}

    def keep(pipeline, step, timestep, kwargs):
        seen.append(kwargs["latents"])
        return kwargs

    images = with_tiny("a cat", generator=torch.Generator().manual_seed(0), callback_on_step_end=keep, **arguments)[0]
    with torch.no_grad():
        decoded = decoder.decode(seen[-1])
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images)
    assert images.std() > 1e-3


def test_a_flow_models_tiny_vae_takes_the_latents_unshifted(tmp_path):
    """SD3 and FLUX pipelines compute latents / scaling_factor + shift_factor with the VAE's own config: 1 and 0."""
    folder = save_tiny_vae(tmp_path, latent_channels=16)
    decoder = decoding_family(recognise_family(tiny_sd3_pipeline()), folder, bf16=False)
    latents = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(folder).decode(latents).sample
        torch.testing.assert_close(decoder.decode(latents), expected)


def test_decoder_is_frozen_and_in_bfloat16_where_training_is():
    family = recognise_family(tiny_sdxl_pipeline())
    vae = decoding_family(family, None, bf16=True).pipeline.vae
    assert vae.dtype == torch.bfloat16
    assert family.pipeline.vae.dtype == torch.float32
    assert not any(p.requires_grad for p in vae.parameters())
    family.pipeline.vae.half()
    assert decoding_family(family, None, bf16=False).pipeline.vae.dtype == torch.float32


# Which images


def test_noise_limits():
    sdxl, flux = recognise_family(tiny_sdxl_pipeline()), recognise_family(tiny_flux_pipeline())
    sigmas = (1 - sdxl.scheduler.alphas_cumprod).sqrt() / sdxl.scheduler.alphas_cumprod.sqrt()
    limit = noise_limit(sdxl, None, "uniform", None)
    assert (sigmas <= limit).sum() == 501  # timesteps 0 to 500
    assert noise_limit(flux, None, "logit_normal", None) == pytest.approx(1.5)
    assert noise_limit(sdxl, 2.5, "uniform", None) == 2.5
    zero_terminal = recognise_family(tiny_sdxl_pipeline(rescale_betas_zero_snr=True))
    turbo = noise_limit(zero_terminal, None, "turbo", [249, 499, 749])
    noise = zero_terminal.snr(torch.tensor([249, 499, 749, 999])).rsqrt()
    assert (noise <= turbo).tolist() == [True, True, True, False]


def test_only_timesteps_without_signal_are_refused(tmp_path, folder):
    options = {"adversarial_mode": "frozen", "adversarial_discriminator": folder, "timestep_sampling": "discrete"}
    for prediction_type in ("epsilon", "v_prediction"):
        pipeline = tiny_sdxl_pipeline(prediction_type, rescale_betas_zero_snr=True)
        with pytest.raises(ValueError, match=r"No timestep of \[999\] is below the adversarial term's noise limit"):
            make_trainer(tmp_path, model=pipeline, timesteps=[999], adversarial_max_noise=500.0, **options)


def test_timesteps_above_the_limit_contribute_nothing(tmp_path, folder):
    """Beside timesteps that do, 999 without signal is neither divided by nor judged."""
    pipeline = tiny_sdxl_pipeline(rescale_betas_zero_snr=True)
    options = {"timestep_sampling": "discrete", "timesteps": [300, 999]}
    term = {"adversarial_mode": "frozen", "adversarial_discriminator": folder, "adversarial_margin": 1e3}
    trainer = make_trainer(tmp_path, model=pipeline, adversarial_max_images=100, **options, **term)
    batch = first_batch(trainer)
    (_, timesteps, _), _ = trainer._noised(batch, 0)
    assert set(timesteps.tolist()) == {300, 999}
    best, clear = trainer._adversary._candidates(timesteps, batch, 0)
    assert torch.equal(clear, timesteps == 300)
    assert torch.equal(best, (batch["ranks"] == 1)[batch["mask"]] & clear)
    _, answer = trainer._ask(trainer.model, *trainer._noised(batch, 0), batch["mask"])
    answer = answer._replace(prediction=answer.prediction.detach().requires_grad_())
    total, logs = trainer._adversary(answer.prediction.sum() * 0, answer, batch, 0)
    (gradient,) = torch.autograd.grad(total, answer.prediction)
    assert torch.equal(gradient.flatten(1).abs().sum(1) > 0, best)
    assert logs["adversarial/weight"] == 0.1

    nothing = answer._replace(timesteps=torch.full_like(timesteps, 999))
    main = answer.prediction.square().mean()
    total, logs = trainer._adversary(main, nothing, batch, 0)
    assert total is main and logs == {}


def test_images_are_bounded_and_drawn_alike_again(tmp_path, folder):
    term = {"adversarial_mode": "frozen", "adversarial_discriminator": folder, "adversarial_max_noise": 500.0}
    trainer = make_trainer(tmp_path, adversarial_max_images=3, adversarial_on="all", **term)
    batch = first_batch(trainer)
    picked = [trainer._adversary._pick(torch.ones(19, dtype=torch.bool), batch, visit).tolist() for visit in (0, 0, 1)]
    assert picked[0] == picked[1] != picked[2]
    assert len(set(picked[0])) == 3 and picked[0] == sorted(picked[0])
    sizes = []
    trainer._adversary.decoder.pipeline.vae.decoder.register_forward_pre_hook(lambda _, a: sizes.append(len(a[0])))
    loss_and_logs(trainer, batch)
    assert sizes == [3]


def test_a_dropped_caption_isnt_judged(tmp_path, folder):
    term = {"adversarial_mode": "frozen", "adversarial_discriminator": folder, **ALL_TIMES}
    trainer = make_trainer(tmp_path, caption_dropout=0.5, **term)
    plain = make_trainer(tmp_path, **term)
    batch = first_batch(trainer)
    (_, timesteps, conditioning), _ = trainer._noised(batch, 0)
    (_, _, full), _ = plain._noised(batch, 0)
    pairs = zip(conditioning["prompt_embeds"], full["prompt_embeds"], strict=True)
    kept = torch.tensor([torch.equal(given, whole) for given, whole in pairs])
    assert 0 < kept.sum() < 19
    assert torch.equal(trainer._adversary._candidates(timesteps, batch, 0)[1], kept)


# Frozen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cache_latents", [True, False])
def test_frozen_term_is_the_formula_and_reaches_lora_alone(tmp_path, folder, method, cache_latents):
    """relu(margin - D(decode(x0), caption)) of the best images, transcribed from the forward pass to the score."""
    plain = make_trainer(tmp_path, method, cache_latents=cache_latents)
    term = {"adversarial_mode": "frozen", "adversarial_discriminator": folder, "adversarial_margin": 50.0, **ALL_TIMES}
    trainer = make_trainer(tmp_path, method, cache_latents=cache_latents, adversarial_weight=0.3, **term)
    adversary = trainer._adversary
    before = state(adversary.discriminator), state(adversary.decoder.pipeline.vae)
    batch = first_batch(trainer)
    main, _ = loss_and_logs(plain)
    loss, logs = loss_and_logs(trainer, batch)

    pipeline = tiny_sdxl_pipeline()
    _, answer = trainer._ask(trainer.model, *trainer._noised(batch, 0), batch["mask"])
    best = (batch["ranks"] == 1)[batch["mask"]]
    alphas_cumprod = trainer.family.scheduler.alphas_cumprod[answer.timesteps].view(-1, 1, 1, 1)
    clean = (answer.noisy_latents - (1 - alphas_cumprod).sqrt() * answer.prediction) / alphas_cumprod.sqrt()
    pixels = pipeline.vae.decode(clean[best] / pipeline.vae.config.scaling_factor).sample
    model, processor = AestheticDiscriminator.from_pretrained(folder), tiny_processor("clip")
    captions = processor.tokenize(list(ranked_dataset()["prompt"]))
    scores = model(pixel_values=processor.preprocess_pixels(pixels), **captions).logits[:, 0]
    expected = main + 0.3 * (50.0 - scores).relu().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert logs["adversarial/score_fake"] == pytest.approx(scores.mean().item(), rel=1e-4)
    assert logs["adversarial/loss"] == pytest.approx(50 - scores.mean().item(), rel=1e-4)
    assert "adversarial/accuracy" not in logs and logs["adversarial/weight"] == 0.3

    wanted = gradients(trainer, 0.3 * (50.0 - scores).relu().mean())
    found, of_main = gradients(trainer, loss), gradients(plain, main)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name] - of_main[name], gradient, rtol=1e-3, atol=1e-3)
    assert any(gradient.abs().max() > 1e-2 for gradient in wanted.values())

    trainer.train()
    assert same(before[0], state(adversary.discriminator)) and same(before[1], state(adversary.decoder.pipeline.vae))
    others = (*adversary.discriminator.parameters(), *adversary.decoder.pipeline.vae.parameters())
    assert all(p.grad is None and not p.requires_grad for p in others)
    assert all(
        "lora_" in name for name, p in trainer.model.named_parameters() if p.grad is not None or p.requires_grad
    )


@pytest.mark.parametrize("method", METHODS)
def test_past_the_margin_the_gradient_is_exactly_that_without_the_term(tmp_path, folder, method):
    term = {"adversarial_mode": "frozen", "adversarial_discriminator": folder, "adversarial_margin": -1e3, **ALL_TIMES}
    plain, trainer = make_trainer(tmp_path, method), make_trainer(tmp_path, method, adversarial_weight=10.0, **term)
    main, _ = loss_and_logs(plain)
    loss, logs = loss_and_logs(trainer)
    assert torch.equal(loss, main)
    assert same(gradients(trainer, loss), gradients(plain, main))
    assert logs["adversarial/loss"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_without_the_term_nothing_is_loaded_and_one_step_is_bit_equal(tmp_path, folder, method):
    """Also before `adversarial_start`, in which nothing is decoded."""
    plain = make_trainer(tmp_path, method, max_steps=4)
    assert plain._adversary is None
    plain.train()
    term = {"adversarial_mode": "joint", "adversarial_discriminator": folder, **ALL_TIMES}
    late = make_trainer(tmp_path, method, max_steps=4, adversarial_start=0.5, **term)
    decoded = []
    late._adversary.decoder.pipeline.vae.decoder.register_forward_hook(
        lambda *_: decoded.append(late.state.global_step)
    )
    late.train()
    logs = [[log for log in t.state.log_history if "loss" in log] for t in (plain, late)]
    assert [a["loss"] == b["loss"] for a, b in zip(*logs, strict=True)] == [True, True, False, False]
    assert ["adversarial/loss" in log for log in logs[1]] == [False, False, True, True]
    assert set(decoded) == {2, 3}


@pytest.mark.parametrize("name", ["sd-v", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("mode", ["frozen", "joint"])
def test_families_train(tmp_path, folder, name, mode):
    term = {"adversarial_mode": mode, "adversarial_discriminator": folder, "adversarial_adaptive": True}
    trainer = make_trainer(
        tmp_path, model=PIPELINES[name](), max_steps=3, resolution=16, per_device_train_batch_size=6, **term
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logs = [log for log in trainer.state.log_history if "adversarial/loss" in log]
    assert logs and all(log["adversarial/weight"] > 0 for log in logs)
    changed = [key for key, p in trainer.model.named_parameters() if not torch.equal(p, before[key])]
    assert changed and all("lora_" in key for key in changed)


def test_behaviour_cloning_with_a_tiny_vae_and_a_discriminator_without_text(tmp_path, tiny_vae_folder):
    """A ranking loss of weight 0 and an anchor: supervised fine-tuning on the best images, with the term."""
    unconditional = save_tiny_discriminator("siglip", tmp_path / "d", text_conditioned=False)
    cloning = {"loss_type": ["pairwise"], "loss_weights": [0.0], "sft_weight": 1.0}
    term = {"adversarial_mode": "joint", "adversarial_discriminator": unconditional, **ALL_TIMES}
    trainer = make_trainer(tmp_path, **cloning, **term, adversarial_vae=tiny_vae_folder)
    assert isinstance(trainer._adversary.decoder.pipeline.vae, AutoencoderTiny)
    before = state(trainer._adversary.discriminator)
    main, _ = loss_and_logs(make_trainer(tmp_path, **cloning))
    loss, logs = loss_and_logs(trainer)
    assert loss.item() == pytest.approx(main.item() - 0.1 * logs["adversarial/score_fake"], rel=1e-4)
    trainer.train()
    assert not same(before, state(trainer._adversary.discriminator))


@pytest.mark.parametrize("peft_config", ["lora", None])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(tmp_path, folder, method, peft_config):
    term = {"adversarial_mode": "frozen", "adversarial_discriminator": folder, "adversarial_margin": 50.0, **ALL_TIMES}
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path, method, peft_config=peft_config, gradient_checkpointing=checkpointing, max_steps=1,
            gradient_checkpointing_kwargs={"use_reentrant": False}, adversarial_adaptive=True, **term
        )  # fmt: skip
        trainer.model.train()
        assert trainer._adversary.decoder.pipeline.vae.is_gradient_checkpointing == checkpointing
        loss, logs = loss_and_logs(trainer)
        results.append((loss, logs["adversarial/weight"], gradients(trainer, loss)))
    (loss, weight, plain), (other_loss, other_weight, checkpointed) = results
    torch.testing.assert_close(loss, other_loss)
    assert weight == pytest.approx(other_weight, rel=1e-4) and weight > 0
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-3, atol=1e-4)


def test_reentrant_checkpointing_has_no_adaptive_weight(tmp_path, folder):
    term = {"adversarial_mode": "frozen", "adversarial_discriminator": folder, "adversarial_adaptive": True}
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r"`adversarial_adaptive=True` can't be used with reentrant gradient check"):
        make_trainer(tmp_path, **reentrant, **term)


@pytest.mark.parametrize("mode", ["frozen", "joint"])
def test_bfloat16_trains(tmp_path, folder, mode):
    term = {"adversarial_mode": mode, "adversarial_discriminator": folder, "adversarial_adaptive": True, **ALL_TIMES}
    trainer = make_trainer(tmp_path, bf16=True, use_cpu=True, **term)
    exact = make_trainer(tmp_path, **term)
    assert trainer._adversary.decoder.pipeline.vae.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainer._adversary.discriminator.parameters())
    _, logs = loss_and_logs(trainer)
    _, expected = loss_and_logs(exact)
    assert logs["adversarial/score_fake"] == pytest.approx(expected["adversarial/score_fake"], abs=0.3)
    trainer.train()
    for log in trainer.state.log_history[:2]:
        assert all(torch.isfinite(torch.tensor(value)) for value in log.values())


# The adaptive weight


@pytest.mark.parametrize("peft_config", ["lora", None])
def test_adaptive_weight_by_hand(tmp_path, folder, peft_config):
    term = {"adversarial_mode": "frozen", "adversarial_discriminator": folder, "adversarial_margin": 50.0, **ALL_TIMES}
    fixed = make_trainer(tmp_path, peft_config=peft_config, adversarial_weight=1.0, **term)
    plain = make_trainer(tmp_path, peft_config=peft_config)
    main, _ = loss_and_logs(plain)
    both, _ = loss_and_logs(fixed)
    of_main, of_both = gradients(plain, main), gradients(fixed, both)
    if peft_config is None:
        last = "denoiser.conv_out.weight"
    else:
        last = [name for name in of_main if "lora_B" in name and "up_blocks" in name][-1]
    ratio = (of_main[last].norm() / (of_both[last] - of_main[last]).norm()).item()
    trainer = make_trainer(
        tmp_path, peft_config=peft_config, adversarial_weight=0.5, adversarial_adaptive=True, **term
    )
    _, logs = loss_and_logs(trainer)
    assert logs["adversarial/weight"] == pytest.approx(0.5 * ratio, rel=1e-3)

    trainer._adversary.ratio = 10.0  # of earlier steps
    _, logs = loss_and_logs(trainer)
    assert logs["adversarial/weight"] == pytest.approx(0.5 * (9.0 + 0.1 * ratio), rel=1e-3)
    trainer._adversary.args.adversarial_margin = -1e3
    _, logs = loss_and_logs(trainer)
    assert logs["adversarial/weight"] == pytest.approx(0.5 * (9.0 + 0.1 * ratio), rel=1e-3), "nothing was learnt"


# Joint


@pytest.mark.parametrize("method", METHODS)
def test_joint_term_trains_the_head_and_the_lora(tmp_path, folder, method):
    term = {"adversarial_mode": "joint", "adversarial_discriminator": folder, **ALL_TIMES}
    trainer = make_trainer(tmp_path, method, discriminator_learning_rate=1e-2, **term)
    adversary = trainer._adversary
    before, vae = state(adversary.discriminator), state(adversary.decoder.pipeline.vae)
    trainer.train()
    after = state(adversary.discriminator)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("score_head", "logit_scale"))}
    assert same(vae, state(adversary.decoder.pipeline.vae))
    log = trainer.state.log_history[0]
    assert {f"adversarial/{key}" for key in ("loss", "score_fake", "score_real", "accuracy", "weight")} <= set(log)
    assert log["adversarial/loss"] == -log["adversarial/score_fake"]
    assert 0 <= log["adversarial/accuracy"] <= 1

    trainer.save_model()
    saved = AestheticDiscriminator.from_pretrained(tmp_path / "discriminator")
    assert same(after, state(saved))
    assert AestheticDiscriminatorProcessor.from_pretrained(tmp_path / "discriminator").caption_length == 12


def test_layers_of_the_vision_tower_are_trained_on_demand(tmp_path, folder):
    term = {"adversarial_mode": "joint", "adversarial_discriminator": folder, "discriminator_trainable_layers": 1}
    trainer = make_trainer(tmp_path, **term, **ALL_TIMES)
    before = state(trainer._adversary.discriminator)
    trainer.train()
    after = state(trainer._adversary.discriminator)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("backbone.vision_model.encoder.layers.2.") for name in changed)
    assert not any("layers.1." in name or "text_model" in name for name in changed)


def test_discriminators_step_by_hand(tmp_path, folder):
    """Hinge on real and estimated images plus the regulariser; clipped; AdamW's first step is the gradient's sign."""
    term = {"adversarial_mode": "joint", "adversarial_discriminator": folder, **ALL_TIMES}
    trainer = make_trainer(tmp_path, adversarial_regularization=3.0, discriminator_learning_rate=1e-3, **term)
    adversary, batch = trainer._adversary, first_batch(trainer)
    before = state(adversary.discriminator)
    seen = []
    adversary.optimizer.register_step_pre_hook(
        lambda *_: seen.append({name: p.grad.clone() for name, p in adversary._trained.items()})
    )
    _, logs = loss_and_logs(trainer, batch)
    stepped = state(adversary.discriminator)

    family = recognise_family(tiny_sdxl_pipeline())
    model, processor = tiny_discriminator("clip", patch_layer=1), tiny_processor("clip")
    model.load_state_dict(before)
    best = (batch["ranks"] == 1) & batch["mask"]
    tokens = processor.tokenize(list(ranked_dataset()["prompt"]))
    with torch.no_grad():
        _, answer = trainer._ask(trainer.model, *trainer._noised(batch, 0), batch["mask"])
        at = (answer.noisy_latents, answer.timesteps, answer.prediction)
        fake = family.decode(family.predict_clean(*at)[best[batch["mask"]]])
        real = family.decode(batch["latents"][best].float())
    real, fake = processor.preprocess_pixels(real), processor.preprocess_pixels(fake)
    noise = adversary._noise(real, torch.arange(19)[best[batch["mask"]]], batch, 0)
    assert noise.std().item() == pytest.approx(1, abs=0.05) and not torch.equal(noise[0], noise[1])
    of_real, of_fake, of_noisy = (
        model(pixel_values=pixels, **tokens).logits[:, 0] for pixels in (real, fake, real + 0.01 * noise)
    )
    loss = (1 - of_real).relu().mean() + (1 + of_fake).relu().mean() + 3.0 * (of_real - of_noisy).square().mean()
    trained = {name: p for name, p in model.named_parameters() if name in seen[0]}
    expected = dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm > trainer.args.max_grad_norm == 1.0
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[0][name], gradient / norm, rtol=1e-2, atol=1e-4)
        moved = gradient.abs() / norm > 1e-3
        torch.testing.assert_close(
            (stepped[name] - before[name])[moved], -1e-3 * gradient[moved].sign(), rtol=1e-2, atol=1e-6
        )
    accuracy = ((of_real > 0).float().mean() + (of_fake < 0).float().mean()) / 2
    assert logs["adversarial/accuracy"] == pytest.approx(accuracy.item())
    assert logs["adversarial/score_real"] == pytest.approx(of_real.mean().item(), abs=1e-3)


def test_all_images_are_judged_but_only_the_best_are_real(tmp_path, folder):
    term = {"adversarial_mode": "joint", "adversarial_discriminator": folder, "adversarial_on": "all", **ALL_TIMES}
    trainer = make_trainer(tmp_path, **term)
    sizes = []
    trainer._adversary.decoder.pipeline.vae.decoder.register_forward_pre_hook(lambda _, a: sizes.append(len(a[0])))
    loss_and_logs(trainer)
    assert sizes == [19, 6]


def test_accumulated_batches_make_one_step_of_the_discriminator(tmp_path, folder):
    """Two rows twice or four rows at once: the same gradients, so the same weights."""
    term = {"adversarial_mode": "joint", "adversarial_discriminator": folder, **ALL_TIMES}
    data = ranked_dataset((3, 3, 3, 3))
    steps = {}
    for rows, accumulation in ((4, 1), (2, 2)):
        batches = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tmp_path, data=data, learning_rate=1e-4, **batches, **term)
        steps[accumulation] = seen = _Steps(trainer._adversary)
        trainer.train()
        assert len(seen.gradients) == 2
    for whole, parts in zip(steps[1].gradients, steps[2].gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-2, atol=1e-4)


class _Steps:
    """The gradients of the discriminator's steps, each as one vector."""

    def __init__(self, adversary):
        self.gradients = []
        self.parameters = adversary._trained.values()
        adversary.optimizer.register_step_pre_hook(self)

    def __call__(self, *_):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["joint", "frozen"])
def test_interrupted_training_resumes_to_the_same_weights(tmp_path, folder, method, mode):
    term = {"adversarial_mode": mode, "adversarial_discriminator": folder, "adversarial_adaptive": True, **ALL_TIMES}
    term |= {"adversarial_max_images": 2, "adversarial_margin": 50.0} if mode == "frozen" else {}
    options = {"max_steps": 5, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", **term}
    whole = make_trainer(tmp_path / "whole", method, **options)
    whole.train()
    saved = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path / "cut", method, **options, **saved, callbacks=[_StopAfter(3)]).train()
    resumed = make_trainer(tmp_path / "cut", method, **options)
    fresh = state(resumed._adversary.discriminator)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert resumed.state.global_step == 5
    assert same(state(resumed.model), state(whole.model))
    assert same(state(resumed._adversary.discriminator), state(whole._adversary.discriminator))
    assert resumed._adversary.ratio == whole._adversary.ratio > 0
    assert same(fresh, state(whole._adversary.discriminator)) == (mode == "frozen")


def test_a_checkpoint_of_another_term_is_refused(tmp_path, folder):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    term = {"adversarial_discriminator": folder, "max_steps": 4, **ALL_TIMES}
    for options in ({"adversarial_mode": "joint"}, {"adversarial_mode": "frozen", "adversarial_adaptive": True}):
        resumed = make_trainer(tmp_path, **term, **options)
        with pytest.raises(ValueError, match=r"checkpoint-2` is a checkpoint of a run with another adversarial term"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    make_trainer(tmp_path / "b", adversarial_mode="joint", save_strategy="steps", save_steps=4, **term).train()
    other = make_trainer(tmp_path / "b", adversarial_mode="joint", discriminator_trainable_layers=1, **term)
    with pytest.raises(ValueError, match="`discriminator_trainable_layers`, or start anew"):
        other.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))


def test_evaluation_leaves_the_term_out(tmp_path, folder):
    term = {"adversarial_mode": "joint", "adversarial_discriminator": folder, **ALL_TIMES}
    for method in METHODS:
        plain, trainer = make_trainer(tmp_path, method), make_trainer(tmp_path, method, **term)
        before = state(trainer._adversary.discriminator)
        expected, found = (t.evaluate(t.train_dataset) for t in (plain, trainer))
        assert found["eval_loss"] == expected["eval_loss"]
        assert not any("adversarial" in name for name in found)
        assert same(before, state(trainer._adversary.discriminator))


# Options


@pytest.mark.parametrize("config_class", [RankedDiffusionDPOConfig, DiffusionCPOConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adversarial_mode": "gan"}, r"`adversarial_mode` must be one of 'none', 'frozen', 'joint', got 'gan'"),
        ({"adversarial_on": "worst"}, r"`adversarial_on` must be one of 'best', 'all', got 'worst'"),
        ({"adversarial_mode": "joint"}, r"`adversarial_mode='joint'` needs `adversarial_discriminator`"),
        ({"adversarial_weight": 0.2}, r"`adversarial_weight=0.2` does nothing with `adversarial_mode='none'`"),
        ({"adversarial_discriminator": "x"}, r"`adversarial_discriminator='x'` does nothing with"),
        (
            {"adversarial_mode": "joint", "adversarial_discriminator": "x", "adversarial_margin": 2.0},
            r"`adversarial_margin=2.0` does nothing with `adversarial_mode='joint'`. Leave it out, or choose 'frozen'",
        ),
        (
            {"adversarial_mode": "frozen", "adversarial_discriminator": "x", "discriminator_learning_rate": 1e-3},
            r"`discriminator_learning_rate=0.001` does nothing with `adversarial_mode='frozen'`",
        ),
        *(
            ({"adversarial_mode": "joint", "adversarial_discriminator": "x", option: value}, message)
            for option, value, message in [
                ("adversarial_weight", -1.0, "`adversarial_weight` must be positive, got -1.0"),
                ("discriminator_learning_rate", 0.0, "`discriminator_learning_rate` must be positive, got 0.0"),
                ("adversarial_max_images", 0, "`adversarial_max_images` must be at least 1, got 0"),
                ("adversarial_regularization", -1.0, "`adversarial_regularization` must be at least 0, got -1.0"),
                ("discriminator_trainable_layers", -1, "`discriminator_trainable_layers` must be at least 0, got -1"),
                ("adversarial_start", 1.0, r"`adversarial_start` must be in \[0, 1\), got 1.0"),
                ("adversarial_max_noise", 1e6, r"`adversarial_max_noise` must be in \(0, 500\], got 1000000.0"),
            ]
        ),
    ],
)
def test_bad_options_are_refused(tmp_path, config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(str(tmp_path), **options)


def test_what_cannot_be_loaded_is_refused(tmp_path, folder):
    tiny_vae().save_pretrained(tmp_path / "kl")
    save_tiny_vae(tmp_path / "16", latent_channels=16)
    tiny_discriminator("clip").backbone.vision_model.config.save_pretrained(tmp_path / "clip")
    term = {"adversarial_mode": "frozen", "adversarial_discriminator": folder}
    for options, message in (
        (
            {"adversarial_discriminator": str(tmp_path / "none")},
            r"`adversarial_discriminator='.*none'` can't be loaded",
        ),
        (
            {"adversarial_discriminator": str(tmp_path / "clip")},
            r"is of the type 'clip_vision_model', not an aesthetic",
        ),
        ({"adversarial_vae": str(tmp_path / "none")}, r"`adversarial_vae='.*none'` can't be loaded"),
        ({"adversarial_vae": str(tmp_path / "kl")}, r"is a `AutoencoderKL`; an `AutoencoderTiny` is expected"),
        ({"adversarial_vae": str(tmp_path / "16")}, r"decodes latents of 16 channels, the model's have 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **(term | options))


# Processes


def train_in_processes(folder: str, batch_size: int, discriminator: str) -> None:
    """
    Three steps of four rows, whatever the number of processes. At t = 999 nothing is judged, and of two processes one
    has such rows alone in some steps.
    """
    trainer = make_trainer(
        folder,
        data=ranked_dataset((4, 3, 2, 4, 3, 2, 4, 4)),
        max_steps=3,
        learning_rate=1e-3,
        per_device_train_batch_size=batch_size,
        use_cpu=True,
        timestep_sampling="discrete",
        timesteps=[100, 999],
        adversarial_mode="joint",
        adversarial_discriminator=discriminator,
        adversarial_adaptive=True,
        adversarial_max_images=100,
        discriminator_learning_rate=1e-3,
    )
    idle = []
    original = trainer._adversary._candidates

    def candidates(*args):
        best, clear = original(*args)
        idle.append(not clear.any().item())
        return best, clear

    trainer._adversary._candidates = candidates
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer._adversary._trained.values()])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    result = {"processes": trainer.accelerator.num_processes, "logs": logs, "weights": weights.tolist(), "idle": idle}
    Path(folder, f"{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_two_processes_keep_one_discriminator_and_train_it_as_one_does(tmp_path, folder):
    results = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        output.mkdir()
        launch(__file__, processes, output, 4 // processes, folder)
        results[processes] = [json.loads((output / f"{index}.json").read_text()) for index in range(processes)]
    (one,), (first, second) = results[1], results[2]
    assert [one["processes"], first["processes"]] == [1, 2]
    assert first["weights"] == second["weights"], "all processes keep the same discriminator"
    assert any(a != b for a, b in zip(first["idle"], second["idle"], strict=True)), "one had nothing to judge"
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-3, abs=1e-5)
    assert len(one["logs"]) == 3
    for log, other in zip(one["logs"], first["logs"], strict=True):
        for name in (name for name in log if name == "loss" or name.startswith("adversarial/")):
            assert other[name] == pytest.approx(log[name], rel=1e-3, abs=1e-4), name


if __name__ == "__main__":
    train_in_processes(sys.argv[1], int(sys.argv[2]), sys.argv[3])
