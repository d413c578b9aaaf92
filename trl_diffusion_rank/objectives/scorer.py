"""
Losses of a scorer that tells real images from generated ones: pure functions of tensors.

Every function takes

    scores (B, n)  logits of the images of one caption per row
    mask   (B, n)  True where the row has an image; padded places may hold any finite number

and returns one loss per row, (B,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_diffusion_rank.objectives.ranking import mean_over, plackett_luce


def group_loss(scores: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    """
    -log of the probability that a real image is chosen among itself and the generated ones of its caption.

        mean over real i of [ logsumexp({s_i} U {s_k : k generated}) - s_i ]

    The first choice of Plackett-Luce; Bradley-Terry for one real and one generated image. Real images don't compete
    with each other: softmax over the whole row would pay for one real image at the expense of the next. It compares
    within a row only, so a number added to all of a row's scores changes nothing, and a row without a real or without
    a generated image has loss 0.

    Args:
        order: (B, n) True for a real image and False for a generated one; or, as integers, the ranks of a whole order,
            1 the best, ties equal, for which this is [`plackett_luce`].
    """
    ranks = torch.where(order, 1, 2) if order.dtype == torch.bool else order
    return plackett_luce(scores, ranks, mask)


def bce_loss(scores: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    """
    Binary cross-entropy of real (B, n) and generated, which gives the scores an absolute zero.

        1/2 [ mean over real of softplus(-s) + mean over generated of softplus(s) ]

    Both kinds weigh the same whatever their numbers: 0 means as likely real as generated, and not that a row has
    three times as many generated images. Where a row has one kind, its mean is the loss.
    """
    real, generated = real & mask, ~real & mask
    kinds = (real.any(1).int() + generated.any(1).int()).clamp(min=1)
    return (mean_over(F.softplus(-scores), real) + mean_over(F.softplus(scores), generated)) / kinds


def caption_negative_loss(pair_scores: Tensor, caption_of: Tensor, mask: Tensor) -> Tensor:
    """
    -log softmax over captions [own]: an image must score above itself with the captions of others, else a scorer
    learns to ignore the text. (N,)

        logsumexp over captions c of s(x, c) - s(x, own)

    Bradley-Terry for two captions. What the score has of the image alone cancels.

    Args:
        pair_scores: (N, T) logits of N images with T different captions.
        caption_of: (N,) index of each image's own caption.
        mask: (N, T) False where a caption isn't an image's negative: padding, or one that says the same. Its own
            always counts.
    """
    own = F.one_hot(caption_of, pair_scores.shape[1]).bool()
    return group_loss(pair_scores, own, mask | own)
