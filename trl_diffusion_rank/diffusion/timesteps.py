"""Where on the noise schedule a row is trained. One timestep a row, shared by its images."""

import torch
from torch import Tensor


# The four steps of SDXL-Turbo's schedule are 249, 499, 749 and 999. At 999 a schedule with zero terminal SNR leaves
# nothing of the image: with shared noise all images of a row are the same input and the gradient is exactly zero.
TURBO_TIMESTEPS = (249, 499, 749)
TIMESTEP_SAMPLING = ("uniform", "turbo", "discrete", "logit_normal")


def allowed_timesteps(sampling: str, timesteps: list[int] | None, num_train_timesteps: int) -> list[int] | None:
    """
    The grid that `sampling` draws from, or None for every timestep; raises `ValueError` for what can't be drawn.

    `timesteps` is the user's list for `discrete` (Lightning's and LCM's grids, say).
    """
    if sampling not in TIMESTEP_SAMPLING:
        raise ValueError(f"Unknown `timestep_sampling` {sampling!r}: expected one of {', '.join(TIMESTEP_SAMPLING)}.")
    if (sampling == "discrete") != (timesteps is not None):
        raise ValueError(
            f"`timesteps` is the grid of `timestep_sampling='discrete'`, got `timestep_sampling={sampling!r}` with "
            f"`timesteps={timesteps}`. Set both or neither."
        )
    if sampling in ("uniform", "logit_normal"):
        return None
    grid = list(TURBO_TIMESTEPS) if sampling == "turbo" else list(timesteps or [])
    outside = [t for t in grid if not 0 <= t < num_train_timesteps]
    if outside or not grid:
        raise ValueError(
            f"`timestep_sampling={sampling!r}` needs timesteps between 0 and {num_train_timesteps - 1}, which is what "
            f"the model's scheduler was trained with; got {outside or grid}."
        )
    return grid


def logit_normal(u: Tensor) -> Tensor:
    """
    Uniform numbers `u` (B,) in [0, 1) to noise levels (B,) whose logit is standard normal: sigmoid(Phi^-1(u)).

    Mostly the middle of the schedule, as Stable Diffusion 3 was trained (https://huggingface.co/papers/2403.03206,
    "Tailored SNR samplers for RF models").
    """
    return torch.special.ndtri(u).sigmoid()


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """
    Noise levels (B,) in [0, 1] with the odds of noise multiplied by `shift`, as the scheduler's own are.

    The more pixels an image has, the more noise it takes to hide it (https://huggingface.co/papers/2403.03206,
    "Resolution-dependent shifting of timestep schedules").
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_timesteps(u: Tensor, num_train_timesteps: int, grid: list[int] | None = None) -> Tensor:
    """Uniform numbers `u` (B,) in [0, 1) to timesteps (B,): every one is equally likely, or every one of `grid`."""
    if grid is None:
        return (u * num_train_timesteps).long()
    return torch.tensor(grid, device=u.device)[(u * len(grid)).long()]
