from dataclasses import dataclass, field

from trl import DPOConfig

from trl_diffusion_rank.objectives.ranking import LOSS_TYPES, SMOOTHABLE_LOSS_TYPES
from trl_diffusion_rank.trainers.diffusion_options import DiffusionOptions, refuse_meaningless


# Options of TRL's DPO that speak of tokens
_MEANINGLESS = {
    "max_length": "images are not sequences; see `resolution`",
    "truncation_mode": "images are not sequences; see `resolution`",
    "padding_free": "images are not sequences",
    "pad_to_multiple_of": "images are not sequences",
    "pad_token": "the pipeline's tokenizers pad by themselves",
    "router_aux_loss_coef": "a denoiser has no experts to balance",
    "ld_alpha": "images have no verbose part",
    "f_divergence_type": "a denoiser's surrogate log-likelihood gives no density ratio for other divergences",
    "f_alpha_divergence_coef": "a denoiser's surrogate log-likelihood gives no density ratio for other divergences",
    "use_weighting": "WPO weights by token probabilities, which a denoiser doesn't have",
    "discopop_tau": "`discopop` is no `loss_type` here",
}


@dataclass
class RankedDiffusionDPOConfig(DiffusionOptions, DPOConfig):
    r"""
    Configuration class for the [`RankedDiffusionDPOTrainer`].

    Only the options that are specific to ranked diffusion DPO, or mean something else here, are listed; the rest is
    [`~trl.DPOConfig`] and [`~transformers.TrainingArguments`]. A batch size counts rows (prompts), each with all its
    images. Options that only make sense for language models raise when they are set.

    Parameters:
        > Parameters that control the loss

        loss_type (`str` or `list[str]`, *optional*, defaults to `["plackett_luce"]`):
            One of `plackett_luce`, `top1`, `pairwise`, `best_vs_worst`, `best_vs_rest`, `lambda`, `ipo`, `hinge`,
            `linear`; several are summed with `loss_weights`.
        beta (`float`, *optional*):
            Strength of the preference on the mean squared denoising error, with Diffusion-DPO's factor 1/2 inside:
            `reward = beta / 2 * (ref_error - error)`. Larger saturates sooner and keeps the model closer to the
            reference. Defaults to the family's: 2000 for SD, 5000 for SDXL, 500 for SD3 and FLUX; for `linear` 250,
            500 and 500.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability in [0, 0.5) that a preference is the wrong way round, for `pairwise`, `best_vs_worst`,
            `best_vs_rest` and `lambda`.
        linear_eta (`float`, *optional*, defaults to `0.1`):
            Least weight of a pair in the `linear` loss, in [0, 0.5].
        sft_weight (`float`, *optional*, defaults to `0.0`):
            Weight of an anchor, `beta / 2 * error` of the best images: behaviour cloning in units of reward.
        dpop_lambda (`float`, *optional*, defaults to `0.0`):
            Weight of `beta / 2 * relu(error - ref_error)` of the best images (DPO-Positive): nothing as long as they
            are no worse than under the reference.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Ask the reference before training, at the `num_reference_draws` draws that each row will meet, and cache
            what it says. Spares the reference's pass at each step, and for full weights its memory; a sweep over
            losses and betas asks it once.
        num_reference_draws (`int`, *optional*):
            Number K of distinct draws of timestep and noise that a row meets: at its visit v the draw v modulo K.
            Defaults to a new draw at each visit, with `precompute_ref_log_probs` to no more than 8.
        displacement_patience (`int`, *optional*, defaults to `10`):
            Number of logs over which the errors of best and worst images must both rise, the best ones' being more
            than half above the reference's, before a warning says that the model is degrading. `0` never warns.
        stop_on_displacement (`bool`, *optional*, defaults to `False`):
            Stop then, with the weights of the last log before the best images' error was half above the reference's.
            Keeps a copy of the trained weights in CPU memory.

    The options about noise and data are those of [`~trl_diffusion_rank.trainers.diffusion_options.DiffusionOptions`].

    > [!NOTE]
    > These parameters have default values different from [`~trl.DPOConfig`]:
    > - `learning_rate`: Defaults to `1e-5` instead of `1e-6`.
    > - `loss_type`: Defaults to `["plackett_luce"]` instead of `["sigmoid"]`.
    > - `beta`: Defaults to the family's instead of `0.1`.
    """

    learning_rate: float = field(
        default=1e-5,
        metadata={"help": "The initial learning rate for AdamW. Never scaled by batch size or processes."},
    )

    # Parameters that control the loss
    loss_type: list[str] = field(
        default_factory=lambda: ["plackett_luce"],
        metadata={
            "help": "One or several of plackett_luce, top1, pairwise, best_vs_worst, best_vs_rest, lambda, ipo, "
            "hinge, linear; several are summed with `loss_weights`."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the preference on the mean squared denoising error: reward = beta / 2 * (ref_error - "
            "error). Defaults to the family's: 2000 for SD, 5000 for SDXL, 500 for SD3 and FLUX."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Probability in [0, 0.5) that a preference is the wrong way round, for the logistic pair losses."
        },
    )
    linear_eta: float = field(
        default=0.1, metadata={"help": "Least weight of a pair in the `linear` loss, in [0, 0.5]."}
    )
    sft_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of behaviour cloning of the best images: beta / 2 * their error is added."},
    )
    dpop_lambda: float = field(
        default=0.0,
        metadata={"help": "Weight of a penalty, beta / 2 * what the best images' error exceeds the reference's."},
    )
    num_reference_draws: int | None = field(
        default=None,
        metadata={
            "help": "Distinct draws of timestep and noise that a row meets, in turn; their reference errors are what "
            "`precompute_ref_log_probs` computes. Defaults to a new draw at each visit, then to no more than 8."
        },
    )
    displacement_patience: int = field(
        default=10,
        metadata={
            "help": "Logs over which the errors of best and worst images must both rise, the best ones' being more "
            "than half above the reference's, before a warning. 0 never warns."
        },
    )

    stop_on_displacement: bool = field(
        default=False,
        metadata={
            "help": "Stop at displacement, with the weights of the last log before the best images' error was half "
            "above the reference's. Keeps a copy of the trained weights in CPU memory."
        },
    )

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self.check_options()
        super().__post_init__()

    def check_options(self) -> None:
        """
        Refuse what makes no sense, naming the option. Reads nothing but the options, so that parsed ones can be
        checked before a config is made of them (`RankedDiffusionDPOConfig.check_options(namespace)`): making one
        looks for devices.
        """
        refuse_meaningless(self, DPOConfig, _MEANINGLESS)
        DiffusionOptions.check_shared_options(self)

        unknown = [loss_type for loss_type in self.loss_type if loss_type not in LOSS_TYPES]
        if unknown:
            hint = " TRL's `sigmoid` is `pairwise` here." if "sigmoid" in unknown else ""
            raise ValueError(f"Unknown `loss_type` {unknown[0]!r}: expected one of {', '.join(LOSS_TYPES)}.{hint}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"`loss_weights` must have the same length as `loss_type`, got {len(self.loss_weights)} weights for "
                f"{len(self.loss_type)} losses."
            )
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        if self.beta is None and "linear" in self.loss_type and len(self.loss_type) > 1:
            raise ValueError(
                "`linear` and the other losses have different defaults of `beta`: set `beta` when combining them."
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must be in [0, 0.5), got {self.label_smoothing}.")
        if self.label_smoothing and not set(self.loss_type) & set(SMOOTHABLE_LOSS_TYPES):
            raise ValueError(
                f"`label_smoothing` acts on {', '.join(SMOOTHABLE_LOSS_TYPES)}, not on `loss_type={self.loss_type}`. "
                "Leave it at 0 or choose one of those."
            )
        if not 0 <= self.linear_eta <= 0.5:
            raise ValueError(f"`linear_eta` must be in [0, 0.5], got {self.linear_eta}.")
        if self.num_reference_draws is not None and self.num_reference_draws < 1:
            raise ValueError(f"`num_reference_draws` must be at least 1, got {self.num_reference_draws}.")
        if self.stop_on_displacement and not self.displacement_patience:
            raise ValueError("`stop_on_displacement` needs a `displacement_patience` above 0.")
        for option in ("sft_weight", "dpop_lambda", "displacement_patience"):
            if getattr(self, option) < 0:
                raise ValueError(f"`{option}` must be at least 0, got {getattr(self, option)}.")
