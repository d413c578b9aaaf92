"""What a family must answer: how one kind of model is noised, asked and decoded."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn

from trl_diffusion_rank.diffusion.timesteps import TIMESTEP_SAMPLING, allowed_timesteps, sample_timesteps


class Family(ABC):
    """
    One kind of text-to-image model. Nothing here is about training, saving or devices.

    A family is made from a diffusers pipeline and takes its encoders and scheduler from it. Conditioning is a dict of
    tensors by diffusers' names; what belongs to the prompt comes from `encode_prompts`, what belongs to the single
    image (sizes and crops) from `image_conditioning`.

    Class attributes:
        name: how the family is called in options and errors.
        denoiser_name: the pipeline's component that is trained.
        lora_target_modules: what LoRA adapts when the user doesn't say: the attention projections.
        default_beta, default_beta_linear: strength on mean errors with the 1/2 inside, for the logistic losses and for
            `linear`.
        default_beta_reference_free: the same for the losses without a reference.
        timestep_samplings: the kinds of `timestep_sampling` that make sense for it.
        default_timestep_sampling: the one it gets when the user doesn't say.
    """

    name: ClassVar[str]
    denoiser_name: ClassVar[str] = "unet"
    lora_target_modules: ClassVar[tuple[str, ...]] = ("to_k", "to_q", "to_v", "to_out.0")
    default_beta: ClassVar[float]
    default_beta_linear: ClassVar[float]
    default_beta_reference_free: ClassVar[float] = 500.0
    timestep_samplings: ClassVar[tuple[str, ...]] = ("uniform", "turbo", "discrete")
    default_timestep_sampling: ClassVar[str] = "uniform"

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline: DiffusionPipeline | None = pipeline
        self.pipeline_class: type[DiffusionPipeline] = type(pipeline)
        self.denoiser_class: type[nn.Module] = type(getattr(pipeline, self.denoiser_name))
        self.scheduler = self._training_scheduler(pipeline)
        vae = pipeline.vae
        self.vae_scale_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.default_resolution: int = self._sample_size(pipeline) * self.vae_scale_factor
        self.resolution_multiple: int = self.vae_scale_factor * self._patch_size(pipeline)

    @classmethod
    @abstractmethod
    def recognises(cls, pipeline: DiffusionPipeline) -> bool:
        """Whether the pipeline's components are of this family."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """P prompts to the embeddings that the denoiser is asked with, {name: (P, ...)}."""

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        """Ask the denoiser: (M, C, h, w), (M,), {name: (M, ...)} -> (M, C, h, w)."""

    def encode_unconditional(self) -> dict[str, Tensor]:
        """What the denoiser is asked with where a caption is dropped, {name: (1, ...)}: as the pipeline's guidance."""
        return self.encode_prompts([""])

    def image_conditioning(
        self, original_sizes: list[tuple[int, int]], crop_offsets: list[tuple[int, int]], resolution: int
    ) -> dict[str, Tensor]:
        """What the model is told of each image's own size: {name: (N, ...)}, empty for families that aren't told."""
        return {}

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The frozen modules that turn prompts and images into tensors, by their names in the pipeline."""
        names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        components = self._require_pipeline().components
        return {name: components[name] for name in names if components.get(name) is not None}

    def drop_encoders(self) -> None:
        """Let go of the pipeline, so that its VAE and text encoders can leave memory."""
        self.pipeline = None

    def _require_pipeline(self) -> DiffusionPipeline:
        if self.pipeline is None:
            raise RuntimeError("The VAE and the text encoders have left memory: encode the dataset before that.")
        return self.pipeline

    @staticmethod
    def input_layer(denoiser: nn.Module) -> nn.Module:
        """The layer that takes the latents in."""
        return denoiser.conv_in

    @staticmethod
    def _sample_size(pipeline: DiffusionPipeline) -> int:
        """Side of the latents that the denoiser was trained on."""
        return pipeline.unet.config.sample_size

    @staticmethod
    def _patch_size(pipeline: DiffusionPipeline) -> int:
        """Side in latents of what the denoiser takes as one token: an image must be a whole number of them."""
        return 1

    # Images and latents. The latent conventions of AutoencoderKL: scaled, and centred where its config says so.

    def encode_images(self, pixels: Tensor) -> Tensor:
        """
        Pixels (N, 3, H, W) in [-1, 1] to the latents (N, C, h, w) the denoiser works on, float32.

        The posterior's mean, not a sample: what is cached must not depend on a draw, and its standard deviation is a
        thousandth of the latents'.
        """
        vae = self._require_pipeline().vae
        if vae.config.get("force_upcast", False) and vae.dtype == torch.float16:
            vae.to(torch.float32)  # SDXL's VAE overflows in float16
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"The VAE `{vae.config.get('_name_or_path') or type(vae).__name__}` gives non-finite latents in "
                f"{vae.dtype}. Load the pipeline with `dtype='bfloat16'` or `'float32'`, or with a VAE that is "
                "safe in float16 (madebyollin/sdxl-vae-fp16-fix)."
            )
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) to pixels (N, 3, H, W), nominally in [-1, 1]: the inverse of `encode_images`."""
        vae = self._require_pipeline().vae
        mean, std = self._latent_statistics(latents)
        return vae.decode((latents / vae.config.scaling_factor * std + mean).to(vae.dtype)).sample

    def sampled_latents(self, latents: Tensor, resolution: int) -> Tensor:
        """What the stock pipeline gives with `output_type="latent"`, as `decode` takes it: (N, C, h, w)."""
        return latents

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Per-channel mean and standard deviation (1, C, 1, 1) that the VAE's config asks for, else 0 and 1."""
        config = self._require_pipeline().vae.config
        mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
        std = config.get("latents_std") or [1.0]
        return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)

    # The noise process. Variance-preserving diffusion; families of flow matching override these.

    @staticmethod
    def _training_scheduler(pipeline: DiffusionPipeline) -> DDPMScheduler:
        """The pipeline's noise schedule, whatever its sampler: the `add_noise` of Euler's scales differently."""
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"The scheduler's `prediction_type` is {scheduler.config.prediction_type!r}; expected 'epsilon', "
                "'v_prediction' or 'sample'."
            )
        return scheduler

    @property
    def num_train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    @property
    def last_timestep(self) -> int:
        """The noisiest timestep."""
        return self.num_train_timesteps - 1

    def timestep_grid(self, sampling: str, timesteps: list[int] | None) -> list[int] | None:
        """
        The grid that `sample_timesteps` is given, or None where it draws from all timesteps; `timesteps` is the user's
        list for `discrete`. Raises `ValueError` for what can't be drawn or doesn't fit this kind of model.
        """
        if sampling in TIMESTEP_SAMPLING and sampling not in self.timestep_samplings:
            raise ValueError(
                f"`timestep_sampling={sampling!r}` doesn't fit the `{self.name}` family: `turbo` is the schedule of "
                "SDXL-Turbo, and `logit_normal` is for flow matching (SD3, FLUX). Use "
                f"{', '.join(self.timestep_samplings)}, or leave it unset for {self.default_timestep_sampling!r}."
            )
        return allowed_timesteps(sampling, timesteps, self.last_timestep + 1)

    def sample_timesteps(
        self, u: Tensor, sampling: str, grid: list[int] | None, resolution: int | None = None
    ) -> Tensor:
        """
        Uniform numbers `u` (B,) in [0, 1) to timesteps (B,).

        Args:
            u: one number for each row.
            sampling: one of `timestep_samplings`.
            grid: what `timestep_grid` gave for it.
            resolution: side in pixels of the images; read by families whose schedule depends on it, for which it
                defaults to `default_resolution`.
        """
        return sample_timesteps(u, self.num_train_timesteps, grid)

    def _alpha_and_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise levels (M, 1, 1, 1) at `timesteps` (M,): x_t = alpha x_0 + sigma noise."""
        alphas_cumprod = self.scheduler.alphas_cumprod.to(like.device)[timesteps].to(like.dtype).view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def schedule(self) -> Tensor:
        """All timesteps that were trained, (T,)."""
        return torch.arange(self.num_train_timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at `timesteps` (M,), float32."""
        alpha, sigma = self._alpha_and_sigma(timesteps, torch.empty(0, device=timesteps.device))
        return (alpha / sigma).square().flatten()

    def clean_error_per_error(self, snr: Tensor) -> Tensor:
        """
        How many times the error of the clean estimate is the prediction's error, (M,): 1 / SNR for epsilon, sigma^2 =
        1 / (1 + SNR) for velocity, 1 for the sample itself.
        """
        if self.scheduler.config.prediction_type == "sample":
            return torch.ones_like(snr)
        return 1 / (1 + snr) if self.scheduler.config.prediction_type == "v_prediction" else 1 / snr

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (M, C, h, w) from x_0, noise and timesteps (M,)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the prediction is compared with, by the scheduler's `prediction_type`. (M, C, h, w)"""
        if self.scheduler.config.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise if self.scheduler.config.prediction_type == "epsilon" else latents

    def predict_clean(self, noisy_latents: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """
        The estimate of x_0 (M, C, h, w) that a prediction stands for.

            epsilon: (x_t - sigma pred) / alpha     v_prediction: alpha x_t - sigma pred     sample: pred

        Raises `ValueError` where alpha is 0 and the target is epsilon: x_t then says nothing about x_0.
        """
        alpha, sigma = self._alpha_and_sigma(timesteps, noisy_latents)
        if self.scheduler.config.prediction_type == "sample":
            return prediction
        if self.scheduler.config.prediction_type == "v_prediction":
            return alpha * noisy_latents - sigma * prediction
        if (alpha < 1e-3).any():
            raise ValueError(
                "There is no clean estimate from an epsilon prediction at a timestep without signal (alpha = 0, zero "
                "terminal SNR). Leave the last timestep out."
            )
        return (noisy_latents - sigma * prediction) / alpha
