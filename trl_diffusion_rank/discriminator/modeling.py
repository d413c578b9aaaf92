"""The aesthetic discriminator as a transformers model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from trl_diffusion_rank.discriminator.configuration import AestheticDiscriminatorConfig, check_backbone_type


MAX_LOGIT_SCALE = 100.0  # CLIP's own limit (https://huggingface.co/papers/2103.00020, section 2.5)


@dataclass
class AestheticDiscriminatorOutput(ModelOutput):
    """
    Scores of N images, in float32.

    Args:
        logits (`torch.Tensor` of shape `(N, 1)`):
            Of each image with its own caption: `conditional` + `unconditional`.
        conditional (`torch.Tensor` of shape `(N,)`, *optional*):
            The part that depends on the caption. None for a model that isn't text-conditioned.
        unconditional (`torch.Tensor` of shape `(N,)`):
            The head's part, which knows nothing of the caption.
        pair_scores (`torch.Tensor` of shape `(N, T)`, *optional*):
            Logits of each image with each of the T captions, which mismatched captions are taken from.
    """

    logits: Tensor | None = None
    conditional: Tensor | None = None
    unconditional: Tensor | None = None
    pair_scores: Tensor | None = None


class ImageFeatures(NamedTuple):
    """What the discriminator knows of N images before it reads a caption, in float32."""

    embedding: Tensor  # (N, d), of length 1
    unconditional: Tensor  # (N,), the head's logit


class Towers(nn.Module):
    """
    The towers of a CLIP or SigLIP with their projections into the common space, under the names that they have there.

    Its own temperature is left behind: it would be a parameter without a use, which distributed training refuses.
    """

    def __init__(self, config: PreTrainedConfig, with_text: bool):
        super().__init__()
        model = AutoModel.from_config(config)
        has_projections = config.model_type == "clip"  # SigLIP's towers end in the common space
        self.vision_model = model.vision_model
        self.visual_projection = model.visual_projection if has_projections else nn.Identity()
        if with_text:
            self.text_model = model.text_model
            self.text_projection = model.text_projection if has_projections else nn.Identity()


class ScoreHead(nn.Module):
    """
    One logit per image, whatever its caption: normalised features - linear - GELU - dropout - linear.

    The features are the image's embedding and, with `patch_layer`, mean and standard deviation over the patches of
    their normalised hidden states: what is everywhere in the image, and how much it varies.
    """

    def __init__(self, embedding_size: int, patch_size: int | None, hidden_size: int, dropout: float):
        super().__init__()
        self.embedding_norm = nn.LayerNorm(embedding_size)
        # Patch by patch, since a few channels of a CLIP's hidden states are a hundred times the others
        self.patch_norm = None if patch_size is None else nn.LayerNorm(patch_size)
        self.hidden = nn.Linear(embedding_size + 2 * (patch_size or 0), hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.logit = nn.Linear(hidden_size, 1)

    def forward(self, embedding: Tensor, patches: Tensor | None) -> Tensor:
        """Logits (N,) from embeddings (N, d) and, where there is a `patch_layer`, hidden states (N, P, D)."""
        dtype = self.logit.weight.dtype
        features = [self.embedding_norm(embedding.to(dtype))]
        if self.patch_norm is not None:
            variance, mean = torch.var_mean(self.patch_norm(patches.to(dtype)), dim=1, correction=0)
            features += [mean, (variance + 1e-6).sqrt()]  # the root of 0 has no gradient: all patches may be the same
        return self.logit(self.dropout(F.gelu(self.hidden(torch.cat(features, dim=1))))).squeeze(1)


class LogitScale(nn.Module):
    """
    Cosines times a learnt positive factor. A module of its own, because peft trains and saves whole modules beside a
    LoRA; with one element and not none, because FSDP doesn't shard scalars.
    """

    def __init__(self, init_value: float):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), init_value))

    def forward(self, cosines: Tensor) -> Tensor:
        return cosines * self.log_scale.float().clamp(max=math.log(MAX_LOGIT_SCALE)).exp()


class AestheticDiscriminator(PreTrainedModel):
    """
    How good an image is for its caption, as one logit:

        logit = scale * cos(f_image(x), f_text(c)) + head(features of x)

    with the towers f of a CLIP (https://huggingface.co/papers/2103.00020) or SigLIP
    (https://huggingface.co/papers/2303.15343). Logits of different captions have a common scale as far as the head
    and BCE made one; the group loss compares images of one caption only.

    ```python
    model = AestheticDiscriminator.from_backbone("openai/clip-vit-large-patch14", patch_layer=12)
    processor = AestheticDiscriminatorProcessor.from_backbone("openai/clip-vit-large-patch14")
    model.freeze_backbone(trainable_layers=4)
    logits = model(**processor(images=images, text=captions)).logits  # (N, 1)
    ```

    A LoRA on the vision tower: `LoraConfig(target_modules=AestheticDiscriminator.lora_target_modules,
    modules_to_save=AestheticDiscriminator.modules_to_save)`.
    """

    config_class = AestheticDiscriminatorConfig
    config: AestheticDiscriminatorConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Rounded to bfloat16, scores would be ties
    _keep_in_fp32_modules_strict = ["score_head", "logit_scale"]

    # For peft. Not `head`: peft compares the ends of names, and the pooling of a SigLIP's vision tower is a `head`
    lora_target_modules = (
        r"backbone\.vision_model\.encoder\.layers\.\d+\.(self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12])"
    )
    modules_to_save = ["score_head", "logit_scale"]

    def __init__(self, config: AestheticDiscriminatorConfig):
        super().__init__(config)
        backbone = config.backbone_config
        vision_size = backbone.vision_config.hidden_size
        self.backbone = Towers(backbone, with_text=config.text_conditioned)
        self.score_head = ScoreHead(
            embedding_size=backbone.projection_dim if backbone.model_type == "clip" else vision_size,
            patch_size=None if config.patch_layer is None else vision_size,
            hidden_size=config.head_hidden_size,
            dropout=config.head_dropout,
        )
        if config.text_conditioned:
            self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Of this class's own layers: transformers asks the towers themselves about theirs
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, LogitScale):
            init.constant_(module.log_scale, self.config.logit_scale_init_value)
        else:
            super()._init_weights(module)

    @classmethod
    def from_backbone(cls, backbone: str | PreTrainedModel, **options) -> AestheticDiscriminator:
        """
        A discriminator on the towers of a pretrained model, with a new head, in float32.

        Args:
            backbone (`str` or `PreTrainedModel`):
                A `CLIPModel` or `SiglipModel`, whose weights are copied, or its folder or id on the Hub.
            options:
                Of the [`AestheticDiscriminatorConfig`].
        """
        if isinstance(backbone, str):
            backbone = load_backbone(backbone)
        check_backbone_type(backbone.config.model_type)
        model = cls(AestheticDiscriminatorConfig(backbone_config=copy.deepcopy(backbone.config), **options)).float()
        for name, tower in model.backbone.named_children():
            if not isinstance(tower, nn.Identity):
                tower.load_state_dict(getattr(backbone, name).state_dict())
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.vision_model.embeddings.patch_embedding

    def freeze_backbone(self, trainable_layers: int | Literal["all"] = 0) -> None:
        """
        Choose what of the backbone is trained; the head and the scale always are.

        Args:
            trainable_layers (`int` or `"all"`, *optional*, defaults to `0`):
                0 freezes the backbone. k trains the last k layers of the vision tower and what follows them: its
                last norm, SigLIP's pooling, CLIP's projection; the text tower stays frozen, so that the embeddings of
                captions can be kept. `"all"` trains everything, the text tower too.
        """
        vision = self.backbone.vision_model
        layers = vision.encoder.layers
        if trainable_layers != "all" and not (type(trainable_layers) is int and 0 <= trainable_layers <= len(layers)):
            raise ValueError(
                f"`trainable_layers` is {trainable_layers!r}; the vision tower has {len(layers)} layers, so 0 to "
                f"{len(layers)} is expected, or 'all' for both towers."
            )
        self.backbone.requires_grad_(trainable_layers == "all")
        if trainable_layers not in ("all", 0):
            for module in (*layers[-trainable_layers:], vision.post_layernorm, self.backbone.visual_projection):
                module.requires_grad_(True)
            if self.config.backbone_config.model_type == "siglip":
                vision.head.requires_grad_(True)

    def encode_images(self, pixel_values: Tensor) -> ImageFeatures:
        """What there is to know of processed images (N, 3, h, w) without a caption. Differentiable."""
        layer = self.config.patch_layer
        vision = self.backbone.vision_model
        with nullcontext([]) if layer is None else hidden_state(vision.encoder.layers, layer) as states:
            pooled = vision(pixel_values=pixel_values).pooler_output
        embedding = self.backbone.visual_projection(pooled)  # (N, d)
        class_tokens = 1 if self.config.backbone_config.model_type == "clip" else 0
        patches = None if layer is None else states[0][:, class_tokens:]  # (N, P, D)
        with torch.autocast(embedding.device.type, enabled=False):
            unconditional = self.score_head(embedding, patches)
            return ImageFeatures(F.normalize(embedding.float(), dim=1), unconditional.float())

    def encode_captions(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """
        Embeddings (T, d) of length 1, in float32, of captions (T, L) as the processor gives them.

        SigLIP pools the last of a fixed number of tokens and was trained to read their padding
        (https://github.com/mlfoundations/open_clip/issues/984), so for it there is no `attention_mask`.
        """
        if not self.config.text_conditioned:
            raise ValueError("The model was built with `text_conditioned=False`: it has no text tower.")
        if self.config.backbone_config.model_type == "siglip":
            length = self.config.backbone_config.text_config.max_position_embeddings
            if attention_mask is not None or input_ids.shape[1] != length:
                raise ValueError(
                    f"`input_ids` have the shape {tuple(input_ids.shape)}, "
                    f"{'without' if attention_mask is None else 'with'} an `attention_mask`; SigLIP reads captions "
                    f"padded to {length} tokens, without a mask. AestheticDiscriminatorProcessor makes them."
                )
        outputs = self.backbone.text_model(input_ids=input_ids, attention_mask=attention_mask)
        embedding = self.backbone.text_projection(outputs.pooler_output)
        return F.normalize(embedding.float(), dim=1)

    def conditional_scores(self, images: ImageFeatures, captions: Tensor) -> Tensor:
        """scale * cos(image, caption) of N images with T captions (T, d). (N, T)"""
        with torch.autocast(captions.device.type, enabled=False):
            return self.logit_scale(images.embedding @ captions.T)

    def pair_scores(self, images: ImageFeatures, captions: Tensor) -> Tensor:
        """Logits (N, T) of each of N images with each of T captions (T, d); nothing is encoded again."""
        return self.conditional_scores(images, captions) + images.unconditional.unsqueeze(1)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        caption_of: Tensor | None = None,
    ) -> AestheticDiscriminatorOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, h, w)`):
                Processed images, from the processor or its `preprocess_pixels`.
            input_ids (`torch.Tensor` of shape `(T, L)`, *optional*):
                Captions; a model that isn't text-conditioned reads none.
            attention_mask (`torch.Tensor` of shape `(T, L)`, *optional*):
                Of the captions; none for SigLIP.
            caption_of (`torch.Tensor` of shape `(N,)`, *optional*):
                Which of the T captions belongs to each image. By default there is one per image, in order.
        """
        images = self.encode_images(pixel_values)
        if not self.config.text_conditioned:
            return AestheticDiscriminatorOutput(
                logits=images.unconditional.unsqueeze(1), unconditional=images.unconditional
            )
        if input_ids is None:
            raise ValueError("`input_ids` are missing: the model is text-conditioned, give the images' captions.")
        if caption_of is None:
            if len(input_ids) != len(pixel_values):
                raise ValueError(
                    f"There are {len(pixel_values)} images and {len(input_ids)} captions; give `caption_of`, the "
                    "index of each image's caption, or one caption per image."
                )
            caption_of = torch.arange(len(pixel_values), device=pixel_values.device)
        captions = self.encode_captions(input_ids, attention_mask)  # (T, d)
        pairs = self.conditional_scores(images, captions)  # (N, T)
        conditional = pairs.gather(1, caption_of.unsqueeze(1)).squeeze(1)
        return AestheticDiscriminatorOutput(
            logits=(conditional + images.unconditional).unsqueeze(1),
            conditional=conditional,
            unconditional=images.unconditional,
            pair_scores=pairs + images.unconditional.unsqueeze(1),
        )


@contextmanager
def hidden_state(layers: nn.ModuleList, index: int) -> Iterator[list[Tensor]]:
    """
    A list that holds one hidden state after a forward pass in here: 0 is what goes into the first of `layers`, k what
    comes out of the k-th. `output_hidden_states` would keep them all, and gets none from a SigLIP of transformers 5.4.
    """
    states = []
    if index == 0:
        hook = layers[0].register_forward_pre_hook(lambda layer, args: states.append(args[0]))
    else:
        hook = layers[index - 1].register_forward_hook(lambda layer, args, output: states.append(output))
    try:
        yield states
    finally:
        hook.remove()


def load_backbone(name: str) -> PreTrainedModel:
    """A CLIP or SigLIP from a folder or the Hub, in float32, all of whose weights are there."""
    try:
        model, info = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except OSError as error:
        raise ValueError(
            f"The backbone {name!r} could not be loaded; it must be the folder of a CLIP or SigLIP, or its id on the "
            f"Hub that can be reached. ({error})"
        ) from error
    check_backbone_type(model.config.model_type)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"The backbone {name!r} lacks {len(missing)} weights of a {type(model).__name__} ({missing[0]}, ...), "
            "which would be drawn at random. Give a complete checkpoint."
        )
    return model
