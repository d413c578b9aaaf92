import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_discriminator import (
    BACKBONES,
    CAPTION_LENGTH,
    IMAGE_SIZE,
    save_tiny_backbone,
    tiny_backbone,
    tiny_discriminator,
    tiny_processor,
)
from tiny_scorers import random_images
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    SiglipConfig,
    Trainer,
    TrainingArguments,
)

from trl_diffusion_rank.discriminator import AestheticDiscriminator, AestheticDiscriminatorConfig
from trl_diffusion_rank.discriminator.modeling import LogitScale
from trl_diffusion_rank.objectives.scorer import bce_loss, group_loss


INITIAL_SCALE = np.exp(2.6592)
CAPTIONS = ["a cat", "a dog", "a cat", "hen"]


def tiny_inputs(kind: str) -> dict[str, torch.Tensor]:
    """Four images and three different captions."""
    return dict(tiny_processor(kind)(images=random_images(4), text=CAPTIONS))


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def train(model: torch.nn.Module, inputs: dict[str, torch.Tensor], steps: int = 3) -> None:
    """Steps towards the order of the images, on all that is trainable."""
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        scores = model(**inputs).logits.view(1, -1)  # (1, 4)
        loss = group_loss(scores, torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4, dtype=torch.bool))
        loss.sum().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_the_conditional_part_is_the_backbones_cosine(kind):
    """CLIPModel's and SiglipModel's own logits, with their temperature taken out."""
    backbone, model, inputs = tiny_backbone(kind), tiny_discriminator(kind), tiny_inputs(kind)
    caption_of = inputs.pop("caption_of")
    expected = backbone(**inputs).logits_per_image  # (4, 3)
    if kind == "siglip":
        expected = expected - backbone.logit_bias
    expected = INITIAL_SCALE * expected / backbone.logit_scale.exp()
    output = model(**inputs, caption_of=caption_of)
    torch.testing.assert_close(output.conditional, expected[torch.arange(4), caption_of], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.pair_scores, expected + output.unconditional.unsqueeze(1), atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("patch_layer", [None, 0, 2, 3])
@torch.no_grad()
def test_the_unconditional_part_by_hand(kind, patch_layer):
    """Embedding, mean and standard deviation of the normalised patches, and the two layers, in NumPy."""
    backbone, inputs = tiny_backbone(kind), tiny_inputs(kind)
    model = tiny_discriminator(kind, patch_layer=patch_layer)
    weights = {name: weight.double().numpy() for name, weight in model.score_head.state_dict().items()}

    def layer_norm(values, name):
        values = values - values.mean(axis=-1, keepdims=True)
        values = values / np.sqrt(values.var(axis=-1, keepdims=True) + 1e-5)
        return values * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    embedding = backbone.get_image_features(inputs["pixel_values"]).pooler_output
    features = [layer_norm(embedding.double().numpy(), "embedding_norm")]
    if patch_layer is not None:
        tower = backbone.vision_model
        states = tower.embeddings(inputs["pixel_values"])
        states = tower.pre_layrnorm(states) if kind == "clip" else states
        for layer in tower.encoder.layers[:patch_layer]:
            states = layer(states, None)
        patches = layer_norm(states.double().numpy()[:, -16:], "patch_norm")  # CLIP's class token stands before them
        features += [patches.mean(axis=1), np.sqrt(patches.var(axis=1) + 1e-6)]
    hidden = np.concatenate(features, axis=1) @ weights["hidden.weight"].T + weights["hidden.bias"]
    hidden = hidden * torch.special.ndtr(torch.from_numpy(hidden)).numpy()  # GELU
    expected = (hidden @ weights["logit.weight"].T + weights["logit.bias"])[:, 0]
    assert np.ptp(expected) > 0.01
    assert model(**inputs).unconditional.numpy() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_logits_are_the_sum_of_both_parts(kind):
    output = tiny_discriminator(kind, patch_layer=1)(**tiny_inputs(kind))
    assert output.logits.shape == (4, 1) and output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits[:, 0], output.conditional + output.unconditional)
    assert AestheticDiscriminatorConfig(backbone_config=CLIPConfig()).num_labels == 1  # what TRL's reward trainer asks


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_each_distinct_caption_is_encoded_once(kind):
    model, processor = tiny_discriminator(kind), tiny_processor(kind)
    encoded = []
    model.backbone.text_model.register_forward_hook(
        lambda module, args, kwargs, output: encoded.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    inputs = tiny_inputs(kind)
    assert inputs["caption_of"].tolist() == [0, 1, 0, 2]
    shared = model(**inputs).logits
    one_each = model(pixel_values=inputs["pixel_values"], **processor(text=CAPTIONS)).logits
    assert encoded == [3, 4]
    torch.testing.assert_close(shared, one_each, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_pairs_are_scored_without_encoding_again(kind):
    """The matrix of all pairs holds what single forward passes give."""
    model, inputs = tiny_discriminator(kind, patch_layer=2), tiny_inputs(kind)
    inputs.pop("caption_of")
    pixel_values = inputs.pop("pixel_values")
    images, captions = model.encode_images(pixel_values), model.encode_captions(**inputs)
    for tower in (model.backbone.vision_model, model.backbone.text_model):
        tower.forward = None
    pairs = model.pair_scores(images, captions)
    assert images.embedding.norm(dim=1).tolist() == pytest.approx([1.0] * 4)
    assert captions.norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    del model.backbone.vision_model.forward, model.backbone.text_model.forward
    for caption in range(3):
        logits = model(pixel_values, **inputs, caption_of=torch.full((4,), caption)).logits
        torch.testing.assert_close(pairs[:, caption], logits[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("patch_layer", [None, 0, 1])
@pytest.mark.parametrize("part", ["logits", "unconditional"])
def test_the_gradient_on_the_pixels_is_right(kind, patch_layer, part):
    """By finite differences along the gradient, through a frozen backbone that gets none itself."""
    model = tiny_discriminator(kind, patch_layer=patch_layer)
    model.freeze_backbone()
    inputs = tiny_inputs(kind)
    pixels = inputs["pixel_values"].requires_grad_()
    model(**inputs)[part].sum().backward()
    direction = pixels.grad / pixels.grad.norm()
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (model(**inputs | {"pixel_values": pixels + s * direction})[part] for s in (step, -step))
    slope = (ahead - behind).sum().item() / (2 * step)
    assert slope == pytest.approx(pixels.grad.norm().item(), rel=0.02) and slope > 0.01
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.score_head.parameters())


def test_the_gradient_is_finite_where_all_patches_are_the_same():
    model = tiny_discriminator("siglip", patch_layer=0)
    # without positions and of one colour, the patches differ in nothing
    torch.nn.init.zeros_(model.backbone.vision_model.embeddings.position_embedding.weight)
    pixels = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, requires_grad=True)
    model(pixels, **tiny_processor("siglip")(text=["a"])).logits.sum().backward()
    assert pixels.grad.isfinite().all() and pixels.grad.abs().max() > 0


LAST_LAYERS = {
    0: set(),
    1: {"vision_model.encoder.layers.2."},
    2: {"vision_model.encoder.layers.1.", "vision_model.encoder.layers.2."},
}
AFTER_THE_LAYERS = {
    "clip": {"vision_model.post_layernorm.", "visual_projection."},
    "siglip": {"vision_model.post_layernorm.", "vision_model.head."},
}


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("trainable_layers", [0, 1, 2, "all"])
def test_what_is_trained_and_what_is_frozen(kind, trainable_layers):
    model, inputs = tiny_discriminator(kind), tiny_inputs(kind)
    model.freeze_backbone("all")
    model.freeze_backbone(trainable_layers)  # the last word counts
    before = snapshot(model)
    train(model, inputs)
    names = {name.removeprefix("backbone.") for name in changed(model, before)}
    backbone = {name for name in before if name.startswith("backbone.")}
    expected = {name for name in before if name not in backbone}
    if trainable_layers == "all":
        expected |= backbone
    elif trainable_layers:
        prefixes = tuple(f"backbone.{name}" for name in LAST_LAYERS[trainable_layers] | AFTER_THE_LAYERS[kind])
        expected |= {name for name in backbone if name.startswith(prefixes)}
    # A bias of the keys shifts all the attention logits of a query alike: its gradient is rounding
    expected = {name.removeprefix("backbone.") for name in expected if not name.endswith("k_proj.bias")}
    assert names - {name for name in names if name.endswith("k_proj.bias")} == expected
    assert {"score_head.logit.weight", "logit_scale.log_scale"} <= names


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("options", [{}, {"patch_layer": 1}, {"text_conditioned": False}])
def test_no_parameter_is_without_use(kind, options):
    """Else distributed training refuses the model."""
    model = tiny_discriminator(kind, **options)
    model(**tiny_inputs(kind)).logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("trainable_layers", [-1, 4, 1.0, True, "last"])
def test_layers_that_there_are_not(trainable_layers):
    with pytest.raises(ValueError, match=r"`trainable_layers` is .*; the vision tower has 3 layers, so 0 to 3"):
        tiny_discriminator("clip").freeze_backbone(trainable_layers)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("options", [{}, {"patch_layer": 2, "head_dropout": 0.3}, {"text_conditioned": False}])
@torch.no_grad()
def test_saved_and_loaded_by_the_auto_classes(kind, options, tmp_path):
    model, inputs = tiny_discriminator(kind, **options), tiny_inputs(kind)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is AestheticDiscriminatorConfig and config.num_labels == 1
    assert type(config.backbone_config) is {"clip": CLIPConfig, "siglip": SiglipConfig}[kind]
    assert config.backbone_config.vision_config.num_hidden_layers == 3
    assert {name: getattr(config, name) for name in options} == options
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is AestheticDiscriminator and not loaded.training
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    eager = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")  # options reach the towers
    assert eager.backbone.vision_model.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_without_the_caption_there_is_no_text_tower(tmp_path):
    model, inputs = tiny_discriminator("clip", text_conditioned=False), tiny_inputs("clip")
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "text" in name or "scale" in name]
    output = model(inputs["pixel_values"])
    assert output.conditional is None and output.pair_scores is None
    assert torch.equal(output.logits[:, 0], output.unconditional)
    assert torch.equal(model(**inputs).logits, output.logits)
    with pytest.raises(ValueError, match="built with `text_conditioned=False`: it has no text tower"):
        model.encode_captions(inputs["input_ids"])


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_the_head_stays_in_float32_under_a_bfloat16_backbone(kind, tmp_path):
    exact, inputs = tiny_discriminator(kind, patch_layer=1), tiny_inputs(kind)
    exact.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name.split(".")[0]: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {"backbone": torch.bfloat16, "score_head": torch.float32, "logit_scale": torch.float32}
    logits = model(**inputs).logits
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits, exact(**inputs).logits, atol=0.6, rtol=0)

    # saved again it is what it was, and a whole model in bfloat16, as DeepSpeed makes it, works too
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**inputs).logits, logits)
    assert copy.deepcopy(exact).bfloat16()(**inputs).logits.dtype == torch.float32


@torch.no_grad()
def test_autocast_leaves_the_head_alone():
    model, inputs = tiny_discriminator("clip"), tiny_inputs("clip")
    seen = {}
    for name in ("score_head.hidden", "backbone.vision_model.encoder.layers.0.mlp.fc1"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    assert list(seen.values()) == [torch.bfloat16, torch.float32]
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(kind, use_reentrant):
    """Nor those that come by the patches, which are taken from the middle of the tower."""
    model, inputs = tiny_discriminator(kind, patch_layer=2).train(), tiny_inputs(kind)
    model(**inputs).logits.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    calls = []
    attention = model.backbone.vision_model.encoder.layers[0].self_attn
    attention.register_forward_pre_hook(lambda *args: calls.append(args))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**inputs).logits.square().sum().backward()
    assert len(calls) == 2  # the layer was computed again
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_lora_trains_saves_and_loads(kind, tmp_path):
    base, inputs = tiny_discriminator(kind, patch_layer=1), tiny_inputs(kind)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        base,
        LoraConfig(
            r=2,
            target_modules=AestheticDiscriminator.lora_target_modules,
            modules_to_save=AestheticDiscriminator.modules_to_save,
        ),
    )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    loras = {name for name in trainable if "lora_" in name}
    assert len(loras) == 2 * 6 * 3 and all("vision_model.encoder.layers" in name for name in loras)
    # not the `head`s of a SigLIP's towers
    assert {name.split(".")[2] for name in trainable - loras} == {"score_head", "logit_scale"}

    before, initial = snapshot(model), model(**inputs).logits
    train(model, inputs)
    assert changed(model, before) == trainable
    logits = model(**inputs).logits
    assert (logits - initial).abs().max() > 0.1
    images = model.encode_images(inputs["pixel_values"])  # the other ways in see the LoRA too
    torch.testing.assert_close(images.unconditional, model(**inputs).unconditional)

    model.save_pretrained(tmp_path / "lora")
    fresh = AestheticDiscriminator.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "lora").eval()
    torch.testing.assert_close(loaded(**inputs).logits, logits)

    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    assert type(merged) is AestheticDiscriminator
    torch.testing.assert_close(merged(**inputs).logits, logits, atol=1e-4, rtol=1e-4)


def test_a_frozen_clip_learns_to_tell_smooth_images_from_noise():
    """Group loss and BCE on 8 rows of one smooth image and three of noise; then on other images."""
    processor = tiny_processor("clip")
    model = tiny_discriminator("clip", patch_layer=1)
    model.freeze_backbone()

    def rows(seed):
        noise = random_images(24, (IMAGE_SIZE, IMAGE_SIZE), seed=seed)
        smooth = [image.resize((2, 2)).resize((IMAGE_SIZE, IMAGE_SIZE)) for image in random_images(8, seed=seed + 1)]
        images = [image for i in range(8) for image in (smooth[i], *noise[3 * i : 3 * i + 3])]
        return processor(images=images, text=["a cat", "a dog"] * 16)

    real = torch.tensor([[True, False, False, False]]).expand(8, 4)
    mask = torch.ones(8, 4, dtype=torch.bool)
    inputs, others = rows(seed=0), rows(seed=2)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.03)
    for _ in range(40):
        scores = model(**inputs).logits.view(8, 4)
        loss = (group_loss(scores, real, mask) + bce_loss(scores, real, mask)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = model(**others).logits.view(8, 4)
    assert (scores.argmax(dim=1) == 0).all()
    assert ((scores > 0) == real).float().mean() > 0.9


def test_the_trainer_of_transformers_gathers_the_logits_alone(tmp_path):
    """Two batches of different sizes; the matrices of their pairs could not be put together."""
    processor, model = tiny_processor("clip"), tiny_discriminator("clip")
    rows = [{"image": image, "caption": caption} for image, caption in zip(random_images(5), "abcde", strict=True)]

    def collate(batch):
        return dict(processor(images=[row["image"] for row in batch], text=[row["caption"] for row in batch]))

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=3, remove_unused_columns=False, report_to=[], use_cpu=True
    )
    predictions = Trainer(model, arguments, data_collator=collate).predict(rows).predictions
    with torch.no_grad():
        expected = model(**collate(rows)).logits.numpy()
    assert predictions == pytest.approx(expected, abs=1e-4)


def test_the_scale_has_a_limit():
    scale = LogitScale(10.0)
    assert scale(torch.tensor([0.5])).item() == pytest.approx(50.0)


@torch.no_grad()
def test_a_backbone_by_its_folder_and_as_a_model(tmp_path):
    """Weights are copied: the model that was given stays as it is, and in its own precision."""
    folder, inputs = save_tiny_backbone("clip", tmp_path), tiny_inputs("clip")
    by_folder = AestheticDiscriminator.from_backbone(folder, head_hidden_size=8).eval()
    assert torch.equal(by_folder(**inputs).conditional, tiny_discriminator("clip")(**inputs).conditional)
    backbone = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    model = AestheticDiscriminator.from_backbone(backbone)
    model.freeze_backbone()
    assert model.config.backbone_config is not backbone.config
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_backbones_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"The backbone '.*nowhere' could not be loaded; it must be the folder of a"):
        AestheticDiscriminator.from_backbone(str(tmp_path / "nowhere"))
    bert = BertModel(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8))
    with pytest.raises(ValueError, match="The backbone is of the type 'bert'; a whole CLIP or SigLIP"):
        AestheticDiscriminator.from_backbone(bert)
    with pytest.raises(ValueError, match="The backbone is of the type 'clip_vision_model'; a whole CLIP or SigLIP"):
        AestheticDiscriminator.from_backbone(tiny_backbone("clip").vision_model)


def test_a_backbone_with_weights_missing(tmp_path):
    folder = save_tiny_backbone("clip", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a CLIPModel \(visual_projection.weight, \.\.\.\)"):
        AestheticDiscriminator.from_backbone(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_hidden_size": 0}, "`head_hidden_size` is 0; it must be at least 1"),
        ({"head_dropout": 1.0}, "`head_dropout` is 1.0; a probability below 1"),
        ({"patch_layer": 4}, "`patch_layer` is 4; the vision tower has 3 layers, so 0 .* to 3 is expected"),
        ({"patch_layer": -1}, "`patch_layer` is -1"),
        ({"num_labels": 2}, "`num_labels` is 2; a discriminator gives one logit"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AestheticDiscriminator.from_backbone(tiny_backbone("clip"), **options)


def test_configurations_of_other_models(tmp_path):
    with pytest.raises(ValueError, match="`backbone_config` is missing: either this is the configuration of another"):
        AestheticDiscriminatorConfig()
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`backbone_config` is missing: either this is the configuration of another"):
        AestheticDiscriminatorConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The backbone is of the type 'bert'"):
        AestheticDiscriminatorConfig(backbone_config={"model_type": "bert"})
    with pytest.raises(ValueError, match="The backbone is of the type None"):
        AestheticDiscriminatorConfig(backbone_config={"projection_dim": 8})
    with pytest.raises(ValueError, match="The backbone has `vision_use_head` False"):
        AestheticDiscriminatorConfig(backbone_config=SiglipConfig(vision_config={"vision_use_head": False}))


def test_a_config_survives_json(tmp_path):
    config = AestheticDiscriminatorConfig(backbone_config=tiny_backbone("siglip").config, patch_layer=3)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "aesthetic_discriminator"


def test_inputs_that_do_not_fit():
    model, inputs = tiny_discriminator("clip"), tiny_inputs("clip")
    with pytest.raises(ValueError, match="`input_ids` are missing: the model is text-conditioned"):
        model(inputs["pixel_values"])
    with pytest.raises(ValueError, match="There are 4 images and 3 captions; give `caption_of`"):
        model(inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"])


def test_captions_that_siglip_was_not_trained_to_read():
    model, inputs = tiny_discriminator("siglip"), tiny_inputs("siglip")
    with pytest.raises(ValueError, match=rf"\(3, 5\), without an `attention_mask`; SigLIP .* to {CAPTION_LENGTH} tok"):
        model.encode_captions(inputs["input_ids"][:, :5])
    with pytest.raises(ValueError, match=r"have the shape \(3, 12\), with an `attention_mask`; SigLIP reads captions"):
        model.encode_captions(inputs["input_ids"], torch.ones_like(inputs["input_ids"]))
