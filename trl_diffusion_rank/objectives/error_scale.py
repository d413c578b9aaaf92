"""
The spread of denoising errors along the noise schedule: pure functions of tensors.

An error's size depends on the timestep far more than on the model: noise is hard to tell from an almost clean image.
Divided by its own standard deviation there, an error counts alike wherever it was measured.

Moments are (3, K): number, sum and sum of squares of the errors of each of K buckets of the schedule.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


BUCKETS = 10
# A bucket remembers its last thousand images or so
FORGETTING = 0.999
# So many images are pretended to have had a standard deviation as large as the mean. One row alone, whose images share
# timestep and noise, can agree by chance, and dividing by almost nothing would be a leap.
PRIOR_COUNT = 8


def schedule_buckets(timesteps: Tensor, num_train_timesteps: int) -> Tensor:
    """Timesteps (M,) to the number of their bucket in [0, K), equal parts of the schedule. (M,)"""
    return (timesteps * BUCKETS / num_train_timesteps).long().clamp(0, BUCKETS - 1)


def moments(error: Tensor, buckets: Tensor) -> Tensor:
    """Moments (3, K) of errors (M,) that fell into `buckets` (M,)."""
    member = F.one_hot(buckets, BUCKETS).to(error.dtype)  # (M, K)
    return torch.stack([torch.ones_like(error), error, error.square()]) @ member


def remember(old: Tensor, new: Tensor) -> Tensor:
    """Moments (3, K) after new ones: what a bucket held fades by `FORGETTING` for each new image in it."""
    return old * FORGETTING ** new[0] + new


def standard_deviations(moments: Tensor) -> Tensor:
    """
    Of each bucket, (K,), from its moments (3, K).

        sqrt((number * variance + PRIOR_COUNT * mean^2) / (number + PRIOR_COUNT))

    A bucket without images takes the moments of all others, and 1 where there are none at all.
    """
    moments = torch.where(moments[0] > 0, moments, moments.sum(1, keepdim=True))
    number = moments[0].clamp(min=torch.finfo(moments.dtype).tiny)
    mean = moments[1] / number
    variance = (moments[2] / number - mean.square()).clamp(min=0)
    spread = ((moments[0] * variance + PRIOR_COUNT * mean.square()) / (moments[0] + PRIOR_COUNT)).sqrt()
    return torch.where(moments[0] > 0, spread.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
