"""Tiny image-text models of the real classes, made from configs and saved to a folder."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BartConfig,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)


WORDS = ("a", "red", "green", "blue", "small", "cat", "dog", "house", "tree", "on", "under", "the", "sky", "and")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PATCH, SIDE = 4, 8  # 2 x 2 patches

# As in llava-1.5, of words that the tokenizer knows: without them two instructions would read the same.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VISION = CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=PATCH,
)


def tiny_word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and the decoded text is the words with spaces between them."""
    words = (*SPECIAL, "USER:", "ASSISTANT:", *WORDS)
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right",  # the wrong side for a decoder: whoever generates has to know
    )


def spread(model: PreTrainedModel, std: float = 0.3) -> None:
    """Random weights as they are made all say nearly the same; larger ones tell images apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)


def say(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, sentence: str) -> None:
    """
    Make the model answer `sentence`, of distinct words, to any image: its layers add nothing to the embedding of the
    last token, embeddings are one-hot, and the head maps each word to the one that follows it.
    """
    chain = tokenizer.convert_tokens_to_ids(["ASSISTANT:", *sentence.split()])
    width = model.config.text_config.hidden_size
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(len(tokenizer), width))
        model.lm_head.weight.zero_()
        for token, following in zip(chain, [*chain[1:], tokenizer.eos_token_id], strict=True):
            model.lm_head.weight[following, token] = 1.0


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def tiny_llava(
    folder: Path, sentence: str | None = None, next_: bool = False, template: bool = True, **generation: Any
) -> str:
    """
    Folder of LLaVA 1.5, or of LLaVA-NeXT, whose prompts differ in length with the shape of the image. Its answers are
    random, or the words of `sentence`; `generation` is for its `generation_config.json`.
    """
    tokenizer = tiny_word_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    options = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1}
    processing = {
        "tokenizer": tokenizer,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # CLIP's class token, which "default" leaves out again
        "chat_template": CHAT_TEMPLATE if template else None,
    }
    sizes = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_convert_rgb": False,  # some published ones do not either
    }
    torch.manual_seed(0)
    if next_:
        grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(vision_config=VISION, text_config=text, image_grid_pinpoints=grid, **options)
        )
        processor = LlavaNextProcessor(LlavaNextImageProcessorPil(image_grid_pinpoints=grid, **sizes), **processing)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=VISION, text_config=text, **options))
        processor = LlavaProcessor(CLIPImageProcessorPil(**sizes), **processing)
    spread(model)
    if sentence is not None:
        say(model, tokenizer, sentence)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    return save(model, processor, folder)


def tiny_blip(folder: Path) -> str:
    """Folder of a BLIP, which has no chat template and captions without being asked."""
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", *WORDS)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, bos_token="[DEC]")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            **tower,
            "vocab_size": len(words),
            "encoder_hidden_size": 16,
            "max_position_embeddings": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config)
    spread(model)
    return save(model, BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer), folder)


def tiny_florence2(folder: Path) -> str:
    """Folder of a Florence-2: encoder and decoder, no chat template, and a text beside every image."""
    tokenizer = tiny_word_tokenizer()
    layers = ("layers", "attention_heads", "ffn_dim")
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        max_position_embeddings=64,
        **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in zip(layers, (1, 2, 32), strict=True)},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    vision = {
        "depths": (1, 1),
        "patch_size": (7, 3),
        "patch_stride": (4, 2),
        "patch_padding": (3, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (8, 16),
        "num_heads": (2, 2),
        "num_groups": (2, 2),
        "window_size": 2,
        "projection_dim": 16,
    }
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(
        Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=tokenizer.image_token_id)
    )
    spread(model)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    images.image_seq_length = 5  # 2 x 2 and their mean
    return save(model, Florence2Processor(images, tokenizer), folder)
