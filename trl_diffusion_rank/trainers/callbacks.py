"""What the trainers do around the optimizer's step."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_diffusion_rank.files import replace_file


logger = logging.getLogger(__name__)


class SkipNonFiniteSteps(TrainerCallback):
    """
    Leaves out an optimizer step whose gradient has a NaN or an infinity, and counts it.

    One bad batch (an overflow in half precision, a broken image) would otherwise end a run of days: AdamW's moments
    keep a NaN for ever. The gradients are the same on all processes by then, so all decide alike. Under DeepSpeed,
    which keeps gradients to itself and skips overflows of float16 by itself, nothing is seen here.

    Args:
        max_in_a_row (`int`): after so many skipped steps in a row training stops with an error.
    """

    def __init__(self, max_in_a_row: int):
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.in_a_row = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs,
    ) -> None:
        self.trained = _trained(model)  # to look for them among a UNet's thousands of modules takes tens of ms

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs,
    ) -> None:
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        if not gradients or torch.isfinite(nn.utils.get_total_norm(gradients)):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_in_a_row:
            raise FloatingPointError(
                f"The gradient wasn't finite in {self.in_a_row} steps in a row, the last being step "
                f"{state.global_step + 1}: training stops (`max_skipped_steps={self.max_in_a_row}`). Lower "
                "`learning_rate`, train with `bf16` instead of `fp16`, or look at the data; checkpoints are kept."
            )
        model.zero_grad(set_to_none=True)  # the optimizer leaves parameters without a gradient alone


class MovingAverage(TrainerCallback):
    """
    Exponential moving average of the trained weights: after each step `average += (1 - decay) * (weights - average)`.

    The average is what the trainers write for diffusers; training, evaluation and resuming go on with the weights
    themselves. At step t the decay is no more than (1 + t) / (10 + t), so that the first steps are forgotten, as in
    diffusers' `EMAModel`.

    Args:
        decay (`float`): in (0, 1).
    """

    FILE = "moving_average.pt"

    def __init__(self, decay: float):
        self.decay = decay
        self.weights: list[torch.Tensor] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs,
    ) -> None:
        if self.weights is None:  # a resumed run has them already
            self.weights = [parameter.detach().clone() for parameter in _trained(model)]

    @torch.no_grad()
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs,
    ) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_(self.weights, _trained(model), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The average in the model's place; before the first step the model as it is."""
        if self.weights is None:
            yield
            return
        trained = _trained(model)
        own = [parameter.detach().clone() for parameter in trained]
        _copy(self.weights, trained)
        try:
            yield
        finally:
            _copy(own, trained)

    def save(self, folder: str | Path) -> None:
        torch.save({"weights": self.weights}, Path(folder) / self.FILE)

    def load(self, folder: str | Path) -> None:
        """Raises `ValueError` for a checkpoint of a run without a moving average."""
        path = Path(folder) / self.FILE
        if not path.is_file():
            raise ValueError(
                f"`ema_decay={self.decay:g}`, but `{folder}` is a checkpoint of a run without a moving average. "
                "Resume without `ema_decay`, or start anew."
            )
        self.weights = torch.load(path, map_location="cpu", weights_only=True)["weights"]


class LogHistory(TrainerCallback):
    """
    Keeps `state.log_history` in the output folder while training goes on, as `log_history.jsonl`: one JSON object a
    line, what isn't finite as null.

    Only the main process writes. A resumed run begins the file again with what its checkpoint knows. A line that can't
    be written is warned of, and comes with the next.
    """

    FILE = "log_history.jsonl"

    def __init__(self):
        self._began = False
        self._is_whole = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._began, self._is_whole = True, False
        self._write(args, state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._began:  # an evaluation without training leaves the file of an earlier run alone
            self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / self.FILE
        try:
            if self._is_whole:
                self._is_whole = False
                with path.open("a") as file:
                    file.write(_json_line(state.log_history[-1]))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, "".join(map(_json_line, state.log_history)))
            self._is_whole = True
        except OSError as error:
            logger.warning(f"`{path}` can't be written, training goes on: {error}")


def _json_line(entry: dict[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }
    return json.dumps(finite) + "\n"


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def _copy(source: list[torch.Tensor], target: list[nn.Parameter]) -> None:
    for parameter, value in zip(target, source, strict=True):
        parameter.copy_(value)
