"""The one place that decides what DeepSpeed and FSDP may split over the processes, and what stays whole on each."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from transformers import Trainer, TrainingArguments
from transformers.integrations import deepspeed as hf_deepspeed


@contextmanager
def loading_whole() -> Iterator[None]:
    """
    Models that are loaded in here are whole on every process.

    Under ZeRO-3 Transformers splits each model while it is loaded. DeepSpeed gathers only what is trained, so text
    encoders and a discriminator in the loss would stay empty; loading a pipeline, whose components diffusers loads in
    no fixed order, hangs.
    """
    config, hf_deepspeed._hf_deepspeed_config_weak_ref = hf_deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config


def uses_fsdp(args: TrainingArguments) -> bool:
    """Whether a trainer with these arguments will use FSDP."""
    return args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def uses_zero_3(args: TrainingArguments) -> bool:
    """Whether a trainer with these arguments will use DeepSpeed's ZeRO-3."""
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def check_sharding(args: TrainingArguments, whole_weights: tuple[str, ...] = ()) -> None:
    """
    Refuse, before anything is loaded, what would train and then save nothing, or something else than was trained.

    Args:
        args: a trainer's config.
        whole_weights: options that read or write the trained weights between steps.

    Raises:
        `ValueError`: naming the option, and what to set instead.
    """
    if uses_fsdp(args):
        _check_fsdp(FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {})))
    elif uses_zero_3(args):
        config = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not config.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "ZeRO-3 without `stage3_gather_16bit_weights_on_model_save` saves nothing that can be loaded without "
                "DeepSpeed. Set it to true (`zero3_save_16bit_model` in a configuration of Accelerate)."
            )
    else:
        return
    for option in whole_weights:
        if getattr(args, option):
            raise ValueError(
                f"`{option}={getattr(args, option)!r}` can't be used with FSDP or DeepSpeed's ZeRO-3, under which a "
                "process has only a part of each weight. Leave it out, or launch with `--accelerate_config multi_gpu` "
                "or `zero2`."
            )


def keep_buffers(trainer: Trainer) -> None:
    """
    Let FSDP split a model as it lies on each process, where it has buffers that are saved with its weights.

    `cpu_ram_efficient_loading`, which TRL's `fsdp2` turns on, sends the weights of the main process to the others and
    fails at such a buffer: SD3's position embedding. It saves nothing here, diffusers loads on each process anyway.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and trainer.model.state_dict().keys() - dict(trainer.model.named_parameters()).keys():
        plugin.cpu_ram_efficient_loading = False


def _check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version` is {plugin.fsdp_version}, but only FSDP 2 is supported: FSDP 1 flattens weights of one "
            "dtype together, and a LoRA is float32 beside a bfloat16 base. Launch with `--accelerate_config fsdp2`."
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"`fsdp_state_dict_type` is {plugin.state_dict_type.name}, with which nothing is saved that can be loaded "
            "without FSDP. Set it to FULL_STATE_DICT, as `--accelerate_config fsdp2` does."
        )
