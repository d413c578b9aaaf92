"""Stable Diffusion 3 and 3.5."""

from diffusers import DiffusionPipeline, SD3Transformer2DModel
from torch import Tensor, nn

from trl_diffusion_rank.diffusion.families.flow import FlowMatchingFamily, t5_length


class StableDiffusion3Family(FlowMatchingFamily):
    """
    Two CLIP text encoders beside each other, T5 after them, the pooled embeddings of both CLIPs.

    A pipeline loaded without T5 (`text_encoder_3=None`) has zeros in its place, as in the stock pipeline.
    """

    name = "sd3"

    @classmethod
    def recognises(cls, pipeline: DiffusionPipeline) -> bool:
        components = pipeline.components
        return (
            isinstance(components.get("transformer"), SD3Transformer2DModel)
            and components.get("text_encoder") is not None
            and components.get("text_encoder_2") is not None
        )

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        pipeline = self._require_pipeline()
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=t5_length(pipeline.tokenizer_3, default=256),
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        return denoiser(
            noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    @staticmethod
    def input_layer(denoiser: nn.Module) -> nn.Module:
        return denoiser.pos_embed.proj

    @staticmethod
    def _sample_size(pipeline: DiffusionPipeline) -> int:
        return pipeline.transformer.config.sample_size

    @staticmethod
    def _patch_size(pipeline: DiffusionPipeline) -> int:
        return pipeline.transformer.config.patch_size
