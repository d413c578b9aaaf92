import pytest
import torch

from trl_diffusion_rank.diffusion.timesteps import allowed_timesteps, sample_timesteps


def test_uniform_covers_every_timestep_equally():
    u = (torch.arange(10_000) + 0.5) / 10_000
    timesteps = sample_timesteps(u, 1000)
    assert torch.bincount(timesteps, minlength=1000).unique().tolist() == [10]


def test_turbo_and_discrete_draw_from_their_grid():
    u = (torch.arange(30) + 0.5) / 30
    turbo = allowed_timesteps("turbo", None, 1000)
    assert torch.bincount(sample_timesteps(u, 1000, turbo))[[249, 499, 749]].tolist() == [10, 10, 10]
    discrete = allowed_timesteps("discrete", [1, 261], 1000)
    assert sample_timesteps(torch.tensor([0.0, 0.49, 0.5, 0.999]), 1000, discrete).tolist() == [1, 1, 261, 261]
    assert allowed_timesteps("uniform", None, 1000) is None


@pytest.mark.parametrize(
    ("sampling", "timesteps", "message"),
    [
        ("logit", None, "Unknown `timestep_sampling` 'logit': expected one of uniform, turbo, discrete"),
        ("discrete", None, "`timesteps` is the grid of `timestep_sampling='discrete'`"),
        ("uniform", [1], "Set both or neither"),
        ("discrete", [1, 1000], r"between 0 and 999.*got \[1000\]"),
        ("discrete", [], r"got \[\]"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sampling, timesteps, message):
    with pytest.raises(ValueError, match=message):
        allowed_timesteps(sampling, timesteps, 1000)


def test_turbo_needs_a_schedule_that_long():
    with pytest.raises(ValueError, match="between 0 and 499"):
        allowed_timesteps("turbo", None, 500)
