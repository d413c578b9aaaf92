"""Frechet distance to real images, in the features of a vision model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel

from trl_diffusion_rank.evaluation.judges import Judge
from trl_diffusion_rank.scorers._models import first_few


if TYPE_CHECKING:
    from PIL.Image import Image

    from trl_diffusion_rank.data.parts import Key, Parts


class ImageFeatures:
    """
    Pooled features of images by a vision model of transformers: `get_image_features` of those that have texts too, as
    CLIP and SigLIP do, else the `pooler_output`.

    Args:
        model (`str`): Hub id or folder of the model, its image processor beside it.
    """

    def __init__(self, model: str):
        self.device = torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        try:
            loaded, info = AutoModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
            # As PIL resizes, which torchvision does slightly differently where it is installed
            self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`feature_model` is {model!r}, which can't be loaded: {str(error).strip().splitlines()[0]} Give the "
                "folder or Hub id of a vision model of transformers with its image processor."
            ) from error
        if info["missing_keys"]:
            raise ValueError(
                f"`feature_model` is {model!r}, which lacks weights of its {type(loaded).__name__}: "
                f"{first_few(info['missing_keys'])}. They would be drawn at random, and so would the features."
            )
        self.name, self.model = model, loaded.eval().to(self.device)

    @torch.no_grad()
    def __call__(self, images: list[Image]) -> np.ndarray:
        """Features `(N, d)` float32 of N images."""
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt").to(self.device)
        has_texts = hasattr(self.model, "get_image_features")
        output = self.model.get_image_features(**pixels) if has_texts else self.model(**pixels)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError(
                f"`feature_model` is {self.name!r}, a {type(self.model).__name__}, which gives no pooled features of "
                "an image. Use a CLIP, a SigLIP or a DINOv2."
            )
        return pooled.float().cpu().numpy().reshape(len(images), -1)


class RealImagesJudge(Judge):
    """
    The Frechet distance to real images, and nothing else.

    Args:
        model (`str`): of [`ImageFeatures`].
        references ([`~data.parts.Parts`]): with the features of the real images, by `keys`.
        keys (`list`): those of all real images.
    """

    name = headline = None
    metrics = ()

    def __init__(self, model: str, references: Parts, keys: list[Key]):
        self.model, self.references, self.keys = model, references, keys
        self.made_of = {"feature_model": model}
        self.network: ImageFeatures | None = None

    def judge(self, images: list[Image], prompts: list[str]) -> dict[str, np.ndarray]:
        return {}

    def features(self, images: list[Image]) -> np.ndarray:
        self.network = self.network or ImageFeatures(self.model)
        return self.network(images)

    def unload(self) -> None:
        self.network = None

    def reference_features(self) -> np.ndarray:
        """As they are on disk."""
        return np.stack([as_features(row["features"]) for row in self.references.read(self.keys, ["features"])])


def as_bytes(features: np.ndarray) -> bytes:
    """The features `(d,)` of an image as they are kept."""
    return features.astype("<f4").tobytes()


def as_features(content: bytes) -> np.ndarray:
    """... and back."""
    return np.frombuffer(content, dtype="<f4")
