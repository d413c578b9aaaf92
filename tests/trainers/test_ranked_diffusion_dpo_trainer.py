import copy
import logging
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from tiny import random_image, ranked_dataset, tiny_sd_pipeline, tiny_sdxl_pipeline
from training import (
    adapter,
    check_gradient_checkpointing,
    config,
    first_batch,
    images,
    lora,
    make,
)
from transformers import TrainerCallback

from trl_diffusion_rank import RankedDiffusionDPOConfig, RankedDiffusionDPOTrainer
from trl_diffusion_rank.diffusion.draws import draw_rows
from trl_diffusion_rank.objectives.ranking import LOSS_TYPES


PIPELINES = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}


def make_trainer(output_dir, model=None, data=None, **kwargs) -> RankedDiffusionDPOTrainer:
    model = tiny_sdxl_pipeline() if model is None else model
    data = ranked_dataset() if data is None else data
    return make(RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig, output_dir, model, data, **kwargs)


# Training


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_lora_trains_and_stock_diffusers_loads_all_of_it(tmp_path, name, prediction_type):
    pipeline = PIPELINES[name](prediction_type)
    before = copy.deepcopy(pipeline.unet.state_dict())
    untouched = images(PIPELINES[name](prediction_type))
    trainer = make_trainer(tmp_path, pipeline)
    initial = adapter(trainer)
    trainer.train()
    trainer.save_model()

    trained = adapter(trainer)
    changed = [key for key in trained if not torch.equal(trained[key], initial[key])]
    assert changed == list(trained), "every LoRA weight is trained (lora_A moves once lora_B isn't zero)"
    base = {
        key.replace(".base_layer", ""): value
        for key, value in trainer.model.get_base_model().denoiser.state_dict().items()
    }
    for key, value in before.items():
        torch.testing.assert_close(base[key], value, rtol=0, atol=0)

    loaded = PIPELINES[name](prediction_type)
    loaded.load_lora_weights(str(tmp_path))
    assert loaded.unet.peft_config["default_0"].lora_alpha == 12
    assert loaded.unet.peft_config["default_0"].r == 4
    in_memory = PIPELINES[name](prediction_type)
    in_memory.unet = trainer.model.get_base_model().denoiser.eval()
    expected = images(in_memory)
    np.testing.assert_allclose(images(loaded), expected, atol=1e-4)
    assert np.abs(expected - untouched).max() > 1e-2, "training changed nothing that could be lost"


@pytest.mark.parametrize("name", PIPELINES)
def test_full_weights_train_against_a_frozen_copy(tmp_path, name):
    pipeline = PIPELINES[name]()
    before = copy.deepcopy(pipeline.unet.state_dict())
    trainer = make_trainer(tmp_path, pipeline, peft_config=None, learning_rate=1e-4)
    trainer.train()
    trainer.save_model()
    reference = trainer.ref_model.denoiser.state_dict()
    assert all(torch.equal(reference[key], before[key]) for key in before)
    assert any(not torch.equal(value, before[key]) for key, value in pipeline.unet.state_dict().items())

    loaded = PIPELINES[name]()
    loaded.unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    np.testing.assert_allclose(images(loaded), images(pipeline), atol=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_trains(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, loss_type=loss_type, beta=1000.0)
    initial = adapter(trainer)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])
    assert any(not torch.equal(value, initial[key]) for key, value in adapter(trainer).items())


def test_several_losses_are_summed_with_their_weights(tmp_path):
    trainer = make_trainer(tmp_path, loss_type=["pairwise", "top1"], loss_weights=[0.5, 2.0], beta=100.0)
    batch = first_batch(trainer)
    single = {}
    combined = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    for loss_type in ("pairwise", "top1"):
        trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
        single[loss_type] = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    torch.testing.assert_close(combined, 0.5 * single["pairwise"] + 2.0 * single["top1"])


# The loss


def test_pair_loss_is_the_published_script_on_the_same_draws(tmp_path):
    """The whole step transcribed from Diffusion-DPO's formula: value, and gradient on the LoRA weights."""
    trainer = make_trainer(tmp_path, data=ranked_dataset((2, 2, 2)), beta=500.0, loss_type="pairwise")
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # an adapter that has learnt something
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    batch = first_batch(trainer)
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)

    best_first = batch["ranks"].argsort(1)
    rows = torch.arange(3)
    u, noise = draw_rows(trainer.args.seed, batch["row_seeds"].tolist(), 0, (4, 8, 8))
    timesteps = (u * 1000).long()
    alphas_cumprod = trainer.family.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    unet = trainer.model.get_base_model().denoiser

    def errors(place: int) -> torch.Tensor:
        latents = batch["latents"][rows, best_first[:, place]].float()
        prediction = unet(
            alphas_cumprod.sqrt() * latents + (1 - alphas_cumprod).sqrt() * noise,
            timesteps,
            encoder_hidden_states=batch["prompt_conditioning"]["prompt_embeds"].float(),
            added_cond_kwargs={
                "text_embeds": batch["prompt_conditioning"]["pooled_prompt_embeds"].float(),
                "time_ids": batch["image_conditioning"]["add_time_ids"][rows, best_first[:, place]].float(),
            },
        ).sample
        return (prediction - noise).pow(2).mean(dim=[1, 2, 3])

    with torch.no_grad(), trainer.model.disable_adapter():
        ref_w, ref_l = errors(0), errors(1)
    model_w, model_l = errors(0), errors(1)
    inside_term = -0.5 * 500.0 * ((model_w - model_l) - (ref_w - ref_l))
    expected = -F.logsigmoid(inside_term).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)


def test_one_forward_pass_for_all_images_and_one_for_the_reference(tmp_path):
    trainer = make_trainer(tmp_path)
    calls = []
    denoiser = trainer.model.get_base_model().denoiser
    denoiser.register_forward_pre_hook(lambda _, args: calls.append((args[0].shape[0], torch.is_grad_enabled())))
    trainer._compute_loss(trainer.model, first_batch(trainer), return_outputs=False)
    assert calls == [(19, False), (19, True)]  # 4 + 4 + 3 + 2 + 4 + 2 images, no padding among them


def test_rows_of_different_n_do_not_disturb_each_other(tmp_path):
    trainer = make_trainer(tmp_path, beta=1000.0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    together = trainer._compute_loss(trainer.model, first_batch(trainer), return_outputs=False)
    alone = []
    for example in trainer.train_dataset:
        batch = trainer._prepare_inputs(trainer.data_collator([example]))
        alone.append(trainer._compute_loss(trainer.model, batch, return_outputs=False))
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-5)


def test_without_signal_every_margin_is_exactly_zero(tmp_path):
    """At t = 999 of a schedule with zero terminal SNR all images of a row are the same input under shared noise."""
    trainer = make_trainer(
        tmp_path,
        tiny_sdxl_pipeline(rescale_betas_zero_snr=True),
        ranked_dataset((4, 4)),
        timestep_sampling="discrete",
        timesteps=[999],
        beta=5000.0,
    )
    assert trainer.family.scheduler.alphas_cumprod[999] == 0
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss = trainer._compute_loss(trainer.model, first_batch(trainer), return_outputs=False)
    gradients = torch.autograd.grad(loss, [p for p in trainer.model.parameters() if p.requires_grad])
    trainer._read_metrics()
    metrics = trainer._metrics["train"]
    assert metrics["rewards/margins"] == [0.0]
    assert metrics["rewards/accuracies"] == [0.5]
    assert abs(metrics["rewards/chosen"][0]) > 0
    assert max(gradient.abs().max() for gradient in gradients) < 1e-2  # rounding of sums that cancel, times beta


@pytest.mark.parametrize("peft_config", ["lora", None])
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(tmp_path, peft_config):
    check_gradient_checkpointing(partial(make_trainer, tmp_path, peft_config=peft_config, beta=100.0))


# Reproducibility


def test_same_seed_same_weights_and_another_seed_others(tmp_path):
    weights = []
    for index, seed in enumerate((0, 0, 1)):
        trainer = make_trainer(tmp_path / str(index), seed=seed, max_steps=3)
        trainer.train()
        weights.append(adapter(trainer))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert any(not torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.parametrize("peft_config", ["lora", None])
def test_moving_average_is_what_is_saved_and_survives_an_interruption(tmp_path, peft_config):
    options = {"peft_config": peft_config, "max_steps": 6, "learning_rate": 1e-3, "ema_decay": 0.5}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    before = [parameter.detach().clone() for parameter in whole.model.parameters()]
    whole.save_model()
    assert all(torch.equal(a, b) for a, b in zip(before, whole.model.parameters(), strict=True))
    cut = make_trainer(tmp_path / "cut", **options, save_strategy="steps", save_steps=4, callbacks=[_StopAfter(4)])
    cut.train()
    resumed = make_trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    resumed.save_model()
    for a, b in zip(resumed._average.weights, whole._average.weights, strict=True):
        assert torch.equal(a, b)

    def load(folder):
        pipeline = tiny_sdxl_pipeline()
        if peft_config:
            pipeline.load_lora_weights(str(folder))
        else:
            pipeline.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        return images(pipeline)

    np.testing.assert_array_equal(load(tmp_path / "whole"), load(tmp_path / "cut"))
    in_memory = tiny_sdxl_pipeline()
    in_memory.unet = (whole.model.get_base_model() if peft_config else whole.model).denoiser.eval()
    assert np.abs(load(tmp_path / "whole") - images(in_memory)).max() > 1e-4, "the last weights are others"


@pytest.mark.parametrize("peft_config", ["lora", None])
def test_interrupted_training_resumes_to_the_same_weights(tmp_path, peft_config):
    """Six steps of two rows over six rows are two epochs: the second epoch's draws differ from the first's."""
    options = {"peft_config": peft_config, "max_steps": 6, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    cut = make_trainer(tmp_path / "cut", **options, save_strategy="steps", save_steps=4, callbacks=[_StopAfter(4)])
    cut.train()
    assert cut.state.global_step == 4
    resumed = make_trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


class _StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_each_visit_of_a_row_has_its_own_noise(tmp_path):
    trainer = make_trainer(tmp_path, beta=100.0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    losses = []
    for epoch in (0.0, 0.99, 1.0, 2.5):
        trainer.state.epoch = epoch
        losses.append(trainer._compute_loss(trainer.model, first_batch(trainer), return_outputs=False).item())
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_evaluations_are_comparable(tmp_path):
    """Same weights, same `eval_loss`, whatever was drawn between; the logs carry TRL's names with `eval_`."""
    trainer = make_trainer(tmp_path, eval_dataset=ranked_dataset(seed=1), per_device_eval_batch_size=4)
    first = trainer.evaluate()
    trainer.state.epoch = 1.7
    second = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_error/chosen", "eval_error/rejected_delta"):
        assert first[name] == second[name]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != first["eval_loss"]


def test_trls_metric_names_and_the_monitors_are_logged(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    start = trainer.state.log_history[0]
    expected = {
        f"rewards/{key}" for key in ("chosen", "rejected", "margins", "accuracies", "kendall_tau", "saturation")
    }
    expected |= {"logps/chosen", "logps/rejected", "error/chosen_delta", "error/rejected_delta", "loss", "grad_norm"}
    assert expected <= set(start)
    # Before the first step the adapter is zero: ties count one half
    assert start["rewards/accuracies"] == 0.5
    assert start["error/chosen_delta"] == start["rewards/margins"] == 0
    assert trainer.state.log_history[1]["rewards/chosen"] != 0


def test_displacement_is_warned_of_once(tmp_path, caplog):
    trainer = make_trainer(tmp_path, displacement_patience=3)
    with caplog.at_level(logging.WARNING):
        for step in range(6):
            rise = 0.3 * (step + 1)
            trainer.log({"error/chosen": 0.1 + rise, "error/chosen_delta": rise, "error/rejected_delta": 3 * rise})
    warnings = [record.message for record in caplog.records if "Displacement at step" in record.message]
    assert len(warnings) == 1
    assert "lower `learning_rate` (now 0.01), raise `beta` (now 5000)" in warnings[0]


# Safeguards


def _with_learnt_adapter(trainer):
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return trainer


def _loss_and_gradient(trainer):
    trainer = _with_learnt_adapter(trainer)
    loss = trainer._compute_loss(trainer.model, first_batch(trainer), return_outputs=False)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return loss, torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])


def test_preserve_mu_keeps_the_loss_and_changes_the_gradient(tmp_path):
    plain, gradient = _loss_and_gradient(make_trainer(tmp_path, beta=100.0))
    kept, held = _loss_and_gradient(make_trainer(tmp_path, beta=100.0, preserve_mu=1.0))
    assert plain == kept
    assert not torch.allclose(gradient, held)


def test_preserve_mu_one_is_the_gradient_of_the_best_alone_where_losers_conflict(tmp_path):
    """Residuals of a random model all point the way the noise does, so every loser conflicts: its gradient is gone."""
    _, held = _loss_and_gradient(make_trainer(tmp_path, data=ranked_dataset((2, 2)), beta=100.0, preserve_mu=1.0))
    trainer = _with_learnt_adapter(make_trainer(tmp_path, data=ranked_dataset((2, 2)), beta=100.0))
    batch = first_batch(trainer)
    error, ref_error, answer = trainer._errors(trainer.model, batch, "train")
    residual = (answer.prediction - answer.target).detach().flatten(1).view(2, 2, -1)
    best = batch["ranks"] == 1
    assert ((residual[best] * residual[~best]).sum(1) > 0).all()
    rewards = -50.0 * (torch.where(best, error, error.detach()) - ref_error)
    margins = rewards[best] - rewards[~best]
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(F.softplus(-margins).mean(), parameters)
    torch.testing.assert_close(held, torch.cat([g.flatten() for g in expected]), rtol=1e-3, atol=1e-5)


def test_anchors_add_what_they_say(tmp_path):
    plain, _ = _loss_and_gradient(make_trainer(tmp_path, beta=100.0))
    trainer = _with_learnt_adapter(make_trainer(tmp_path, beta=100.0))
    batch = first_batch(trainer)
    error, ref_error, _ = trainer._errors(trainer.model, batch, "train")
    best = batch["ranks"] == 1
    anchored, _ = _loss_and_gradient(make_trainer(tmp_path, beta=100.0, sft_weight=0.3))
    torch.testing.assert_close(anchored, plain + 0.3 * 50.0 * error[best].mean())
    penalised, _ = _loss_and_gradient(make_trainer(tmp_path, beta=100.0, dpop_lambda=2.0))
    torch.testing.assert_close(penalised, plain + 2.0 * 50.0 * (error - ref_error)[best].relu().mean())


def test_timestep_weighting_scales_both_errors_alike(tmp_path):
    plain = _with_learnt_adapter(make_trainer(tmp_path, beta=100.0))
    weighted = _with_learnt_adapter(make_trainer(tmp_path, beta=100.0, timestep_weighting="min_snr"))
    batch = first_batch(plain)
    (error, ref_error, _), (scaled, ref_scaled, _) = (t._errors(t.model, batch, "train") for t in (plain, weighted))
    mask = batch["mask"]
    torch.testing.assert_close((scaled / error)[mask], (ref_scaled / ref_error)[mask])
    for row, present in zip(scaled / error, mask, strict=True):
        torch.testing.assert_close(row[present], row[present][:1].expand(int(present.sum())))
    assert not torch.allclose(scaled, error)


@pytest.mark.parametrize("name", PIPELINES)
def test_caption_dropout_asks_a_whole_row_without_its_caption(tmp_path, name):
    trainer = make_trainer(tmp_path, PIPELINES[name](), caption_dropout=0.5)
    batch = first_batch(trainer)
    plain = make_trainer(tmp_path, PIPELINES[name]())
    (_, _, conditioning), _ = trainer._noised(batch, visit=0)
    (_, _, expected), _ = plain._noised(batch, visit=0)
    pairs = zip(conditioning["prompt_embeds"], expected["prompt_embeds"], strict=True)
    dropped = [not torch.equal(asked, full) for asked, full in pairs]
    row_of_image = batch["mask"].nonzero()[:, 0].tolist()
    per_row = [{d for d, r in zip(dropped, row_of_image, strict=True) if r == row} for row in range(6)]
    assert sorted(map(len, per_row)) == [1] * 6, "all images of a row alike"
    assert {True} in per_row and {False} in per_row
    if name == "sdxl":  # its guidance zeroes the embeddings
        assert conditioning["pooled_prompt_embeds"][dropped].abs().max() == 0
    (_, _, in_evaluation), _ = trainer._noised(batch, visit=-1)
    assert torch.equal(in_evaluation["prompt_embeds"], expected["prompt_embeds"])


class _Poison(TrainerCallback):
    """Makes the gradient of some steps NaN, before the trainer's own callbacks see it."""

    def __init__(self, steps: set[int]):
        self.steps = steps
        self.weights = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        if state.global_step in self.steps:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    poison = _Poison({1})
    trainer = make_trainer(tmp_path, callbacks=[poison], max_steps=4, weight_decay=0.1)
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    before, after = poison.weights[1:3]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the step did nothing"
    assert any(not torch.equal(a, b) for a, b in zip(*poison.weights[2:4], strict=True)), "the next one did"
    assert [log.get("skipped_steps") for log in trainer.state.log_history if "loss" in log] == [None, 1, 1, 1]


def test_too_many_skipped_steps_in_a_row_stop(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[_Poison({0, 2, 3})], max_steps=9, max_skipped_steps=2)
    with pytest.raises(FloatingPointError, match=r"in 2 steps in a row, the last being step 4.*`max_skipped_steps=2`"):
        trainer.train()


def test_stop_on_displacement_gives_back_the_best_weights(tmp_path, monkeypatch, caplog):
    deltas = iter([-0.01, 0.04, 0.06, 0.07, 0.08, 0.09, 0.1])  # of a reference error of 0.1
    trainer = make_trainer(tmp_path, max_steps=7, stop_on_displacement=True, displacement_patience=3)
    poison = _Poison(set())
    trainer.add_callback(poison)
    store = trainer._store_metrics

    def pretend(mode, *args):
        store(mode, *args)
        trainer._read_metrics()
        delta = next(deltas)
        trainer._metrics[mode]["error/chosen"] = [0.1 + delta]
        trainer._metrics[mode]["error/chosen_delta"] = [delta]
        trainer._metrics[mode]["error/rejected_delta"] = [2 * delta]

    monkeypatch.setattr(trainer, "_store_metrics", pretend)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4  # (.4 + .6 + .7) / 3 is the first window above a half
    assert "Displacement at step 4" in caplog.text and "with the weights of step 2" in caplog.text
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter, expected in zip(trained, poison.weights[2], strict=True):
        assert torch.equal(parameter, expected)


# Reference errors in advance


def losses(trainer) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("peft_config", ["lora", None])
def test_precomputed_reference_gives_the_run_with_the_same_draws(tmp_path, peft_config):
    """Nine steps over three epochs, two draws: the third epoch meets the first one's again. Rows differ in n."""
    options = {"max_steps": 9, "beta": 100.0, "learning_rate": 1e-3, "peft_config": peft_config}
    data = ranked_dataset((4, 3, 2, 4, 2, 3), seed=21)
    online = make_trainer(tmp_path, data=data, num_reference_draws=2, **options)
    expected = losses(online)
    known = make_trainer(tmp_path, data=data, num_reference_draws=2, precompute_ref_log_probs=True, **options)
    assert known.ref_model is None
    assert losses(known) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(losses(make_trainer(tmp_path, data=data, **options)), rel=1e-4)


def test_precomputed_reference_is_not_asked_again_by_a_sweep(tmp_path, monkeypatch, capsys):
    data = ranked_dataset((2, 3, 2, 2), seed=22)
    options = {"data": data, "precompute_ref_log_probs": True, "num_reference_draws": 2}
    first = make_trainer(tmp_path, eval_dataset=ranked_dataset((2, 2), seed=23), **options)
    assert "train dataset, 2 draws a row: computed and cached" in capsys.readouterr().out
    assert first.evaluate()["eval_loss"] > 0
    assert np.shape(first.train_dataset[1]["ref_errors"]) == (3, 2)
    monkeypatch.setattr(RankedDiffusionDPOTrainer, "_reference", _never)
    for beta, loss_type in ((100.0, "lambda"), (3000.0, "pairwise")):
        swept = make_trainer(tmp_path, beta=beta, loss_type=loss_type, **options)
        assert "train dataset, 2 draws a row: found in the cache" in capsys.readouterr().out
        swept.train()
    for other in ({"seed": 5}, {"num_reference_draws": 3}, {"timestep_sampling": "turbo"}):
        with pytest.raises(ValueError, match="encoded again"):
            make_trainer(tmp_path, **(options | other))


def test_draws_default_to_the_visits_of_the_run(tmp_path):
    data = ranked_dataset((2, 3, 2, 2), seed=22)
    for options, draws in (
        ({"max_steps": 5}, 3),
        ({"max_steps": 50}, 8),
        ({"max_steps": -1, "num_train_epochs": 2}, 2),
    ):
        trainer = make_trainer(tmp_path, data=data, precompute_ref_log_probs=True, **options)
        assert np.shape(trainer.train_dataset[0]["ref_errors"]) == (2, draws)


def test_reference_cannot_be_asked_in_advance_of_a_stream(tmp_path):
    for options in ({"data": ranked_dataset().to_iterable_dataset()}, {"cache_latents": False}):
        with pytest.raises(
            ValueError, match="`precompute_ref_log_probs=True` needs a dataset whose images are encoded"
        ):
            make_trainer(tmp_path, precompute_ref_log_probs=True, **options)


# What can be given as model, reference and data


def test_model_by_folder_pipeline_and_denoiser(tmp_path, sdxl_folder):
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder)
    losses = []
    for model, processing_class in (
        (sdxl_folder, None),
        (pipeline, None),
        (DiffusionPipeline.from_pretrained(sdxl_folder).unet, DiffusionPipeline.from_pretrained(sdxl_folder)),
        (UNet2DConditionModel.from_pretrained(sdxl_folder, subfolder="unet"), pipeline),
    ):
        trainer = make_trainer(tmp_path, model, processing_class=processing_class)
        losses.append(trainer._compute_loss(trainer.model, first_batch(trainer), return_outputs=False).item())
    assert losses == [losses[0]] * 4


def test_own_reference_is_used(tmp_path):
    torch.manual_seed(5)
    reference = tiny_sdxl_pipeline().unet
    for parameter in reference.parameters():
        parameter.data.mul_(1.1)
    trainer = make_trainer(tmp_path, ref_model=reference)
    trainer._compute_loss(trainer.model, first_batch(trainer), return_outputs=False)
    trainer._read_metrics()
    assert trainer._metrics["train"]["error/chosen_delta"][0] != 0
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_reference_follows_the_model_where_it_is_asked_to(tmp_path):
    """TRL's TR-DPO callback works on the wrapped denoisers."""
    trainer = make_trainer(
        tmp_path,
        peft_config=None,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
        learning_rate=1e-3,
    )
    trainer.train()
    for reference, trained in zip(trainer.ref_model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(reference, trained)


def test_beta_defaults_to_the_familys(tmp_path):
    assert make_trainer(tmp_path).beta == 5000
    assert make_trainer(tmp_path, tiny_sd_pipeline()).beta == 2000
    assert make_trainer(tmp_path, loss_type="linear").beta == 500
    assert make_trainer(tmp_path, beta=7.0).beta == 7


def test_encoders_leave_memory_and_a_second_run_encodes_nothing(tmp_path, monkeypatch):
    pipeline = tiny_sdxl_pipeline()
    data = ranked_dataset((3, 2), seed=11)
    first = make_trainer(tmp_path, pipeline, data)
    assert first.family.pipeline is None
    monkeypatch.setattr(type(first.family), "encode_images", _never)
    second = make_trainer(tmp_path, tiny_sdxl_pipeline(), data)
    torch.testing.assert_close(first_batch(second)["latents"], first_batch(first)["latents"])
    other = tiny_sdxl_pipeline()
    other.vae.encoder.conv_in.weight.data.mul_(1.01)  # another VAE is another cache
    with pytest.raises(ValueError, match="encoded again"):
        make_trainer(tmp_path, other, data)


def _never(*args):
    raise ValueError("encoded again")


def test_encoding_at_each_step_gives_the_same_as_the_cache(tmp_path):
    cached = make_trainer(tmp_path)
    fresh = make_trainer(tmp_path, cache_latents=False)
    assert fresh.family.pipeline is not None
    batches = [first_batch(trainer) for trainer in (cached, fresh)]
    assert torch.equal(batches[0]["row_seeds"], batches[1]["row_seeds"])
    errors = [t._errors(t.model, batch, "train")[0] for t, batch in zip((cached, fresh), batches, strict=True)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-2, atol=1e-3)  # the cache is in half precision
    fresh.train()
    assert fresh.state.global_step == 2


def test_stream_trains(tmp_path):
    stream = ranked_dataset().to_iterable_dataset()
    trainer = make_trainer(tmp_path, data=stream, max_steps=5)
    initial = adapter(trainer)
    trainer.train()
    assert trainer.state.global_step == 5
    assert any(not torch.equal(value, initial[key]) for key, value in adapter(trainer).items())


def test_stream_of_a_generator_without_features_trains(tmp_path):
    def rows():
        generator = np.random.default_rng(0)
        for _ in range(4):
            yield {"prompt": "a cat", "images": [random_image(generator) for _ in range(3)], "scores": [0.1, 0.7, 0.2]}

    trainer = make_trainer(tmp_path, data=IterableDataset.from_generator(rows))
    trainer.train()
    assert trainer.state.global_step == 2


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_metrics": lambda _: {}}, "`compute_metrics` can't be used with a diffusion model"),
        ({"data_collator": lambda _: {}}, "`data_collator` can't be used with a diffusion model"),
        ({"resolution": 15}, "`resolution=15` must be a multiple of 2"),
        ({"timestep_sampling": "discrete", "timesteps": [1000]}, "between 0 and 999"),
        ({"peft_config": LoraConfig(task_type="SEQ_CLS")}, "`lora_task_type=.*SEQ_CLS.*has no meaning"),
        ({"peft_config": LoraConfig(modules_to_save=["conv_in"])}, "can't hold: got `modules_to_save=.*conv_in"),
        ({"peft_config": LoraConfig(bias="all")}, "`bias='all'`"),
        ({"model_init_kwargs": {"revision": "x"}}, "`model_init_kwargs` are for loading a model by name"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_wrong_models_are_refused(tmp_path, sdxl_folder):
    with pytest.raises(ValueError, match="Can't load the model 'no/such-model'"):
        make_trainer(tmp_path, "no/such-model")
    with pytest.raises(TypeError, match="`model` must be a Hub id, a folder, a `DiffusionPipeline` or a denoiser"):
        make_trainer(tmp_path, 3)
    with pytest.raises(ValueError, match="doesn't say where it was loaded from"):
        make_trainer(tmp_path, tiny_sdxl_pipeline().unet)
    with pytest.raises(TypeError, match=r"`processing_class` .* must be a `DiffusionPipeline`, got `CLIPTokenizer`"):
        make_trainer(tmp_path, sdxl_folder, processing_class=tiny_sdxl_pipeline().tokenizer)
    adapted = tiny_sdxl_pipeline()
    adapted.unet.add_adapter(lora())
    with pytest.raises(ValueError, match="already carries an adapter"):
        make_trainer(tmp_path, adapted.unet, processing_class=adapted)
    with pytest.raises(ValueError, match="`attn_implementation='flash_attention_2'` is Transformers' option"):
        make_trainer(tmp_path, sdxl_folder, model_init_kwargs={"attn_implementation": "flash_attention_2"})


def test_wrong_datasets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        RankedDiffusionDPOTrainer(
            tiny_sdxl_pipeline(), args=config(RankedDiffusionDPOConfig, tmp_path), peft_config=lora()
        )
    with pytest.raises(TypeError, match="must be a `Dataset` or `IterableDataset`"):
        make_trainer(tmp_path, data=[{"prompt": "a"}])
    with pytest.raises(ValueError, match="`cache_latents=True` can't be had for a stream"):
        make_trainer(tmp_path, data=ranked_dataset().to_iterable_dataset(), cache_latents=True)
    with pytest.raises(ValueError, match="The eval dataset is a stream, but the train dataset is cached"):
        make_trainer(tmp_path, eval_dataset=ranked_dataset().to_iterable_dataset())
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="isn't encoded, and the VAE and text encoders have left memory"):
        trainer.evaluate(ranked_dataset(seed=4))


def test_undecodable_image_is_named_or_skipped(tmp_path):
    data = ranked_dataset((2, 2, 2))
    rows = [data[index] for index in range(3)]
    rows = [{**row, "images": [{"bytes": _png(image), "path": None} for image in row["images"]]} for row in rows]
    rows[1]["images"][1] = {"bytes": b"not an image", "path": None}
    broken = Dataset.from_list(rows, features=data.features)
    with pytest.raises(ValueError, match="Row 1 of the train dataset, image 1: the image can't be decoded"):
        make_trainer(tmp_path, data=broken)
    assert len(make_trainer(tmp_path, data=broken, on_bad_row="skip").train_dataset) == 2


def _png(image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
