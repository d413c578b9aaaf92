"""Scorers from the package imscore, an optional extra: `pip install trl-diffusion-rank[scorers]`.

imscore (https://github.com/RE-N-Y/imscore) ports reward models to one interface: `Model.from_pretrained(hub_id)`, then
`model.score(pixels, prompts)` with pixels `(B, 3, h, w)` in [0, 1]. What follows was written against its release
0.0.11. That release was made for transformers 4; the models here are those that run with transformers 5, tried with
random weights. The published weights could not be loaded where this was written, so no score was compared with the
original's; imscore's README gives the distance of its ports (0.4 % for HPSv2, 0.8 % ImageReward, 1.3 % MPS).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trl_diffusion_rank.scorers._models import ModelScorer, chunks


if TYPE_CHECKING:
    from PIL.Image import Image


class ImscoreScorer(ModelScorer):
    """
    A model of imscore.

    Args:
        model (`str`, *optional*):
            Hub id or folder of its weights, in the format of imscore.
        batch_size (`int`, *optional*, defaults to `32`):
            Images in one forward pass, at most: they must have one size.
        device (`str` or `torch.device`, *optional*):
            Where it runs; by default the accelerator, else the CPU.
    """

    model_class: ClassVar[str]
    default_model: ClassVar[str]
    # Whether an image's score depends on the captions of the others in its batch.
    one_caption_per_batch: ClassVar[bool] = False

    def __init__(self, model: str | None = None, batch_size: int = 32, device: str | torch.device | None = None):
        super().__init__(batch_size, device)
        model = model or self.default_model
        module, _, attribute = self.model_class.partition(":")
        model_class = getattr(import_module(module), attribute)
        try:
            with special_tokens_of_transformers_4():
                # Without `strict`, weights that the file lacks would stay random.
                self.model = model_class.from_pretrained(model, strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The scorer {self.name!r} could not load `model` {model!r}; it must be a folder or an id on the Hub "
                f"that can be reached, with the weights of imscore's {attribute}. ({error})"
            ) from error
        self.model.eval().to(self.device)

    def batches(self, images: list[Image], prompts: list[str]) -> Iterable[list[int]]:
        groups: dict[tuple, list[int]] = {}
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            key = (image.size, prompt if self.one_caption_per_batch else None)
            groups.setdefault(key, []).append(index)
        return chain.from_iterable(chunks(group, self.batch_size) for group in groups.values())

    def score_batch(self, images: list[Image], prompts: list[str]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).to(self.device)  # (B, h, w, 3)
        # Some of its models answer with (B,), others with (B, 1).
        return self.model.score(pixels.permute(0, 3, 1, 2).float() / 255, prompts).reshape(len(images))


class HPSv2Scorer(ImscoreScorer):
    """HPSv2.1 (https://huggingface.co/papers/2306.09341): a CLIP-H fine-tuned on people's choices."""

    name = "imscore_hpsv2"
    model_class = "imscore.hps.model:HPSv2"
    default_model = "RE-N-Y/hpsv21"


class ImageRewardScorer(ImscoreScorer):
    """ImageReward (https://huggingface.co/papers/2304.05977): a BLIP trained on experts' rankings."""

    name = "imscore_imagereward"
    model_class = "imscore.imreward.model:ImageReward"
    default_model = "RE-N-Y/ImageReward"


class MPSScorer(ImscoreScorer):
    """
    MPS (https://huggingface.co/papers/2405.14705), its overall score: a CLIP-H with cross-attention between image and
    caption.
    """

    name = "imscore_mps"
    model_class = "imscore.mps.model:MPS"
    default_model = "RE-N-Y/mpsv1"
    # It masks a caption's words by their weight relative to the heaviest word of the whole batch.
    one_caption_per_batch = True


class CycleRewardScorer(ImscoreScorer):
    """
    CycleReward (https://huggingface.co/papers/2506.02095): a BLIP trained on how well image and caption can be
    recovered from each other.
    """

    name = "imscore_cyclereward"
    model_class = "imscore.cyclereward.model:CycleReward"
    default_model = "NagaSaiAbhinay/CycleReward-Combo"


@contextmanager
def special_tokens_of_transformers_4() -> Iterator[None]:
    """
    For the time of loading, the property that transformers 5 took from its tokenizers and that imscore's BLIP models
    read as they are built (they never use what they read).
    """
    PreTrainedTokenizerBase.additional_special_tokens_ids = property(
        lambda self: self.convert_tokens_to_ids(self.extra_special_tokens)
    )
    try:
        yield
    finally:
        del PreTrainedTokenizerBase.additional_special_tokens_ids
