"""What a run logs about the rewards of its lists: pure functions of tensors, one number per row, (B,)."""

from torch import Tensor

from trl_diffusion_rank.objectives.ranking import better_than, extremes, margins_of_pairs, mean_over


def chosen_and_rejected(values: Tensor, ranks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of `values` (B, n) over the best and over the worst images of each row: TRL's chosen and rejected."""
    best, worst = extremes(ranks, mask)
    return mean_over(values, best), mean_over(values, worst)


def accuracy(rewards: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Share of the strictly ordered pairs whose rewards stand in that order; equal rewards count one half."""
    margins = margins_of_pairs(rewards)
    return mean_over((margins > 0).float() + 0.5 * (margins == 0).float(), better_than(ranks, mask))


def kendall_tau(rewards: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Kendall's tau over the strictly ordered pairs: concordant minus discordant, over all. In [-1, 1]."""
    return mean_over(margins_of_pairs(rewards).sign(), better_than(ranks, mask))


def saturation(rewards: Tensor, ranks: Tensor, mask: Tensor, threshold: float = 4.0) -> Tensor:
    """Share of the ordered pairs with |margin| > 4, where a logistic link has less than 2 % of its slope left."""
    return mean_over((margins_of_pairs(rewards).abs() > threshold).float(), better_than(ranks, mask))
