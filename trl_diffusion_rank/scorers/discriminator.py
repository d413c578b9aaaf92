"""Scorer of an aesthetic discriminator that was trained with this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trl_diffusion_rank.discriminator import AestheticDiscriminator, AestheticDiscriminatorProcessor
from trl_diffusion_rank.discriminator.configuration import check_is_discriminator
from trl_diffusion_rank.scorers._models import TransformersScorer


if TYPE_CHECKING:
    from PIL.Image import Image


class DiscriminatorScorer(TransformersScorer):
    """
    The logit of an [`AestheticDiscriminator`]: how good an image is for its caption.

    Args:
        model (`str`):
            Hub id or folder of the discriminator, its processor beside it.
        batch_size, device, dtype:
            See [`TransformersScorer`].
    """

    name = "discriminator"
    model_class = AestheticDiscriminator
    processor_class = AestheticDiscriminatorProcessor
    towers = ("backbone",)

    def __init__(
        self,
        model: str,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: str = "float32",
    ):
        super().__init__(model=model, batch_size=batch_size, device=device, dtype=dtype)

    def load_model(self, model: str) -> AestheticDiscriminator:
        check_is_discriminator(model, f"`model` {model!r} of the scorer {self.name!r}")
        return super().load_model(model)

    def score_batch(self, images: list[Image], prompts: list[str]) -> torch.Tensor:
        inputs = self.processor(images=images, text=prompts).to(self.device)
        return self.model(**inputs).logits.squeeze(1)
