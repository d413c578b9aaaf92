"""
Quantized bases. Diffusers loads them only where there is an accelerator; bitsandbytes itself also computes on a CPU.
So that check is switched off here, and everything else is the real thing.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from peft import LoraConfig
from tiny import ranked_dataset, tiny_flux_pipeline, tiny_sdxl_pipeline
from training import make
from transformers import BitsAndBytesConfig

from trl_diffusion_rank import DiffusionCPOConfig, DiffusionCPOTrainer, RankedDiffusionDPOConfig
from trl_diffusion_rank import RankedDiffusionDPOTrainer as DPOTrainer
from trl_diffusion_rank.diffusion import loading
from trl_diffusion_rank.recipe import stage_parser
from trl_diffusion_rank.stages._common import check_bitsandbytes


bnb = pytest.importorskip("bitsandbytes")

FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture
def without_accelerator(monkeypatch):
    """Diffusers' and our own refusal of machines without an accelerator, off."""
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    monkeypatch.setattr(loading, "check_can_quantize", lambda: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Saved pipelines, by the name of their denoiser."""
    made = {}
    for name, pipeline in (("unet", tiny_sdxl_pipeline()), ("transformer", tiny_flux_pipeline())):
        made[name] = str(tmp_path_factory.mktemp(name))
        pipeline.save_pretrained(made[name])
    return made


def make_trainer(trainer_class, output_dir, model, quantization_config, **kwargs):
    config_class = RankedDiffusionDPOConfig if trainer_class is DPOTrainer else DiffusionCPOConfig
    kwargs = {"peft_config": LoraConfig(r=4), "quantization_config": quantization_config} | kwargs
    return make(trainer_class, config_class, output_dir, model, ranked_dataset(), **kwargs)


@pytest.mark.parametrize("trainer_class", [DPOTrainer, DiffusionCPOTrainer])
@pytest.mark.parametrize("denoiser", ["unet", pytest.param("transformer", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_lora_on_a_quantized_base_trains_and_loads_on_the_full_one(
    tmp_path, without_accelerator, folders, trainer_class, denoiser, bits
):
    quantization = FOUR_BITS if bits == 4 else EIGHT_BITS
    trainer = make_trainer(trainer_class, tmp_path, folders[denoiser], quantization)
    base = trainer.model.get_base_model()
    layer = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    quantized = [module for module in base.denoiser.modules() if isinstance(module, layer)]
    assert len(quantized) > 10
    assert (base.is_loaded_in_4bit, base.is_loaded_in_8bit) == (bits == 4, bits == 8)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    trainer.train()
    trainer.save_model()

    for name, parameter in trainer.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("lora_" in name), name
    assert all(np.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    full = DiffusionPipeline.from_pretrained(folders[denoiser])
    full.load_lora_weights(str(tmp_path))
    loaded = [name for name, _ in getattr(full, denoiser).named_parameters() if "lora_B" in name]
    assert len(loaded) == sum("lora_B" in name for name in before) > 0


@pytest.mark.parametrize("quantization", [FOUR_BITS, EIGHT_BITS])
def test_the_reference_of_a_quantized_base_is_the_base(tmp_path, without_accelerator, folders, quantization):
    """Before any update trained model and reference are the same, so a row's loss is log n! / (n - 1)."""
    options = {"per_device_train_batch_size": 6, "max_steps": 1, "logging_steps": 1}
    trainer = make_trainer(DPOTrainer, tmp_path, folders["unet"], quantization, **options)
    trainer.train()
    of_rows = [math.log(math.factorial(n)) / (n - 1) for n in (4, 4, 3, 2, 4, 2)]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(of_rows), abs=1e-4)


def test_only_the_denoiser_is_quantized(without_accelerator, folders):
    pipeline = loading.load_pipeline(folders["unet"], quantization_config=FOUR_BITS)
    assert pipeline.unet.is_quantized
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert not any(isinstance(m, bnb.nn.Linear4bit) for m in getattr(pipeline, name).modules())


def test_without_an_accelerator_there_is_one_clear_error(tmp_path, folders, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"`load_in_4bit`.* need an accelerator.*train on the CPU"):
        make_trainer(DPOTrainer, tmp_path, folders["unet"], FOUR_BITS)


def test_quantized_weights_are_not_trained_themselves(tmp_path, without_accelerator, folders):
    with pytest.raises(ValueError, match="quantized base can't be trained themselves: pass a `peft_config`"):
        make_trainer(DPOTrainer, tmp_path, folders["unet"], FOUR_BITS, peft_config=None)


def test_quantization_of_a_loaded_model_is_refused(tmp_path, without_accelerator):
    with pytest.raises(ValueError, match=r"`model` is loaded\. Pass its name"):
        make_trainer(DPOTrainer, tmp_path, tiny_sdxl_pipeline(), FOUR_BITS)


def test_quantization_set_twice_is_refused(tmp_path, without_accelerator, folders):
    with pytest.raises(ValueError, match="`quantization_config` is set twice"):
        make_trainer(
            DPOTrainer, tmp_path, folders["unet"], FOUR_BITS, model_init_kwargs={"quantization_config": FOUR_BITS}
        )


def test_an_8_bit_optimizer_trains(tmp_path, folders):
    trainer = make_trainer(DPOTrainer, tmp_path, folders["unet"], None, optim="adamw_bnb_8bit")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, bnb.optim.AdamW)
    assert trainer.optimizer.optimizer.args.optim_bits == 8
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--load_in_4bit", "true"], "load_in_4bit"), (["--optim", "adamw_bnb_8bit"], "optim=adamw_bnb_8bit")],
)
def test_a_missing_bitsandbytes_is_found_before_anything_starts(monkeypatch, flags, named):
    options = stage_parser("dpo").parse_args(["--output_dir", "out", *flags])
    check_bitsandbytes(options)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"`{named}` needs the package bitsandbytes.*quantization"):
        check_bitsandbytes(options)
