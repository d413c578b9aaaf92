import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_scorers import random_images, save_tiny_clip
from transformers import CLIPModel, CLIPProcessor

from trl_diffusion_rank.scorers import load_scorer


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


IMAGES = random_images(5)
PROMPTS = ["a cat", "a red dog and a very long story about it", "b", "a hen", "cow"]


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_score_is_the_logit_of_clip(name, tiny_clip):
    """The forward pass of CLIPModel gives the same numbers, on the diagonal of its images x captions matrix."""
    scores = load_scorer(name, model=tiny_clip, batch_size=2, device="cpu").score(IMAGES, PROMPTS)
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    processor = CLIPProcessor.from_pretrained(tiny_clip, backend="pil")
    inputs = processor(images=IMAGES, text=PROMPTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    assert scores.shape == (5,)
    assert scores == pytest.approx(expected.numpy(), abs=1e-4)
    assert np.ptp(scores) > 0.01


def test_score_does_not_depend_on_the_batch_size(tiny_clip):
    one, all_ = (load_scorer("clip", model=tiny_clip, batch_size=b).score(IMAGES, PROMPTS) for b in (1, 8))
    assert one == pytest.approx(all_, abs=1e-4)


def test_score_takes_other_image_modes_and_sizes(tiny_clip):
    scorer = load_scorer("clip", model=tiny_clip)
    assert np.isfinite(scorer.score([Image.new("L", (9, 5)), Image.new("RGBA", (5, 9))], ["a", "b"])).all()


def test_bfloat16(tiny_clip):
    scorer = load_scorer("clip", model=tiny_clip, dtype="bfloat16")
    assert scorer.model.vision_model.embeddings.patch_embedding.weight.dtype == torch.bfloat16
    assert scorer.model.text_projection.weight.dtype == torch.bfloat16
    scores, exact = scorer.score(IMAGES, PROMPTS), load_scorer("clip", model=tiny_clip).score(IMAGES, PROMPTS)
    # three digits are left of an embedding, and the similarity is not rounded once more
    assert scores == pytest.approx(exact, abs=0.02 * np.exp(scorer.model.logit_scale.item()))
    assert (scores != exact).all() and (scores != torch.tensor(scores).bfloat16().double().numpy()).all()


def test_published_models():
    from trl_diffusion_rank.scorers.clip import CLIPScorer, PickScoreScorer

    assert CLIPScorer.default_model == "openai/clip-vit-large-patch14"
    assert PickScoreScorer.default_model == "yuvalkirstain/PickScore_v1"
    assert PickScoreScorer.default_processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def test_a_model_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"scorer 'clip' could not load `model` '.*nowhere'"):
        load_scorer("clip", model=str(tmp_path / "nowhere"))


def test_options_out_of_range(tiny_clip):
    with pytest.raises(ValueError, match="`batch_size` of the scorer 'clip' is 0; it must be at least 1"):
        load_scorer("clip", model=tiny_clip, batch_size=0)
    with pytest.raises(ValueError, match="`dtype` of the scorer 'clip' is 'float8'; it may be float32 or bfloat16"):
        load_scorer("clip", model=tiny_clip, dtype="float8")


def test_weights_that_do_not_fit(tmp_path):
    """What transformers would fill up at random, or leave out, is an error that names it."""
    folder = save_tiny_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["head.weight"] = weights.pop("visual_projection.weight")
    weights["text_projection.weight"] = torch.zeros(8, 17)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"scorer 'clip' does not hold the weights of a CLIPModel: 1 \(visual_projection.weight\) missing; "
        r"1 \(text_projection.weight\) of another shape; 1 \(head.weight\) with no place in it\.",
    ):
        load_scorer("clip", model=folder)


def test_buffers_of_old_checkpoints_do_no_harm(tmp_path):
    """OpenAI's own and PickScore's checkpoints hold `position_ids`, saved before transformers 4.31."""
    folder = save_tiny_clip(tmp_path)
    expected = load_scorer("clip", model=folder).score(IMAGES, PROMPTS)
    weights = load_file(tmp_path / "model.safetensors")
    for tower, positions in (("text_model", 12), ("vision_model", 5)):
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(positions)[None]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert (load_scorer("clip", model=folder).score(IMAGES, PROMPTS) == expected).all()


def test_images_are_resized_by_pil(tiny_clip):
    """Also where torchvision is installed, whose resizing gives slightly other scores."""
    processor = load_scorer("clip", model=tiny_clip).processor
    assert type(processor.image_processor).__name__ == "CLIPImageProcessorPil"
