"""
Safeguards against collapse: pure functions of tensors.

Diffusion-DPO lowers its loss by raising the error of the worst images; what raises theirs raises that of the best too,
because all share one model. These terms and scales hold the best images' error down.
"""

import torch
from torch import Tensor

from trl_diffusion_rank.objectives.ranking import extremes, mean_over


def preservation_scales(error_gradient: Tensor, residual: Tensor, ranks: Tensor, mask: Tensor, mu: float) -> Tensor:
    """
    How much of the losers' gradient is let through, in [0, 1]. (B, n)

    A loser is an image whose error a descent step would raise. With g = d error / d prediction, moving a shared
    prediction against the loss changes the best image's error by -|w_b| ||g_b||^2 + sum_i scale_i w_i (g_b . g_i); the
    scales keep that sum below (1 - mu) |w_b| ||g_b||^2:

        scale_i = clip((1 - mu) ||g_b||^2 / (g_b . g_i) * |w_b| / sum of w over the losers, 0, 1)   where g_b . g_i > 0

    and 1 elsewhere. For a pair the last factor is 1 and this is the winner-preserving loss of
    https://huggingface.co/papers/2511.03317; a list has more than one loser, which share what one may do.

    Args:
        error_gradient (B, n): dL / d error; a loser's is negative.
        residual (B, n, D): prediction minus target of each image, to which g is proportional.
        ranks, mask (B, n): as in `objectives.ranking`; tied best images are averaged.
        mu: share of the best image's descent that is kept, in [0, 1]; 1 lets no loser work against it.
    """
    best, _ = extremes(ranks, mask)
    share = best / best.sum(1, keepdim=True).clamp(min=1)
    g_best = (share.unsqueeze(2) * residual).sum(1, keepdim=True)  # (B, 1, D)
    conflict = (g_best * residual).sum(2)  # (B, n)
    losers = (error_gradient < 0) & mask
    weight_of_best = (error_gradient * best).clamp(min=0).sum(1, keepdim=True)
    weight_of_losers = (-error_gradient * losers).sum(1, keepdim=True)
    allowed = (1 - mu) * g_best.square().sum(2) * weight_of_best  # (B, 1)
    scale = (allowed / (conflict * weight_of_losers).clamp(min=torch.finfo(residual.dtype).tiny)).clamp(0, 1)
    return torch.where(losers & (conflict > 0), scale, 1.0)


def scale_gradient(values: Tensor, scales: Tensor) -> Tensor:
    """The same values with their gradient multiplied by `scales`. (B, n), (B, n) -> (B, n)"""
    fixed = values.detach()
    return fixed + scales * (values - fixed)


def anchor(error: Tensor, ranks: Tensor, mask: Tensor, beta: float) -> Tensor:
    """
    Behaviour cloning of the best images in units of reward: beta / 2 * mean of their errors. (B,)

    CPO's second term (https://huggingface.co/papers/2401.08417); in these units its weight means the same at any beta.
    """
    best, _ = extremes(ranks, mask)
    return 0.5 * beta * mean_over(error, best)


def dpop(error: Tensor, ref_error: Tensor, ranks: Tensor, mask: Tensor, beta: float) -> Tensor:
    """
    DPO-Positive (https://huggingface.co/papers/2402.13228): a penalty once the best images' errors exceed the
    reference's, in units of reward: beta / 2 * mean of relu(error - ref_error) over the best. (B,)
    """
    best, _ = extremes(ranks, mask)
    return 0.5 * beta * mean_over((error - ref_error).relu(), best)
