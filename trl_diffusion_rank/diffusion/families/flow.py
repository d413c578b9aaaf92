"""What the families of flow matching share: straight paths from images to noise, and the speed along them."""

import math

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_diffusion_rank.diffusion.families.base import Family
from trl_diffusion_rank.diffusion.timesteps import logit_normal, sample_timesteps, shift_sigmas


class FlowMatchingFamily(Family):
    """
    Rectified flow (https://huggingface.co/papers/2209.03003) in diffusers' convention:

        x_t = (1 - sigma) x_0 + sigma noise,    target = noise - x_0,    timestep = 1000 sigma

    Timesteps are floats: the noise levels of a flow are continuous.

    The error of the velocity weighs all noise levels alike; that of the noise is (1 - sigma)^2 of it. A constant
    `beta` on the velocity's error was found best (https://huggingface.co/papers/2501.13918).
    """

    denoiser_name = "transformer"
    # The attention projections of both streams, of the image (first line) and of the text
    lora_target_modules = (
        *("to_k", "to_q", "to_v", "to_out.0"),
        *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
    )
    default_beta = 500.0
    default_beta_linear = 500.0
    default_beta_reference_free = 100.0
    timestep_samplings = ("logit_normal", "uniform", "discrete")
    default_timestep_sampling = "logit_normal"

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        self.patch_size: int = self._patch_size(pipeline)

    @staticmethod
    def _training_scheduler(pipeline: DiffusionPipeline) -> FlowMatchEulerDiscreteScheduler:
        """The pipeline's shift, whatever its sampler."""
        if "shift" not in pipeline.scheduler.config:
            raise ValueError(
                f"The scheduler is a `{type(pipeline.scheduler).__name__}` without a `shift`, so it isn't known at "
                "which noise levels the model was trained. Use the model's own `FlowMatchEulerDiscreteScheduler`."
            )
        return FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)

    # Noise levels

    @property
    def last_timestep(self) -> int:
        return self.num_train_timesteps  # noise alone, from which the velocity still tells the images apart

    def shift(self, resolution: int | None = None) -> float:
        """
        By which factor the scheduler multiplies the odds of noise, for images of `resolution` pixels a side: a number
        of its config (SD3), or one that grows with the image's number of tokens (FLUX).
        """
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        side = (resolution or self.default_resolution) // (self.vae_scale_factor * self.patch_size)
        mu = calculate_shift(
            side**2, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def sample_timesteps(
        self, u: Tensor, sampling: str, grid: list[int] | None, resolution: int | None = None
    ) -> Tensor:
        """
        As [`Family.sample_timesteps`], floats in [0, 1000]. `logit_normal` and `uniform` draw the noise level before
        the scheduler's shift, `discrete` gives the timesteps as the model is told them, after it.
        """
        if grid is not None:
            return sample_timesteps(u, self.num_train_timesteps, grid).to(u.dtype)
        sigmas = logit_normal(u) if sampling == "logit_normal" else u
        return shift_sigmas(sigmas, self.shift(resolution)) * self.num_train_timesteps

    # The noise process

    def _alpha_and_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (timesteps / self.num_train_timesteps).to(like.dtype).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def schedule(self) -> Tensor:
        """Timesteps over the whole interval without its ends, where there is no signal or no noise, (1000,)."""
        return (torch.arange(1000) + 0.5) * self.num_train_timesteps / 1000

    def clean_error_per_error(self, snr: Tensor) -> Tensor:
        """sigma^2 = 1 / (1 + sqrt(SNR))^2, as x_0 = x_t - sigma v with sigma = 1 - alpha. (M,)"""
        return 1 / (1 + snr.sqrt()).square()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self._alpha_and_sigma(timesteps, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity from image to noise, the same all the way. (M, C, h, w)"""
        return noise - latents

    def predict_clean(self, noisy_latents: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """The estimate of x_0 (M, C, h, w) that a prediction stands for: x_t - sigma pred."""
        _, sigma = self._alpha_and_sigma(timesteps, noisy_latents)
        return noisy_latents - sigma * prediction


def t5_length(tokenizer: PreTrainedTokenizerBase | None, default: int) -> int:
    """Tokens that a prompt is padded to for T5: the pipeline's `default`, or fewer if the tokenizer takes fewer."""
    return default if tokenizer is None else min(default, tokenizer.model_max_length)
