import pytest
import torch

from trl_diffusion_rank.objectives.ranking import LOSS_TYPES, ranking_loss
from trl_diffusion_rank.objectives.safeguards import anchor, dpop, preservation_scales, scale_gradient


def shared_prediction(n: int, seed: int, requires_grad: bool = True):
    """One prediction that all images of a row share, as all share one model, and their targets. (D,), (n, D)"""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(n, 12, generator=generator, dtype=torch.float64)
    prediction = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=requires_grad)
    return prediction, targets


def errors(prediction: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (prediction - targets).square().mean(1).unsqueeze(0)  # (1, n)


def loss_of(error: torch.Tensor, loss_type: str, ranks: torch.Tensor, beta: float = 8.0) -> torch.Tensor:
    mask = torch.ones_like(ranks, dtype=torch.bool)
    return ranking_loss(loss_type, -0.5 * beta * error, ranks, mask, error=error).sum()


def scales(prediction, targets, loss_type, ranks, mu):
    error = errors(prediction.detach(), targets).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(error, loss_type, ranks), error)
    residual = (prediction.detach() - targets).unsqueeze(0)
    return preservation_scales(gradient, residual, ranks, torch.ones_like(ranks, dtype=torch.bool), mu)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0])
def test_value_stays_and_only_losers_are_scaled(loss_type, mu):
    ranks = torch.tensor([[1, 2, 3, 4]])
    prediction, targets = shared_prediction(4, seed=0)
    scale = scales(prediction, targets, loss_type, ranks, mu)
    error = errors(prediction, targets)
    assert (loss_of(scale_gradient(error, scale), loss_type, ranks) == loss_of(error, loss_type, ranks)).all()
    assert scale[0, 0] == 1
    assert ((scale >= 0) & (scale <= 1)).all()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_a_step_never_raises_the_error_of_the_best_of_a_pair(seed, mu):
    ranks = torch.tensor([[1, 2]])
    prediction, targets = shared_prediction(2, seed)
    scale = scales(prediction, targets, "plackett_luce", ranks, mu)
    error = errors(prediction, targets)
    loss = loss_of(scale_gradient(error, scale), "plackett_luce", ranks)
    (step,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    (of_best,) = torch.autograd.grad(error[0, 0], prediction)
    assert (-step @ of_best) <= 1e-12, "to first order, a descent step doesn't raise it"


@pytest.mark.parametrize("seed", range(20))
def test_losers_of_a_list_never_outweigh_the_best(seed):
    """Of a list too: what all losers together do to the best stays below what the best does for itself."""
    ranks = torch.tensor([[1, 2, 3, 4]])
    prediction, targets = shared_prediction(4, seed)
    scale = scales(prediction, targets, "plackett_luce", ranks, mu=0.0)
    error = errors(prediction.detach(), targets).requires_grad_()
    (w,) = torch.autograd.grad(loss_of(error, "plackett_luce", ranks), error)
    residual = prediction.detach() - targets
    conflict = residual @ residual[0]
    losers = w[0] < 0
    raised = (-w[0] * scale[0] * conflict)[losers].sum()
    assert raised <= w[0, 0] * residual[0].square().sum() + 1e-12


def test_mu_one_stops_a_conflicting_loser_and_leaves_a_harmless_one():
    ranks = torch.tensor([[1, 2]])
    mask = torch.ones_like(ranks, dtype=torch.bool)
    gradient = torch.tensor([[1.0, -1.0]])
    against = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    assert preservation_scales(gradient, against, ranks, mask, mu=1.0).tolist() == [[1.0, 0.0]]
    harmless = torch.tensor([[[1.0, 0.0], [-1.0, 1.0]]])
    assert preservation_scales(gradient, harmless, ranks, mask, mu=1.0).tolist() == [[1.0, 1.0]]
    # ||g_b||^2 = 1, g_b . g_l = 4: half of what is kept, divided by 4
    steep = torch.tensor([[[1.0, 0.0], [4.0, 0.0]]])
    assert preservation_scales(gradient, steep, ranks, mask, mu=0.5).tolist() == [[1.0, 0.125]]


def test_anchors_in_units_of_reward():
    """beta 10: half of it times the best's error 0.4 (tied best averaged), and times what exceeds the reference."""
    ranks = torch.tensor([[1, 2, 3], [1, 1, 2]])
    mask = torch.ones_like(ranks, dtype=torch.bool)
    error = torch.tensor([[0.4, 0.9, 0.9], [0.2, 0.4, 0.9]])
    ref_error = torch.tensor([[0.3, 0.0, 0.0], [0.3, 0.3, 0.0]])
    assert anchor(error, ranks, mask, beta=10.0).tolist() == pytest.approx([2.0, 1.5])
    assert dpop(error, ref_error, ranks, mask, beta=10.0).tolist() == pytest.approx([0.5, 0.25])
