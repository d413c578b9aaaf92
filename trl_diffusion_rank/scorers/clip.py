"""Scorers of the CLIP kind: the similarity of an image's and a caption's embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import CLIPModel, CLIPProcessor

from trl_diffusion_rank.scorers._models import TransformersScorer


if TYPE_CHECKING:
    from PIL.Image import Image


class CLIPScorer(TransformersScorer):
    """
    `exp(logit_scale) * cos(image, caption)`, the logit of a `CLIPModel` (https://huggingface.co/papers/2103.00020).
    Captions are cut to the 77 tokens that it reads. Options: see [`TransformersScorer`].
    """

    name = "clip"
    model_class = CLIPModel
    processor_class = CLIPProcessor
    default_model = "openai/clip-vit-large-patch14"
    towers = ("vision_model", "visual_projection", "text_model", "text_projection")

    def score_batch(self, images: list[Image], prompts: list[str]) -> torch.Tensor:
        inputs = self.processor(images=images, text=prompts, padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(self.device)
        # transformers 5 answers with the whole output; the projected embedding took the place of its pooled one.
        image = self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.dtype)).pooler_output
        text = self.model.get_text_features(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).pooler_output
        cosine = torch.nn.functional.cosine_similarity(image.float(), text.float())  # of (B, d) and (B, d)
        return self.model.logit_scale.exp() * cosine


class PickScoreScorer(CLIPScorer):
    """
    PickScore (https://huggingface.co/papers/2305.01569): a CLIP-H fine-tuned on the choices of Pick-a-Pic's users. Its
    score is the same logit, with the processor of the model it started from.
    """

    name = "pickscore"
    default_model = "yuvalkirstain/PickScore_v1"
    default_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
