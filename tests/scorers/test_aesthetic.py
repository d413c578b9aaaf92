import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_scorers import VISION, random_images, save_tiny_aesthetic, tiny_image_processor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from trl_diffusion_rank.scorers import load_scorer


IMAGES = random_images(5)
PROMPTS = ["a", "b", "c", "d", "e"]

# Names in the published checkpoint: those of shunk031/simple-aesthetics-predictor 0.2.0, aesthetics_predictor/
# modeling_v2.py, class AestheticsPredictorV2Linear: `CLIPVisionModelWithProjection` and `layers`, a `Sequential` of
# linear layers with dropouts after the first three.
HEAD = [f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]


@pytest.fixture(scope="module")
def tiny_aesthetic(tmp_path_factory) -> str:
    return save_tiny_aesthetic(tmp_path_factory.mktemp("aesthetic"))


def test_score_is_the_head_on_the_normalised_embedding(tiny_aesthetic):
    """By hand: the embedding from transformers' own class, to length one, times five matrices in NumPy."""
    weights = load_file(f"{tiny_aesthetic}/model.safetensors")
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=8)).eval()
    tower.load_state_dict({key: value for key, value in weights.items() if key not in HEAD})
    with torch.no_grad():
        pixels = tiny_image_processor()(images=IMAGES, return_tensors="pt")["pixel_values"]
        expected = tower(pixel_values=pixels).image_embeds.double().numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    for layer in (0, 2, 4, 6, 7):
        weight, bias = (weights[f"layers.{layer}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        expected = expected @ weight.T + bias
    assert expected.shape == (5, 1) and np.ptp(expected) > 0.1

    for batch_size in (2, 8):
        scorer = load_scorer("laion_aesthetic", model=tiny_aesthetic, batch_size=batch_size, device="cpu")
        assert scorer.score(IMAGES, PROMPTS) == pytest.approx(expected[:, 0], rel=1e-4, abs=1e-3)


def test_captions_play_no_part(tiny_aesthetic):
    scorer = load_scorer("laion_aesthetic", model=tiny_aesthetic)
    assert (scorer.score(IMAGES, PROMPTS) == scorer.score(IMAGES, [""] * 5)).all()


def test_layout_of_the_published_checkpoint(tiny_aesthetic):
    """Sizes of ViT-L/14's head, and transformers' own names for the tower."""
    from trl_diffusion_rank.scorers.aesthetic import LaionAestheticConfig, LaionAestheticModel, LaionAestheticScorer

    assert LaionAestheticScorer.default_model == "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
    head = LaionAestheticModel(LaionAestheticConfig(**VISION, projection_dim=768)).layers
    widths = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, torch.nn.Linear)]
    assert widths == [(768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]

    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=8)).state_dict()
    assert "vision_model.encoder.layers.0.self_attn.k_proj.weight" in tower
    assert set(load_file(f"{tiny_aesthetic}/model.safetensors")) == {*tower, *HEAD}


@pytest.mark.parametrize("model_type", ["aesthetics_predictor", "clip_vision_model"])
def test_the_published_config_of_either_time(tmp_path, model_type):
    """As release 0.2.0 saved it, with a type and classes of its own, and as 0.1 did, with that of the tower."""
    folder = save_tiny_aesthetic(tmp_path)
    expected = load_scorer("laion_aesthetic", model=folder).score(IMAGES, PROMPTS)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": ["AestheticsPredictorV2Linear"], "torch_dtype": "float32"}
    if model_type == "aesthetics_predictor":
        config["auto_map"] = {
            "AutoConfig": "configuration_predictor.AestheticsPredictorConfig",
            "AutoModel": "modeling_v2.AestheticsPredictorV2Linear",
        }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (load_scorer("laion_aesthetic", model=folder).score(IMAGES, PROMPTS) == expected).all()


def test_a_checkpoint_without_the_head_is_refused(tmp_path):
    CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=8)).save_pretrained(tmp_path)
    tiny_image_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of a LaionAestheticModel: 10 \(layers.0.bias, .*, \.\.\.\) missing\."):
        load_scorer("laion_aesthetic", model=str(tmp_path))


def test_the_head_with_activations_is_refused(tmp_path):
    """`ava+logos-l14-reluMSE` counts ReLUs too: its linear layers are 0, 3, 6, 9 and 11."""
    folder = save_tiny_aesthetic(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for old, new in ((7, 11), (6, 9), (4, 6), (2, 3)):
        for kind in ("weight", "bias"):
            weights[f"layers.{new}.{kind}"] = weights.pop(f"layers.{old}.{kind}")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"6 \(layers.2.bias, .* missing; 2 \(layers.6.bias, .* another shape; 6"):
        load_scorer("laion_aesthetic", model=folder)


def test_bfloat16_leaves_the_head_alone(tiny_aesthetic):
    scorer = load_scorer("laion_aesthetic", model=tiny_aesthetic, dtype="bfloat16")
    assert scorer.model.visual_projection.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in scorer.model.layers.parameters()} == {torch.float32}
    exact = load_scorer("laion_aesthetic", model=tiny_aesthetic).score(IMAGES, PROMPTS)
    scores = scorer.score(IMAGES, PROMPTS)
    assert scores == pytest.approx(exact, abs=0.1 * np.abs(exact).max())
    assert (scores != exact).all()


def test_a_model_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"scorer 'laion_aesthetic' could not load `model` '.*nowhere'"):
        load_scorer("laion_aesthetic", model=str(tmp_path / "nowhere"))
