"""Scorers of the CLIP kind: the similarity of an image's and a caption's embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch


if TYPE_CHECKING:
    from PIL.Image import Image


class CLIPScorer:
    """
    `exp(logit_scale) * cos(image, caption)`, the logit of CLIP.

    Args:
        model (`str`, *optional*):
            Hub id or folder of a `CLIPModel`.
        processor (`str`, *optional*):
            Hub id or folder of its processor; by default that of the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Images in one forward pass.
        device (`str` or `torch.device`, *optional*):
            Where it runs; by default the accelerator, else the CPU.
    """

    name = "clip"
    default_model = "openai/clip-vit-large-patch14"
    default_processor: str | None = None

    def __init__(
        self,
        model: str | None = None,
        processor: str | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
    ):
        from transformers import CLIPModel, CLIPProcessor

        # A model of the user's own brings its own processor.
        processor = processor or model or self.default_processor or self.default_model
        model = model or self.default_model
        try:
            self.model = CLIPModel.from_pretrained(model, dtype=torch.float32).eval()
            self.processor = CLIPProcessor.from_pretrained(processor)
        except OSError as error:
            raise ValueError(
                f"The scorer {self.name!r} could not load `model` {model!r} with `processor` {processor!r}; both must "
                f"be folders or ids on the Hub that can be reached. ({error})"
            ) from error
        # Not `PartialState().device`: that joins the launched processes, and a single one of them scores.
        self.device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        self.model.to(self.device)
        self.batch_size = batch_size

    @torch.no_grad()
    def score(self, images: list[Image], prompts: list[str]) -> np.ndarray:
        """Scores `(N,)` of N images, each for the caption at its place."""
        scores = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            inputs = self.processor(
                images=[image.convert("RGB") for image in images[batch]],
                text=prompts[batch],
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            # transformers 5 answers with the whole output; the projected embedding took the place of its pooled one.
            image = self.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output  # (B, d)
            text = self.model.get_text_features(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).pooler_output  # (B, d)
            cosine = torch.nn.functional.cosine_similarity(image, text)
            scores.append((self.model.logit_scale.exp() * cosine).cpu().numpy())
        return np.concatenate(scores)


class PickScoreScorer(CLIPScorer):
    """
    PickScore (https://huggingface.co/papers/2305.01569): a CLIP-H fine-tuned on the choices of Pick-a-Pic's users. Its
    score is the same logit, with the processor of the model it started from.
    """

    name = "pickscore"
    default_model = "yuvalkirstain/PickScore_v1"
    default_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
