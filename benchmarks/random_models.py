"""
Stable Diffusion pipelines with random weights, from their published configs: a step of training costs the same.

`sd15` and `sdxl` are Stable Diffusion 1.5 and XL; tests/benchmarks/test_step_time.py holds them to the published
numbers of parameters and FLOPs. `tiny` is SDXL in a twentieth of its widths, for a CPU: its UNet has SDXL's blocks and
depths (6 M parameters, 2,567 M there), and its VAE and text encoders cost about the same share of the UNet as SDXL's.
"""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


TOKENS = 77

_SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
UNETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_SDXL_UNET,
        "sample_size": 32,
        "block_out_channels": (16, 32, 64),
        "attention_head_dim": [1, 2, 4],  # the number of heads, by an old mistake that diffusers keeps
        "norm_num_groups": 8,
        "cross_attention_dim": 96,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 48 + 6 * 16,
    },
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sdxl": {
        **_SDXL_UNET,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
}

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
VAES: dict[str, dict[str, Any]] = {
    "tiny": {**_VAE, "sample_size": 256, "block_out_channels": (7, 14, 28, 28), "norm_num_groups": 7},
    "sd15": {**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
    "sdxl": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
}

_CLIP_L = {"width": 768, "layers": 12, "heads": 12, "hidden_act": "quick_gelu"}
_BIG_G = {"width": 1280, "layers": 32, "heads": 20, "hidden_act": "gelu"}
TEXT_ENCODERS: dict[str, list[dict[str, Any]]] = {
    "tiny": [
        {"width": 48, "layers": 2, "heads": 3, "hidden_act": "quick_gelu", "vocab_size": 64},
        {"width": 48, "layers": 2, "heads": 3, "hidden_act": "gelu", "vocab_size": 64},
    ],
    "sd15": [_CLIP_L],
    "sdxl": [_CLIP_L, _BIG_G],
}


def unet(size: str) -> UNet2DConditionModel:
    return UNet2DConditionModel(**UNETS[size])


def vae(size: str) -> AutoencoderKL:
    return AutoencoderKL(**VAES[size])


def text_encoders(size: str) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
    """The second one has a projection, as SDXL's."""
    encoders = []
    for index, sizes in enumerate(TEXT_ENCODERS[size]):
        config = CLIPTextConfig(
            vocab_size=sizes.get("vocab_size", 49408),
            hidden_size=sizes["width"],
            intermediate_size=4 * sizes["width"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            max_position_embeddings=TOKENS,
            projection_dim=sizes["width"],
            hidden_act=sizes["hidden_act"],
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
        )
        encoders.append((CLIPTextModelWithProjection if index else CLIPTextModel)(config).eval())
    return encoders


def pipeline(size: str, device: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Made on the device: random numbers for three billion weights take minutes on a CPU."""
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            parts = {"unet": unet(size), "vae": vae(size).eval()}
            encoders = text_encoders(size)
    finally:
        torch.set_default_dtype(default)
    parts["scheduler"] = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tokenizer = _tokenizer()
    if len(encoders) == 1:
        return StableDiffusionPipeline(
            **parts,
            text_encoder=encoders[0],
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        **parts,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        add_watermarker=False,
    )


def _tokenizer() -> CLIPTokenizer:
    """A token a letter: which tokens an encoder is given doesn't change what it costs."""
    letters = string.ascii_lowercase
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS, pad_token="<|endoftext|>")


def forward_flops(size: str, resolution: int) -> dict[str, float]:
    """
    FLOPs of one image's way through the `unet` and through the VAE's encoder (`vae`), and of one prompt's through the
    text encoders (`text`): two for each multiplication and addition, in products, convolutions and attention alone.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        config = UNETS[size]
        side = resolution // 8
        asked = {
            "sample": torch.empty(1, 4, side, side),
            "timestep": torch.zeros(1, dtype=torch.long),
            "encoder_hidden_states": torch.empty(1, TOKENS, config["cross_attention_dim"]),
        }
        if "addition_embed_type" in config:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            asked["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}

        def count(module: Any, **inputs: Any) -> float:
            with FlopCounterMode(display=False) as counter:
                module(**inputs)
            return float(counter.get_total_flops())

        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        return {
            "unet": count(unet(size), **asked),
            "vae": count(vae(size).encode, x=torch.empty(1, 3, resolution, resolution)),
            "text": sum(count(encoder, input_ids=tokens) for encoder in text_encoders(size)),
        }
