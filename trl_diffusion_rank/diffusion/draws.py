"""
The randomness of a training step, tied to the row instead of to the process.

A row's noise and timestep follow from the run's seed, the row's own seed and how often the row was seen before. So a
run can be repeated and resumed, and neither the number of processes nor the place in a batch changes what a row gets.
"""

import hashlib

import torch
from torch import Tensor


EVALUATION = -1  # the "visit" of an evaluation: the same draw each time, or `eval_loss` couldn't be compared


def stable_seed(*parts: int | str | bytes) -> int:
    """A 63-bit seed from anything, the same in every process and on every machine (Python's `hash` is not)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        part = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(part).to_bytes(8, "big") + part)
    return int.from_bytes(digest.digest(), "big") >> 1


def draw_rows(seed: int, row_seeds: list[int], visit: int, latent_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """
    What each of B rows is given at its `visit`-th visit.

    Returns `u` (B,), uniform in [0, 1), from which the timestep follows, and `noise` (B, *latent_shape), standard
    normal; both float32 on the CPU, where a generator gives the same numbers whatever the accelerator.
    """
    u, noise = [], []
    for row_seed in row_seeds:
        generator = torch.Generator().manual_seed(stable_seed(seed, row_seed, visit))
        u.append(torch.rand((), generator=generator))
        noise.append(torch.randn(latent_shape, generator=generator))
    return torch.stack(u), torch.stack(noise)


def draw_captions(seed: int, row_seeds: list[int], visit: int, probability: float) -> Tensor:
    """Which of B rows lose their caption at their `visit`-th visit, (B,) bool; an evaluation drops none."""
    if visit == EVALUATION:
        return torch.zeros(len(row_seeds), dtype=torch.bool)
    u = [stable_seed(seed, row_seed, visit, "caption") / 2**63 for row_seed in row_seeds]
    return torch.tensor(u) < probability
