import math

import pytest
import torch

from trl_diffusion_rank.objectives.error_scale import (
    FORGETTING,
    PRIOR_COUNT,
    moments,
    remember,
    schedule_buckets,
    standard_deviations,
)


def test_buckets_are_tenths_of_the_schedule_and_its_end_belongs_to_the_last():
    timesteps = torch.tensor([0, 99, 100, 549, 999])
    assert schedule_buckets(timesteps, 1000).tolist() == [0, 0, 1, 5, 9]
    assert schedule_buckets(torch.tensor([0.5, 999.9, 1000.0]), 1000).tolist() == [0, 9, 9]


def test_moments_by_hand():
    seen = moments(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 2, 7]))
    assert seen[:, 2].tolist() == [2, 4, 10]
    assert seen[:, 7].tolist() == [1, 5, 25]
    assert seen.sum().item() == 16 + 31


def test_memory_fades_only_where_something_new_came():
    old = moments(torch.tensor([2.0, 4.0]), torch.tensor([0, 1]))
    new = remember(old, moments(torch.tensor([6.0, 6.0]), torch.tensor([1, 1])))
    assert new[:, 0].tolist() == [1, 2, 4]
    fade = FORGETTING**2
    assert new[:, 1].tolist() == pytest.approx([fade + 2, 4 * fade + 12, 16 * fade + 72])


def test_standard_deviations_by_hand():
    """Values 1 and 3: variance 1, mean 2, so (2 * 1 + 8 * 4) / 10; the empty buckets take the same."""
    scales = standard_deviations(moments(torch.tensor([1.0, 3.0]), torch.tensor([4, 4])))
    assert PRIOR_COUNT == 8
    torch.testing.assert_close(scales, torch.full((10,), math.sqrt(3.4)))


def test_before_anything_is_seen_errors_stay_as_they_are():
    assert standard_deviations(torch.zeros(3, 10)).tolist() == [1.0] * 10


def test_one_image_or_equal_ones_are_divided_by_nearly_their_mean():
    for count in (1, 4):
        scales = standard_deviations(moments(torch.full((count,), 0.05), torch.zeros(count, dtype=torch.long)))
        assert scales[0].item() == pytest.approx(0.05 * math.sqrt(PRIOR_COUNT / (PRIOR_COUNT + count)))


def test_the_spread_of_many_is_found():
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(3, 10, dtype=torch.float64)
    for _ in range(300):
        error = 0.3 + 0.1 * torch.randn(8, generator=generator, dtype=torch.float64)
        seen = remember(seen, moments(error, torch.full((8,), 3)))
    assert standard_deviations(seen)[3].item() == pytest.approx(0.1, rel=0.08)
