"""Tiny CLIP and SigLIP of transformers' real classes, with random weights, and discriminators on them."""

import string
from pathlib import Path

import torch
from tiny_scorers import spread_weights
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from trl_diffusion_rank.discriminator import AestheticDiscriminator, AestheticDiscriminatorProcessor


BACKBONES = ("clip", "siglip")
IMAGE_SIZE = 16
CAPTION_LENGTH = 12
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": IMAGE_SIZE, "patch_size": 4}
TEXT = {**TOWER, "num_hidden_layers": 2, "max_position_embeddings": CAPTION_LENGTH}


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CAPTION_LENGTH)


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    """
    Letters, and </s> behind them. Case matters and the limit isn't set, as in the tokenizer of SigLIP 2; the padding
    is no </s>.
    """
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_lowercase])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def tiny_backbone(kind: str) -> PreTrainedModel:
    """A `CLIPModel` or `SiglipModel` whose scores differ between images and captions, the same at every call."""
    torch.manual_seed(0)
    if kind == "clip":
        tokenizer = clip_tokenizer()
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text = {**TEXT, **ends, "vocab_size": len(tokenizer)}
        return spread_weights(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)))
    text = {**TEXT, "vocab_size": len(siglip_tokenizer())}
    return spread_weights(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)))


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    return clip_tokenizer() if kind == "clip" else siglip_tokenizer()


def tiny_image_processor(kind: str) -> CLIPImageProcessorPil | SiglipImageProcessorPil:
    """CLIP's keeps proportions and crops, SigLIP's squeezes into a square; they normalise differently."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if kind == "clip":
        return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)
    return SiglipImageProcessorPil(size=square)


def tiny_processor(kind: str) -> AestheticDiscriminatorProcessor:
    return AestheticDiscriminatorProcessor(
        tiny_image_processor(kind), tiny_tokenizer(kind), CAPTION_LENGTH, pad_to_length=kind == "siglip"
    )


def save_tiny_backbone(kind: str, folder: Path) -> str:
    """Folder of a backbone with its image processor and tokenizer, laid out as on the Hub."""
    tiny_backbone(kind).save_pretrained(folder)
    tiny_image_processor(kind).save_pretrained(folder)
    tiny_tokenizer(kind).save_pretrained(folder)
    return str(folder)


def tiny_discriminator(kind: str, **options) -> AestheticDiscriminator:
    backbone = tiny_backbone(kind)
    torch.manual_seed(1)  # of the head
    return AestheticDiscriminator.from_backbone(backbone, head_hidden_size=8, **options).eval()


def save_tiny_discriminator(kind: str, folder: Path, **options) -> str:
    """Folder of a discriminator with its processor."""
    tiny_discriminator(kind, **options).save_pretrained(folder)
    tiny_processor(kind).save_pretrained(folder)
    return str(folder)
