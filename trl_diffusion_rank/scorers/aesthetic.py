"""LAION's aesthetic predictor: how beautiful an image is, whatever its caption."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from trl_diffusion_rank.scorers._models import TransformersScorer


if TYPE_CHECKING:
    from PIL.Image import Image


class LaionAestheticConfig(CLIPVisionConfig):
    """That of the vision tower, under the type that the published checkpoint goes by."""

    model_type = "aesthetics_predictor"


class LaionAestheticModel(CLIPVisionModelWithProjection):
    """
    CLIP's vision tower and a head on its normalised embedding, `projection_dim` - 1024 - 128 - 64 - 16 - 1 without
    activations: the improved aesthetic predictor, trained to predict people's ratings from 1 to 10
    (https://github.com/christophschuhmann/improved-aesthetic-predictor).
    """

    config_class = LaionAestheticConfig

    def __init__(self, config: LaionAestheticConfig):
        super().__init__(config)
        # The names in the checkpoint, `layers.0`, `.2`, `.4`, `.6` and `.7`, count the dropouts of the training.
        self.layers = nn.Sequential(
            nn.Linear(config.projection_dim, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Ratings `(B,)` of processed images `(B, 3, h, w)`."""
        embedding = super().forward(pixel_values=pixel_values).image_embeds.float()  # (B, d)
        return self.layers(nn.functional.normalize(embedding, dim=-1)).squeeze(-1)


class LaionAestheticScorer(TransformersScorer):
    """
    LAION's improved aesthetic predictor, version 2, on CLIP ViT-L/14; captions play no part. The default is its
    checkpoint `sac+logos+ava1-l14-linearMSE` in transformers' format; any other must be of a [`LaionAestheticModel`].
    Options: see [`TransformersScorer`].
    """

    name = "laion_aesthetic"
    model_class = LaionAestheticModel
    processor_class = AutoImageProcessor
    default_model = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
    towers = ("vision_model", "visual_projection")

    def score_batch(self, images: list[Image], prompts: list[str]) -> torch.Tensor:
        inputs = self.processor(images=images, return_tensors="pt").to(self.device)
        return self.model(inputs["pixel_values"].to(self.dtype))
