"""What the aesthetic discriminator is given: captions, and images from files or, differentiably, from pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin

from trl_diffusion_rank.discriminator.configuration import check_backbone_type


if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor


RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers; torch has no antialiased counterpart of its others


class AestheticDiscriminatorProcessor(ProcessorMixin):
    """
    The image processor and the tokenizer of the backbone, with the backbone's rules for captions.

    ```python
    inputs = processor(images=images, text=captions)  # one caption per image
    pixel_values = processor.preprocess_pixels(decoded)  # differentiable, from (N, 3, H, W) in [-1, 1]
    ```

    Args:
        image_processor (`BaseImageProcessor`):
            Of the backbone.
        tokenizer (`PreTrainedTokenizerBase`):
            Of the backbone.
        caption_length (`int`, *optional*, defaults to `77`):
            Tokens that the text tower reads; captions are cut to them. A tokenizer's own limit is often not set.
        pad_to_length (`bool`, *optional*, defaults to `False`):
            Whether every caption is padded to `caption_length` and no mask is made, as SigLIP was trained
            (https://github.com/google-research/big_vision/issues/157).
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        caption_length: int = 77,
        pad_to_length: bool = False,
    ):
        super().__init__(image_processor, tokenizer)
        self.caption_length = caption_length
        self.pad_to_length = pad_to_length

    @classmethod
    def from_backbone(cls, backbone: str) -> AestheticDiscriminatorProcessor:
        """The processor that goes with `AestheticDiscriminator.from_backbone`, from a folder or an id on the Hub."""
        try:
            config = AutoConfig.from_pretrained(backbone)
            check_backbone_type(config.model_type)
            image_processor = AutoImageProcessor.from_pretrained(backbone, backend="pil")
            tokenizer = AutoTokenizer.from_pretrained(backbone)
        except OSError as error:
            raise ValueError(
                f"The processor of the backbone {backbone!r} could not be loaded; it must be the folder of a CLIP or "
                f"SigLIP with its image processor and tokenizer, or its id on the Hub that can be reached. ({error})"
            ) from error
        return cls(
            image_processor,
            tokenizer,
            caption_length=config.text_config.max_position_embeddings,
            pad_to_length=config.model_type == "siglip",
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs) -> AestheticDiscriminatorProcessor:
        # PIL resizes the same on every machine; torchvision, the default where it is installed, slightly otherwise
        kwargs.setdefault("backend", "pil")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def __call__(self, images: Image | list[Image] | None = None, text: str | list[str] | None = None) -> BatchFeature:
        """
        Inputs of the discriminator as tensors.

        Args:
            images: N images.
            text: with images, the caption of each, which are encoded once where they are the same; alone, T captions.

        Returns:
            `BatchFeature` with `pixel_values` (N, 3, h, w); `input_ids` (T, L) and, unless captions are padded to
            one length, `attention_mask` (T, L); and with both images and captions `caption_of` (N,).
        """
        inputs = {}
        if images is not None:
            images = images if isinstance(images, (list, tuple)) else [images]
            inputs |= self.image_processor(images=list(images), return_tensors="pt")
        if text is not None:
            captions = [text] if isinstance(text, str) else list(text)
            if images is not None:
                if len(captions) != len(images):
                    raise ValueError(f"`images` are {len(images)} and `text` {len(captions)}; one caption per image.")
                distinct = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
                inputs["caption_of"] = torch.tensor([distinct[caption] for caption in captions])
                captions = list(distinct)
            inputs |= self.tokenize(captions)
        return BatchFeature(inputs)

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        """`input_ids` (T, L) and, unless captions are padded to one length, `attention_mask` (T, L)."""
        # CLIP's and SigLIP's own tokenizers do it; SigLIP 2 was trained so too, with a tokenizer that doesn't
        captions = [caption.lower() for caption in captions]
        return dict(
            self.tokenizer(
                captions,
                padding="max_length" if self.pad_to_length else "longest",
                max_length=self.caption_length,
                truncation=True,
                return_attention_mask=not self.pad_to_length,
                return_tensors="pt",
            )
        )

    def preprocess_pixels(self, pixels: Tensor) -> Tensor:
        """
        What `image_processor` does to images, differentiably: (N, 3, H, W) in [-1, 1], as a VAE decodes them, to
        (N, 3, h, w), in float32.

        The result is PIL's but for the rounding to 8 bits that PIL does after the resize along either side, and
        without which there is a gradient. Measured on noise, edges and smooth images of 16 to 1024 pixels, enlarged
        and shrunk: 0.4 of a level of 255 in the mean and 1.1 at most, which is 0.006 and 0.017 of CLIP's normalised
        units. See [`resize`] for tall images and Pillow 13.

        Values outside of [-1, 1] are clipped, as in any image that is saved; no gradient comes through where they are.
        """
        settings = self.image_processor
        images = (pixels.to(torch.promote_types(pixels.dtype, torch.float32)) + 1) / 2
        images = images.clamp(0, 1)
        if settings.do_resize:
            size = resized_size(settings, images.shape[2], images.shape[3])
            if settings.resample not in RESAMPLING:
                raise ValueError(
                    f"The image processor resizes with `resample` {settings.resample!r}; only bilinear (2) and "
                    "bicubic (3) have a differentiable counterpart."
                )
            images = resize(images, *size, RESAMPLING[settings.resample])
        if settings.do_center_crop:
            images = center_crop(images, settings.crop_size.height, settings.crop_size.width)
        if settings.do_normalize:
            mean, std = (
                images.new_tensor(values).view(-1, 1, 1) for values in (settings.image_mean, settings.image_std)
            )
            images = (images - mean) / std
        return images


def resized_size(settings: BaseImageProcessor, height: int, width: int) -> tuple[int, int]:
    """Height and width that an image processor resizes to: fixed, or by the shorter side, the longer rounded down."""
    size = settings.size
    if size.height and size.width:
        return size.height, size.width
    if not size.shortest_edge or size.longest_edge:
        raise ValueError(
            f"The image processor resizes to `size` {dict(size)!r}; `height` and `width` or `shortest_edge` alone is "
            "expected."
        )
    shorter = min(height, width)
    return int(size.shortest_edge * height / shorter), int(size.shortest_edge * width / shorter)


def resize(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    """
    (N, 3, H, W) in [0, 1] to (N, 3, height, width), antialiased, as PIL does it: along the width and then along the
    height, clipping after each, since bicubic weights overshoot. Clipping once is up to 26 levels of 255 off at edges.

    Pillow 13 starts with the height where that shrinks more than the width, as a tall image's does before a SigLIP
    (https://github.com/python-pillow/Pillow/pull/9549). Single pixels at edges then differ by up to 22 levels, as
    they do between Pillow 12 and 13; the mean stays.
    """
    for size in ((images.shape[2], width), (height, width)):
        if size != tuple(images.shape[2:]):
            images = F.interpolate(images, size=size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    return images


def center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """The centre of (N, 3, H, W)."""
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    if top < 0 or left < 0:
        raise ValueError(
            f"The image processor crops to `crop_size` {height} x {width} what it has resized to {images.shape[2]} x "
            f"{images.shape[3]}; its `size` must be at least its `crop_size`."
        )
    return images[:, :, top : top + height, left : left + width]
