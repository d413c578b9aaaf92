"""This process among those of a stage, and its memory. Imports torch only when it is asked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from accelerate import PartialState


def is_main_process() -> bool:
    """Whether this process writes. The launcher tells, so that no library has to be imported to ask."""
    return os.environ.get("RANK", "0") == "0"


def process_state() -> PartialState:
    """Which of how many processes this is, and its device; the first call joins them."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # `Accelerator` looks at these, `PartialState` does not: processes launched on CPUs would each take themselves for
    # the only one.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
    # Whoever is done early waits for the others, for longer than the minutes after which a group gives up by default
    return PartialState(cpu=on_cpu, timeout=timedelta(hours=6)) if several else PartialState(cpu=on_cpu)


def free_memory() -> None:
    """Give back what the last model took, before the next one is loaded. Pipelines hold references in circles."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
