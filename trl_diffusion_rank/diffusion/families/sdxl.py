"""Stable Diffusion XL, with Turbo and Lightning, which share its layout."""

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from trl_diffusion_rank.diffusion.families.base import Family


class StableDiffusionXLFamily(Family):
    """Two text encoders, the second one's pooled embedding, and six numbers that tell an image's size and crop."""

    name = "sdxl"
    default_beta = 5000.0
    default_beta_linear = 500.0

    @classmethod
    def recognises(cls, pipeline: DiffusionPipeline) -> bool:
        components = pipeline.components
        return (
            isinstance(components.get("unet"), UNet2DConditionModel)
            and components["unet"].config.addition_embed_type == "text_time"
            and components.get("text_encoder") is not None
            and components.get("text_encoder_2") is not None
        )

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        pipeline = self._require_pipeline()
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
            prompts,
            device=pipeline.text_encoder_2.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def encode_unconditional(self) -> dict[str, Tensor]:
        if self._require_pipeline().config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(tensor) for name, tensor in self.encode_prompts([""]).items()}
        return super().encode_unconditional()

    def image_conditioning(
        self, original_sizes: list[tuple[int, int]], crop_offsets: list[tuple[int, int]], resolution: int
    ) -> dict[str, Tensor]:
        """
        `add_time_ids` (N, 6): original height and width, crop top and left, target height and width
        (https://huggingface.co/papers/2307.01952, section 2.2).

        Integers, because they must reach the sinusoidal embedding exactly, and whoever casts the floats of a batch to
        half precision on the way (DeepSpeed does) leaves integers alone.
        """
        rows = [
            (*size, *offset, resolution, resolution) for size, offset in zip(original_sizes, crop_offsets, strict=True)
        ]
        return {"add_time_ids": torch.tensor(rows, dtype=torch.int32)}

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        return denoiser(
            noisy_latents,
            timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_prompt_embeds"],
                "time_ids": conditioning["add_time_ids"].float(),
            },
            return_dict=False,
        )[0]
