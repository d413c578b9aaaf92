"""What `normalize_error` keeps from step to step."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_diffusion_rank.objectives.error_scale import (
    BUCKETS,
    moments,
    remember,
    schedule_buckets,
    standard_deviations,
)


class RunningErrorScale:
    """
    Running standard deviation of the denoising errors in each bucket of the schedule, the same on all processes.

    A training step counts its own images before it divides, so the first step has a scale; evaluation counts none.

    Args:
        num_train_timesteps (`int`): length of the schedule.
        accelerator ([`~accelerate.Accelerator`]): adds up what the processes saw.
    """

    FILE = "error_scale.pt"

    def __init__(self, num_train_timesteps: int, accelerator: Accelerator):
        self.num_train_timesteps = num_train_timesteps
        self.accelerator = accelerator
        self.moments = torch.zeros(3, BUCKETS, dtype=torch.float64)  # (3, K), on the CPU: not every device has float64

    def update(self, error: Tensor, timesteps: Tensor) -> None:
        """Count the images of a training step: errors (M,) at timesteps (M,), other M on other processes."""
        new = moments(error.float(), schedule_buckets(timesteps, self.num_train_timesteps))
        self.moments = remember(self.moments, self.accelerator.reduce(new, reduction="sum").cpu().double())

    def at(self, timesteps: Tensor) -> Tensor:
        """What errors at `timesteps` (M,) are divided by, (M,) float32."""
        scales = standard_deviations(self.moments).float().to(timesteps.device)
        return scales[schedule_buckets(timesteps, self.num_train_timesteps)]

    def save(self, folder: str) -> None:
        torch.save(self.moments, Path(folder, self.FILE))

    def load(self, folder: str) -> None:
        path = Path(folder, self.FILE)
        if not path.is_file():
            raise ValueError(
                f"The checkpoint {folder} has no `{self.FILE}`: it was made without `normalize_error`, and its errors "
                "are on another scale. Resume it with `normalize_error=False`, or start a new run."
            )
        self.moments = torch.load(path, weights_only=True)
