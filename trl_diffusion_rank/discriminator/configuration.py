"""Configuration of the aesthetic discriminator."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


BACKBONE_TYPES = ("clip", "siglip")  # google/siglip2-*-patch16-224 and its like are of the type `siglip` too


def check_backbone_type(model_type: str | None) -> None:
    """Refuse a backbone that is neither a CLIP nor a SigLIP."""
    if model_type not in BACKBONE_TYPES:
        raise ValueError(
            f"The backbone is of the type {model_type!r}; a whole CLIP or SigLIP (`model_type` "
            f"{' or '.join(BACKBONE_TYPES)}) is expected, for example openai/clip-vit-large-patch14 or "
            "google/siglip2-base-patch16-224."
        )


def read_model_type(model: str) -> str | None:
    """What kind of model a folder or Hub id holds. `OSError` where there is none."""
    return PreTrainedConfig.get_config_dict(model)[0].get("model_type")


def check_is_discriminator(model: str, option: str) -> None:
    """Refuse a folder or Hub id of another kind of model; `option` is what the user gave it as."""
    model_type = read_model_type(model)
    if model_type != AestheticDiscriminatorConfig.model_type:
        raise ValueError(
            f"{option} is of the type {model_type!r}, not an aesthetic discriminator. Give the folder or Hub id of "
            "one that was trained with this package."
        )


class AestheticDiscriminatorConfig(PreTrainedConfig):
    """
    Configuration of an [`AestheticDiscriminator`].

    Args:
        backbone_config (`CLIPConfig`, `SiglipConfig` or `dict`):
            Of the two towers. A `dict` needs the key `model_type`.
        head_hidden_size (`int`, *optional*, defaults to `256`):
            Width of the head's hidden layer.
        head_dropout (`float`, *optional*, defaults to `0.0`):
            On the head's hidden layer. TRL's trainers switch it off unless `disable_dropout=False`.
        patch_layer (`int`, *optional*):
            Which hidden layer of the vision tower gives the head its features of single patches, where artefacts and
            texture show that the pooled embedding of a model trained on captions no longer holds: 0 the patch
            embeddings, k what comes out of the k-th layer. By default there are none.
        text_conditioned (`bool`, *optional*, defaults to `True`):
            Whether the caption counts. Without it there is no text tower and the score is the head's alone.
        logit_scale_init_value (`float`, *optional*, defaults to `2.6592`):
            Logarithm of the factor on the cosine of image and caption when training begins: ln(1 / 0.07), what CLIP
            began with. A pretrained CLIP's own factor of 100 would make logits of 20 to 30, which no longer move.
    """

    model_type = "aesthetic_discriminator"
    sub_configs = {"backbone_config": AutoConfig}
    has_no_defaults_at_init = True
    # What `Trainer.evaluate` would gather beside the logits; the pairs of different batches don't even fit together
    keys_to_ignore_at_inference = ["conditional", "unconditional", "pair_scores"]

    backbone_config: dict | PreTrainedConfig | None = None
    head_hidden_size: int = 256
    head_dropout: float = 0.0
    patch_layer: int | None = None
    text_conditioned: bool = True
    logit_scale_init_value: float = 2.6592

    def __post_init__(self, **kwargs: Any):
        if self.backbone_config is None:
            raise ValueError(
                "`backbone_config` is missing: either this is the configuration of another kind of model, or give a "
                "CLIPConfig or SiglipConfig. `AestheticDiscriminator.from_backbone` takes it from a pretrained model."
            )
        if isinstance(self.backbone_config, dict):
            check_backbone_type(self.backbone_config.get("model_type"))
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        check_backbone_type(self.backbone_config.model_type)
        self._check_values()
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        super().__post_init__(**kwargs)
        if self.num_labels != 1:
            raise ValueError(f"`num_labels` is {self.num_labels}; a discriminator gives one logit, so it must be 1.")

    def _check_values(self) -> None:
        if self.head_hidden_size < 1:
            raise ValueError(f"`head_hidden_size` is {self.head_hidden_size}; it must be at least 1.")
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"`head_dropout` is {self.head_dropout}; a probability below 1 is expected.")
        layers = self.backbone_config.vision_config.num_hidden_layers
        if self.patch_layer is not None and not 0 <= self.patch_layer <= layers:
            raise ValueError(
                f"`patch_layer` is {self.patch_layer}; the vision tower has {layers} layers, so 0 (the patch "
                f"embeddings) to {layers} is expected, or None for no patch features."
            )
        # A CLIP has no such option; before transformers 5.6 a SigLIP's config holds it only where it was given
        if not getattr(self.backbone_config.vision_config, "vision_use_head", True):
            raise ValueError(
                "The backbone has `vision_use_head` False: a SigLIP without its pooling has no embedding of an image. "
                "Give one that has it."
            )
