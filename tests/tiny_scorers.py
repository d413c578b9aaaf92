"""Tiny models of the scorers' real classes, with random weights, and images to score."""

import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedModel,
)

from trl_diffusion_rank.scorers.aesthetic import LaionAestheticConfig, LaionAestheticModel


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}


def random_images(count: int, size: tuple[int, int] = (20, 20), seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)) for _ in range(count)]


def tiny_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def spread_weights(model: PreTrainedModel) -> PreTrainedModel:
    """
    Random towers map all to nearly one point; larger projections would not change a cosine, spread-out weights do.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def save_tiny_clip(folder: Path) -> str:
    """Folder of a `CLIPModel` and its processor."""
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    ends = {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"]}
    config = CLIPConfig(
        text_config={**TOWER, **ends, "vocab_size": len(vocab), "max_position_embeddings": 12},
        vision_config=VISION,
        projection_dim=8,
    )
    spread_weights(CLIPModel(config)).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12)
    CLIPProcessor(tiny_image_processor(), tokenizer).save_pretrained(folder)
    return str(folder)


def save_tiny_aesthetic(folder: Path) -> str:
    """Folder of a `LaionAestheticModel` and its image processor."""
    spread_weights(LaionAestheticModel(LaionAestheticConfig(**VISION, projection_dim=8))).save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    return str(folder)
