"""A StableDiffusionPipeline of real classes at toy size, with random weights: 8x8 images in milliseconds."""

import string

import pytest


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> str:
    """Folder of the pipeline."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=8,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocab),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=vocab["<|startoftext|>"],
                eos_token_id=vocab["<|endoftext|>"],
            )
        ),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16),
        unet=UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("tiny_pipeline")
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def black_pipeline(tiny_pipeline, tmp_path) -> str:
    """The same with a VAE that overflows: every image is black."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.weight, float("nan"))
    pipe.save_pretrained(tmp_path / "black")
    return str(tmp_path / "black")


@pytest.fixture
def prompts_folder(tmp_path) -> str:
    """What the stage `prompts` leaves: three prompts to train on, two to test."""
    from datasets import Dataset, DatasetDict

    train = Dataset.from_dict({"prompt": ["a cat", "a dog", "a cat"], "row": [0, 1, 2]})
    test = Dataset.from_dict({"prompt": ["a hen", "a cow"], "row": [3, 4]})
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "prompts")
    return str(tmp_path / "prompts")
