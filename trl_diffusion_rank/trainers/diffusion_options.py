"""The options that every preference trainer of diffusion models has, whichever of TRL's configs it extends."""

from dataclasses import dataclass, field, fields
from typing import Any

from trl_diffusion_rank.diffusion.timesteps import allowed_timesteps
from trl_diffusion_rank.diffusion.weighting import TIMESTEP_WEIGHTINGS
from trl_diffusion_rank.trainers.publishing import without_token


# Options of TrainingArguments that speak of tokens. Setting one is an error: ignored, it would mislead.
_MEANINGLESS = {
    "use_liger_kernel": "Liger's kernels are for language models",
    "neftune_noise_alpha": "a denoiser has no token embeddings to perturb",
    "label_smoothing_factor": "there are no labels; see `label_smoothing`",
    "include_num_input_tokens_seen": "there are no tokens to count",
}

_ADVERSARIAL_CHOICES = {"adversarial_mode": ("none", "frozen", "joint"), "adversarial_on": ("best", "all")}
_BOTH_MODES = ("frozen", "joint")
_ADVERSARIAL_MODES_OF = {  # in which modes an option does something
    "adversarial_discriminator": _BOTH_MODES,
    "adversarial_weight": _BOTH_MODES,
    "adversarial_adaptive": _BOTH_MODES,
    "adversarial_margin": ("frozen",),
    "adversarial_on": _BOTH_MODES,
    "adversarial_max_noise": _BOTH_MODES,
    "adversarial_max_images": _BOTH_MODES,
    "adversarial_start": _BOTH_MODES,
    "adversarial_vae": _BOTH_MODES,
    "discriminator_learning_rate": ("joint",),
    "discriminator_trainable_layers": ("joint",),
    "adversarial_regularization": ("joint",),
}
_OF_SAMPLES = ("sample_prompts", "samples_per_prompt", "sample_inference_steps", "sample_guidance_scale")


def refuse_meaningless(
    options: Any, config_class: type, reasons: dict[str, str], kind: str = "a diffusion model"
) -> None:
    """
    Raise `ValueError` for an option, a key of `reasons`, that was set to something else than its default.

    Args:
        kind (`str`): what the option has no meaning for.
    """
    defaults = {option.name: option.default for option in fields(config_class)}
    off = {"include_num_input_tokens_seen": ("no", False)}  # both mean off
    for option, reason in {**_MEANINGLESS, **reasons}.items():
        value = getattr(options, option)
        if value != defaults[option] and value not in off.get(option, ()):
            raise ValueError(f"`{option}={value!r}` has no meaning for {kind}: {reason}. Leave it out.")


@dataclass
class DiffusionOptions:
    """
    Options about noise and data. Comes before TRL's config among the bases.

    Parameters:
        > Parameters that guard against collapse

        preserve_mu (`float`, *optional*):
            Scale down the gradient that raises the worse images' errors, so that at least this share, in [0, 1], of
            the best images' descent is kept (https://huggingface.co/papers/2511.03317). The loss's value stays.
        max_skipped_steps (`int`, *optional*, defaults to `10`):
            An optimizer step whose gradient isn't finite is skipped and counted (`skipped_steps` in the log); after so
            many in a row training stops with an error.

        ema_decay (`float`, *optional*):
            Decay, in (0, 1), of an exponential moving average of the trained weights, which is what is saved for
            diffusers. Off when unset.

        > Parameters that control noise

        timestep_sampling (`str`, *optional*):
            `uniform`, `turbo` (249, 499, 749), `discrete` (those of `timesteps`) or, for flow matching, `logit_normal`
            with the scheduler's shift. Defaults to the family's: `logit_normal` for SD3 and FLUX, else `uniform`.
        timesteps (`list[int]`, *optional*):
            The grid of `timestep_sampling="discrete"`, for models distilled to a few steps.

        timestep_weighting (`str`, *optional*, defaults to `"constant"`):
            How much the errors at a timestep count, the reference's alike: `min_snr`, `snr_sqrt` (debiased estimation)
            or `constant`; with mean 1 over the schedule.
        caption_dropout (`float`, *optional*, defaults to `0.0`):
            Probability in [0, 1) that a row loses its caption at a visit, all its images alike, as for training
            classifier-free guidance.

        > Parameters that control the adversarial term

        adversarial_mode (`str`, *optional*, defaults to `"none"`):
            Add a discriminator's judgement of what the denoiser takes for the clean image, decoded, to the training
            loss: `frozen` pays `relu(adversarial_margin - score)` to a discriminator as it is, `joint` pays `-score`
            to one that is trained beside, on the best images as real and the estimates as fake. Evaluation leaves the
            term out.
        adversarial_discriminator (`str`, *optional*):
            Folder or Hub id of the `AestheticDiscriminator` and its processor.
        adversarial_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the term. A fixed one means something else for each loss: the gradients of ranking losses are a
            hundred times those of behaviour cloning.
        adversarial_adaptive (`bool`, *optional*, defaults to `False`):
            Multiply the weight by the ratio of the lengths of the main loss's gradient and the term's at the last
            LoRA-B weight (a moving average; https://huggingface.co/papers/2012.09841), so that it means
            the same for each loss.
        adversarial_margin (`float`, *optional*, defaults to `1.0`):
            Score beyond which the `frozen` mode has nothing more to ask for.
        adversarial_on (`str`, *optional*, defaults to `"best"`):
            Whether the estimates of the `best` images of each row are judged, or of `all`.
        adversarial_max_noise (`float`, *optional*):
            Largest sigma / alpha of an estimate that is judged, at most 500. Defaults to that of timestep 500 of 1000,
            for flow matching to 1.5 (sigma = 0.6), for `timestep_sampling="turbo"` to whatever has a signal.
        adversarial_max_images (`int`, *optional*, defaults to `4`):
            Images that a process decodes and judges in one forward pass, drawn from those that could be: a bound on
            memory.
        adversarial_start (`float`, *optional*, defaults to `0.0`):
            Share of the steps, in [0, 1), before which the term is off and costs nothing.
        adversarial_vae (`str`, *optional*):
            Folder or Hub id of an `AutoencoderTiny` that decodes instead of the pipeline's VAE.
        discriminator_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Of the `joint` mode's discriminator, which has its own AdamW, one step for each of the denoiser's.
        discriminator_trainable_layers (`int`, *optional*, defaults to `0`):
            How many of the last layers of its vision tower are trained besides its head.
        adversarial_regularization (`float`, *optional*, defaults to `100.0`):
            Weight of `||D(x) - D(x + 0.01 n)||^2` in its loss (https://huggingface.co/papers/2501.08316).

        > Parameters that control the samples drawn during training

        sample_steps (`int`, *optional*):
            Draw a grid of images of fixed prompts and seeds every so many steps, before the first step and at the end:
            `samples/step-000100.png` in the output folder, and to the trackers of `report_to`. What is drawn with is
            what would be saved, so the moving average with `ema_decay`. Off when unset.
        sample_prompts (`list[str]`, *optional*):
            Prompts of the grid, a column each. Defaults to the first four of the eval dataset, else of the train
            dataset.
        samples_per_prompt (`int`, *optional*, defaults to `1`):
            Rows of the grid.
        sample_inference_steps (`int`, *optional*, defaults to `20`):
            Denoising steps of an image.
        sample_guidance_scale (`float`, *optional*):
            Classifier-free guidance; the pipeline's own default when unset.

        > Parameters that control the data

        resolution (`int`, *optional*):
            Side in pixels that images are brought to: resized until the shorter side fits, then cut at the centre.
            Defaults to what the model was trained on.
        cache_latents (`bool`, *optional*):
            Encode all images and prompts once, before training, and let the VAE and the text encoders leave memory.
            Defaults to `True`, and to `False` for a stream, which can't be cached.
        encode_batch_size (`int`, *optional*, defaults to `16`):
            Images or prompts in one pass of an encoder.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `error` stops at a row that breaks the contract or can't be decoded; `skip` leaves it out and counts it.

        > Parameters that control the speed

        channels_last (`bool`, *optional*, defaults to `False`):
            Keep a UNet's convolutions and what they are given in the memory layout (N, H, W, C).

    > [!NOTE]
    > `torch_compile=True`, an option of [`~transformers.TrainingArguments`], compiles the blocks that the denoiser
    > repeats, each by itself, and not the whole model: that takes a fraction of the time, and weights keep their
    > names.
    """

    # Parameters that guard against collapse
    __getstate__ = without_token

    preserve_mu: float | None = field(
        default=None,
        metadata={
            "help": "Scale the losers' gradient down so that at least this share, in [0, 1], of the best images' "
            "descent is kept. Off when unset."
        },
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={"help": "Steps in a row whose gradient isn't finite, each skipped, before training stops."},
    )

    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay, in (0, 1), of an exponential moving average of the trained weights, which is what is "
            "saved for diffusers. Off when unset."
        },
    )

    # Parameters that control noise
    timestep_sampling: str | None = field(
        default=None,
        metadata={
            "help": "Which timesteps are trained: `discrete` means those of `timesteps`, `turbo` 249, 499 and 749. "
            "Defaults to the family's: logit_normal for flow matching, else uniform.",
            "choices": ["uniform", "turbo", "discrete", "logit_normal"],
        },
    )
    timesteps: list[int] | None = field(
        default=None, metadata={"help": "The grid of `timestep_sampling=discrete`, for few-step models."}
    )

    timestep_weighting: str = field(
        default="constant",
        metadata={
            "help": "How much a timestep's errors count, the reference's too; mean 1 over the schedule.",
            "choices": ["constant", "min_snr", "snr_sqrt"],
        },
    )
    caption_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability in [0, 1) that a row loses its caption at a visit, all its images alike."},
    )

    # Parameters that control the adversarial term
    adversarial_mode: str = field(
        default="none",
        metadata={
            "help": "A discriminator in the loss, which judges the denoiser's clean estimates: `frozen` as it is, "
            "`joint` trained beside.",
            "choices": ["none", "frozen", "joint"],
        },
    )
    adversarial_discriminator: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the aesthetic discriminator of the adversarial term."}
    )
    adversarial_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the adversarial term; with `adversarial_adaptive` in lengths of the main loss's "
            "gradient."
        },
    )
    adversarial_adaptive: bool = field(
        default=False,
        metadata={
            "help": "Multiply `adversarial_weight` by the ratio of the lengths of both gradients at the last LoRA-B "
            "weight, as in VQGAN."
        },
    )
    adversarial_margin: float = field(
        default=1.0, metadata={"help": "Score beyond which the `frozen` adversarial term asks for nothing more."}
    )
    adversarial_on: str = field(
        default="best",
        metadata={
            "help": "Whose estimates are judged: those of each row's best images, or of all.",
            "choices": ["best", "all"],
        },
    )
    adversarial_max_noise: float | None = field(
        default=None,
        metadata={
            "help": "Largest sigma / alpha of an estimate that is judged. Defaults to that of the schedule's middle, "
            "for flow matching 1.5, for `turbo` whatever has a signal."
        },
    )
    adversarial_max_images: int = field(
        default=4, metadata={"help": "Images that a process decodes and judges in one forward pass: bounds memory."}
    )
    adversarial_start: float = field(
        default=0.0, metadata={"help": "Share of the steps, in [0, 1), before which the adversarial term is off."}
    )
    adversarial_vae: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of an AutoencoderTiny that decodes instead of the pipeline's VAE."},
    )
    discriminator_learning_rate: float = field(
        default=1e-4, metadata={"help": "Of the `joint` mode's discriminator, which has its own AdamW."}
    )
    discriminator_trainable_layers: int = field(
        default=0, metadata={"help": "Last layers of the vision tower that `joint` trains besides the head."}
    )
    adversarial_regularization: float = field(
        default=100.0, metadata={"help": "Weight of ||D(x) - D(x + 0.01 n)||^2 in the `joint` discriminator's loss."}
    )

    # Parameters that control the samples drawn during training
    sample_steps: int | None = field(
        default=None,
        metadata={
            "help": "Draw a grid of images of fixed prompts and seeds every so many steps, before the first and at "
            "the end, to the folder `samples` and to the trackers of `report_to`. Off when unset."
        },
    )
    sample_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts of the grid. Defaults to the first four of the eval dataset, else of the train dataset."
        },
    )
    samples_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt in the grid."})
    sample_inference_steps: int = field(default=20, metadata={"help": "Denoising steps of an image of the grid."})
    sample_guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Classifier-free guidance of the grid's images; the pipeline's own default when unset."},
    )

    # Parameters that control the data
    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels that images are brought to (shorter side resized, centre cut). Defaults to the "
            "model's."
        },
    )
    cache_latents: bool | None = field(
        default=None,
        metadata={
            "help": "Encode everything once before training and free the encoders. Defaults to True, for a stream to "
            "False."
        },
    )
    encode_batch_size: int = field(
        default=16, metadata={"help": "Images or prompts in one pass of an encoder before training."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "What to do with a row that breaks the contract or can't be decoded.",
            "choices": ["error", "skip"],
        },
    )

    # Parameters that control the speed
    channels_last: bool = field(
        default=False, metadata={"help": "Keep a UNet's convolutions in the memory layout (N, H, W, C)."}
    )

    def check_shared_options(self) -> None:
        """Refuse bad values of these options, naming the option; reads nothing but the options."""
        if self.preserve_mu is not None and not 0 <= self.preserve_mu <= 1:
            raise ValueError(f"`preserve_mu` must be in [0, 1], got {self.preserve_mu}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in (0, 1), got {self.ema_decay}.")
        for option, least in (("max_skipped_steps", 1), ("encode_batch_size", 1), ("resolution", 8)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"`{option}` must be at least {least}, got {value}.")
        if self.timestep_weighting not in TIMESTEP_WEIGHTINGS:
            raise ValueError(
                f"`timestep_weighting` must be one of {', '.join(TIMESTEP_WEIGHTINGS)}, got "
                f"{self.timestep_weighting!r}."
            )
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"`caption_dropout` must be in [0, 1), got {self.caption_dropout}.")
        if self.on_bad_row not in ("error", "skip"):
            raise ValueError(f"`on_bad_row` must be 'error' or 'skip', got {self.on_bad_row!r}.")
        DiffusionOptions._check_adversarial_options(self)
        DiffusionOptions._check_sample_options(self)
        if self.auto_find_batch_size and self.adversarial_mode != "none":
            raise ValueError(
                f"`auto_find_batch_size=True` can't be used with `adversarial_mode={self.adversarial_mode!r}`, whose "
                "steps need memory by turns. Leave it out, and lower `per_device_train_batch_size` by hand."
            )
        # What can be said of the grid without the model; the trainer knows how long its schedule is
        allowed_timesteps(self.timestep_sampling or "uniform", self.timesteps, num_train_timesteps=10**9)

    def _check_adversarial_options(self) -> None:
        for option, allowed in _ADVERSARIAL_CHOICES.items():
            if getattr(self, option) not in allowed:
                names = ", ".join(map(repr, allowed))
                raise ValueError(f"`{option}` must be one of {names}, got {getattr(self, option)!r}.")
        mode = self.adversarial_mode
        for option, modes in _ADVERSARIAL_MODES_OF.items():
            default = DiffusionOptions.__dataclass_fields__[option].default
            if mode not in modes and getattr(self, option) != default:
                raise ValueError(
                    f"`{option}={getattr(self, option)!r}` does nothing with `adversarial_mode={mode!r}`. Leave it "
                    f"out, or choose {' or '.join(map(repr, modes))}."
                )
        if mode != "none" and not self.adversarial_discriminator:
            raise ValueError(
                f"`adversarial_mode={mode!r}` needs `adversarial_discriminator`, the folder or Hub id of an aesthetic "
                "discriminator; got none."
            )
        for option in ("adversarial_weight", "discriminator_learning_rate"):
            if not getattr(self, option) > 0:
                raise ValueError(f"`{option}` must be positive, got {getattr(self, option)}.")
        least = {"adversarial_max_images": 1, "discriminator_trainable_layers": 0, "adversarial_regularization": 0}
        for option, value in least.items():
            if not getattr(self, option) >= value:
                raise ValueError(f"`{option}` must be at least {value}, got {getattr(self, option)}.")
        if not 0 <= self.adversarial_start < 1:
            raise ValueError(f"`adversarial_start` must be in [0, 1), got {self.adversarial_start}.")
        if self.adversarial_max_noise is not None and not 0 < self.adversarial_max_noise <= 500:
            raise ValueError(
                f"`adversarial_max_noise` must be in (0, 500], got {self.adversarial_max_noise}: it is sigma / alpha, "
                "and beyond there is no signal that an estimate could be made of."
            )

    def _check_sample_options(self) -> None:
        for option in _OF_SAMPLES:
            default = DiffusionOptions.__dataclass_fields__[option].default
            if self.sample_steps is None and getattr(self, option) != default:
                raise ValueError(
                    f"`{option}={getattr(self, option)!r}` does nothing without `sample_steps`, which says how often "
                    "samples are drawn. Set `sample_steps`, or leave it out."
                )
        for option in ("sample_steps", "samples_per_prompt", "sample_inference_steps"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"`{option}` must be at least 1, got {value}.")
        if self.sample_prompts is not None and not self.sample_prompts:
            raise ValueError("`sample_prompts` is empty. Name at least one, or leave it out for the dataset's first.")
        if self.sample_guidance_scale is not None and not self.sample_guidance_scale >= 0:
            raise ValueError(f"`sample_guidance_scale` must be at least 0, got {self.sample_guidance_scale}.")
