"""What is refused before anything is loaded, because under DeepSpeed or FSDP it would train and not save."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_sdxl_pipeline
from transformers.integrations import deepspeed as hf_deepspeed

from trl_diffusion_rank import RankedDiffusionDPOTrainer
from trl_diffusion_rank.diffusion.denoiser import DenoiserModel
from trl_diffusion_rank.diffusion.families import recognise_family
from trl_diffusion_rank.hub.adapters import save_denoiser
from trl_diffusion_rank.trainers.sharding import check_sharding, loading_whole, uses_fsdp, uses_zero_3


def arguments(fsdp: dict | None = None, zero_stage: int | None = None, gathers: bool = True, **options):
    plugin = None
    if zero_stage is not None:
        zero = {"stage": zero_stage, "stage3_gather_16bit_weights_on_model_save": gathers}
        plugin = SimpleNamespace(zero_stage=zero_stage, deepspeed_config={"zero_optimization": zero})
    options = {"adversarial_adaptive": False, "stop_on_displacement": False, "sample_steps": None} | options
    return SimpleNamespace(fsdp_plugin_args=fsdp, deepspeed_plugin=plugin, **options)


FSDP_2 = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
ALLOWED = {
    "ddp": arguments(stop_on_displacement=True),
    "zero2": arguments(
        zero_stage=2, gathers=False, stop_on_displacement=True, adversarial_adaptive=True, sample_steps=7
    ),
    "zero3": arguments(zero_stage=3),
    "fsdp2": arguments(FSDP_2),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name):
    args = ALLOWED[name]
    check_sharding(args, RankedDiffusionDPOTrainer.needs_whole_weights)
    assert (uses_fsdp(args), uses_zero_3(args)) == (name == "fsdp2", name == "zero3")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (arguments({**FSDP_2, "fsdp_version": 1}), "`fsdp_version` is 1, but only FSDP 2 is supported"),
        (
            arguments({**FSDP_2, "state_dict_type": "SHARDED_STATE_DICT"}),
            "`fsdp_state_dict_type` is SHARDED_STATE_DICT, with which nothing is saved",
        ),
        (arguments(zero_stage=3, gathers=False), "ZeRO-3 without `stage3_gather_16bit_weights_on_model_save`"),
        (arguments(FSDP_2, stop_on_displacement=True), "`stop_on_displacement=True` can't be used with FSDP"),
        (arguments(FSDP_2, sample_steps=7), "`sample_steps=7` can't be used with FSDP or DeepSpeed's ZeRO-3"),
        (arguments(zero_stage=3, adversarial_adaptive=True), "`adversarial_adaptive=True` can't be used with FSDP"),
    ],
)
def test_refused(args, message):
    with pytest.raises(ValueError, match=message):
        check_sharding(args, RankedDiffusionDPOTrainer.needs_whole_weights)


def test_fsdp_of_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    assert uses_fsdp(arguments())
    check_sharding(arguments())
    monkeypatch.delenv("FSDP_STATE_DICT_TYPE")  # sharded by default
    with pytest.raises(ValueError, match="`fsdp_state_dict_type` is SHARDED_STATE_DICT"):
        check_sharding(arguments())


class Config:
    """Of DeepSpeed, as Transformers keeps it while training arguments are alive."""

    def is_zero3(self) -> bool:
        return True


def test_models_are_loaded_whole_under_zero_3():
    config = Config()
    hf_deepspeed.set_hf_deepspeed_config(config)
    try:
        with pytest.raises(KeyError), loading_whole():
            assert not hf_deepspeed.is_deepspeed_zero3_enabled()
            raise KeyError
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()


def test_gathered_weights_are_saved_as_diffusers_would(tmp_path):
    pipeline = tiny_sdxl_pipeline()
    family = recognise_family(pipeline)
    model = DenoiserModel(pipeline.unet, family)
    save_denoiser(model, family, tmp_path / "whole")
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_denoiser(model, family, tmp_path / "gathered", gathered)
    name = "unet/diffusion_pytorch_model.safetensors"
    whole, saved = load_file(tmp_path / "whole" / name), load_file(tmp_path / "gathered" / name)
    assert whole.keys() == saved.keys()
    assert all(torch.equal(weight + 1, saved[key]) for key, weight in whole.items())
    loaded = type(pipeline.unet).from_pretrained(tmp_path / "gathered" / "unet")
    assert all(torch.equal(weight, saved[key]) for key, weight in loaded.state_dict().items())
