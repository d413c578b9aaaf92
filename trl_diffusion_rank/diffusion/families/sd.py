"""Stable Diffusion 1.x and 2.x."""

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from trl_diffusion_rank.diffusion.families.base import Family


class StableDiffusionFamily(Family):
    """One CLIP text encoder, a UNet with cross attention, nothing said about sizes."""

    name = "sd"
    default_beta = 2000.0
    default_beta_linear = 250.0

    @classmethod
    def recognises(cls, pipeline: DiffusionPipeline) -> bool:
        components = pipeline.components
        return (
            isinstance(components.get("unet"), UNet2DConditionModel)
            and components["unet"].config.addition_embed_type is None
            and components.get("text_encoder") is not None
            and components.get("text_encoder_2") is None
        )

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        pipeline = self._require_pipeline()
        prompt_embeds, _ = pipeline.encode_prompt(
            prompts,
            device=pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": prompt_embeds}

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        return denoiser(
            noisy_latents, timesteps, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False
        )[0]
