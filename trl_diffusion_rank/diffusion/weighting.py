"""How much the error at a timestep counts: the explicit omega(t) that Diffusion-DPO folds into beta."""

import torch
from torch import Tensor

from trl_diffusion_rank.diffusion.families.base import Family


TIMESTEP_WEIGHTINGS = ("constant", "min_snr", "snr_sqrt")
MIN_SNR_GAMMA = 5.0  # of the paper


def timestep_weights(family: Family, weighting: str, timesteps: Tensor) -> Tensor:
    """
    Weights (M,) of the errors at `timesteps` (M,), with mean 1 over the schedule, so that `beta` keeps its meaning.

    Both are stated on the error of the clean image, whatever the denoiser predicts, with SNR = alpha^2 / sigma^2:

        min_snr    min(SNR, 5)    https://huggingface.co/papers/2303.09556
        snr_sqrt   sqrt(SNR)      https://huggingface.co/papers/2310.08442 (debiased estimation)

    `constant` is 1 on the error as it is predicted.
    """
    if weighting == "constant":
        return torch.ones(timesteps.shape, device=timesteps.device)
    schedule = _weights(family, weighting, family.schedule())
    return _weights(family, weighting, timesteps) / schedule.mean().to(timesteps.device)


def _weights(family: Family, weighting: str, timesteps: Tensor) -> Tensor:
    snr = family.snr(timesteps).clamp(1e-4, 1e4)  # a schedule may end without signal or begin without noise
    on_clean = snr.clamp(max=MIN_SNR_GAMMA) if weighting == "min_snr" else snr.sqrt()
    return on_clean * family.clean_error_per_error(snr)
