"""The options that make a step fast change nothing but its speed."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny import ranked_dataset, tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from torch import nn
from training import adapter, first_batch, images, make

from trl_diffusion_rank import (
    DiffusionCPOConfig,
    DiffusionCPOTrainer,
    RankedDiffusionDPOConfig,
    RankedDiffusionDPOTrainer,
)
from trl_diffusion_rank.trainers import diffusion_trainer


# Traces and differentiates as inductor's compiler gets it, without minutes of a C++ compiler
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def make_trainer(output_dir, model=None, data=None, **kwargs) -> RankedDiffusionDPOTrainer:
    model = tiny_sdxl_pipeline() if model is None else model
    data = ranked_dataset() if data is None else data
    return make(RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig, output_dir, model, data, **kwargs)


def compiled_classes(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if module._compiled_call_impl is not None}


# Compilation


def test_compiled_run_is_the_same_and_its_files_are_plain(tmp_path):
    """With rows of different n, resumed from a checkpoint, and loaded by stock diffusers."""
    options = {"max_steps": 4, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    plain = make_trainer(tmp_path / "plain", **options)
    plain.train()
    plain.save_model()
    compiled = make_trainer(tmp_path / "compiled", **options, **COMPILED)
    compiled.train()
    compiled.save_model()
    assert compiled_classes(compiled.model) == {"BasicTransformerBlock"}
    assert compiled.accelerator.unwrap_model(compiled.model_wrapped, keep_torch_compile=True) is compiled.model
    for log, expected in zip(compiled.state.log_history[:4], plain.state.log_history[:4], strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert log["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)

    name = "pytorch_lora_weights.safetensors"
    weights = load_file(tmp_path / "compiled" / name)
    assert weights.keys() == load_file(tmp_path / "plain" / name).keys()
    pipeline = tiny_sdxl_pipeline()
    pipeline.load_lora_weights(str(tmp_path / "compiled"))
    in_memory = tiny_sdxl_pipeline()
    in_memory.load_lora_weights(str(tmp_path / "plain"))
    np.testing.assert_allclose(images(pipeline), images(in_memory), atol=1e-2)

    checkpoint = str(tmp_path / "compiled" / "checkpoint-2")
    keys = [key for path in Path(checkpoint).glob("*.safetensors") for key in load_file(path)]
    assert keys and not any("_orig_mod" in key for key in keys)
    resumed = make_trainer(tmp_path / "resumed", **options)  # not compiled: the checkpoint doesn't care
    resumed.train(resume_from_checkpoint=checkpoint)
    trained = adapter(compiled)
    for key, value in adapter(resumed).items():
        torch.testing.assert_close(value, trained[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("pipeline", "blocks"),
    [
        (tiny_sd3_pipeline, {"JointTransformerBlock"}),
        (tiny_flux_pipeline, {"FluxTransformerBlock", "FluxSingleTransformerBlock"}),
    ],
)
def test_blocks_of_transformers_are_compiled(tmp_path, pipeline, blocks):
    trainer = make_trainer(tmp_path, pipeline(), peft_config=None, **COMPILED)
    assert compiled_classes(trainer.model) == compiled_classes(trainer.ref_model) == blocks


def test_nothing_is_compiled_unless_asked_for(tmp_path):
    assert compiled_classes(make_trainer(tmp_path).model) == set()


@pytest.mark.slow
def test_no_shape_is_left_uncompiled(tmp_path):
    """
    SD 1.5's four widths, each with adapter, without it and without gradients, on batches of several sizes: more than
    the eight versions after which a function is no longer compiled.
    """
    pipeline = tiny_sdxl_pipeline()
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 12, 16, 20),
        down_block_types=("CrossAttnDownBlock2D",) * 4,
        up_block_types=("CrossAttnUpBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    data = ranked_dataset((4, 4, 3, 2, 4, 2))
    trainer = make_trainer(tmp_path, pipeline, data, eval_dataset=ranked_dataset(seed=1), max_steps=3, **COMPILED)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trainer.train()
        trainer.evaluate()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 8


# Precision


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_inputs_of_a_lora_are_not_copied_to_float32_under_autocast(tmp_path, monkeypatch, gradient_checkpointing):
    """
    Less is kept for the backward pass. The loss is the same to the last bit; gradients are those of bfloat16, in which
    the terms of a sum are added in another order.
    """
    options = {
        "max_steps": 1,
        "bf16": True,
        "use_cpu": True,
        "learning_rate": 1e-3,
        "gradient_checkpointing": gradient_checkpointing,
    }
    kept, logs = [], []
    for name in ("ours", "peft's"):
        if name == "peft's":
            monkeypatch.setattr(diffusion_trainer, "disable_input_dtype_casting", lambda *_, **__: nullcontext())
        trainer = make_trainer(tmp_path / name, tiny_sdxl_pipeline().to(torch.bfloat16), **options)
        assert {value.dtype for value in adapter(trainer).values()} == {torch.float32}
        storages = {}

        def keep(tensor, storages=storages):  # alive, so that no address is used twice
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.train()
        kept.append(sum(storage.nbytes() for storage in storages.values()))
        logs.append(trainer.state.log_history[0])
        layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
        assert all(layer.cast_input_dtype_enabled for layer in layers), "the model is as usual after training"
    assert kept[0] <= kept[1] if gradient_checkpointing else kept[0] < kept[1]
    assert logs[0]["loss"] == logs[1]["loss"]
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-2)


# Memory layout


@pytest.mark.parametrize("peft_config", ["lora", None])
def test_channels_last_changes_the_layout_alone(tmp_path, peft_config):
    options = {"max_steps": 2, "learning_rate": 1e-3, "peft_config": peft_config}
    plain = make_trainer(tmp_path / "plain", **options)
    plain.train()
    trainer = make_trainer(tmp_path / "last", channels_last=True, **options)
    trainer.train()
    for model in (trainer.model, trainer.ref_model):
        for module in model.modules() if model else ():
            if isinstance(module, nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)
    seen = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert seen == pytest.approx([log["loss"] for log in plain.state.log_history if "loss" in log], rel=1e-3)

    trainer.save_model()
    pipeline = tiny_sdxl_pipeline()
    if peft_config:
        pipeline.load_lora_weights(str(tmp_path / "last"))
    else:
        pipeline.unet = UNet2DConditionModel.from_pretrained(tmp_path / "last", subfolder="unet")
    images(pipeline)


@pytest.mark.parametrize("pipeline", [tiny_sd3_pipeline, tiny_flux_pipeline])
def test_channels_last_is_refused_for_transformers(tmp_path, pipeline):
    with pytest.raises(ValueError, match=r"`channels_last=True` is a layout of convolutions, and the denoiser of"):
        make_trainer(tmp_path, pipeline(), channels_last=True)


# The reference


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_reference_is_the_model_without_its_adapter(tmp_path, gradient_checkpointing, use_reentrant):
    """As PEFT's `disable_adapter` gives it, to the last bit, and the adapter is back afterwards."""
    kwargs = {"use_reentrant": use_reentrant}
    options = {"gradient_checkpointing": gradient_checkpointing, "gradient_checkpointing_kwargs": kwargs}
    trainer = make_trainer(tmp_path, **options)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    batch = first_batch(trainer)
    asked, target = trainer._noised(batch, visit=0)
    with torch.no_grad():
        adapted, _ = trainer._ask(trainer.model, asked, target, batch["mask"])
        with trainer.model.disable_adapter():
            expected, _ = trainer._ask(trainer.model, asked, target, batch["mask"])
    reference = trainer._reference_error(asked, target, batch["mask"])
    assert torch.equal(reference, expected) and not reference.requires_grad
    assert not torch.allclose(reference, adapted)
    with torch.no_grad():
        again, _ = trainer._ask(trainer.model, asked, target, batch["mask"])
    assert torch.equal(again, adapted)


# Metrics


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig), (DiffusionCPOTrainer, DiffusionCPOConfig)],
)
def test_metrics_are_read_at_a_log_and_not_at_a_step(tmp_path, trainer_class, config_class):
    """A log is the mean of its steps, each as it would have been logged by itself."""
    read = []
    histories = []
    for logging_steps in (1, 3):
        trainer = make(
            trainer_class,
            config_class,
            tmp_path,
            tiny_sdxl_pipeline(),
            ranked_dataset(),
            max_steps=3,
            logging_steps=logging_steps,
        )
        original = trainer._read_metrics

        def counted(trainer=trainer, original=original):
            read.append((trainer.state.global_step, len(trainer._unread["train"])))
            original()

        trainer._read_metrics = counted
        trainer.train()
        histories.append([log for log in trainer.state.log_history if "loss" in log])
    assert [at for at in read if at[1]] == [(1, 1), (2, 1), (3, 1), (3, 3)]
    every, last = histories
    for name in ("rewards/margins", "error/chosen", "logps/rejected", "rewards/kendall_tau"):
        assert last[0][name] == pytest.approx(np.mean([log[name] for log in every]), rel=1e-6), name


def test_rows_of_ties_count_for_no_metric(tmp_path):
    trainer = make_trainer(tmp_path, data=ranked_dataset((3, 3)), beta=100.0)
    batch = first_batch(trainer)
    tied = batch | {"ranks": torch.where(torch.tensor([[True], [False]]), 1, batch["ranks"])}
    only_ties = batch | {"ranks": torch.ones_like(batch["ranks"])}
    alone = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[1]]))
    values = []
    for inputs in (tied, only_ties, alone):
        trainer._compute_loss(trainer.model, inputs, return_outputs=False)
        trainer._read_metrics()
        values.append({name: list(steps) for name, steps in trainer._metrics["train"].items()})
        trainer._metrics["train"].clear()
    assert values[1] == {}
    assert values[0].keys() == values[2].keys()
    assert values[0]["error/chosen"] == pytest.approx(values[2]["error/chosen"], rel=1e-4)
