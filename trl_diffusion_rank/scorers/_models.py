"""What scorers with a network share: the device, batches, and weights that must fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch


if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin
    from transformers.image_processing_utils import BaseImageProcessor


# What `dtype` of a scorer may be.
DTYPES = ("float32", "bfloat16")


class ModelScorer(ABC):
    """
    A scorer that puts batches of images through a network.

    Args:
        batch_size (`int`, *optional*, defaults to `32`):
            Images in one forward pass.
        device (`str` or `torch.device`, *optional*):
            Where it runs; by default the accelerator, else the CPU.
    """

    name: ClassVar[str]

    def __init__(self, batch_size: int = 32, device: str | torch.device | None = None):
        if batch_size < 1:
            raise ValueError(f"`batch_size` of the scorer {self.name!r} is {batch_size}; it must be at least 1.")
        self.batch_size = batch_size
        # Not `PartialState().device`: that joins the launched processes, and a single one of them scores.
        self.device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")

    @torch.no_grad()
    def score(self, images: list[Image], prompts: list[str]) -> np.ndarray:
        """Scores `(N,)` of N images, each for the caption at its place."""
        scores = np.empty(len(images))
        for batch in self.batches(images, prompts):
            batch_scores = self.score_batch([images[i].convert("RGB") for i in batch], [prompts[i] for i in batch])
            scores[batch] = batch_scores.float().cpu().numpy()
        return scores

    def batches(self, images: list[Image], prompts: list[str]) -> Iterable[list[int]]:
        """Which images, by their index, share a forward pass."""
        return chunks(list(range(len(images))), self.batch_size)

    @abstractmethod
    def score_batch(self, images: list[Image], prompts: list[str]) -> torch.Tensor:
        """Scores `(B,)` of B images in RGB."""


class TransformersScorer(ModelScorer):
    """
    A scorer whose model and processor are loaded by transformers.

    Args:
        model (`str`, *optional*):
            Hub id or folder of the model.
        processor (`str`, *optional*):
            Hub id or folder of its processor; by default that of the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Images in one forward pass.
        device (`str` or `torch.device`, *optional*):
            Where it runs; by default the accelerator, else the CPU.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of the towers: `float32`, or `bfloat16`, which is faster and less exact. What comes after them stays in
            float32, since rounded scores would be ties.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[type[ProcessorMixin | BaseImageProcessor]]
    default_model: ClassVar[str]
    default_processor: ClassVar[str | None] = None
    towers: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        model: str | None = None,
        processor: str | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: str = "float32",
    ):
        super().__init__(batch_size, device)
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` of the scorer {self.name!r} is {dtype!r}; it may be {' or '.join(DTYPES)}.")
        # A model of the user's own brings its own processor.
        processor = processor or model or self.default_processor or self.default_model
        model = model or self.default_model
        try:
            self.model = self.load_model(model).eval().to(self.device)
            # PIL's resizing is what these models were published with; torchvision's, the default of transformers
            # where it is installed, gives slightly other scores.
            self.processor = self.processor_class.from_pretrained(processor, backend="pil")
        except OSError as error:
            raise ValueError(
                f"The scorer {self.name!r} could not load `model` {model!r} with `processor` {processor!r}; both must "
                f"be folders or ids on the Hub that can be reached. ({error})"
            ) from error
        self.dtype = getattr(torch, dtype)
        for tower in self.towers:
            self.model.get_submodule(tower).to(self.dtype)

    def load_model(self, model: str) -> PreTrainedModel:
        """The model with its weights. Those that do not fit are refused; transformers would draw them at random."""
        loaded, info = self.model_class.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        faults = {
            "missing": info["missing_keys"],
            "of another shape": {key for key, *_ in info["mismatched_keys"]},
            # Checkpoints from before transformers 4.31 also hold a buffer that no model reads any more.
            "with no place in it": {key for key in info["unexpected_keys"] if not key.endswith("position_ids")},
        }
        if any(faults.values()):
            found = "; ".join(f"{first_few(keys)} {fault}" for fault, keys in faults.items() if keys)
            raise ValueError(
                f"`model` {model!r} of the scorer {self.name!r} does not hold the weights of a "
                f"{self.model_class.__name__}: {found}. Give a checkpoint of this kind of model."
            )
        return loaded


def chunks(indices: list[int], size: int) -> Iterable[list[int]]:
    """The `indices` in order, `size` at a time."""
    return (indices[start : start + size] for start in range(0, len(indices), size))


def first_few(keys: Iterable[str], count: int = 3) -> str:
    """How many there are, and some of their names."""
    keys = sorted(keys)
    return f"{len(keys)} ({', '.join(keys[:count])}{', ...' if len(keys) > count else ''})"
