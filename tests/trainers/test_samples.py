"""Grids drawn during training: what stock diffusers would draw, on disk and in the trackers, and nothing disturbed."""

import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tiny import ranked_dataset, tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from training import adapter, launch, lora, make
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import integration_utils

from trl_diffusion_rank import (
    DiffusionCPOConfig,
    DiffusionCPOTrainer,
    RankedDiffusionDPOConfig,
    RankedDiffusionDPOTrainer,
)
from trl_diffusion_rank.diffusion.draws import stable_seed
from trl_diffusion_rank.diffusion.families import recognise_family
from trl_diffusion_rank.diffusion.sampling import TrainingSampler, is_black
from trl_diffusion_rank.evaluation.grid import image_grid


PIPELINES = {
    "sd": tiny_sd_pipeline,
    "sdxl": tiny_sdxl_pipeline,
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
}
TRAINERS = {
    "dpo": (RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig),
    "cpo": (DiffusionCPOTrainer, DiffusionCPOConfig),
}
PROMPTS = ["a red cat", "a blue dog", "a green sun"]
OPTIONS = {"sample_steps": 2, "sample_prompts": PROMPTS, "sample_inference_steps": 2, "max_steps": 3}
SMALL_LORA = LoraConfig(r=4, target_modules=["to_q", "to_v"])


def make_trainer(output_dir, model=None, data=None, method="dpo", **kwargs):
    model = tiny_sdxl_pipeline() if model is None else model
    data = ranked_dataset() if data is None else data
    return make(*TRAINERS[method], output_dir, model, data, **kwargs)


def stock(pipeline, seeds, **options) -> list[np.ndarray]:
    """What the pipeline itself draws of `PROMPTS`."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": 2, "height": 16, "width": 16} | options
    return pixels(pipeline(PROMPTS, generator=generators, **options).images)


def pixels(images: list[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(image).astype(int) for image in images]


def record(output_dir) -> dict:
    return json.loads((Path(output_dir) / "samples/samples.json").read_text())


def grids(output_dir) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(output_dir) / "samples").glob("*.png")}


# The images


@pytest.mark.parametrize("guidance_scale", [None, 1.0])
@pytest.mark.parametrize("name", PIPELINES)
def test_images_are_the_stock_pipelines_without_its_encoders(name, guidance_scale):
    pipeline = PIPELINES[name]()
    options = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    t5 = {"max_sequence_length": 24} if name in ("sd3", "flux") else {}  # the most that the tiny tokenizer takes
    expected = stock(pipeline, [5, 6, 7], **options, **t5)
    family = recognise_family(pipeline)
    parts = {"resolution": 16, "num_inference_steps": 2, "guidance_scale": guidance_scale, "encode_batch_size": 2}
    sampler = TrainingSampler(family, getattr(pipeline, family.denoiser_name), PROMPTS, **parts)
    components = pipeline.components
    for encoder in [encoder for encoder in family.encoders if encoder != "vae"]:
        setattr(pipeline, encoder, None)
    family.drop_encoders()
    drawn = pixels(sampler.draw([0, 1], [5, 6]) + sampler.draw([2], [7]))
    for image, reference in zip(drawn, expected, strict=True):
        assert np.abs(image - reference).max() <= 1  # kernels round differently at another batch size
    assert pipeline.vae is components["vae"] and pipeline.scheduler is components["scheduler"]
    assert pipeline.scheduler is not sampler.pipe.scheduler, "a grid must not move the user's scheduler"


def test_what_is_not_finite_is_black_and_a_half_precision_vae_is_lifted():
    pipeline = tiny_sdxl_pipeline()
    pipeline.vae.to(torch.float16)
    parts = {"resolution": 16, "num_inference_steps": 1}
    sampler = TrainingSampler(recognise_family(pipeline), pipeline.unet, PROMPTS, **parts)
    (image,) = sampler.draw([0], [1])
    assert not is_black(image) and pipeline.vae.dtype == torch.float16
    pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    (image,) = sampler.draw([0], [1])
    assert is_black(image)


# Training


@pytest.mark.parametrize("peft_config", [lora(lora_dropout=0.3), None], ids=["lora", "full"])
def test_grids_show_what_is_saved_and_the_base_model_first(tmp_path, peft_config):
    """Also with a moving average: it is what is saved."""
    options = {"ema_decay": 0.5, "per_device_train_batch_size": 2, "peft_config": peft_config}
    trainer = make_trainer(tmp_path, **OPTIONS, **options, sample_guidance_scale=2.0, seed=3)
    trainer.train()
    trainer.save_model()
    seeds = [stable_seed(3, "sample", prompt, 0) for prompt in PROMPTS]
    assert record(tmp_path) == {
        "prompts": PROMPTS,
        "seeds": seeds,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "steps": [0, 2, 3],
    }
    assert sorted(grids(tmp_path)) == ["step-000000.png", "step-000002.png", "step-000003.png"]

    tuned = tiny_sdxl_pipeline()
    if peft_config:
        tuned.load_lora_weights(str(tmp_path))
    else:
        tuned.unet = type(tuned.unet).from_pretrained(tmp_path, subfolder="unet")
    tuned.unet.eval()  # diffusers leaves the dropout of a loaded LoRA on
    for step, pipeline in ((0, tiny_sdxl_pipeline()), (3, tuned)):
        images = [Image.fromarray(image.astype(np.uint8)) for image in stock(pipeline, seeds, guidance_scale=2.0)]
        expected = np.asarray(image_grid([(f"step {step}", images)], PROMPTS)).astype(int)
        shown = np.asarray(Image.open(tmp_path / f"samples/step-00000{step}.png")).astype(int)
        assert np.abs(shown - expected).max() <= 1
    assert len(set(grids(tmp_path).values())) == 3, "the trained model draws otherwise"


@pytest.mark.parametrize("method", ["dpo", pytest.param("cpo", marks=pytest.mark.slow)])
def test_training_is_the_same_bit_for_bit_with_and_without_samples(tmp_path, monkeypatch, method):
    """Dropout and the order of the rows come from the global generator, on which a scheduler may draw, too."""
    draw = TrainingSampler.draw
    monkeypatch.setattr(TrainingSampler, "draw", lambda *args: (torch.rand(3), draw(*args))[1])
    options = {"peft_config": lora(lora_dropout=0.3), "gradient_checkpointing": True, "max_steps": 4, "method": method}
    results = []
    for samples in ({}, {**OPTIONS, "sample_steps": 1, "max_steps": 4}):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / str(len(samples)), **{**options, **samples})
        trainer.model.train()
        modes = [module.training for module in trainer.model.modules()]
        trainer.train()
        assert [module.training for module in trainer.model.modules()] == modes
        assert trainer.model.is_gradient_checkpointing
        logs = [
            {k: v for k, v in log.items() if not any(word in k for word in ("runtime", "per_second", "memory/"))}
            for log in trainer.state.log_history
        ]
        results.append((adapter(trainer), logs))
    assert record(tmp_path / str(len(OPTIONS)))["steps"] == [0, 1, 2, 3, 4]
    (plain, plain_logs), (sampled, sampled_logs) = results
    assert all(torch.equal(plain[name], sampled[name]) for name in plain) and len(plain) == len(sampled)
    assert plain_logs == sampled_logs


class _StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_resumed_run_keeps_its_grids_and_draws_the_others_as_they_were(tmp_path):
    options = {**OPTIONS, "sample_steps": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"sample_inference_steps": 1, "peft_config": SMALL_LORA}
    make_trainer(tmp_path / "whole", **options).train()
    make_trainer(tmp_path / "cut", **options, callbacks=[_StopAfter(3)]).train()
    for name in ("step-000001.png", "step-000003.png"):
        (tmp_path / "cut/samples" / name).write_bytes(b"seen")
    checkpoint = str(tmp_path / "cut/checkpoint-2")
    make_trainer(tmp_path / "cut", **options).train(resume_from_checkpoint=checkpoint)
    assert record(tmp_path / "cut") == record(tmp_path / "whole")
    assert record(tmp_path / "cut")["steps"] == [0, 1, 2, 3, 4]
    drawn = grids(tmp_path / "cut")
    assert drawn.pop("step-000001.png") == b"seen", "before the checkpoint nothing is drawn again"
    expected = grids(tmp_path / "whole")
    expected.pop("step-000001.png")
    assert drawn == expected

    grids_of_others = make_trainer(tmp_path / "cut", **{**options, "sample_prompts": ["a red sun"]})
    callback = grids_of_others.callback_handler.callbacks[0]
    callback.on_train_begin(grids_of_others.args, TrainerState(global_step=2), TrainerControl())
    assert callback.record["steps"] == [], "grids of other prompts are no earlier steps of these"


@pytest.mark.parametrize("cached", [True, False, "stream"])
def test_prompts_are_the_first_of_the_eval_dataset_or_of_the_train_dataset(tmp_path, cached):
    def named(texts: str) -> Dataset:
        rows = ranked_dataset((2,) * len(texts)).remove_columns("prompt")
        rows = rows.add_column("prompt", [f"a {letter}" for letter in texts])
        return rows.to_iterable_dataset() if cached == "stream" else rows

    options = {"sample_steps": 2, "cache_latents": None if cached == "stream" else cached}
    trainer = make_trainer(tmp_path, data=named("aabcdef"), **options)
    assert trainer.callback_handler.callbacks[0].record["prompts"] == ["a a", "a b", "a c", "a d"]
    for eval_dataset in (named("xyx"), {"one": named("xyx"), "two": named("b")}):
        trainer = make_trainer(tmp_path, data=named("aabcdef"), eval_dataset=eval_dataset, **options)
        assert trainer.callback_handler.callbacks[0].record["prompts"] == ["a x", "a y"]


def test_encoders_may_stay_for_training_and_several_rows_have_seeds_of_their_own(tmp_path):
    """With `cache_latents=False` the VAE is where training wants it."""
    trainer = make_trainer(tmp_path, **OPTIONS, cache_latents=False, samples_per_prompt=2, peft_config=SMALL_LORA)
    trainer.train()
    seeds = record(tmp_path)["seeds"]
    assert len(set(seeds)) == 6 and seeds[4] == stable_seed(42, "sample", PROMPTS[1], 1)
    one_row = make_trainer(tmp_path / "one", **OPTIONS, peft_config=SMALL_LORA)
    one_row.train()
    one, two = (np.asarray(Image.open(folder / "samples/step-000003.png")) for folder in (tmp_path / "one", tmp_path))
    assert two.shape[0] > one.shape[0] + 90 and two.shape[1] == one.shape[1]


@pytest.mark.parametrize("name", ["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mixed", [True, False])
def test_half_precision(tmp_path, name, mixed):
    """bfloat16 by autocast of float32 weights, and weights in bfloat16 with a LoRA in float32."""
    pipeline = PIPELINES[name]()
    if not mixed:
        pipeline.to(torch.bfloat16)
    options = {**OPTIONS, "bf16": mixed, "use_cpu": True, "resolution": 16, "peft_config": LoraConfig(r=4)}
    trainer = make_trainer(tmp_path, pipeline, **options)
    trainer.train()
    assert record(tmp_path)["steps"] == [0, 2, 3]
    assert np.asarray(Image.open(tmp_path / "samples/step-000003.png"))[40:, 130:].std() > 10


def test_weights_that_are_lost_do_not_stop_training(tmp_path):
    trainer = make_trainer(tmp_path, **OPTIONS, max_skipped_steps=10, peft_config=SMALL_LORA)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))
    trainer.train()
    assert record(tmp_path)["steps"] == [0, 2, 3]


def test_neither_a_full_disk_nor_a_full_device_stops_training(tmp_path, monkeypatch, caplog):
    (tmp_path / "samples").write_text("in the way")
    trainer = make_trainer(tmp_path, **OPTIONS, peft_config=SMALL_LORA)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 3
    assert caplog.text.count("weren't written, training goes on") == 3

    def full(*args):
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr(TrainingSampler, "draw", full)
    trainer = make_trainer(tmp_path / "other", **OPTIONS, peft_config=SMALL_LORA)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 3
    assert "The samples of step 2 weren't drawn, training goes on: out of memory. (no room)" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_steps": 0}, "`sample_steps` must be at least 1, got 0"),
        ({"sample_steps": 1, "samples_per_prompt": 0}, "`samples_per_prompt` must be at least 1, got 0"),
        ({"sample_steps": 1, "sample_inference_steps": 0}, "`sample_inference_steps` must be at least 1, got 0"),
        ({"sample_steps": 1, "sample_prompts": []}, "`sample_prompts` is empty"),
        ({"sample_steps": 1, "sample_guidance_scale": -1.0}, "`sample_guidance_scale` must be at least 0, got -1.0"),
        ({"sample_prompts": ["a cat"]}, r"`sample_prompts=\['a cat'\]` does nothing without `sample_steps`"),
        ({"sample_inference_steps": 4}, "`sample_inference_steps=4` does nothing without `sample_steps`"),
        ({"sample_guidance_scale": 0.0}, "`sample_guidance_scale=0.0` does nothing without `sample_steps`"),
        ({"samples_per_prompt": 2}, "`samples_per_prompt=2` does nothing without `sample_steps`"),
    ],
)
@pytest.mark.parametrize("config_class", [RankedDiffusionDPOConfig, DiffusionCPOConfig])
def test_bad_values_name_the_option(tmp_path, config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(str(tmp_path), bf16=False, **options)


# Trackers


def test_tensorboard_has_every_grid(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(tmp_path, **OPTIONS, report_to="tensorboard", peft_config=SMALL_LORA)
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    shown = events.Images("samples")
    assert [event.step for event in shown] == [0, 2, 3]
    on_disk = Image.open(tmp_path / "samples/step-000003.png")
    assert (shown[-1].width, shown[-1].height) == on_disk.size
    assert "train/loss" in events.Tags()["scalars"]


class _Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


class _Recorder(ModuleType):
    """In the place of the packages wandb and trackio: what is logged, until it is finished."""

    def __init__(self, name: str):
        super().__init__(name)
        self.logged: list[dict] = []
        self.is_finished = False
        self.run = SimpleNamespace(summary={}, _label=lambda code: None)
        self.config = _Config()
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
        self.Image = lambda grid: ("image", grid.copy())

    def init(self, **kwargs) -> None:
        pass

    def log(self, values: dict) -> None:
        assert not self.is_finished, "nothing can be logged any more"
        self.logged.append(values)

    def finish(self) -> None:
        self.is_finished = True


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_wandb_and_trackio_have_every_grid(tmp_path, monkeypatch, tracker):
    recorder = _Recorder(tracker)
    monkeypatch.setitem(sys.modules, tracker, recorder)
    if tracker == "wandb":
        errors = ModuleType("wandb.sdk.lib.config_util")
        errors.ConfigError = RuntimeError
        for name in ("wandb.sdk", "wandb.sdk.lib"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, errors.__name__, errors)
    monkeypatch.setattr(integration_utils, f"is_{tracker}_available", lambda: True)
    trainer = make_trainer(tmp_path, **OPTIONS, report_to=tracker, peft_config=SMALL_LORA)
    trainer.train()
    shown = [values for values in recorder.logged if "samples" in values]
    assert [values["train/global_step"] for values in shown] == [0, 2, 3]
    kind, grid = shown[-1]["samples"]
    assert kind == "image"
    np.testing.assert_array_equal(np.asarray(grid), np.asarray(Image.open(tmp_path / "samples/step-000003.png")))
    assert any("train/loss" in values for values in recorder.logged)


# Processes


@pytest.mark.slow
def test_two_processes_train_and_draw_as_one(tmp_path):
    for processes in (1, 2):
        launch(__file__, processes, tmp_path / str(processes), 4 // processes)
    assert json.loads((tmp_path / "2/processes.json").read_text()) == 2
    assert record(tmp_path / "1") == record(tmp_path / "2")
    one, two = ([json.loads(line) for line in (tmp_path / f"{n}/log_history.jsonl").open()] for n in (1, 2))
    assert len(one) == len(two) == 4
    for a, b in zip(one[:-1], two[:-1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=3e-5)
    first, last = (
        [np.asarray(Image.open(tmp_path / f"{n}/samples/step-00000{step}.png")).astype(int) for n in (1, 2)]
        for step in (0, 3)
    )
    assert np.abs(first[0] - first[1]).max() <= 1
    assert np.abs(last[0] - last[1]).max() <= 3
    assert np.abs(first[0] - last[0])[40:].max() > 3


def train(folder: str, batch_size: str) -> None:
    data = ranked_dataset((4, 3, 2, 4, 3, 2, 4, 4))
    options = {**OPTIONS, "per_device_train_batch_size": int(batch_size), "beta": 100.0, "use_cpu": True}
    trainer = make_trainer(folder, data=data, **options, peft_config=LoraConfig(r=4, target_modules=["to_q", "conv1"]))
    trainer.train()
    if trainer.accelerator.is_main_process:
        Path(folder, "processes.json").write_text(json.dumps(trainer.accelerator.num_processes))


if __name__ == "__main__":
    train(*sys.argv[1:])
