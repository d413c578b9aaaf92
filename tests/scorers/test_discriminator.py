import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_discriminator import BACKBONES, save_tiny_discriminator, tiny_discriminator, tiny_processor
from tiny_scorers import random_images, save_tiny_clip

from trl_diffusion_rank.scorers import load_scorer, read_scorers


IMAGES = random_images(5)
PROMPTS = ["a cat", "a red dog and a very long story about it", "a cat", "a hen", "cow"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return {
        kind: save_tiny_discriminator(kind, tmp_path_factory.mktemp(kind), patch_layer=2, head_dropout=0.5)
        for kind in BACKBONES
    }


@pytest.mark.parametrize("kind", BACKBONES)
def test_score_is_the_logit(kind, folders):
    """Without dropout, and whatever shares a batch: some captions meet themselves there, others don't."""
    with torch.no_grad():
        inputs = tiny_processor(kind)(images=IMAGES, text=PROMPTS)
        expected = tiny_discriminator(kind, patch_layer=2)(**inputs).logits[:, 0].numpy()
    assert np.ptp(expected) > 0.1
    for batch_size in (1, 3, 8):
        scores = load_scorer("discriminator", model=folders[kind], batch_size=batch_size, device="cpu").score(
            IMAGES, PROMPTS
        )
        assert scores.shape == (5,)
        assert scores == pytest.approx(expected, abs=1e-4)


def test_a_discriminator_that_reads_no_captions(tmp_path):
    scorer = load_scorer("discriminator", model=save_tiny_discriminator("clip", tmp_path, text_conditioned=False))
    assert (scorer.score(IMAGES, PROMPTS) == scorer.score(IMAGES, ["a"] * 5)).all()
    assert np.ptp(scorer.score(IMAGES, PROMPTS)) > 0.01


@pytest.mark.parametrize("kind", BACKBONES)
def test_bfloat16_leaves_the_head_alone(kind, folders):
    scorer = load_scorer("discriminator", model=folders[kind], dtype="bfloat16")
    dtypes = {name.split(".")[0]: parameter.dtype for name, parameter in scorer.model.named_parameters()}
    assert dtypes == {"backbone": torch.bfloat16, "score_head": torch.float32, "logit_scale": torch.float32}
    exact, scores = (
        load_scorer("discriminator", model=folders[kind]).score(IMAGES, PROMPTS),
        scorer.score(IMAGES, PROMPTS),
    )
    assert scores == pytest.approx(exact, abs=0.6) and (scores != exact).all()


def test_the_model_must_be_named():
    assert read_scorers([{"name": "discriminator", "model": "someone/model"}])[0].options == {"model": "someone/model"}
    with pytest.raises(ValueError, match=r"'discriminator' can't be built with the options \{\}: missing .*'model'"):
        load_scorer("discriminator")
    with pytest.raises(ValueError, match="'discriminator' has no option 'processor'"):
        read_scorers([{"name": "discriminator", "model": "x", "processor": "y"}])


def test_a_model_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"scorer 'discriminator' could not load `model` '.*nowhere'"):
        load_scorer("discriminator", model=str(tmp_path / "nowhere"))


def test_a_folder_without_a_processor(tmp_path):
    tiny_discriminator("clip").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"scorer 'discriminator' could not load `model` .* with `processor`"):
        load_scorer("discriminator", model=str(tmp_path))


def test_a_model_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="scorer 'discriminator' is of the type 'clip', not an aesthetic discrim"):
        load_scorer("discriminator", model=save_tiny_clip(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="scorer 'discriminator' is of the type None, not an aesthetic discrim"):
        load_scorer("discriminator", model=str(tmp_path))


def test_weights_that_do_not_fit(tmp_path):
    folder = save_tiny_discriminator("clip", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score_head.logit.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"weights of a AestheticDiscriminator: 1 \(score_head.logit.weight\) missing"
    ):
        load_scorer("discriminator", model=folder)
