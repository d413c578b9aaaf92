"""Tiny pipelines of the real classes, made from configs, and ranked rows to train them on."""

import string

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image as PILImage
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


WORDS = ("a", "red", "green", "blue", "cat", "dog", "sun", "house")


def tiny_tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16, pad_token="<|endoftext|>")


def tiny_text_encoder(tokenizer: CLIPTokenizer, with_projection: bool = False):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def tiny_t5_tokenizer() -> T5Tokenizer:
    tokens = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(token, -2.0) for token in tokens], extra_ids=0, model_max_length=24)


def tiny_t5_encoder(tokenizer: T5Tokenizer, d_model: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=d_model, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def tiny_vae(latent_channels: int = 4, **kwargs) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        **kwargs,
    ).eval()


def tiny_unet(**kwargs) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **kwargs,
    )


def tiny_sd_pipeline(prediction_type: str = "epsilon", **scheduler) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(cross_attention_dim=16),
        scheduler=DDIMScheduler(
            prediction_type=prediction_type,
            timestep_spacing="trailing",
            clip_sample=False,
            steps_offset=1,
            **scheduler,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl_pipeline(prediction_type: str = "epsilon", **scheduler) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return StableDiffusionXLPipeline(
        vae=tiny_vae(force_upcast=True),
        text_encoder=tiny_text_encoder(tokenizer),
        text_encoder_2=tiny_text_encoder(tokenizer, with_projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        scheduler=DDIMScheduler(
            prediction_type=prediction_type,
            timestep_spacing="trailing",
            clip_sample=False,
            steps_offset=1,
            **scheduler,
        ),
        add_watermarker=False,
    )


def tiny_flow_vae() -> AutoencoderKL:
    return tiny_vae(16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def tiny_sd3_pipeline(t5: bool = True) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tokenizer, t5_tokenizer = tiny_tokenizer(), tiny_t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=40,  # T5's width; both CLIPs together have 32
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_flow_vae(),
        text_encoder=tiny_text_encoder(tokenizer, with_projection=True),
        tokenizer=tokenizer,
        text_encoder_2=tiny_text_encoder(tokenizer, with_projection=True),
        tokenizer_2=tokenizer,
        text_encoder_3=tiny_t5_encoder(t5_tokenizer, d_model=40) if t5 else None,
        tokenizer_3=t5_tokenizer if t5 else None,
    )


def tiny_flux_pipeline(guidance_embeds: bool = True) -> FluxPipeline:
    """In FLUX.1-dev's layout, or schnell's without `guidance_embeds`."""
    torch.manual_seed(0)
    tokenizer, t5_tokenizer = tiny_tokenizer(), tiny_t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_flow_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5_encoder(t5_tokenizer, d_model=32),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def random_image(generator: np.random.Generator, size: tuple[int, int] = (16, 16)) -> PILImage.Image:
    """An RGB image of `size` (width, height)."""
    return PILImage.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def ranked_dataset(counts: tuple[int, ...] = (4, 4, 3, 2, 4, 2), seed: int = 0) -> Dataset:
    """Rows of the contract with `counts[i]` images each, ranked in a shuffled order."""
    generator = np.random.default_rng(seed)
    rows = [
        {
            "prompt": f"a {WORDS[1 + index % 3]} {WORDS[4 + index % 4]}",
            "images": [random_image(generator) for _ in range(n)],
            "ranks": (generator.permutation(n) + 1).tolist(),
        }
        for index, n in enumerate(counts)
    ]
    features = Features({"prompt": Value("string"), "images": List(Image()), "ranks": List(Value("int32"))})
    return Dataset.from_list(rows, features=features)
