"""The identities that the losses without a reference must hold, in float64."""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from trl_diffusion_rank.objectives.ranking import ranking_loss
from trl_diffusion_rank.objectives.reference_free import (
    LOSS_TYPES,
    SMOOTHABLE_LOSS_TYPES,
    mapo,
    phi_minus_one,
    reference_free_loss,
    simpo,
)
from trl_diffusion_rank.objectives.safeguards import anchor


SHARED = tuple(loss_type for loss_type in LOSS_TYPES if loss_type not in ("simpo", "mapo"))


def random_batch(n: int, seed: int = 0, ties: bool = False, size: float = 1.0):
    """Errors in (0, size), ranks and mask, (5, n) each."""
    generator = torch.Generator().manual_seed(seed)
    error = size * torch.rand(5, n, generator=generator, dtype=torch.float64)
    high = max(2, n // 2) + 1 if ties else 10**6
    return error, torch.randint(1, high, (5, n), generator=generator), torch.ones(5, n, dtype=torch.bool)


def value_and_gradient(loss_type, error, ranks, mask, **kwargs):
    error = error.detach().clone().requires_grad_()
    loss = reference_free_loss(loss_type, error, ranks, mask, **({"beta": 5.0} | kwargs))
    return loss.detach(), torch.autograd.grad(loss.sum(), error)[0]


@pytest.mark.parametrize("loss_type", SHARED)
@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_without_cloning_it_is_dpo_with_the_same_reference_error_for_all(loss_type, n):
    error, ranks, mask = random_batch(n, seed=n, ties=n > 3)
    loss, gradient = value_and_gradient(loss_type, error, ranks, mask)
    error.requires_grad_()
    rewards = 5.0 * (-0.5 * error + 0.5 * 0.37)
    expected = ranking_loss(loss_type, rewards, ranks, mask, error=error)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), error)[0])


def test_the_pair_loss_by_hand():
    """-E log sigmoid(beta log pi(y_w|x) - beta log pi(y_l|x)) with log pi = -e/2: errors .2 and .5, beta 10."""
    error, ranks, mask = torch.tensor([[0.2, 0.5]]), torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)
    loss, _ = value_and_gradient("pairwise", error, ranks, mask, beta=10.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)))


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_simpo_without_a_margin_is_pairwise_and_its_margin_is_in_units_of_reward(n):
    error, ranks, mask = random_batch(n)
    plain, gradient = value_and_gradient("pairwise", error, ranks, mask, label_smoothing=0.1)
    zero, zero_gradient = value_and_gradient("simpo", error, ranks, mask, label_smoothing=0.1)
    torch.testing.assert_close(zero, plain)
    torch.testing.assert_close(zero_gradient, gradient)
    pair = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    loss = simpo(pair, torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool), gamma=0.7)
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.7 - 1.5)))


@pytest.mark.parametrize("loss_type", [loss_type for loss_type in LOSS_TYPES if loss_type != "mapo"])
def test_cloning_is_half_of_beta_times_the_best_errors(loss_type):
    """Ranks (2, 1, 1): the mean error of the two best is .45, so 0.2 * 5 / 2 * .45 is added."""
    error = torch.tensor([[0.9, 0.3, 0.6]], dtype=torch.float64)
    ranks, mask = torch.tensor([[2, 1, 1]]), torch.ones(1, 3, dtype=torch.bool)
    without, gradient = value_and_gradient(loss_type, error, ranks, mask)
    loss, with_cloning = value_and_gradient(loss_type, error, ranks, mask, cpo_alpha=0.2)
    assert (loss - without).item() == pytest.approx(0.2 * 2.5 * 0.45)
    expected = torch.tensor([[0.0, 0.25, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(with_cloning - gradient, expected)
    assert anchor(error, ranks, mask, 5.0).item() == pytest.approx(2.5 * 0.45)


# MaPO


def test_phi_by_hand_and_at_its_limit():
    for error in (1e-3, 0.1999, 0.2001, 1.0, 5.0):
        value = torch.tensor(error, dtype=torch.float64, requires_grad=True)
        result = phi_minus_one(value)
        x = error / 2
        assert result.item() == pytest.approx(x / math.expm1(x) - 1, rel=1e-12)
        (gradient,) = torch.autograd.grad(result, value)
        by_hand = 0.5 * (math.expm1(x) - x * math.exp(x)) / math.expm1(x) ** 2
        assert gradient.item() == pytest.approx(by_hand, rel=1e-9)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert phi_minus_one(zero).item() == 0
    assert torch.autograd.grad(phi_minus_one(zero), zero)[0].item() == -0.25


def test_phi_is_safe_in_float32():
    """Tiny errors keep their differences, huge ones overflow nothing; the gradient is -1/4 near 0 and goes to 0."""
    error = torch.tensor([0.0, 1e-12, 1e-8, 1e-6, 2e-6, 1e-4, 1e-2, 0.3, 1e3, 1e6], requires_grad=True)
    value = phi_minus_one(error)
    (gradient,) = torch.autograd.grad(value.sum(), error)
    exact = phi_minus_one(error.detach().double())
    torch.testing.assert_close(value.detach().double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[:6], torch.full((6,), -0.25), rtol=1e-4, atol=0)
    assert torch.isfinite(gradient).all()
    assert gradient[-1] == 0


def test_mapo_pair_is_the_papers_formula():
    """e_w - 0.1 log sigmoid(1000 (phi(e_w) - phi(e_l))) with phi written as in the paper."""
    error, _, mask = random_batch(2, size=0.01)
    best, worst = error[:, 0], error[:, 1]

    def phi(e):
        return 0.5 * e / torch.expm1(0.5 * e)

    expected = best - 0.1 * F.logsigmoid(1000 * (phi(best) - phi(worst)))
    torch.testing.assert_close(mapo(error, torch.tensor([[1, 2]]).expand(5, 2), mask, beta=500.0), expected)


@pytest.mark.parametrize("n", [2, 3, 4, 7])
@pytest.mark.parametrize("beta", [100.0, 500.0])
def test_ten_times_mapo_is_cpo_for_small_errors(n, beta):
    """At beta = 500 with `cpo_alpha` = 0.04: no constant is left over, and the difference is of second order."""
    differences = []
    for size in (0.02, 0.01):
        error, ranks, mask = random_batch(n, size=size)
        cpo, cpo_gradient = value_and_gradient("pairwise", error, ranks, mask, beta=beta, cpo_alpha=20 / beta)
        loss, gradient = value_and_gradient("mapo", error, ranks, mask, beta=beta)
        torch.testing.assert_close(10 * loss, cpo, rtol=0, atol=beta * size**2 / 10)
        torch.testing.assert_close(10 * gradient, cpo_gradient, rtol=0, atol=beta * size)
        differences.append((10 * loss - cpo).abs().max().item())
    assert differences[0] / differences[1] > 2.5  # 4 for a quadratic; ranks meet other margins at another size


# What holds for all


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("n", [2, 3, 4, 7])
@pytest.mark.parametrize("ties", [False, True])
def test_shift_permutation_padding_and_zero_sum(loss_type, n, ties):
    options = {"cpo_alpha": 0.3, "simpo_gamma": 0.4}
    error, ranks, mask = random_batch(n, seed=n, ties=ties)
    loss, gradient = value_and_gradient(loss_type, error, ranks, mask, **options)

    if loss_type != "mapo":  # its phi isn't linear
        ranking, ranking_gradient = value_and_gradient(loss_type, error, ranks, mask, simpo_gamma=0.4)
        shifted, _ = value_and_gradient(loss_type, error + 3.7, ranks, mask, simpo_gamma=0.4)
        torch.testing.assert_close(shifted, ranking)
        torch.testing.assert_close(ranking_gradient.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)

    for order in list(permutations(range(n)))[:: max(1, math.factorial(n) // 6)]:
        order = torch.tensor(order)
        permuted, permuted_gradient = value_and_gradient(loss_type, error[:, order], ranks[:, order], mask, **options)
        torch.testing.assert_close(permuted, loss)
        torch.testing.assert_close(permuted_gradient, gradient[:, order])

    padded, padded_gradient = value_and_gradient(
        loss_type,
        F.pad(error, (1, 2), value=9.0),
        F.pad(ranks, (1, 2), value=-1),
        F.pad(mask, (1, 2), value=False),
        **options,
    )
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(padded_gradient, F.pad(gradient, (1, 2)))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_all_tied_is_zero_with_zero_gradient(loss_type):
    error, _, mask = random_batch(3)
    loss, gradient = value_and_gradient(loss_type, error, torch.full((5, 3), 2), mask, cpo_alpha=0.3)
    assert loss.abs().max() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_down_makes_the_best_better_than_the_worst(loss_type):
    error, ranks, mask = torch.full((1, 4), 0.2, dtype=torch.float64), torch.tensor([[3, 1, 4, 2]]), torch.ones(1, 4)
    _, gradient = value_and_gradient(loss_type, error, ranks, mask.bool(), cpo_alpha=0.2)
    assert gradient[0, 1] > 0 > gradient[0, 2]


@pytest.mark.parametrize("loss_type", SMOOTHABLE_LOSS_TYPES)
def test_label_smoothing_mixes_in_the_flipped_link(loss_type):
    error, ranks, mask = torch.tensor([[0.0, 0.32]]), torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)
    loss, _ = value_and_gradient(loss_type, error, ranks, mask, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * math.log1p(math.exp(-0.8)) + 0.1 * math.log1p(math.exp(0.8)))


@pytest.mark.parametrize("loss_type", ["sigmoid", "linear"])
def test_unknown_loss_type_is_refused_by_name(loss_type):
    with pytest.raises(ValueError, match=f"Unknown `loss_type` '{loss_type}': expected one of plackett_luce"):
        reference_free_loss(loss_type, *random_batch(2), beta=1.0)
