import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset, IterableDatasetDict
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from tiny import random_image, ranked_dataset, tiny_sd_pipeline, tiny_sdxl_pipeline
from training import adapter, check_gradient_checkpointing, config, first_batch, images, make
from transformers import TrainerCallback
from trl.experimental.cpo import cpo_trainer

from trl_diffusion_rank import DiffusionCPOConfig, DiffusionCPOTrainer
from trl_diffusion_rank.diffusion.draws import draw_rows
from trl_diffusion_rank.objectives.error_scale import standard_deviations
from trl_diffusion_rank.objectives.reference_free import LOSS_TYPES


PIPELINES = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}


def make_trainer(output_dir, model=None, data=None, **kwargs) -> DiffusionCPOTrainer:
    model = tiny_sdxl_pipeline() if model is None else model
    data = ranked_dataset() if data is None else data
    return make(DiffusionCPOTrainer, DiffusionCPOConfig, output_dir, model, data, **kwargs)


# Training


@pytest.mark.parametrize("name", PIPELINES)
def test_lora_trains_and_stock_diffusers_loads_all_of_it(tmp_path, name):
    pipeline = PIPELINES[name]()
    untouched = images(PIPELINES[name]())
    trainer = make_trainer(tmp_path, pipeline)
    initial = adapter(trainer)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()

    trained = adapter(trainer)
    assert [key for key in trained if not torch.equal(trained[key], initial[key])] == list(trained)
    loaded = PIPELINES[name]()
    loaded.load_lora_weights(str(tmp_path))
    assert loaded.unet.peft_config["default_0"].lora_alpha == 12
    in_memory = PIPELINES[name]()
    in_memory.unet = trainer.model.get_base_model().denoiser.eval()
    expected = images(in_memory)
    np.testing.assert_allclose(images(loaded), expected, atol=1e-4)
    assert np.abs(expected - untouched).max() > 1e-2, "training changed nothing that could be lost"
    card = (tmp_path / "README.md").read_text()
    assert "diffusion-cpo" in card
    assert "huggingface.co/papers/2401.08417" in card


@pytest.mark.parametrize("name", PIPELINES)
def test_full_weights_train(tmp_path, name):
    pipeline = PIPELINES[name]()
    before = copy.deepcopy(pipeline.unet.state_dict())
    trainer = make_trainer(tmp_path, pipeline, peft_config=None, learning_rate=1e-4)
    trainer.train()
    trainer.save_model()
    assert any(not torch.equal(value, before[key]) for key, value in pipeline.unet.state_dict().items())
    loaded = PIPELINES[name]()
    loaded.unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    np.testing.assert_allclose(images(loaded), images(pipeline), atol=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_trains(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, loss_type=loss_type)
    initial = adapter(trainer)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])
    assert any(not torch.equal(value, initial[key]) for key, value in adapter(trainer).items())


# The loss


def test_loss_is_the_formula_on_the_same_draws(tmp_path):
    """-E log sigmoid(beta log pi(y_w|x) - beta log pi(y_l|x)) + alpha beta / 2 e_w, transcribed with the UNet."""
    trainer = make_trainer(tmp_path, data=ranked_dataset((2, 2, 2)), beta=50.0, loss_type="pairwise", cpo_alpha=0.3)
    batch = first_batch(trainer)
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    trainer._read_metrics()
    metrics = trainer._stored_metrics["train"]

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

    best, worst = errors(0), errors(1)
    expected = -F.logsigmoid(25.0 * (worst - best)).mean() + 0.3 * 25.0 * best.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert metrics["nll_loss"] == pytest.approx([25.0 * best.mean().item()], rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx([25.0 * (worst - best).mean().item()], rel=1e-3)


def test_one_forward_pass_a_step_and_no_reference(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, per_device_train_batch_size=6, peft_config=None)
    calls = []
    denoiser = trainer.model.denoiser
    denoiser.register_forward_pre_hook(lambda _, args: calls.append((args[0].shape[0], torch.is_grad_enabled())))
    trainer.train()
    assert calls == [(19, True)] * 3  # 4 + 4 + 3 + 2 + 4 + 2 images, no padding among them
    assert getattr(trainer, "ref_model", None) is None
    unets = [module for module in trainer.model.modules() if isinstance(module, UNet2DConditionModel)]
    assert unets == [denoiser]


def test_rows_of_different_n_do_not_disturb_each_other(tmp_path):
    trainer = make_trainer(tmp_path)
    together, _ = trainer.get_batch_loss_metrics(trainer.model, first_batch(trainer))
    alone = []
    for example in trainer.train_dataset:
        batch = trainer._prepare_inputs(trainer.data_collator([example]))
        alone.append(trainer.get_batch_loss_metrics(trainer.model, batch)[0])
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peft_config", ["lora", None])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(tmp_path, peft_config, use_reentrant):
    options = {"peft_config": peft_config, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    check_gradient_checkpointing(partial(make_trainer, tmp_path, **options), atol=1e-5)


# Normalized errors


def test_normalized_errors_are_divided_by_the_buckets_deviation(tmp_path):
    trainer = make_trainer(tmp_path, normalize_error=True, loss_type="pairwise", cpo_alpha=0.0)
    assert trainer.beta == 10
    batch = first_batch(trainer)
    plain = make_trainer(tmp_path, loss_type="pairwise", cpo_alpha=0.0)
    asked, target = plain._noised(batch, visit=0)
    error, _ = plain._ask(plain.model, asked, target, batch["mask"])
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    trainer._read_metrics()
    metrics = {name: values[0] for name, values in trainer._stored_metrics["train"].items()}

    buckets = (asked[1] // 100).long()
    of_images = error[batch["mask"]].detach().double()
    scales = torch.empty_like(of_images)
    for bucket in buckets.unique():
        own = of_images[buckets == bucket]
        spread = (len(own) * own.var(correction=0) + 8 * own.mean() ** 2) / (len(own) + 8)
        scales[buckets == bucket] = spread.sqrt()
    scale = torch.ones_like(error).masked_scatter(batch["mask"], scales.float())
    margins = 5.0 * ((error / scale).unsqueeze(1) - (error / scale).unsqueeze(2))  # [b, better, worse]
    better = batch["ranks"].unsqueeze(2) < batch["ranks"].unsqueeze(1)
    better &= batch["mask"].unsqueeze(2) & batch["mask"].unsqueeze(1)
    per_row = [F.softplus(-row[where]).mean() for row, where in zip(margins, better, strict=True)]
    torch.testing.assert_close(loss, torch.stack(per_row).mean(), rtol=1e-4, atol=1e-5)
    assert metrics["error/chosen"] < 2 < metrics["nll_loss"] / 2  # logged errors stay the errors themselves


def test_evaluation_leaves_the_running_scale_alone(tmp_path):
    trainer = make_trainer(tmp_path, normalize_error=True, eval_dataset=ranked_dataset(seed=1))
    before = trainer.evaluate()["eval_loss"]
    assert trainer._error_scale.moments.abs().max() == 0
    assert standard_deviations(trainer._error_scale.moments).tolist() == [1.0] * 10
    trainer.train()
    moments = trainer._error_scale.moments.clone()
    assert moments[0].sum() > 0
    first = trainer.evaluate()["eval_loss"]
    assert first == trainer.evaluate()["eval_loss"] != before
    assert torch.equal(trainer._error_scale.moments, moments)


# Reproducibility


@pytest.mark.parametrize("options", [{}, {"normalize_error": True}, {"peft_config": None}])
def test_interrupted_training_resumes_to_the_same_weights(tmp_path, options):
    """Six steps of two rows over six rows are two epochs: the second epoch's draws differ from the first's."""
    options = {"max_steps": 6, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", **options}
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
    if options.get("normalize_error"):
        assert torch.equal(resumed._error_scale.moments, whole._error_scale.moments)


class _StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_checkpoint_without_the_running_scale_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    resumed = make_trainer(tmp_path, normalize_error=True, max_steps=4)
    with pytest.raises(ValueError, match=r"checkpoint-2 has no `error_scale.pt`.*without `normalize_error`"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_evaluations_are_comparable(tmp_path):
    """Same weights, same `eval_loss`, whatever was drawn between; the logs carry TRL's names with `eval_`."""
    trainer = make_trainer(tmp_path, eval_dataset=ranked_dataset(seed=1), per_device_eval_batch_size=4)
    first = trainer.evaluate()
    trainer.state.epoch = 1.7
    second = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_error/chosen", "eval_nll_loss"):
        assert first[name] == second[name]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != first["eval_loss"]
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == trainer.evaluate()["eval_loss"]


def test_several_eval_datasets_and_one_that_comes_later(tmp_path):
    sets = {"a": ranked_dataset((2, 2), seed=1), "b": ranked_dataset((3, 2), seed=2)}
    trainer = make_trainer(tmp_path, cache_latents=False, eval_dataset=sets, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert {"eval_a_loss", "eval_b_loss"} <= logged
    assert "eval_loss" in trainer.evaluate(ranked_dataset((2, 3), seed=3))


def test_trls_metric_names_and_the_monitors_are_logged(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    start = trainer.state.log_history[0]
    expected = {
        f"rewards/{key}" for key in ("chosen", "rejected", "margins", "accuracies", "kendall_tau", "saturation")
    }
    expected |= {"logps/chosen", "logps/rejected", "error/chosen", "error/rejected", "nll_loss", "loss", "grad_norm"}
    assert expected <= set(start)
    assert not {"error/chosen_delta", "logits/chosen"} & set(start)
    assert start["rewards/chosen"] == pytest.approx(-250 * start["error/chosen"], rel=1e-5)
    assert start["nll_loss"] == pytest.approx(-start["rewards/chosen"], rel=1e-5)


# What can be given as model and data


def test_beta_defaults_to_the_familys_without_a_reference(tmp_path):
    assert make_trainer(tmp_path).beta == make_trainer(tmp_path, tiny_sd_pipeline()).beta == 500
    assert make_trainer(tmp_path, beta=7.0, normalize_error=True).beta == 7


def test_model_by_folder_pipeline_and_denoiser(tmp_path, sdxl_folder):
    losses = []
    for model, processing_class in (
        (sdxl_folder, None),
        (DiffusionPipeline.from_pretrained(sdxl_folder), None),
        (UNet2DConditionModel.from_pretrained(sdxl_folder, subfolder="unet"), None),
    ):
        trainer = make_trainer(tmp_path, model, processing_class=processing_class)
        losses.append(trainer.get_batch_loss_metrics(trainer.model, first_batch(trainer))[0].item())
    assert losses == [losses[0]] * 3


def test_trls_text_functions_are_not_mapped_over_the_latents(tmp_path, monkeypatch):
    mapped = []
    trl_maps = (cpo_trainer.maybe_extract_prompt, cpo_trainer.maybe_apply_chat_template)
    original = Dataset.map
    monkeypatch.setattr(
        Dataset,
        "map",
        lambda self, function, *args, **kwargs: mapped.append(function) or original(self, function, *args, **kwargs),
    )
    trainer = make_trainer(tmp_path, eval_dataset=ranked_dataset(seed=1))
    assert not [function for function in mapped if function in trl_maps]
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 6
    assert trainer.family.pipeline is None  # the encoders have left memory


@pytest.mark.parametrize("normalize_error", [False, True])
def test_stream_trains(tmp_path, normalize_error):
    stream = ranked_dataset().to_iterable_dataset()
    trainer = make_trainer(tmp_path, data=stream, max_steps=5, normalize_error=normalize_error)
    initial = adapter(trainer)
    trainer.train()
    assert trainer.state.global_step == 5
    assert any(not torch.equal(value, initial[key]) for key, value in adapter(trainer).items())


def test_stream_needs_max_steps(tmp_path):
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        make_trainer(tmp_path, data=ranked_dataset().to_iterable_dataset(), max_steps=-1)


def test_stream_with_a_row_of_ties_trains(tmp_path):
    def rows():
        generator = np.random.default_rng(0)
        for scores in ([0.1, 0.7, 0.2], [0.5, 0.5, 0.5]):
            yield {"prompt": "a cat", "images": [random_image(generator) for _ in range(3)], "scores": scores}

    trainer = make_trainer(tmp_path, data=IterableDataset.from_generator(rows), per_device_train_batch_size=1)
    trainer.train()
    assert trainer.state.log_history[1]["loss"] == 0
    assert "nll_loss" not in trainer.state.log_history[1]


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_metrics": lambda _: {}}, "`compute_metrics` can't be used with a diffusion model"),
        ({"data_collator": lambda _: {}}, "`data_collator` can't be used with a diffusion model"),
        ({"model_init": lambda: None}, "`model_init` can't be used with a diffusion model"),
        ({"resolution": 15}, "`resolution=15` must be a multiple of 2"),
        ({"peft_config": LoraConfig(modules_to_save=["conv_in"])}, "can't hold: got `modules_to_save=.*conv_in"),
        ({"model_init_kwargs": {"revision": "x"}}, "`model_init_kwargs` are for loading a model by name"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_wrong_datasets_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset` or `IterableDataset`, got none"):
        DiffusionCPOTrainer(tiny_sdxl_pipeline(), args=config(DiffusionCPOConfig, tmp_path))
    with pytest.raises(TypeError, match="must be a `Dataset` or `IterableDataset`, got `IterableDatasetDict`"):
        make_trainer(tmp_path, data=IterableDatasetDict())
    with pytest.raises(ValueError, match="`cache_latents=True` can't be had for a stream"):
        make_trainer(tmp_path, data=ranked_dataset().to_iterable_dataset(), cache_latents=True)
    with pytest.raises(ValueError, match="The eval dataset is a stream, but the train dataset is cached"):
        make_trainer(tmp_path, eval_dataset=ranked_dataset().to_iterable_dataset())
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="isn't encoded, and the VAE and text encoders have left memory"):
        trainer.evaluate(ranked_dataset(seed=4))
