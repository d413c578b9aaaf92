"""FLUX.1 dev and schnell."""

from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from trl_diffusion_rank.diffusion.families.flow import FlowMatchingFamily, t5_length


class FluxFamily(FlowMatchingFamily):
    """
    T5's states, CLIP's pooled embedding, and latents packed into tokens of 2x2, which is undone here: outside,
    latents are (C, h, w) as everywhere.

    Class attributes:
        guidance: what a guidance-distilled model (FLUX.1-dev) is told.
    """

    name = "flux"
    # 1 leaves the distilled guidance as it is, so that the tuned model is sampled at its usual 3.5; training at a
    # higher value would teach it guidance a second time (https://github.com/black-forest-labs/flux/issues/79)
    guidance: ClassVar[float] = 1.0

    @classmethod
    def recognises(cls, pipeline: DiffusionPipeline) -> bool:
        components = pipeline.components
        transformer = components.get("transformer")
        return (
            isinstance(transformer, FluxTransformer2DModel)
            # Fill, Canny and Depth take a second image in more channels
            and transformer.config.in_channels == 4 * components["vae"].config.latent_channels
            and components.get("text_encoder") is not None
            and components.get("text_encoder_2") is not None
        )

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        pipeline = self._require_pipeline()
        prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt(
            prompts,
            device=pipeline.text_encoder.device,
            max_sequence_length=t5_length(pipeline.tokenizer_2, default=512),
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        size, channels, height, width = noisy_latents.shape
        device = noisy_latents.device
        prompt_embeds = conditioning["prompt_embeds"]  # (M, L, D)
        # Positions in float32: they are whole numbers that the rotary embedding must get exactly
        image_ids = FluxPipeline._prepare_latent_image_ids(size, height // 2, width // 2, device, torch.float32)
        guidance = torch.full((size,), self.guidance, device=device) if denoiser.config.guidance_embeds else None
        prediction = denoiser(
            FluxPipeline._pack_latents(noisy_latents, size, channels, height, width),  # (M, h/2 * w/2, 4C)
            timestep=timesteps / 1000,  # the model multiplies by 1000 again
            guidance=guidance,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(prediction, height, width, vae_scale_factor=1)  # sizes are in latents

    def sampled_latents(self, latents: Tensor, resolution: int) -> Tensor:
        return FluxPipeline._unpack_latents(latents, resolution, resolution, self.vae_scale_factor)

    @staticmethod
    def input_layer(denoiser: nn.Module) -> nn.Module:
        return denoiser.x_embedder

    @staticmethod
    def _sample_size(pipeline: DiffusionPipeline) -> int:
        return pipeline.default_sample_size  # no position is learnt, so the transformer's config doesn't say

    @staticmethod
    def _patch_size(pipeline: DiffusionPipeline) -> int:
        return 2  # the pipeline packs, not the transformer
