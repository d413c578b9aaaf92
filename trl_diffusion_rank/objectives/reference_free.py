"""
Losses without a reference model: pure functions of tensors.

The implicit reward of an image is `q = beta * logps = -beta / 2 * error`, and CPO
(https://huggingface.co/papers/2401.08417) is

    L = L_rank(q) + cpo_alpha * mean over the best images of (-q)

with any of the losses of `objectives.ranking` as `L_rank`. The second term clones the best images; without it a model
is only told to be worse at some images than at others, which it can be by forgetting all of them
(https://huggingface.co/papers/2406.17636, equation 11).

Arguments are those of `objectives.ranking`: `rewards`, `error`, `ranks`, `mask`, all (B, n); results are (B,). A row
in which nothing is better than anything else says nothing, so its loss is 0, its gradient too.
"""

import torch
from torch import Tensor

from trl_diffusion_rank.objectives import ranking
from trl_diffusion_rank.objectives.ranking import better_than, extremes, logistic, margins_of_pairs, mean_over
from trl_diffusion_rank.objectives.safeguards import anchor


# `linear` weighs pairs by rewards that start at 0, which only a reference gives
LOSS_TYPES = (*(loss_type for loss_type in ranking.LOSS_TYPES if loss_type != "linear"), "simpo", "mapo")
SMOOTHABLE_LOSS_TYPES = (*ranking.SMOOTHABLE_LOSS_TYPES, "simpo")


def simpo(rewards: Tensor, ranks: Tensor, mask: Tensor, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """
    SimPO (https://huggingface.co/papers/2405.14734): `pairwise` with margins that must exceed `gamma` (of reward).

        mean over ordered pairs of softplus(gamma - (r_better - r_worse))
    """
    return mean_over(logistic(margins_of_pairs(rewards) - gamma, label_smoothing), better_than(ranks, mask))


def phi_minus_one(error: Tensor) -> Tensor:
    """
    MaPO's phi(e) = x / (exp(x) - 1) with x = e / 2, less its value 1 at e = 0. (...) -> (...)

    The 1 is left out because it would round differences of small errors away. Below x = 0.1 it is the series with
    Bernoulli's numbers, whose next term is 1e-14 there: the quotient's gradient subtracts two numbers near 1/x.
    """
    x = 0.5 * error
    small = x < 0.1
    near, far = torch.where(small, x, 0.0), torch.where(small, 0.1, x)
    square = near.square()
    series = -near / 2 + square * (1 / 12 - square * (1 / 720 - square / 30240))
    quotient = far * torch.exp(-far) / -torch.expm1(-far) - 1  # exp(x) itself overflows
    return torch.where(small, series, quotient)


def mapo(error: Tensor, ranks: Tensor, mask: Tensor, beta: float) -> Tensor:
    """
    MaPO (https://huggingface.co/papers/2406.06424), which for a pair and beta = 500 is

        e_w - 0.1 * log sigmoid(1000 * (phi(e_w) - phi(e_l)))

    On a list the first term is the mean over the best images, the second over the ordered pairs. phi falls with slope
    -1/4 at 0, so 2 * beta in the place of 1000 gives `beta` its usual meaning: for small errors ten times this loss is
    CPO with `pairwise`, `cpo_alpha` = 20 / beta.
    """
    best, _ = extremes(ranks, mask)
    margins = margins_of_pairs(2 * beta * phi_minus_one(error))
    return mean_over(error, best) + 0.1 * mean_over(logistic(margins, 0.0), better_than(ranks, mask))


def reference_free_loss(
    loss_type: str,
    error: Tensor,
    ranks: Tensor,
    mask: Tensor,
    *,
    beta: float,
    cpo_alpha: float = 0.0,
    simpo_gamma: float = 0.0,
    label_smoothing: float = 0.0,
    psi: Tensor | None = None,
) -> Tensor:
    """
    The loss called `loss_type` (one of `LOSS_TYPES`) of each row, (B,), behaviour cloning included.

    `mapo` has its own cloning term and leaves `cpo_alpha` out. Other arguments as in the loss's own function.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"Unknown `loss_type` {loss_type!r}: expected one of {', '.join(LOSS_TYPES)}.")
    rewards = -0.5 * beta * error
    if loss_type == "mapo":
        loss = mapo(error, ranks, mask, beta)
    else:
        if loss_type == "simpo":
            loss = simpo(rewards, ranks, mask, simpo_gamma, label_smoothing)
        else:
            loss = ranking.ranking_loss(
                loss_type, rewards, ranks, mask, error=error, psi=psi, label_smoothing=label_smoothing
            )
        loss = loss + cpo_alpha * anchor(error, ranks, mask, beta)
    return torch.where(better_than(ranks, mask).flatten(1).any(1), loss, 0.0)
