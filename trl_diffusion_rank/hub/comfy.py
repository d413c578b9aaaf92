"""
A LoRA in the keys that kohya's sd-scripts write and ComfyUI reads.

SD 1.x and 2.x: `lora_unet_` and diffusers' module names with underscores
(https://github.com/kohya-ss/sd-scripts/blob/main/networks/lora.py). SDXL: the same with the names of Stability's own
UNet (`make_unet_conversion_map`, https://github.com/kohya-ss/sd-scripts/blob/main/library/sdxl_model_util.py). The
strength of a module is `alpha / rank`.

SD3 and FLUX: ComfyUI reads diffusers' keys (`model_lora_keys_unet`,
https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/lora.py), but not the metadata where diffusers keeps the
strength, which is therefore multiplied into the weights.
"""

import json
import logging
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils import logging as diffusers_logging
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trl_diffusion_rank.digits import digits_model_path


logger = logging.getLogger(__name__)

WEIGHTS = "pytorch_lora_weights.safetensors"
SUFFIX = "_comfy.safetensors"

_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_IN_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)"
)


@dataclass
class LoraModule:
    """The weights of one adapted module: `W + scale * up @ down`."""

    down: Tensor  # (r, in, ...)
    up: Tensor  # (out, r, ...)
    scale: float

    @property
    def alpha(self) -> float:
        """The scale as kohya writes it, times the rank."""
        return self.scale * self.down.shape[0]


def save_comfy_lora(lora: str | Path, base_model: str | nn.Module, output: str | Path | None = None) -> Path:
    """
    Write a diffusers LoRA file of SD, SDXL, SD3 or FLUX once more, for ComfyUI and others that read its keys.

    Args:
        lora (`str` or `Path`):
            The file, or the folder of `pytorch_lora_weights.safetensors`. Anybody's, not only this package's.
        base_model (`str` or `torch.nn.Module`):
            What the LoRA was trained on, by Hub id or folder of its pipeline, or its loaded denoiser. It is asked for
            its config, for SDXL's names count its blocks.
        output (`str` or `Path`, *optional*):
            Defaults to `<folder's name>_comfy.safetensors` beside the file.

    Returns:
        `Path`: of the written file.

    Raises:
        `ValueError`: naming what the keys can't say. No module is left out.
    """
    file = Path(lora, WEIGHTS) if Path(lora).is_dir() else Path(lora)
    if not file.is_file():
        raise ValueError(f"There is no LoRA at {str(file)!r}: give a file, or a folder with {WEIGHTS}.")
    folder = file.resolve().parent
    output = Path(output) if output is not None else folder / f"{folder.name}{SUFFIX}"
    kind, config = _denoiser_of(base_model)
    if kind == "UNet2DConditionModel":
        modules = read_lora(file, "unet")
        tensors = kohya_tensors(modules, config)
        metadata = _kohya_metadata(modules, config, output.stem)
    elif kind in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        tensors, metadata = {}, {}
        for name, module in read_lora(file, "transformer").items():
            tensors[f"transformer.{name}.lora_A.weight"] = module.down
            tensors[f"transformer.{name}.lora_B.weight"] = module.up * module.scale
    else:
        raise ValueError(f"ComfyUI's keys are known for UNets, SD3 and FLUX; the base model is a `{kind}`.")
    unfinished = output.with_name(f"{output.name}.tmp")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, unfinished, {"format": "pt", **metadata})
    unfinished.replace(output)
    return output


def save_comfy_lora_if_possible(lora: str | Path, base_model: str | nn.Module, output: Path | None = None) -> None:
    """As [`save_comfy_lora`], with a warning in the place of its error: the diffusers file is there all the same."""
    try:
        save_comfy_lora(lora, base_model, output)
    except ValueError as error:
        logger.warning(f"No file for ComfyUI was written: {error}")


def read_lora(file: Path, denoiser_name: str) -> dict[str, LoraModule]:
    """
    The modules of a diffusers LoRA file by the denoiser's own names.

    Raises:
        `ValueError`: if it holds something else than plain LoRA of the denoiser.
    """
    with safe_open(file, "pt") as opened:
        metadata = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        tensors = convert_unet_state_dict_to_peft({key: opened.get_tensor(key) for key in opened.keys()})
    prefix = f"{denoiser_name}."
    config = {key.removeprefix(prefix): value for key, value in metadata.items()}
    if any("lora_magnitude_vector" in key for key in tensors):
        raise ValueError(
            f"{file.name} holds a DoRA, whose magnitudes stock diffusers leaves out when it reads these keys. Train "
            "without `use_dora`."
        )
    foreign = sorted(key for key in tensors if not re.fullmatch(rf"{prefix}.+\.lora_[AB]\.weight", key))
    if foreign:
        raise ValueError(
            f"{file.name} holds more than a LoRA of the {denoiser_name} in diffusers' keys: {', '.join(foreign[:3])}"
            f"{' ...' if len(foreign) > 3 else ''}."
        )
    modules = {}
    for name in sorted({key.removeprefix(prefix).split(".lora_")[0] for key in tensors}):
        down, up = (tensors[f"{prefix}{name}.lora_{letter}.weight"] for letter in "AB")
        rank = down.shape[0]
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns, name), config.get("lora_alpha", rank))
        modules[name] = LoraModule(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return modules


def kohya_tensors(modules: dict[str, LoraModule], config: dict[str, Any]) -> dict[str, Tensor]:
    """
    The tensors of all modules in kohya's keys, which stock diffusers is asked to read back.

    Raises:
        `ValueError`: naming the first module for which there is no name, or that diffusers would take for another.
    """
    tensors = {}
    common = _common_alpha(modules)
    for name, module in modules.items():
        key = f"lora_unet_{kohya_name(name, config)}"
        tensors[f"{key}.lora_down.weight"] = module.down
        # One alpha for all: stock diffusers loses the ones of attention projections where they differ
        tensors[f"{key}.lora_up.weight"] = module.up * (module.alpha / common) if module.alpha != common else module.up
        tensors[f"{key}.alpha"] = torch.tensor(common, dtype=torch.float32)
    lost = sorted(modules.keys() - _read_by_diffusers(tensors, config))
    if lost or len(tensors) != 3 * len(modules):
        raise ValueError(
            f"Stock diffusers doesn't find {len(lost)} of {len(modules)} modules again in kohya's keys, "
            f"{', '.join(lost[:1])} for one: this UNet's blocks are not laid out as SD's or SDXL's."
        )
    return tensors


def _common_alpha(modules: dict[str, LoraModule]) -> float:
    return Counter(module.alpha for module in modules.values()).most_common(1)[0][0]


def kohya_name(module: str, config: dict[str, Any]) -> str:
    """What kohya calls a module of a UNet with this config: diffusers' name for SD, Stability's for SDXL."""
    return (_stability_name(module, config) if _is_sdxl(config) else module).replace(".", "_")


def _is_sdxl(config: dict[str, Any]) -> bool:
    if config["addition_embed_type"] not in (None, "text_time"):
        raise ValueError(
            "kohya's keys are known for SD and SDXL, whose UNets have `addition_embed_type` None or 'text_time', not "
            f"{config['addition_embed_type']!r}."
        )
    return config["addition_embed_type"] == "text_time"


def _stability_name(module: str, config: dict[str, Any]) -> str:
    """`down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in`"""
    if module in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[module]
    match = _IN_BLOCK.fullmatch(module)
    resnets = config["layers_per_block"]
    if match is None or not isinstance(resnets, int):
        raise ValueError(f"SDXL's UNet has no name for `{module}` with `layers_per_block` {resnets}.")
    kind, number, rest = match["kind"], int(match["number"]), match["rest"]
    if kind == "resnets":
        rest = _IN_RESNET.get(rest, rest)
    if match["side"] is None:
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
    first = (resnets + 1) * int(match["block"])
    if match["side"] == "down":  # the first input block is `conv_in`
        if kind == "downsamplers":
            return f"input_blocks.{first + resnets + 1}.0.op"
        return f"input_blocks.{first + number + 1}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":  # comes after the last resnet, and its attention where there is one
        has_attention = "Attn" in config["up_block_types"][int(match["block"])]
        return f"output_blocks.{first + resnets}.{1 + has_attention}.{rest}"
    return f"output_blocks.{first + number}.{int(kind == 'attentions')}.{rest}"


def _read_by_diffusers(tensors: dict[str, Tensor], config: dict[str, Any]) -> set[str]:
    """Names of the modules that stock diffusers finds in kohya's keys."""
    is_sdxl = _is_sdxl(config)
    pipeline_class = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        unet_config = SimpleNamespace(**config) if is_sdxl else None
        state, _ = pipeline_class.lora_state_dict(dict(tensors), unet_config=unet_config)
    except (KeyError, ValueError) as error:
        raise ValueError(f"Stock diffusers can't read kohya's keys of this UNet: {error}") from error
    finally:
        diffusers_logging.set_verbosity(level)
    return {key.removeprefix("unet.").split(".lora_")[0] for key in convert_unet_state_dict_to_peft(state)}


def _kohya_metadata(modules: dict[str, LoraModule], config: dict[str, Any], title: str) -> dict[str, str]:
    """What sd-scripts writes and user interfaces show, as far as the file knows it."""
    is_sdxl = _is_sdxl(config)
    is_v2 = config["cross_attention_dim"] == 1024
    version = "sdxl_base_v1-0" if is_sdxl else "sd_v2" if is_v2 else "sd_v1"
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(Counter(module.down.shape[0] for module in modules.values()).most_common(1)[0][0]),
        "ss_network_alpha": f"{_common_alpha(modules):g}",
        "ss_base_model_version": version,
    }
    if is_v2 and not is_sdxl:
        return metadata  # of 2.x there are two, which the UNet doesn't tell apart
    # https://github.com/Stability-AI/ModelSpec
    return metadata | {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if is_sdxl else 'v1'}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if is_sdxl else "diffusers",
        "modelspec.title": title,
    }


def _denoiser_of(base_model: str | nn.Module) -> tuple[str, dict[str, Any]]:
    """Class and config of a base model's denoiser."""
    if isinstance(base_model, nn.Module):
        return type(base_model).__name__, dict(base_model.config)
    path = digits_model_path() if base_model == "digits" else base_model
    try:
        components = DiffusionPipeline.load_config(path)
        name = "unet" if "unet" in components else "transformer"
        kind = components[name][1]
        return kind, dict(getattr(diffusers, kind).load_config(path, subfolder=name))
    except (OSError, KeyError) as error:
        raise ValueError(
            f"The config of the base model {base_model!r} can't be read: {str(error).strip().splitlines()[0]} Give "
            "the Hub id or the folder of a diffusers pipeline."
        ) from error
