"""A small CLIP for images of 16 pixels, which the digits world's discriminator is built on."""

import copy

import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
)

from trl_diffusion_rank.digits import digits_model_path
from trl_diffusion_rank.digits.data import IMAGE_SIZE
from trl_diffusion_rank.discriminator import AestheticDiscriminatorProcessor


SEED = 0  # of the vision tower's weights, so that a run's own seed decides nothing before training
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
}


def digits_backbone() -> CLIPModel:
    """
    A `CLIPModel` that reads captions already and has yet to learn to see: the text tower is the shipped pipeline's
    `text_encoder_2`, which was trained contrastively on the crawl; the vision tower is new.
    """
    text = CLIPTextModelWithProjection.from_pretrained(digits_model_path(), subfolder="text_encoder_2")
    config = CLIPConfig(
        text_config=copy.deepcopy(text.config).to_dict(),
        vision_config=CLIPVisionConfig(**VISION).to_dict(),
        projection_dim=text.config.projection_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = CLIPModel(config).float()
    model.text_model.load_state_dict(text.text_model.state_dict())
    model.text_projection.load_state_dict(text.text_projection.state_dict())
    return model


def digits_processor() -> AestheticDiscriminatorProcessor:
    """The pipeline's second tokenizer, and pixels as they are but for CLIP's normalisation."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return AestheticDiscriminatorProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        AutoTokenizer.from_pretrained(digits_model_path(), subfolder="tokenizer_2"),
        caption_length=CLIPTextModelWithProjection.config_class.from_pretrained(
            digits_model_path(), subfolder="text_encoder_2"
        ).max_position_embeddings,
    )
