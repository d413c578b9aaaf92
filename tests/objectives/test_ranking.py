"""The identities that the ranking losses must hold, in float64."""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from trl_diffusion_rank.objectives import LOSS_TYPES, ranking_loss
from trl_diffusion_rank.objectives.ranking import (
    SMOOTHABLE_LOSS_TYPES,
    lambda_rank,
    lambda_weights,
    pairwise,
    plackett_luce,
    top1,
    win_rates,
)


LOGISTIC_AT_TWO = ("plackett_luce", "pairwise", "best_vs_worst", "best_vs_rest", "top1", "lambda")


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64, requires_grad=True)


def ranks_of(*values: int) -> tuple[torch.Tensor, torch.Tensor]:
    ranks = torch.tensor([values])
    return ranks, torch.ones_like(ranks, dtype=torch.bool)


def value_and_gradient(loss_type, rewards, ranks, mask, **kwargs):
    """Loss (B,) and its gradient (B, n). For `linear` the rewards stand in for -error: the same order and sign."""
    rewards = rewards.detach().clone().requires_grad_()
    loss = ranking_loss(loss_type, rewards, ranks, mask, error=-rewards, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), rewards)[0]


def random_batch(n: int, seed: int = 0, ties: bool = False):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(5, n, generator=generator, dtype=torch.float64)
    high = max(2, n // 2) + 1 if ties else 10**6
    ranks = torch.randint(1, high, (5, n), generator=generator)
    return rewards, ranks, torch.ones(5, n, dtype=torch.bool)


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_zero_adapter_gives_the_known_values(n):
    """With all rewards 0 each link is ln 2, a choice among m is ln m, IPO's square is 1/4 and the hinge 1."""
    rewards, (ranks, mask) = row(*[0.0] * n), ranks_of(*range(1, n + 1))
    expected = {
        "plackett_luce": math.log(math.factorial(n)) / (n - 1),
        "top1": math.log(n),
        "pairwise": math.log(2),
        "best_vs_worst": math.log(2),
        "best_vs_rest": math.log(2),
        "lambda": math.log(2),
        "ipo": 0.25,
        "hinge": 1.0,
        "linear": 0.0,
    }
    assert set(expected) == set(LOSS_TYPES)
    for loss_type, value in expected.items():
        loss, _ = value_and_gradient(loss_type, rewards, ranks, mask)
        assert loss.item() == pytest.approx(value, abs=1e-12), loss_type


def test_gradients_at_zero_for_four_images():
    """
    Plackett-Luce: choice i takes 1/(number left) from each of those left and gives 1 to the chosen. Its gradient on
    the best is 1/4 - 1 = -.75, on the next 1/4 + 1/3 - 1 = -.41667, then 1/4 + 1/3 + 1/2 - 1 = .08333, then 1.08333.
    All pairs: each of the six gives -1/2 to the better and +1/2 to the worse.
    """
    ranks, mask = ranks_of(1, 2, 3, 4)
    _, gradient = value_and_gradient("plackett_luce", row(0, 0, 0, 0), ranks, mask)
    torch.testing.assert_close(3 * gradient, torch.tensor([[-0.75, -5 / 12, 1 / 12, 13 / 12]], dtype=torch.float64))
    loss, gradient = value_and_gradient("pairwise", row(0, 0, 0, 0), ranks, mask)
    assert 6 * loss.item() == pytest.approx(6 * math.log(2))
    torch.testing.assert_close(6 * gradient, torch.tensor([[-1.5, -0.5, 0.5, 1.5]], dtype=torch.float64))


@pytest.mark.parametrize("loss_type", LOGISTIC_AT_TWO)
def test_two_images_are_diffusion_dpo(loss_type):
    """Transcribed independently: -log sigmoid(-beta/2 ((e_w - e_l) - (e_w^ref - e_l^ref))), then the mean."""
    generator = torch.Generator().manual_seed(1)
    error, ref_error = torch.rand(2, 6, 2, generator=generator, dtype=torch.float64)
    beta = 7.0
    error = error.requires_grad_()
    inside = -0.5 * beta * ((error[:, 0] - error[:, 1]) - (ref_error[:, 0] - ref_error[:, 1]))
    expected = -F.logsigmoid(inside).mean()
    (expected_gradient,) = torch.autograd.grad(expected, error)

    rewards = beta * (-0.5 * error + 0.5 * ref_error)
    ranks = torch.tensor([[1, 2]]).expand(6, 2)
    mask = torch.ones(6, 2, dtype=torch.bool)
    loss = ranking_loss(loss_type, rewards, ranks, mask, error=error).mean()
    (gradient,) = torch.autograd.grad(loss, error)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_lambda_weights_of_the_paper_and_unit_weights_are_pairwise():
    ranks, mask = ranks_of(1, 2, 3, 4)
    psi = torch.tensor([[1, 2 / 3, 1 / 3, 0]], dtype=torch.float64)
    weights = lambda_weights(psi, ranks, mask)[0]
    expected = {(0, 1): 0.220, (0, 2): 0.534, (0, 3): 0.821, (1, 2): 0.062, (1, 3): 0.170, (2, 3): 0.026}
    for (i, j), value in expected.items():
        assert weights[i, j].item() == pytest.approx(value, abs=5e-4)
        assert weights[i, j] == weights[j, i]
    torch.testing.assert_close(win_rates(ranks, mask), psi.float())
    # At n = 2 there is one pair, so its normalised weight is 1 whatever psi is
    rewards, ranks, mask = random_batch(2)
    psi = torch.rand(5, 2, dtype=torch.float64)
    torch.testing.assert_close(lambda_rank(rewards, ranks, mask, psi), pairwise(rewards, ranks, mask))


def test_lambda_is_the_weighted_mean_by_hand():
    """n = 3, psi = (1, .5, 0): the three pair weights written out, divided by their mean, times the three links."""
    ranks, mask = ranks_of(1, 2, 3)
    rewards = row(0.3, -0.2, 0.5)
    gains = [2.0, math.sqrt(2.0), 1.0]
    discounts = [1 / math.log(2), 1 / math.log(3), 1 / math.log(4)]
    values = rewards[0].tolist()
    total, weighted = 0.0, 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        weight = abs(gains[i] - gains[j]) * abs(discounts[i] - discounts[j])
        total += weight
        weighted += weight * math.log1p(math.exp(values[j] - values[i]))
    psi = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    assert lambda_rank(rewards, ranks, mask, psi).item() == pytest.approx(weighted / total)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("n", [2, 3, 4, 7])
@pytest.mark.parametrize("ties", [False, True])
def test_shift_permutation_padding_and_zero_sum(loss_type, n, ties):
    rewards, ranks, mask = random_batch(n, seed=n, ties=ties)
    loss, gradient = value_and_gradient(loss_type, rewards, ranks, mask)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)

    shifted, _ = value_and_gradient(loss_type, rewards + 3.7, ranks, mask)
    torch.testing.assert_close(shifted, loss)

    for order in list(permutations(range(n)))[:: max(1, math.factorial(n) // 6)]:
        order = torch.tensor(order)
        permuted, permuted_gradient = value_and_gradient(loss_type, rewards[:, order], ranks[:, order], mask)
        torch.testing.assert_close(permuted, loss)
        torch.testing.assert_close(permuted_gradient, gradient[:, order])

    padded_rewards = F.pad(rewards, (1, 2), value=9.0)
    padded_ranks, padded_mask = F.pad(ranks, (1, 2), value=-1), F.pad(mask, (1, 2), value=False)
    padded, padded_gradient = value_and_gradient(loss_type, padded_rewards, padded_ranks, padded_mask)
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(padded_gradient, F.pad(gradient, (1, 2)))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_all_tied_is_zero_with_zero_gradient(loss_type):
    ranks, mask = ranks_of(2, 2, 2)
    loss, gradient = value_and_gradient(loss_type, row(0.4, -1.0, 2.0), ranks, mask)
    assert loss.item() == 0
    assert gradient.abs().max() == 0


def test_ranks_1_2_2_are_top1():
    rewards, _, mask = random_batch(3)
    ranks = torch.tensor([[1, 2, 2]]).expand(5, 3)
    torch.testing.assert_close(plackett_luce(rewards, ranks, mask), top1(rewards, ranks, mask))
    torch.testing.assert_close(top1(rewards, ranks, mask), -torch.log_softmax(rewards, 1)[:, 0])


def test_tied_best_images_do_not_compete():
    """Ranks (1, 1, 2): each best against the worst alone, averaged; the two links of all pairs."""
    ranks, mask = ranks_of(1, 1, 2)
    rewards = row(0.3, -0.7, 0.1)
    expected = (F.softplus(rewards[0, 2] - rewards[0, 0]) + F.softplus(rewards[0, 2] - rewards[0, 1])) / 2
    for loss_type in ("plackett_luce", "top1", "pairwise", "best_vs_worst", "best_vs_rest"):
        loss, _ = value_and_gradient(loss_type, rewards, ranks, mask)
        assert loss.item() == pytest.approx(expected.item()), loss_type


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_plackett_luce_sum_is_at_most_the_sum_over_pairs(n):
    rewards, ranks, mask = random_batch(n)
    plackett_luce_sum = (n - 1) * plackett_luce(rewards, ranks, mask)
    pair_sum = n * (n - 1) / 2 * pairwise(rewards, ranks, mask)
    if n == 2:
        torch.testing.assert_close(plackett_luce_sum, pair_sum)
    else:
        assert (plackett_luce_sum < pair_sum).all()


@pytest.mark.parametrize("loss_type", [loss_type for loss_type in LOSS_TYPES if loss_type != "linear"])
def test_beta_and_error_difference_trade_off(loss_type):
    """
    Only beta times the difference of errors matters. `linear` is left out: its weights follow the rule, its value is
    in units of error.
    """
    generator = torch.Generator().manual_seed(3)
    delta = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    ranks = torch.arange(1, 6).expand(4, 5)
    mask = torch.ones(4, 5, dtype=torch.bool)
    loss = ranking_loss(loss_type, -0.5 * 20 * delta, ranks, mask, error=delta)
    torch.testing.assert_close(ranking_loss(loss_type, -0.5 * 60 * (delta / 3), ranks, mask, error=delta / 3), loss)


def test_linear_by_hand_and_its_clip():
    """Margins 0.5 and 5: weights .5 - .4 * .5 = .3 and clip(-1.5) = eta; the better image's error is .2 lower."""
    ranks, mask = ranks_of(1, 2)
    error = row(0.5, 0.7)
    for margin, weight in ((0.5, 0.3), (5.0, 0.1), (-5.0, 0.9)):
        rewards = row(margin, 0.0)
        loss = ranking_loss("linear", rewards, ranks, mask, error=error)
        assert loss.item() == pytest.approx(weight * -0.2)
        (gradient,) = torch.autograd.grad(loss.sum(), error, retain_graph=True)
        torch.testing.assert_close(gradient, torch.tensor([[weight, -weight]], dtype=torch.float64))
    clipped = ranking_loss("linear", row(5.0, 0.0), ranks, mask, error=error, linear_eta=0.2)
    assert clipped.item() == pytest.approx(-0.04)


@pytest.mark.parametrize("loss_type", SMOOTHABLE_LOSS_TYPES)
def test_label_smoothing_mixes_in_the_flipped_link(loss_type):
    rewards, (ranks, mask) = row(0.8, 0.0), ranks_of(1, 2)
    loss, _ = value_and_gradient(loss_type, rewards, ranks, mask, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * math.log1p(math.exp(-0.8)) + 0.1 * math.log1p(math.exp(0.8)))


def test_unknown_loss_type_is_refused_by_name():
    rewards, ranks, mask = random_batch(2)
    with pytest.raises(ValueError, match="Unknown `loss_type` 'sigmoid': expected one of plackett_luce"):
        ranking_loss("sigmoid", rewards, ranks, mask, error=-rewards)
