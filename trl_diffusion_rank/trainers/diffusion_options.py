"""The options that every preference trainer of diffusion models has, whichever of TRL's configs it extends."""

from dataclasses import dataclass, field, fields
from typing import Any

from trl_diffusion_rank.diffusion.timesteps import allowed_timesteps
from trl_diffusion_rank.diffusion.weighting import TIMESTEP_WEIGHTINGS


# Options of TrainingArguments that speak of tokens. Setting one is an error: ignored, it would mislead.
_MEANINGLESS = {
    "use_liger_kernel": "Liger's kernels are for language models",
    "neftune_noise_alpha": "a denoiser has no token embeddings to perturb",
    "label_smoothing_factor": "there are no labels; see `label_smoothing`",
    "include_num_input_tokens_seen": "there are no tokens to count",
}


def refuse_meaningless(options: Any, config_class: type, reasons: dict[str, str]) -> None:
    """Raise `ValueError` for an option, a key of `reasons`, that was set to something else than its default."""
    defaults = {option.name: option.default for option in fields(config_class)}
    off = {"include_num_input_tokens_seen": ("no", False)}  # both mean off
    for option, reason in {**_MEANINGLESS, **reasons}.items():
        value = getattr(options, option)
        if value != defaults[option] and value not in off.get(option, ()):
            raise ValueError(f"`{option}={value!r}` has no meaning for a diffusion model: {reason}. Leave it out.")


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
    """

    # Parameters that guard against collapse
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
        # What can be said of the grid without the model; the trainer knows how long its schedule is
        allowed_timesteps(self.timestep_sampling or "uniform", self.timesteps, num_train_timesteps=10**9)
