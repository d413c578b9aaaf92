from dataclasses import dataclass, field

from trl import RewardConfig

from trl_diffusion_rank.trainers.diffusion_options import refuse_meaningless
from trl_diffusion_rank.trainers.publishing import without_token


# Options of TRL's RewardConfig and of TrainingArguments that speak of language models. Ignored, they would mislead.
_MEANINGLESS = {
    "model_init_kwargs": "the towers are loaded in float32, and `model` names them",
    "trust_remote_code": "the towers are transformers' own CLIP and SigLIP",
    "chat_template_path": "captions are no conversations",
    "dataset_num_proc": "images are decoded batch by batch; see `dataloader_num_workers`",
    "eos_token": "the backbone's tokenizer knows how captions end",
    "pad_token": "the backbone's tokenizer knows how captions are padded",
    "max_length": "captions are cut to what the backbone's text tower reads",
    "pad_to_multiple_of": "captions are padded as the backbone was trained",
    "center_rewards_coefficient": "see `bce_weight`, which gives the scores an absolute zero",
    "use_liger_kernel": "Liger's kernels are for language models",
    "neftune_noise_alpha": "the embeddings of captions are no place for noise here",
    "label_smoothing_factor": "there are no class labels",
    "include_num_input_tokens_seen": "images are counted, not tokens",
}


@dataclass
class AestheticDiscriminatorTrainerConfig(RewardConfig):
    r"""
    Configuration class for the [`AestheticDiscriminatorTrainer`]: how a discriminator is trained. What it *is* (its
    towers and head) says [`~trl_diffusion_rank.discriminator.AestheticDiscriminatorConfig`], the model's own config.

    Only the options that are specific to the discriminator are listed; the rest is [`~trl.RewardConfig`] and
    [`~transformers.TrainingArguments`]. A batch size counts rows, each a caption with all its images. Options that
    only make sense for language models raise when they are set.

    Parameters:
        > Parameters that control the model

        trainable_layers (`int` or `str`, *optional*):
            How many of the vision tower's last layers are trained, or `all` for both towers. By default the backbone
            is frozen: the head alone is trained, or a LoRA and the head.
        patch_layer (`int`, *optional*):
            Hidden layer of the vision tower whose patches the head sees too, where artefacts and texture show.
        head_hidden_size (`int`, *optional*, defaults to `256`):
            Width of the head's hidden layer.
        head_dropout (`float`, *optional*, defaults to `0.0`):
            On the head's hidden layer, with `disable_dropout=False`.
        text_conditioned (`bool`, *optional*, defaults to `True`):
            Whether the caption counts. Without it the score is the head's alone.

        > Parameters that control the loss

        bce_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the binary cross-entropy of real and generated images, which gives the scores an absolute zero.
        caption_negative_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the loss that a real image scores above itself with the other captions of its batch; without it
            the caption is soon ignored.

        > Parameters that control the data

        real_source (`str`, *optional*, defaults to `"real"`):
            What the column `sources` calls the real images. Rows without one, or without another, are left out. A
            dataset without that column has a column `ranks`, whose order is learned.
        test_share (`float`, *optional*, defaults to `0.2`):
            Share of the captions that are held out where the dataset has no test split.
        equalize_size (`int`, *optional*):
            Side in pixels that every image is brought to, shorter side resized and centre cut, before the processor,
            so that real and generated ones don't differ by their resolution. Off by default.
        equalize_jpeg (`list[int]`, *optional*):
            Lowest and highest quality, 1 to 95, at which every image passes through JPEG, so that they don't differ by
            their codec: one quality for each batch in training, the middle one in evaluation. Off by default.
        random_flip (`bool`, *optional*, defaults to `False`):
            Mirror all images of a caption with a probability of one half in training. Not for writing.

    > [!NOTE]
    > The batch of one process holds the captions that are each other's negatives: a larger
    > `per_device_train_batch_size` gives more of them, `gradient_accumulation_steps` does not.
    """

    # Parameters that control the model
    trainable_layers: int | str | None = field(
        default=None,
        metadata={
            "help": "How many of the vision tower's last layers are trained, or `all` for both towers. By default the "
            "backbone is frozen: the head alone is trained, or a LoRA and the head."
        },
    )
    patch_layer: int | None = field(
        default=None,
        metadata={"help": "Hidden layer of the vision tower whose patches the head sees too. None when unset."},
    )
    head_hidden_size: int = field(default=256, metadata={"help": "Width of the head's hidden layer."})
    head_dropout: float = field(
        default=0.0, metadata={"help": "On the head's hidden layer, with `disable_dropout=False`."}
    )
    text_conditioned: bool = field(
        default=True, metadata={"help": "Whether the caption counts. Without it the score is the head's alone."}
    )

    # Parameters that control the loss
    bce_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the binary cross-entropy of real and generated, the scores' absolute zero."},
    )
    caption_negative_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the loss that a real image scores above itself with the other captions of its batch."
        },
    )

    # Parameters that control the data
    real_source: str = field(default="real", metadata={"help": "What the column `sources` calls the real images."})
    test_share: float = field(
        default=0.2, metadata={"help": "Share of the captions held out where the dataset has no test split."}
    )
    equalize_size: int | None = field(
        default=None,
        metadata={"help": "Side in pixels that every image is brought to before the processor. Off when unset."},
    )
    equalize_jpeg: list[int] | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest quality, 1 to 95, at which every image passes through JPEG: one for each "
            "batch in training, the middle one in evaluation. Off when unset."
        },
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Mirror all images of a caption at random in training. Not for writing."}
    )

    __getstate__ = without_token

    def __post_init__(self):
        self.check_options()
        super().__post_init__()

    def check_options(self) -> None:
        """
        Refuse what makes no sense, naming the option. Reads nothing but the options, so that parsed ones can be
        checked before a config is made of them: making one looks for devices.
        """
        refuse_meaningless(self, RewardConfig, _MEANINGLESS, "a discriminator of images")
        read_trainable_layers(self.trainable_layers)
        if self.patch_layer is not None and self.patch_layer < 0:
            raise ValueError(f"`patch_layer` must be at least 0, got {self.patch_layer}.")
        if self.head_hidden_size < 1:
            raise ValueError(f"`head_hidden_size` must be at least 1, got {self.head_hidden_size}.")
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"`head_dropout` must be in [0, 1), got {self.head_dropout}.")
        if self.head_dropout and self.disable_dropout:
            raise ValueError(
                f"`head_dropout={self.head_dropout}` does nothing while `disable_dropout` is on, as TRL has it by "
                "default. Set `disable_dropout=False` (`--no_disable_dropout`), or leave it out."
            )
        for option in ("bce_weight", "caption_negative_weight"):
            if not getattr(self, option) >= 0:
                raise ValueError(f"`{option}` must be at least 0, got {getattr(self, option)}.")
        default = AestheticDiscriminatorTrainerConfig.caption_negative_weight
        if not self.text_conditioned and self.caption_negative_weight not in (0, default):
            raise ValueError(
                f"`caption_negative_weight={self.caption_negative_weight}` does nothing with "
                "`text_conditioned=False`. Leave one of them out."
            )
        if not 0 < self.test_share < 1:
            raise ValueError(f"`test_share` must be between 0 and 1, got {self.test_share}.")
        if self.equalize_size is not None and self.equalize_size < 8:
            raise ValueError(f"`equalize_size` must be at least 8, got {self.equalize_size}.")
        if self.equalize_jpeg is not None:
            bounds = list(self.equalize_jpeg)
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= 95:
                raise ValueError(
                    f"`equalize_jpeg` must be the lowest and the highest quality, both in 1 to 95, got {bounds}."
                )


def read_trainable_layers(value: int | str | None) -> int | str:
    """`trainable_layers` as the model takes it; the command line gives numbers as text."""
    if value is None:
        return 0
    if value == "all":
        return value
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"`trainable_layers` must be a number of layers or 'all', got {value!r}.")
    return value
