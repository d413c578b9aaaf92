import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny import tiny_sd_pipeline, tiny_sdxl_pipeline

from trl_diffusion_rank.diffusion.denoiser import DenoiserModel
from trl_diffusion_rank.diffusion.families import recognise_family
from trl_diffusion_rank.hub import adapters


def wrapped(pipeline, **kwargs):
    family = recognise_family(pipeline)
    model = DenoiserModel(pipeline.unet, family, "a/base-model")
    return get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": ["to_q", "conv1"]} | kwargs))), family


def test_file_holds_every_module_and_the_whole_config(tmp_path):
    model, family = wrapped(tiny_sdxl_pipeline(), lora_alpha=6, use_rslora=True)
    adapters.save_lora(model, family, tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        keys, metadata = list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    modules = {key.removeprefix("unet.").split(".lora_")[0] for key in keys}
    expected = {
        name for name, module in tiny_sdxl_pipeline().unet.named_modules() if name.split(".")[-1] in ("to_q", "conv1")
    }
    assert modules == expected
    assert len(keys) == 2 * len(expected)
    assert (metadata["unet.lora_alpha"], metadata["unet.r"], metadata["unet.use_rslora"]) == (6, 4, True)


def test_dora_and_patterns_load_in_stock_diffusers(tmp_path):
    torch.manual_seed(0)
    model, family = wrapped(
        tiny_sd_pipeline(), use_dora=True, target_modules=r".*attentions.*(to_q|to_v)", rank_pattern={"to_q": 2}
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapters.save_lora(model, family, tmp_path)
    loaded = tiny_sd_pipeline()
    loaded.load_lora_weights(str(tmp_path))
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 16))
    expected = model.get_base_model().denoiser.eval()(*inputs).sample
    torch.testing.assert_close(loaded.unet.eval()(*inputs).sample, expected, atol=1e-5, rtol=1e-4)


def test_loaded_weights_have_no_dropout(tmp_path):
    torch.manual_seed(0)
    model, family = wrapped(tiny_sd_pipeline(), lora_dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapters.save_lora(model, family, tmp_path)
    loaded = tiny_sd_pipeline()
    loaded.load_lora_weights(str(tmp_path))  # and no call of `eval`, as a user's script has none
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 16))
    with torch.no_grad():
        first, second = loaded.unet(*inputs).sample, loaded.unet(*inputs).sample
        expected = model.get_base_model().denoiser.eval()(*inputs).sample
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-4)
    assert model.peft_config["default"].lora_dropout == 0.5, "training goes on with it"


def test_missing_and_foreign_weights_are_refused():
    model, _ = wrapped(tiny_sd_pipeline())
    state = {key: value for key, value in model.state_dict().items() if "down_blocks.0.resnets.0.conv1" not in key}
    with pytest.raises(
        RuntimeError, match=r"1 of \d+ LoRA modules have no weights to save, the first being `down_blo"
    ):
        adapters.lora_state_dict(model, state)
    model, _ = wrapped(tiny_sd_pipeline(), modules_to_save=["conv_in"])
    with pytest.raises(RuntimeError, match=r"also has .*conv_in.*Train without `modules_to_save`"):
        adapters.lora_state_dict(model)
