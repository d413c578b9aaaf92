import numpy as np
import pytest
import torch
from datasets import Features, Value
from tiny_scorers import VISION, random_images, save_tiny_clip, tiny_image_processor
from transformers import CLIPModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel
from transformers.models.segformer import SegformerConfig, SegformerModel

from trl_diffusion_rank.data.parts import Parts
from trl_diffusion_rank.evaluation.image_features import ImageFeatures, RealImagesJudge, as_bytes, as_features


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    return str(folder)


def test_features_of_clip_are_its_image_embeddings(clip):
    images = random_images(3)
    features = ImageFeatures(clip)(images)
    assert features.shape == (3, 8) and features.dtype == np.float32
    model = CLIPModel.from_pretrained(clip).eval()
    pixels = tiny_image_processor()(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        expected = model.visual_projection(pooled).numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_features_of_a_model_without_texts_are_its_pooled_output(tmp_path):
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    assert ImageFeatures(saved(Dinov2Model(Dinov2Config(**config)), tmp_path / "dino"))(random_images(2)).shape == (
        2,
        16,
    )
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"))
    assert ImageFeatures(saved(resnet, tmp_path / "resnet"))(random_images(2)).shape == (2, 12)  # of (2, 12, 1, 1)


def test_features_that_would_be_drawn_at_random(tmp_path):
    model = ViTModel(ViTConfig(**VISION), add_pooling_layer=False)
    with pytest.raises(ValueError, match=r"which lacks weights of its ViTModel: 2 \(pooler.*drawn at random"):
        ImageFeatures(saved(model, tmp_path))


def test_a_model_without_pooled_features(tmp_path):
    config = {"depths": [1] * 4, "hidden_sizes": [4] * 4, "num_attention_heads": [1] * 4, "sr_ratios": [1] * 4}
    model = SegformerModel(SegformerConfig(**config))
    with pytest.raises(ValueError, match="a SegformerModel, which gives no pooled features"):
        ImageFeatures(saved(model, tmp_path))(random_images(1, (32, 32)))


def test_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"`feature_model` is .*, which can't be loaded: .*image processor"):
        ImageFeatures(str(tmp_path))


def test_features_survive_as_bytes():
    features = np.random.default_rng(0).normal(size=5).astype(np.float32)
    assert (as_features(as_bytes(features)) == features).all()


def test_real_images_are_the_reference_and_no_metric(clip, tmp_path):
    features = ImageFeatures(clip)(random_images(3))
    parts = Parts(tmp_path, ("place",), Features({"place": Value("int64"), "features": Value("binary")}))
    parts.write({"place": [0, 1, 2], "features": list(map(as_bytes, features))})
    parts.scan()
    judge = RealImagesJudge(clip, parts, [(2,), (0,)])
    assert judge.metrics == () and judge.columns() == {} and judge.judge(random_images(3), ["a"] * 3) == {}
    assert (judge.reference_features() == features[[2, 0]]).all()
    np.testing.assert_allclose(judge.features(random_images(3)), features, rtol=1e-6)
    judge.unload()
    assert judge.network is None
