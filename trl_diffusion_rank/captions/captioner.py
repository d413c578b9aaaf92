"""Captions of images, by any image-text-to-text model of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature


# What the first 77 tokens hold is all that CLIP's text encoders read, so the subject has to come first.
INSTRUCTION = (
    "Describe the image in two or three sentences: first its subject, then the surroundings, the colors and the style."
)

# Published generation configs hold these for sampling or beam search. Greedy decoding has no use for them, and
# transformers would say so at every batch.
GREEDY = {
    "do_sample": False,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "typical_p": None,
    "num_beams": 1,
    "early_stopping": None,
    "length_penalty": None,
    "max_length": None,
}


class Captioner:
    """
    Captions images with LLaVA or another image-text-to-text model, by greedy decoding: equal images get equal
    captions, whatever stands beside them in the batch (up to the rounding of the kernels).

    A model with a chat template (LLaVA, Idefics, SmolVLM, Qwen-VL, ...) is shown the image and asked the
    `instruction`. One without is given the image alone, as BLIP, BLIP-2 and GIT want it, or, where you set an
    `instruction`, the image and that text as it is: `"<image>caption en"` for PaliGemma, `"<MORE_DETAILED_CAPTION>"`
    for Florence-2. Captions come as the model writes them; `clean_caption` makes prompts of them.

    Args:
        model (`str`, *optional*, defaults to `"llava-hf/llava-1.5-7b-hf"`):
            Hub id or folder of an image-text-to-text model and its processor.
        instruction (`str`, *optional*):
            What the model is asked; by default `INSTRUCTION`, and nothing where there is no chat template.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            A caption's greatest length in the model's tokens. A longer one ends where it is reached, in mid-sentence.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on an accelerator, float32 on a CPU.
        device (`str` or `torch.device`, *optional*):
            Where it runs; by default the accelerator, else the CPU.
        revision (`str`, *optional*):
            Branch, tag or commit of a model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the code that a model on the Hub brings along.
    """

    def __init__(
        self,
        model: str = "llava-hf/llava-1.5-7b-hf",
        *,
        instruction: str | None = None,
        max_new_tokens: int = 128,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {max_new_tokens}; a caption needs at least 1.")
        self.model_name = model
        self.max_new_tokens = max_new_tokens
        # Not `PartialState().device`: that joins the launched processes, and the caller may be a single one of them.
        self.device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        self._load(dtype, {"revision": revision, "trust_remote_code": trust_remote_code})
        self.has_chat_template = self.processor.chat_template is not None
        self.instruction = INSTRUCTION if instruction is None and self.has_chat_template else instruction

    def _load(self, dtype: str, options: dict[str, str | bool | None]) -> None:
        from transformers import (
            AutoConfig,
            AutoModelForImageTextToText,
            AutoProcessor,
            GenerationMixin,
            ProcessorMixin,
        )

        from trl_diffusion_rank.diffusion.loading import parse_dtype, sampling_dtype

        dtype = parse_dtype(sampling_dtype(dtype, self.device))
        try:
            # The weights last: what is wrong with a model shows before gigabytes are downloaded.
            config = AutoConfig.from_pretrained(self.model_name, **options)
            self.processor = AutoProcessor.from_pretrained(self.model_name, **options)
            if not isinstance(self.processor, ProcessorMixin):
                raise ValueError(f"It has no processor of images and text, only a {type(self.processor).__name__}.")
            self.model = AutoModelForImageTextToText.from_pretrained(
                self.model_name, config=config, dtype=dtype, **options
            ).eval()
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"`model` {self.model_name!r} can't be loaded as a captioner: "
                f"{str(error).strip().splitlines()[0].rstrip('.')}. Give the folder or the id on the Hub of an "
                "image-text-to-text model of transformers with its processor, such as 'llava-hf/llava-1.5-7b-hf', and "
                "check your connection and, for a gated model, `hf auth login`. One that also takes videos (Qwen-VL, "
                "SmolVLM) needs torchvision too."
            ) from error
        self.model.to(self.device)

        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # decoders go on from the last column
        if tokenizer.pad_token is None:  # Llama's and Mistral's have none
            tokenizer.pad_token = tokenizer.eos_token
        for part in self.model.modules():  # BLIP generates with its text decoder's own config
            if isinstance(part, GenerationMixin):
                part.generation_config.update(**GREEDY)
                if part.generation_config.pad_token_id is None:  # transformers 5.4 warns at every batch
                    part.generation_config.pad_token_id = tokenizer.pad_token_id

    @torch.inference_mode()
    def caption(self, images: list[Image]) -> list[str]:
        """Captions of N images, made in one batch."""
        if not images:
            return []
        images = [image.convert("RGB") for image in images]
        try:
            inputs = self._prepare(images).to(self.device, dtype=self.model.dtype)
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens)  # (N, T)
        except (TypeError, ValueError) as error:
            if self.instruction is not None:
                raise
            raise ValueError(
                f"The captioner's `model` {self.model_name!r} has no chat template and does not caption an image "
                f"alone ({error}). Set `instruction` to the whole prompt it expects, with its image token: for "
                "example '<image>caption en' (PaliGemma) or 'USER: <image>\\nDescribe it. ASSISTANT:' (LLaVA 1.5)."
            ) from error
        if "input_ids" in inputs:
            tokens = tokens[:, prompt_length(tokens, inputs["input_ids"]) :]
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prepare(self, images: list[Image]) -> BatchFeature:
        """The processor's tensors of N RGB images, each with the same instruction."""
        options = {"padding": True, "return_tensors": "pt"}
        if not self.has_chat_template:
            if self.instruction is None:
                return self.processor(images=images, return_tensors="pt")
            return self.processor(images=images, text=[self.instruction] * len(images), **options)
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": image}, {"type": "text", "text": self.instruction}],
                }
            ]
            for image in images
        ]
        return self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=options
        )


def prompt_length(tokens: torch.Tensor, prompt: torch.Tensor) -> int:
    """
    How many columns of `tokens` (N, T), which a model generated, repeat its `prompt` (N, P). That is P for most
    decoders, P - 1 for BLIP, which drops the prompt's last token, and 0 for encoder-decoders.
    """
    width = min(tokens.shape[1], prompt.shape[1])
    same = (tokens[:, :width] == prompt[:, :width]).all(dim=0)  # (width,)
    return int(same.long().cumprod(dim=0).sum())
