from dataclasses import dataclass, field

from trl.experimental.cpo import CPOConfig

from trl_diffusion_rank.objectives.reference_free import LOSS_TYPES, SMOOTHABLE_LOSS_TYPES
from trl_diffusion_rank.trainers.diffusion_options import DiffusionOptions, refuse_meaningless


# Options of TRL's CPO that speak of tokens
_MEANINGLESS = {
    "max_length": "images are not sequences; see `resolution`",
    "max_completion_length": "images are not sequences; see `resolution`",
    "alpha": "AlphaPO reshapes probabilities, which a denoiser doesn't have; see `cpo_alpha` for CPO's second term",
    "generate_during_eval": "a denoiser writes no text; samples are judged by `evaluate`",
    "is_encoder_decoder": "a denoiser is neither encoder nor decoder of text",
    "dataset_num_proc": "images are encoded on the model's device, not by worker processes; see `encode_batch_size`",
}


@dataclass
class DiffusionCPOConfig(DiffusionOptions, CPOConfig):
    r"""
    Configuration class for the [`DiffusionCPOTrainer`].

    Only the options that are specific to diffusion CPO, or mean something else here, are listed; the rest is
    [`~trl.experimental.cpo.CPOConfig`] and [`~transformers.TrainingArguments`]. A batch size counts rows (prompts),
    each with all its images. Options that only make sense for language models raise when they are set.

    Parameters:
        > Parameters that control the loss

        loss_type (`str`, *optional*, defaults to `"plackett_luce"`):
            One of `plackett_luce`, `top1`, `pairwise`, `best_vs_worst`, `best_vs_rest`, `lambda`, `ipo`, `hinge`,
            `simpo`, `mapo`.
        beta (`float`, *optional*):
            Strength of the preference on the mean squared denoising error: `reward = -beta / 2 * error`. Defaults to
            the family's for losses without a reference: 500 for SD and SDXL, 100 for flow matching; and to 10 with
            `normalize_error`, where errors differ by about 1.
        cpo_alpha (`float`, *optional*, defaults to `0.2`):
            Weight of behaviour cloning: `beta / 2 * error` of the best images. At 0 nothing holds the model to its
            images, and it may forget all of them. `mapo` has its own such term.
        simpo_gamma (`float`, *optional*, defaults to `0.5`):
            Margin of reward that `simpo` asks for.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability in [0, 0.5) that a preference is the wrong way round, for `pairwise`, `best_vs_worst`,
            `best_vs_rest`, `lambda` and `simpo`.
        normalize_error (`bool`, *optional*, defaults to `False`):
            Divide errors by their running standard deviation in each tenth of the noise schedule, so that all
            timesteps count alike.

    The options about noise, data and safeguards are those of
    [`~trl_diffusion_rank.trainers.diffusion_options.DiffusionOptions`].

    > [!NOTE]
    > These parameters have default values different from [`~trl.experimental.cpo.CPOConfig`]:
    > - `learning_rate`: Defaults to `1e-5` instead of `1e-6`.
    > - `loss_type`: Defaults to `"plackett_luce"` instead of `"sigmoid"`.
    > - `beta`: Defaults to the family's instead of `0.1`.
    > - `cpo_alpha`: Defaults to `0.2` instead of `1.0`.
    """

    learning_rate: float = field(
        default=1e-5,
        metadata={"help": "The initial learning rate for AdamW. Never scaled by batch size or processes."},
    )

    # Parameters that control the loss
    loss_type: str = field(
        default="plackett_luce",
        metadata={
            "help": "One of plackett_luce, top1, pairwise, best_vs_worst, best_vs_rest, lambda, ipo, hinge, simpo, "
            "mapo."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the preference on the mean squared denoising error: reward = -beta / 2 * error. "
            "Defaults to the family's: 500 for SD and SDXL, 100 for flow matching; 10 with `normalize_error`."
        },
    )
    cpo_alpha: float = field(
        default=0.2,
        metadata={"help": "Weight of behaviour cloning: beta / 2 * the error of the best images. `mapo` has its own."},
    )
    simpo_gamma: float = field(default=0.5, metadata={"help": "Margin of reward that `simpo` asks for."})
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Probability in [0, 0.5) that a preference is the wrong way round, for the logistic pair losses."
        },
    )
    normalize_error: bool = field(
        default=False,
        metadata={
            "help": "Divide errors by their running standard deviation in each tenth of the noise schedule, so that "
            "all timesteps count alike."
        },
    )

    def __post_init__(self):
        self.check_options()
        super().__post_init__()

    def check_options(self) -> None:
        """
        Refuse what makes no sense, naming the option. Reads nothing but the options, so that parsed ones can be
        checked before a config is made of them (`DiffusionCPOConfig.check_options(namespace)`): making one looks for
        devices.
        """
        refuse_meaningless(self, CPOConfig, _MEANINGLESS)
        DiffusionOptions.check_shared_options(self)

        if self.loss_type not in LOSS_TYPES:
            hints = {
                "sigmoid": " TRL's `sigmoid` is `pairwise` here.",
                "linear": " `linear` weighs pairs by rewards against a reference: use the `dpo` trainer.",
            }
            hint = hints.get(self.loss_type, "")
            raise ValueError(f"Unknown `loss_type` {self.loss_type!r}: expected one of {', '.join(LOSS_TYPES)}.{hint}")
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        if not self.cpo_alpha >= 0:
            raise ValueError(f"`cpo_alpha` must be at least 0, got {self.cpo_alpha}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must be in [0, 0.5), got {self.label_smoothing}.")
        if self.label_smoothing and self.loss_type not in SMOOTHABLE_LOSS_TYPES:
            raise ValueError(
                f"`label_smoothing` acts on {', '.join(SMOOTHABLE_LOSS_TYPES)}, not on "
                f"`loss_type={self.loss_type!r}`. Leave it at 0 or choose one of those."
            )
        defaults = DiffusionCPOConfig.__dataclass_fields__
        if self.loss_type != "simpo" and self.simpo_gamma != defaults["simpo_gamma"].default:
            raise ValueError(
                f"`simpo_gamma={self.simpo_gamma}` acts on `simpo` only, not on `loss_type={self.loss_type!r}`. Leave "
                "it out or choose `simpo`."
            )
        if self.loss_type == "mapo" and self.cpo_alpha != defaults["cpo_alpha"].default:
            raise ValueError(
                f"`cpo_alpha={self.cpo_alpha}` doesn't act on `mapo`, which has its own behaviour cloning. Leave it "
                "out, or choose `pairwise`, which `mapo` is for small errors."
            )
        if self.loss_type == "mapo" and self.normalize_error:
            raise ValueError(
                "`normalize_error` can't be used with `loss_type='mapo'`, whose function of the error is made for the "
                "error itself. Leave it out or choose `pairwise`."
            )
        if self.normalize_error and self.timestep_weighting != "constant":
            raise ValueError(
                f"`normalize_error` and `timestep_weighting={self.timestep_weighting!r}` both say how much a timestep "
                "counts, and the first undoes the second. Set one of them."
            )
