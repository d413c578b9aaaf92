"""
Losses on the implicit rewards of a ranked list: pure functions of tensors.

Every function takes

    rewards (B, n)  implicit rewards r: `beta * (logps - ref_logps)` for DPO, `beta * logps` without a reference
    ranks   (B, n)  integers, 1 = best, equal = tied; only their order matters
    mask    (B, n)  True where the row has an image; padded places may hold any finite number

and returns one loss per row, (B,). A row in which nothing is strictly better than anything else has loss 0 and
gradient 0. Each loss depends on differences of rewards only, so its gradient over a row sums to 0, and at n = 2 all of
`plackett_luce`, `pairwise`, `best_vs_worst`, `best_vs_rest` and `top1` are Diffusion-DPO
(https://huggingface.co/papers/2311.12908).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def better_than(ranks: Tensor, mask: Tensor) -> Tensor:
    """Strict preferences of each row: `[b, i, j]` is True where image i is ranked better than image j. (B, n, n)"""
    return (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)


def win_rates(ranks: Tensor, mask: Tensor) -> Tensor:
    """
    Share of its rivals that an image beats, ties one half: RankDPO's psi when nothing but the ranks is known. (B, n)

    Rows of a single image and padded places give 0.
    """
    wins = better_than(ranks, mask).float()
    rivals = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    ties = (mask.unsqueeze(2) & mask.unsqueeze(1)).float() - wins - wins.mT  # the image ties with itself: minus one
    return torch.where(mask, (wins.sum(2) + 0.5 * (ties.sum(2) - 1)) / rivals, 0.0)


def margins_of_pairs(rewards: Tensor) -> Tensor:
    """`[b, i, j]` = r_i - r_j. (B, n, n)"""
    return rewards.unsqueeze(2) - rewards.unsqueeze(1)


def mean_over(values: Tensor, where: Tensor) -> Tensor:
    """Mean of `values` over the True places of each row, 0 for a row that has none. (B, ...) -> (B,)"""
    where = where.flatten(1)
    values = values.flatten(1).masked_fill(~where, 0.0)
    return values.sum(1) / where.sum(1).clamp(min=1)


def logistic(margins: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(m), with a probability `label_smoothing` that the preference is the other way round."""
    return (1 - label_smoothing) * F.softplus(-margins) + label_smoothing * F.softplus(margins)


def extremes(ranks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (B, n) of the best and of the worst images of each row; several where they tie, the same if all do."""
    best_rank = ranks.masked_fill(~mask, torch.iinfo(ranks.dtype).max).amin(1, keepdim=True)
    worst_rank = ranks.masked_fill(~mask, torch.iinfo(ranks.dtype).min).amax(1, keepdim=True)
    return (ranks == best_rank) & mask, (ranks == worst_rank) & mask


def _log_choice(rewards: Tensor, better: Tensor) -> Tensor:
    """-log of the probability that i is chosen among itself and everything worse: logsumexp({i} U {k worse}) - r_i."""
    itself = torch.eye(rewards.size(1), dtype=torch.bool, device=rewards.device)
    rivals = rewards.unsqueeze(1).expand_as(better).masked_fill(~(better | itself), float("-inf"))
    return torch.logsumexp(rivals, dim=2) - rewards  # (B, n)


def plackett_luce(rewards: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """
    Plackett-Luce likelihood of the order: the best is chosen among all, the next among the rest, and so on.

        mean over i with a worse rival of [ logsumexp({r_i} U {r_k : rank_k > rank_i}) - r_i ]

    Tied images never compete; without ties this is exactly Plackett-Luce (DPO, https://huggingface.co/papers/2305.18290,
    appendix A.3), divided by its number of choices.
    """
    better = better_than(ranks, mask)
    return mean_over(_log_choice(rewards, better), better.any(2))


def top1(rewards: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """-log softmax(r)[best]: only the first choice of Plackett-Luce; tied best images are averaged."""
    better = better_than(ranks, mask)
    best, _ = extremes(ranks, mask)
    return mean_over(_log_choice(rewards, better), best & better.any(2))


def pairwise(rewards: Tensor, ranks: Tensor, mask: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Bradley-Terry on every strictly ordered pair: mean of softplus(r_worse - r_better)."""
    return mean_over(logistic(margins_of_pairs(rewards), label_smoothing), better_than(ranks, mask))


def best_vs_worst(rewards: Tensor, ranks: Tensor, mask: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """softplus(r_worst - r_best): a list cut down to one pair, today's practice and the baseline."""
    best, worst = extremes(ranks, mask)
    pairs = best.unsqueeze(2) & worst.unsqueeze(1) & better_than(ranks, mask)
    return mean_over(logistic(margins_of_pairs(rewards), label_smoothing), pairs)


def best_vs_rest(rewards: Tensor, ranks: Tensor, mask: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the others of softplus(r_k - r_best) (https://huggingface.co/papers/2406.17636)."""
    best, _ = extremes(ranks, mask)
    pairs = best.unsqueeze(2) & better_than(ranks, mask)
    return mean_over(logistic(margins_of_pairs(rewards), label_smoothing), pairs)


def lambda_weights(psi: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """
    RankDPO's DCG weights of the ordered pairs, before normalising. (B, n, n), symmetric

        Delta_ij = |2^psi_i - 2^psi_j| * |1 / ln(1 + tau_i) - 1 / ln(1 + tau_j)|

    `psi` (B, n) in [0, 1] is the mean win rate of an image, tau its rank (https://huggingface.co/papers/2410.18013).
    """
    gain = torch.exp2(psi)
    discount = 1 / torch.log1p(ranks.masked_fill(~mask, 1).to(psi.dtype))
    return margins_of_pairs(gain).abs() * margins_of_pairs(discount).abs()


def lambda_rank(
    rewards: Tensor, ranks: Tensor, mask: Tensor, psi: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """
    RankDPO (https://huggingface.co/papers/2410.18013): `pairwise` with each pair weighted by what its swap would cost.

    The weights are normalised to mean 1 over the pairs of a row, so `beta` means what it means for `pairwise`. `psi`
    (B, n) defaults to the win rates that follow from the ranks. Pairs of equal psi weigh nothing.
    """
    pairs = better_than(ranks, mask)
    psi = win_rates(ranks, mask) if psi is None else psi
    weights = lambda_weights(psi.to(rewards.dtype), ranks, mask).masked_fill(~pairs, 0.0)
    mean_weight = mean_over(weights, pairs).clamp(min=torch.finfo(weights.dtype).tiny)
    return mean_over(weights * logistic(margins_of_pairs(rewards), label_smoothing), pairs) / mean_weight


def ipo(rewards: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """
    IPO (https://huggingface.co/papers/2310.12036): mean over ordered pairs of (r_better - r_worse - 1/2)^2.

    The paper's target 1 / (2 beta) in units of reward: beta^2 times TRL's `ipo`.
    """
    return mean_over((margins_of_pairs(rewards) - 0.5) ** 2, better_than(ranks, mask))


def hinge(rewards: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """SLiC's hinge (https://huggingface.co/papers/2309.06657): mean over pairs of relu(1 - (r_better - r_worse))."""
    return mean_over(F.relu(1 - margins_of_pairs(rewards)), better_than(ranks, mask))


def linear(rewards: Tensor, ranks: Tensor, mask: Tensor, error: Tensor, eta: float = 0.1) -> Tensor:
    """
    Linear-DPO (https://huggingface.co/papers/2605.21123): a bounded utility of the errors instead of a logistic link.

        mean over pairs of stop_grad(clip(0.5 - 0.4 (r_better - r_worse), eta, 1 - eta)) * (e_better - e_worse)

    `error` (B, n) is the denoising error with its graph; the rewards only weigh. The value is in units of error, so it
    is small and may be negative: an adaptive optimiser doesn't mind.
    """
    weights = (0.5 - 0.4 * margins_of_pairs(rewards.detach())).clamp(eta, 1 - eta)
    return mean_over(weights * margins_of_pairs(error), better_than(ranks, mask))


_PLAIN_LOSSES: dict[str, Callable[..., Tensor]] = {
    "plackett_luce": plackett_luce,
    "top1": top1,
    "ipo": ipo,
    "hinge": hinge,
}
_LOGISTIC_PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "pairwise": pairwise,
    "best_vs_worst": best_vs_worst,
    "best_vs_rest": best_vs_rest,
}
LOSS_TYPES = ("plackett_luce", "top1", *_LOGISTIC_PAIR_LOSSES, "lambda", "ipo", "hinge", "linear")
SMOOTHABLE_LOSS_TYPES = (*_LOGISTIC_PAIR_LOSSES, "lambda")  # `label_smoothing` acts on the logistic of a pair


def ranking_loss(
    loss_type: str,
    rewards: Tensor,
    ranks: Tensor,
    mask: Tensor,
    *,
    error: Tensor,
    psi: Tensor | None = None,
    label_smoothing: float = 0.0,
    linear_eta: float = 0.1,
) -> Tensor:
    """The loss called `loss_type` (one of `LOSS_TYPES`) of each row, (B,). Arguments as in the loss's own function."""
    if loss_type in _PLAIN_LOSSES:
        return _PLAIN_LOSSES[loss_type](rewards, ranks, mask)
    if loss_type in _LOGISTIC_PAIR_LOSSES:
        return _LOGISTIC_PAIR_LOSSES[loss_type](rewards, ranks, mask, label_smoothing)
    if loss_type == "lambda":
        return lambda_rank(rewards, ranks, mask, psi, label_smoothing)
    if loss_type == "linear":
        return linear(rewards, ranks, mask, error, linear_eta)
    raise ValueError(f"Unknown `loss_type` {loss_type!r}: expected one of {', '.join(LOSS_TYPES)}.")
