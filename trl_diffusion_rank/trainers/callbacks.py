"""What the trainers watch between the backward pass and the optimizer's step."""

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs,
    ) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
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
