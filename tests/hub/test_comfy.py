import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_unet
from training import images

from trl_diffusion_rank import save_comfy_lora
from trl_diffusion_rank.diffusion.denoiser import DenoiserModel
from trl_diffusion_rank.diffusion.families import recognise_family
from trl_diffusion_rank.digits import digits_model_path
from trl_diffusion_rank.hub.adapters import save_lora
from trl_diffusion_rank.hub.comfy import LoraModule, kohya_name, kohya_tensors


# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/unet/config.json
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}


def adapted_layers(denoiser: torch.nn.Module) -> list[str]:
    """Every layer that LoRA can adapt."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [name for name, module in denoiser.named_modules() if isinstance(module, kinds)]


def random_lora(pipeline, folder: Path, targets=None, **kwargs) -> torch.nn.Module:
    """A LoRA on every layer with several ranks and strengths, saved as the trainers do; returns the base denoiser."""
    family = recognise_family(pipeline)
    denoiser = getattr(pipeline, family.denoiser_name)
    targets = targets or [f"denoiser.{name}" for name in adapted_layers(denoiser)]
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": targets} | kwargs))
    model = get_peft_model(DenoiserModel(denoiser, family, "a/base"), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)
    folder.mkdir()
    save_lora(model, family, folder)
    return denoiser


def drawn_with(pipeline, folder: Path, weight_name: str | None = None) -> np.ndarray:
    pipeline.load_lora_weights(str(folder), weight_name=weight_name)
    return images(pipeline)


@pytest.mark.parametrize(
    ("make", "use_rslora"),
    [(tiny_sd_pipeline, True), (tiny_sdxl_pipeline, False), (tiny_sd3_pipeline, True), (tiny_flux_pipeline, False)],
)
def test_stock_diffusers_draws_the_same_from_both_files(tmp_path, make, use_rslora):
    patterns = {"rank_pattern": {"to_q": 2, "conv1": 3}, "alpha_pattern": {"to_k": 1.5, "conv_shortcut": 9}}
    denoiser = random_lora(make(), tmp_path / "mine", use_rslora=use_rslora, **patterns)
    file = save_comfy_lora(tmp_path / "mine", denoiser)
    assert file == tmp_path / "mine" / "mine_comfy.safetensors"
    assert not list(tmp_path.rglob("*.tmp"))
    plain = drawn_with(make(), tmp_path / "mine")  # finds its own file, although there are two
    np.testing.assert_allclose(drawn_with(make(), tmp_path / "mine", file.name), plain, atol=1e-5)
    assert abs(plain - images(make())).max() > 0.02


def test_kohyas_file_merges_to_the_trained_weights(tmp_path):
    """`W + alpha / rank * up @ down`, as ComfyUI and sd-scripts do it, with names written out by hand."""
    base = tiny_sdxl_pipeline().unet
    random_lora(tiny_sdxl_pipeline(), tmp_path / "x", use_rslora=True, rank_pattern={"conv1": 3})
    tensors = load_file(save_comfy_lora(tmp_path / "x", base))
    tuned = tiny_sdxl_pipeline()
    tuned.load_lora_weights(str(tmp_path / "x"))
    tuned.fuse_lora()
    tuned.unload_lora_weights()
    names = {  # two blocks with one resnet each
        "conv_in": "input_blocks_0_0",
        "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_3_0_skip_connection",
        "down_blocks.1.attentions.0.proj_in": "input_blocks_3_1_proj_in",
        "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": (
            "output_blocks_1_1_transformer_blocks_0_attn2_to_out_0"
        ),
        "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
        "up_blocks.1.resnets.1.conv2": "output_blocks_3_0_out_layers_3",
        "add_embedding.linear_2": "label_emb_0_2",
    }
    for module, name in names.items():
        down, up, alpha = (
            tensors[f"lora_unet_{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        assert (alpha.shape, alpha.dtype) == (torch.Size([]), torch.float32)
        weight = base.get_submodule(module).weight
        delta = alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        torch.testing.assert_close(weight + delta, tuned.unet.get_submodule(module).weight, msg=module)
        assert delta.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("module", "published"),
    [
        ("conv_in", "input_blocks_0_0"),
        ("time_embedding.linear_1", "time_embed_0"),
        ("add_embedding.linear_1", "label_emb_0_0"),
        ("down_blocks.0.resnets.1.conv2", "input_blocks_2_0_out_layers_3"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks_4_0_skip_connection"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",
            "input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        ),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
            "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        ),
        ("mid_block.resnets.0.time_emb_proj", "middle_block_0_emb_layers_1"),
        ("mid_block.attentions.0.proj_out", "middle_block_1_proj_out"),
        ("mid_block.resnets.1.conv1", "middle_block_2_in_layers_2"),
        (
            "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0",
            "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0",
        ),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
        ("up_blocks.2.resnets.2.conv1", "output_blocks_8_0_in_layers_2"),
        ("conv_out", "out_2"),
    ],
)
def test_names_of_the_real_sdxl(module, published):
    assert kohya_name(module, {**SDXL, "layers_per_block": 2}) == published


@pytest.mark.parametrize(("config", "count"), [(SDXL, 794), ({"cross_attention_dim": 768}, 282)])
def test_every_layer_of_the_real_unets_has_a_name_that_diffusers_reads(config, count):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    modules = {name: LoraModule(torch.zeros(1, 1), torch.zeros(1, 1), 1.0) for name in adapted_layers(unet)}
    assert len(modules) == count
    assert len(kohya_tensors(modules, dict(unet.config))) == 3 * count


def test_metadata_says_what_others_look_for(tmp_path):
    denoiser = random_lora(tiny_sdxl_pipeline(), tmp_path / "a", use_rslora=True)
    with safe_open(save_comfy_lora(tmp_path / "a", denoiser), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == ("4", 6 * math.sqrt(4))
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    denoiser = random_lora(tiny_sd_pipeline(), tmp_path / "b")
    with safe_open(save_comfy_lora(tmp_path / "b", denoiser, tmp_path / "other.safetensors"), "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1"
        assert file.metadata()["modelspec.title"] == "other"


def test_anybodys_lora_by_the_name_of_its_base_model(tmp_path):
    """A file in diffusers' older keys, without metadata: its strength is 1."""
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    for old in (f"unet.{name}.to_q.lora", f"unet.{name}.processor.to_q_lora"):
        save_file({f"{old}.down.weight": down, f"{old}.up.weight": up}, tmp_path / "theirs.safetensors")
        for base_model in ("digits", digits_model_path()):
            file = save_comfy_lora(tmp_path / "theirs.safetensors", base_model)
            assert file.name == f"{tmp_path.name}_comfy.safetensors"
            tensors = load_file(file)
            key = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
            assert set(tensors) == {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"}
            assert tensors[f"{key}.alpha"] == 2
            torch.testing.assert_close(tensors[f"{key}.lora_up.weight"], up)


def test_what_the_keys_cant_say_is_refused(tmp_path):
    unet = random_lora(tiny_sd_pipeline(), tmp_path / "dora", targets=["to_q"], use_dora=True)
    with pytest.raises(ValueError, match="holds a DoRA"):
        save_comfy_lora(tmp_path / "dora", unet)
    save_file({"text_encoder.a.lora_A.weight": torch.ones(1)}, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"more than a LoRA of the unet .*: text_encoder\.a\.lora_A\.weight\."):
        save_comfy_lora(tmp_path / "text.safetensors", unet)
    with pytest.raises(ValueError, match=r"There is no LoRA at .*missing"):
        save_comfy_lora(tmp_path / "missing", unet)
    with pytest.raises(ValueError, match="known for UNets, SD3 and FLUX; the base model is a `AutoencoderKL`"):
        save_comfy_lora(tmp_path / "text.safetensors", tiny_sd_pipeline().vae)
    with pytest.raises(ValueError, match=r"config of the base model .*nowhere' can't be read"):
        save_comfy_lora(tmp_path / "text.safetensors", str(tmp_path / "nowhere"))


def test_unets_that_are_laid_out_otherwise_are_refused():
    module = LoraModule(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    kinds = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }
    # Stability's name is `output_blocks.2.1`, where diffusers expects an attention
    with pytest.raises(
        ValueError, match=r"doesn't find 1 of 1 modules again .* up_blocks\.0\.upsamplers\.0\.conv for"
    ):
        kohya_tensors({"up_blocks.0.upsamplers.0.conv": module}, {**SDXL, **kinds, "layers_per_block": 2})
    with pytest.raises(
        ValueError, match=r"no name for `down_blocks\.0\.resnets\.0\.conv1` with `layers_per_block` \[1"
    ):
        kohya_tensors({"down_blocks.0.resnets.0.conv1": module}, {**SDXL, "layers_per_block": [1, 2, 2]})
    with pytest.raises(ValueError, match="`addition_embed_type` None or 'text_time', not 'image'"):
        kohya_tensors(
            {"conv_in": module}, {**tiny_unet(cross_attention_dim=16).config, "addition_embed_type": "image"}
        )


def test_a_file_of_another_config_keeps_its_strength(tmp_path):
    """The adapter's own config is read from the file, not guessed."""
    denoiser = random_lora(tiny_sd_pipeline(), tmp_path / "x", targets=["to_q"], lora_alpha=20)
    tensors = load_file(save_comfy_lora(tmp_path / "x", denoiser))
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {20.0}
    with safe_open(tmp_path / "x" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 20
