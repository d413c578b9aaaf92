"""
The adversarial term: pure functions of tensors.

`scores` (N,) are a discriminator's logits of N images, above 0 for what it takes for real. Losses are of each image,
(N,), so that means can be taken over the images of all processes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def frozen_loss(scores: Tensor, margin: float) -> Tensor:
    """
    What a denoiser pays a discriminator that doesn't learn: relu(margin - score). (N,)

    Past the margin there is nothing more to win: a frozen discriminator that is pushed on is only hacked.
    """
    return F.relu(margin - scores)


def joint_loss(scores: Tensor) -> Tensor:
    """What a denoiser pays a discriminator that learns beside it: -score (https://huggingface.co/papers/1705.02894)."""
    return -scores


def discriminator_loss(scores: Tensor, real: Tensor) -> Tensor:
    """The hinge that trains a discriminator: relu(1 - score) where `real` (N,), else relu(1 + score). (N,)"""
    return F.relu(torch.where(real, 1 - scores, 1 + scores))


def smoothness_penalty(scores: Tensor, noisy_scores: Tensor) -> Tensor:
    """
    R1 approximated without second derivatives: ||D(x) - D(x + 0.01 n)||^2 of real images. (N,)

    From Seaweed-APT (https://huggingface.co/papers/2501.08316), which uses standard deviation 0.01 and weight 100.
    """
    return (scores - noisy_scores).square()


def adaptive_ratio(gradient: Tensor, adversarial_gradient: Tensor, largest: float = 1e4) -> float | None:
    """
    How much longer the main loss's gradient is than the adversarial one's at one weight, at most `largest`, as in
    VQGAN (https://huggingface.co/papers/2012.09841, equation 7). None where one of them is 0 or not finite, which
    happens past the margin and tells nothing.
    """
    norms = torch.stack([gradient.float().norm(), adversarial_gradient.float().norm()]).tolist()
    if not all(0 < norm < float("inf") for norm in norms):  # False for NaN too
        return None
    return min(norms[0] / norms[1], largest)


def moving_average(average: float | None, value: float | None, decay: float) -> float | None:
    """decay * average + (1 - decay) * value, begun with the first value; without a value the average stays."""
    if average is None or value is None:
        return value if average is None else average
    return decay * average + (1 - decay) * value


def with_gradient(value: Tensor, prediction: Tensor, gradient: Tensor) -> Tensor:
    """
    The scalar `value` with `gradient` as its gradient with respect to `prediction`, both (N, C, h, w).

    What made the gradient (a VAE, a discriminator) has left memory by the time the denoiser's own backward pass runs.
    """
    inner = (prediction.float() * gradient).sum()
    return value.detach() + (inner - inner.detach())
