import string

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from trl_diffusion_rank.scorers import load_scorer


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> str:
    """Folder of a CLIPModel with random weights and its processor."""
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"]}
    config = CLIPConfig(
        text_config={**tower, **ends, "vocab_size": len(vocab), "max_position_embeddings": 12},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    # random towers map all to nearly one point; larger projections would not change a cosine, spread-out weights do
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12),
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(256, size=(20, 20, 3), dtype=np.uint8)) for _ in range(5)]


PROMPTS = ["a cat", "a red dog and a very long story about it", "b", "a hen", "cow"]


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_score_is_the_logit_of_clip(name, tiny_clip, images):
    """The forward pass of CLIPModel gives the same numbers, on the diagonal of its images x captions matrix."""
    scores = load_scorer(name, model=tiny_clip, batch_size=2, device="cpu").score(images, PROMPTS)
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)
    inputs = processor(images=images, text=PROMPTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    assert scores.shape == (5,)
    assert scores == pytest.approx(expected.numpy(), abs=1e-4)
    assert np.ptp(scores) > 0.01


def test_score_does_not_depend_on_the_batch_size(tiny_clip, images):
    one, all_ = (load_scorer("clip", model=tiny_clip, batch_size=b).score(images, PROMPTS) for b in (1, 8))
    assert one == pytest.approx(all_, abs=1e-4)


def test_score_takes_other_image_modes_and_sizes(tiny_clip):
    scorer = load_scorer("clip", model=tiny_clip)
    assert np.isfinite(scorer.score([Image.new("L", (9, 5)), Image.new("RGBA", (5, 9))], ["a", "b"])).all()


def test_published_models():
    from trl_diffusion_rank.scorers.clip import CLIPScorer, PickScoreScorer

    assert CLIPScorer.default_model == "openai/clip-vit-large-patch14"
    assert PickScoreScorer.default_model == "yuvalkirstain/PickScore_v1"
    assert PickScoreScorer.default_processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def test_a_model_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"scorer 'clip' could not load `model` '.*nowhere'"):
        load_scorer("clip", model=str(tmp_path / "nowhere"))
