"""
The bridge to imscore, which is not installed where the tests run: stand-ins take the place of its modules.

They have the interface read in imscore 0.0.11 from PyPI, in imscore/hps/model.py, imreward/model.py, mps/model.py and
cyclereward/model.py: `class HPSv2(nn.Module, PyTorchModelHubMixin)` with `__init__(self)` and `score(self, opixels,
prompts)`, pixels `(B, 3, h, w)` in [0, 1]. HPSv2 and MPS answer with `(B,)`, ImageReward and CycleReward with
`(B, 1)`. Loading and saving is huggingface_hub's own, as there.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_scorers import random_images
from torch import nn
from transformers import BertTokenizer, PreTrainedTokenizerBase

from trl_diffusion_rank import scorers
from trl_diffusion_rank.scorers import load_scorer


class HPSv2(nn.Module, PyTorchModelHubMixin):
    """How much red there is above and blue below, by weights; the captions of each call are kept."""

    def __init__(self):
        super().__init__()
        self.channels = nn.Parameter(torch.tensor([1.0, 0.0, 0.5]))
        self.dropout = nn.Dropout(0.9)
        self.calls = []

    def score(self, opixels, prompts: list[str]):
        b, c, h, _ = opixels.shape
        assert c == 3 and opixels.dtype == torch.float32 and len(prompts) == b
        assert 0 <= opixels.min() and opixels.max() <= 1
        self.calls.append(prompts)
        top, bottom = opixels[:, 0, : h // 2].mean(dim=(1, 2)), opixels[:, 2, h // 2 :].mean(dim=(1, 2))
        return self.dropout(top * self.channels[0] + bottom * self.channels[2])


class MPS(HPSv2):
    """By the number of captions in the batch, too: the batch has a say in the score of each."""

    def score(self, opixels, prompts: list[str]):
        return super().score(opixels, prompts) * len(set(prompts))


class ImageReward(HPSv2):
    """Its tokenizer is asked for what transformers 5 does not have, in these words."""

    def __init__(self):
        super().__init__()
        tokenizer = BertTokenizer(
            vocab={token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"])}
        )
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
        self.enc_token_id = tokenizer.enc_token_id

    def score(self, opixels, prompts: list[str]):
        return super().score(opixels, prompts)[:, None]


class CycleReward(ImageReward):
    pass


@pytest.fixture
def imscore(monkeypatch):
    """The modules of the package that hold the classes."""
    for name, attribute in (("hps", HPSv2), ("mps", MPS), ("imreward", ImageReward), ("cyclereward", CycleReward)):
        for path in ("imscore", f"imscore.{name}", f"imscore.{name}.model"):
            module = ModuleType(path)
            module.__spec__ = ModuleSpec(path, None)
            monkeypatch.setitem(sys.modules, path, module)
        setattr(module, attribute.__name__, attribute)


@pytest.fixture
def folder(tmp_path):
    """Weights in the format of imscore, other than those that a new model has."""
    model = HPSv2()
    model.channels.data.mul_(2)
    model.save_pretrained(tmp_path)
    return str(tmp_path)


IMAGES = [*random_images(3), *random_images(2, size=(10, 30), seed=1)]
PROMPTS = ["a", "b", "a", "b", "b"]


def expected_scores() -> list[float]:
    scores = []
    for image in IMAGES:
        pixels = np.asarray(image) / 255
        half = len(pixels) // 2
        scores.append(2 * pixels[:half, :, 0].mean() + pixels[half:, :, 2].mean())
    return scores


@pytest.mark.parametrize("name", sorted(scorers.IMSCORE_SCORERS))
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_scores(imscore, folder, name, batch_size):
    """Whatever shape it answers with, in the order of the images, of which some have another size."""
    scores = load_scorer(name, model=folder, batch_size=batch_size, device="cpu").score(IMAGES, PROMPTS)
    assert scores.shape == (5,)
    assert scores == pytest.approx(expected_scores(), abs=1e-5)


def test_a_batch_is_of_one_size(imscore, folder):
    scorer = load_scorer("imscore_hpsv2", model=folder, batch_size=2)
    scorer.score(IMAGES, PROMPTS)
    assert scorer.model.calls == [["a", "b"], ["a"], ["b", "b"]]


def test_a_batch_of_mps_is_of_one_caption(imscore, folder):
    scorer = load_scorer("imscore_mps", model=folder)
    scorer.score(IMAGES, PROMPTS)
    assert scorer.model.calls == [["a", "a"], ["b"], ["b", "b"]]


def test_other_image_modes(imscore, folder):
    scorer = load_scorer("imscore_hpsv2", model=folder)
    images = [Image.new("L", (4, 4), 255), Image.new("RGBA", (4, 4), (255, 255, 255, 0))]
    assert scorer.score(images, ["a", "b"]) == pytest.approx([3, 3])


def test_transformers_is_left_as_it_was(imscore, folder):
    assert load_scorer("imscore_imagereward", model=folder).model.enc_token_id == 7  # after [DEC]
    assert not hasattr(PreTrainedTokenizerBase, "additional_special_tokens_ids")


def test_published_models():
    from trl_diffusion_rank.scorers import imscore as bridge

    classes = (bridge.HPSv2Scorer, bridge.ImageRewardScorer, bridge.MPSScorer, bridge.CycleRewardScorer)
    assert [(cls.model_class, cls.default_model) for cls in classes] == [
        ("imscore.hps.model:HPSv2", "RE-N-Y/hpsv21"),
        ("imscore.imreward.model:ImageReward", "RE-N-Y/ImageReward"),
        ("imscore.mps.model:MPS", "RE-N-Y/mpsv1"),
        ("imscore.cyclereward.model:CycleReward", "NagaSaiAbhinay/CycleReward-Combo"),
    ]


def test_a_model_that_does_not_exist(imscore, tmp_path):
    with pytest.raises(ValueError, match=r"scorer 'imscore_mps' could not load `model` '.*nowhere'.* imscore's MPS"):
        load_scorer("imscore_mps", model=str(tmp_path / "nowhere"))


def test_weights_that_are_missing(imscore, folder):
    """imscore by itself would leave them as they were drawn."""
    weights = load_file(f"{folder}/model.safetensors")
    save_file({"other": weights["channels"]}, f"{folder}/model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)could not load `model`.*Missing key\(s\).*channels"):
        load_scorer("imscore_hpsv2", model=folder)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(scorers, "find_spec", lambda name: None)
    for ask in (load_scorer, scorers.check_scorer, lambda name: scorers.read_scorers([name])):
        with pytest.raises(ImportError, match=r"'imscore_hpsv2' needs .* `pip install trl-diffusion-rank\[scorers\]`"):
            ask("imscore_hpsv2")
    scorers.check_scorer("clip")
