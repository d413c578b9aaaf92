"""The identities that the scorer's losses must hold, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from trl_diffusion_rank.objectives.ranking import plackett_luce, top1
from trl_diffusion_rank.objectives.scorer import bce_loss, caption_negative_loss, group_loss


LOSSES = {"group": group_loss, "bce": bce_loss}


def random_rows(n: int, seed: int = 0):
    """Five rows with one to n - 1 real images."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, n, generator=generator, dtype=torch.float64)
    real = torch.zeros(5, n, dtype=torch.bool)
    for row in range(5):
        real[row, torch.randperm(n, generator=generator)[: 1 + row % (n - 1)]] = True
    return scores, real, torch.ones(5, n, dtype=torch.bool)


def value_and_gradient(loss, scores, *args):
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores, *args)
    return value.detach(), torch.autograd.grad(value.sum(), scores)[0]


def test_group_loss_by_hand():
    """
    Real scores 1 and 2, generated 0 and -1. The first is chosen among {1, 0, -1} and the second among {2, 0, -1}:
    ln(e + 1 + 1/e) - 1 = .407606, ln(e^2 + 1 + 1/e) - 2 = .169846, mean .288726.
    """
    scores = torch.tensor([[1.0, 0.0, 2.0, -1.0]], dtype=torch.float64)
    real = torch.tensor([[True, False, True, False]])
    loss = group_loss(scores, real, torch.ones_like(real))
    assert loss.item() == pytest.approx((0.407606 + 0.169846) / 2, abs=1e-6)


def test_group_loss_at_zero():
    """One real image among n: ln n. Its gradient on the real is 1/n - 1 and on every other 1/n."""
    for n in (2, 4, 7):
        real = torch.arange(n).unsqueeze(0) == 1
        loss, gradient = value_and_gradient(group_loss, torch.zeros(1, n, dtype=torch.float64), real, real | True)
        assert loss.item() == pytest.approx(math.log(n))
        torch.testing.assert_close(gradient, 1 / n - real.double())


def test_group_loss_of_a_pair_is_bradley_terry():
    scores, _, mask = random_rows(2)
    real = torch.tensor([[False, True]]).expand(5, 2)
    expected = -F.logsigmoid(scores[:, 1] - scores[:, 0])
    torch.testing.assert_close(group_loss(scores, real, mask), expected)


def test_group_loss_is_the_first_choice_of_plackett_luce():
    scores, _, mask = random_rows(4)
    real = torch.tensor([[True, False, False, False]]).expand(5, 4)
    ranks = torch.tensor([[1, 2, 3, 4]]).expand(5, 4)
    torch.testing.assert_close(group_loss(scores, real, mask), top1(scores, ranks, mask))
    torch.testing.assert_close(group_loss(scores, real, mask), -torch.log_softmax(scores, dim=1)[:, 0])
    # and with a whole order all of its choices
    torch.testing.assert_close(group_loss(scores, ranks, mask), plackett_luce(scores, ranks, mask))
    assert not torch.allclose(group_loss(scores, ranks, mask), group_loss(scores, real, mask))


def test_real_images_do_not_compete():
    """The gradient on a real image is that of its own choice, whatever the other real image scores."""
    real = torch.tensor([[True, True, False, False]])
    scores = torch.tensor([[0.3, -0.7, 0.1, 0.6]], dtype=torch.float64)
    _, gradient = value_and_gradient(group_loss, scores, real, real | True)
    scores[0, 1] = 9.0
    _, other = value_and_gradient(group_loss, scores, real, real | True)
    assert gradient[0, 0] == other[0, 0] < 0
    assert gradient[0, 0].item() == pytest.approx(0.5 * (torch.softmax(scores[0, [0, 2, 3]], 0)[0].item() - 1))


def test_bce_loss_by_hand():
    """
    Real 2, generated 1, 0 and -1: softplus(-2) = .126928; mean of softplus(1) = 1.313262, softplus(0) = .693147 and
    softplus(-1) = .313262 is .773224; half of the sum is .450076.
    """
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    real = torch.tensor([[True, False, False, False]])
    assert bce_loss(scores, real, real | True).item() == pytest.approx(0.450076, abs=1e-6)


def test_bce_does_not_care_how_many_images_are_generated():
    """The best constant score of a row is 0 with one generated image and with five."""
    for generated in (1, 5):
        real = torch.arange(1 + generated).unsqueeze(0) == 0
        loss, gradient = value_and_gradient(
            bce_loss, torch.zeros(1, 1 + generated, dtype=torch.float64), real, real | True
        )
        assert loss.item() == pytest.approx(math.log(2))
        assert gradient.sum().item() == pytest.approx(0, abs=1e-12)


def test_rows_of_one_kind():
    """There is nothing to compare; BCE has the mean of the kind that there is. An empty row is 0."""
    scores = torch.tensor([[1.0, 3.0]] * 3, dtype=torch.float64)
    real = torch.tensor([[True, True], [False, False], [True, False]])
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    loss, gradient = value_and_gradient(group_loss, scores, real, mask)
    assert loss.tolist() == [0, 0, 0] and gradient.abs().max() == 0
    expected = [F.softplus(-scores[0]).mean().item(), F.softplus(scores[0]).mean().item(), 0.0]
    loss, gradient = value_and_gradient(bce_loss, scores, real, mask)
    assert loss.tolist() == pytest.approx(expected) and gradient[2].abs().max() == 0


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_an_offset_per_caption(n):
    """The group loss compares within a caption; BCE has an absolute zero."""
    scores, real, mask = random_rows(n)
    offset = torch.arange(1.0, 6.0, dtype=torch.float64).unsqueeze(1)
    loss, gradient = value_and_gradient(group_loss, scores, real, mask)
    torch.testing.assert_close(group_loss(scores + offset, real, mask), loss)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert ((bce_loss(scores + offset, real, mask) - bce_loss(scores, real, mask)).abs() > 1e-3).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_permutation_and_padding(name, n):
    loss = LOSSES[name]
    scores, real, mask = random_rows(n)
    value, gradient = value_and_gradient(loss, scores, real, mask)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    permuted, permuted_gradient = value_and_gradient(loss, scores[:, order], real[:, order], mask)
    torch.testing.assert_close(permuted, value)
    torch.testing.assert_close(permuted_gradient, gradient[:, order])
    for kind in (True, False):  # padding that claims to be real, or generated
        padded, padded_gradient = value_and_gradient(
            loss, F.pad(scores, (1, 2), value=9.0), F.pad(real, (1, 2), value=kind), F.pad(mask, (1, 2), value=False)
        )
        torch.testing.assert_close(padded, value)
        torch.testing.assert_close(padded_gradient, F.pad(gradient, (1, 2)))


def test_caption_negative_loss_by_hand():
    """
    Scores 1, 0 and -1 with three captions. Own the first: ln(e + 1 + 1/e) - 1 = .407606. Own the last: 2.407606;
    without the middle caption among its negatives ln(e + 1/e) + 1 = 2.126928.
    """
    pairs = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64).expand(3, 3)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[2] = torch.tensor([True, False, False])  # its own, the last, counts all the same
    loss = caption_negative_loss(pairs, torch.tensor([0, 2, 2]), mask)
    assert loss.tolist() == pytest.approx([0.407606, 2.407606, 2.126928], abs=1e-6)


def test_caption_negative_loss_of_two_captions_is_bradley_terry():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    caption_of = torch.tensor([0, 0, 0, 1, 1, 1])
    own, other = pairs.gather(1, caption_of[:, None])[:, 0], pairs.gather(1, 1 - caption_of[:, None])[:, 0]
    loss = caption_negative_loss(pairs, caption_of, torch.ones(6, 2, dtype=torch.bool))
    torch.testing.assert_close(loss, -F.logsigmoid(own - other))


def test_caption_negative_loss_is_about_the_caption_alone():
    """
    An image's own level, the unconditional part, cancels, value and gradient; so do the order of the captions and
    captions that are masked. With no other caption there is nothing to learn.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    caption_of = torch.tensor([0, 1, 1, 3, 2, 0])
    mask = torch.ones(6, 4, dtype=torch.bool)
    loss, gradient = value_and_gradient(caption_negative_loss, pairs, caption_of, mask)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    offset = torch.arange(6.0, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(caption_negative_loss(pairs + offset, caption_of, mask), loss)

    order = torch.tensor([2, 0, 3, 1])
    permuted = caption_negative_loss(pairs[:, order], order.argsort()[caption_of], mask)
    torch.testing.assert_close(permuted, loss)

    padded, padded_gradient = value_and_gradient(
        caption_negative_loss, F.pad(pairs, (0, 2), value=9.0), caption_of, F.pad(mask, (0, 2), value=False)
    )
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(padded_gradient, F.pad(gradient, (0, 2)))

    alone = caption_negative_loss(pairs[:, :1], torch.zeros(6, dtype=torch.long), mask[:, :1])
    assert alone.abs().max() == 0
