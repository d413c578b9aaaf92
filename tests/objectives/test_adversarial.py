import math

import pytest
import torch

from trl_diffusion_rank.objectives.adversarial import (
    adaptive_ratio,
    discriminator_loss,
    frozen_loss,
    joint_loss,
    moving_average,
    smoothness_penalty,
    with_gradient,
)


def test_frozen_loss_asks_for_nothing_past_the_margin():
    scores = torch.tensor([-1.0, 0.5, 1.0, 3.0], requires_grad=True)
    losses = frozen_loss(scores, margin=1.0)
    assert losses.tolist() == [2.0, 0.5, 0.0, 0.0]
    losses.sum().backward()
    assert scores.grad.tolist() == [-1.0, -1.0, 0.0, 0.0]


def test_joint_loss_always_asks_for_more():
    scores = torch.tensor([-1.0, 30.0], requires_grad=True)
    joint_loss(scores).sum().backward()
    assert joint_loss(scores).tolist() == [1.0, -30.0]
    assert scores.grad.tolist() == [-1.0, -1.0]


def test_discriminator_loss_is_the_hinge_on_both_sides():
    """Real images want a score above 1, fakes one below -1."""
    scores = torch.tensor([2.0, 0.25, -3.0, 0.25], requires_grad=True)
    losses = discriminator_loss(scores, torch.tensor([True, True, False, False]))
    assert losses.tolist() == [0.0, 0.75, 0.0, 1.25]
    losses.sum().backward()
    assert scores.grad.tolist() == [0.0, -1.0, 0.0, 1.0]


def test_smoothness_penalty_approximates_r1():
    """For a linear D(x) = w x its mean over the noise is sigma^2 ||w||^2."""
    generator = torch.Generator().manual_seed(0)
    w = torch.tensor([3.0, -4.0], dtype=torch.float64)
    x = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    penalty = smoothness_penalty(x @ w, (x + 0.01 * noise) @ w)
    assert penalty.shape == (200_000,)
    assert penalty.mean().item() == pytest.approx(1e-4 * 25, rel=2e-2)


def test_adaptive_ratio_by_hand():
    assert adaptive_ratio(torch.tensor([[6.0, 8.0]]), torch.tensor([[3.0, 4.0]])) == pytest.approx(2.0)
    assert adaptive_ratio(torch.tensor([1.0]), torch.tensor([1e-9])) == 1e4
    assert adaptive_ratio(torch.tensor([1.0]), torch.tensor([1e-9]), largest=7.0) == 7.0


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_that_says_nothing_gives_no_ratio(value):
    assert adaptive_ratio(torch.tensor([1.0]), torch.tensor([value])) is None
    assert adaptive_ratio(torch.tensor([value]), torch.tensor([1.0])) is None


def test_moving_average_begins_with_the_first_value_and_passes_over_gaps():
    assert moving_average(None, 4.0, 0.9) == 4.0
    assert moving_average(4.0, 14.0, 0.9) == pytest.approx(5.0)
    assert moving_average(4.0, None, 0.9) == 4.0
    assert moving_average(None, None, 0.9) is None


def test_with_gradient_has_both_to_the_bit():
    prediction = torch.randn(2, 3, requires_grad=True)
    gradient = torch.randn(2, 3)
    value = with_gradient(torch.tensor(0.7), prediction, gradient)
    assert value.item() == torch.tensor(0.7).item()
    (3 * value).backward()
    assert torch.equal(prediction.grad, 3 * gradient)
