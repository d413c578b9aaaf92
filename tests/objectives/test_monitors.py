import pytest
import torch

from trl_diffusion_rank.objectives.monitors import accuracy, chosen_and_rejected, kendall_tau, saturation


RANKS = torch.tensor([[1, 2, 3, -1], [2, 1, 1, 2]])
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
REWARDS = torch.tensor([[5.0, 0.0, 0.0, 99.0], [1.0, 1.0, 3.0, 0.0]])


def test_chosen_and_rejected_average_ties_and_skip_padding():
    chosen, rejected = chosen_and_rejected(REWARDS, RANKS, MASK)
    assert chosen.tolist() == [5.0, 2.0]
    assert rejected.tolist() == [0.0, 0.5]


def test_pair_statistics_by_hand():
    """Row 1: pairs 5>0, 5>0 right, 0=0 half. Row 2: 1=1 half, 3>1, 1>0, 3>0 right."""
    assert accuracy(REWARDS, RANKS, MASK).tolist() == pytest.approx([2.5 / 3, 3.5 / 4])
    assert kendall_tau(REWARDS, RANKS, MASK).tolist() == pytest.approx([2 / 3, 3 / 4])
    assert saturation(REWARDS, RANKS, MASK).tolist() == pytest.approx([2 / 3, 0.0])
    assert accuracy(torch.zeros(2, 4), RANKS, MASK).tolist() == [0.5, 0.5]
