"""Tiny pipelines of the real classes, made from configs, and ranked rows to train them on."""

import string

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image as PILImage
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


WORDS = ("a", "red", "green", "blue", "cat", "dog", "sun", "house")


def tiny_tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16, pad_token="<|endoftext|>")


def tiny_text_encoder(tokenizer: CLIPTokenizer, with_projection: bool = False):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def tiny_vae(**kwargs) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **kwargs,
    ).eval()


def tiny_unet(**kwargs) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **kwargs,
    )


def tiny_sd_pipeline(prediction_type: str = "epsilon", **scheduler) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(cross_attention_dim=16),
        scheduler=DDIMScheduler(
            prediction_type=prediction_type,
            timestep_spacing="trailing",
            clip_sample=False,
            steps_offset=1,
            **scheduler,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl_pipeline(prediction_type: str = "epsilon", **scheduler) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return StableDiffusionXLPipeline(
        vae=tiny_vae(force_upcast=True),
        text_encoder=tiny_text_encoder(tokenizer),
        text_encoder_2=tiny_text_encoder(tokenizer, with_projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        scheduler=DDIMScheduler(
            prediction_type=prediction_type,
            timestep_spacing="trailing",
            clip_sample=False,
            steps_offset=1,
            **scheduler,
        ),
        add_watermarker=False,
    )


def random_image(generator: np.random.Generator, size: tuple[int, int] = (16, 16)) -> PILImage.Image:
    """An RGB image of `size` (width, height)."""
    return PILImage.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def ranked_dataset(counts: tuple[int, ...] = (4, 4, 3, 2, 4, 2), seed: int = 0) -> Dataset:
    """Rows of the contract with `counts[i]` images each, ranked in a shuffled order."""
    generator = np.random.default_rng(seed)
    rows = [
        {
            "prompt": f"a {WORDS[1 + index % 3]} {WORDS[4 + index % 4]}",
            "images": [random_image(generator) for _ in range(n)],
            "ranks": (generator.permutation(n) + 1).tolist(),
        }
        for index, n in enumerate(counts)
    ]
    features = Features({"prompt": Value("string"), "images": List(Image()), "ranks": List(Value("int32"))})
    return Dataset.from_list(rows, features=features)
