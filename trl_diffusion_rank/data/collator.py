"""Rows to batches: rows of different n are padded to the longest, and masked."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl_diffusion_rank.data.encoding import IMAGE_CONDITIONING, RowImages, load_images, unpack
from trl_diffusion_rank.data.ranked_rows import RankedRow, read_row
from trl_diffusion_rank.diffusion.families.base import Family
from trl_diffusion_rank.objectives.ranking import win_rates


def _collate_lists(ranks: list[list[int]], psi: list[list[float] | None], row_seeds: list[int]) -> dict[str, Tensor]:
    """`ranks` (B, n) padded with -1, `mask` (B, n), `psi` (B, n) and `row_seeds` (B,)."""
    padded = pad_sequence([torch.tensor(row) for row in ranks], batch_first=True, padding_value=-1)
    mask = padded != -1
    batch_psi = win_rates(padded, mask)
    for index, row in enumerate(psi):
        if row is not None:
            batch_psi[index, : len(row)] = torch.tensor(row)
    return {"ranks": padded, "mask": mask, "psi": batch_psi, "row_seeds": torch.tensor(row_seeds)}


class EncodedRowCollator:
    """
    Batches of encoded rows.

    Every tensor has the rows first: `latents` (B, n, C, h, w) float16, what [`_collate_lists`] gives,
    `prompt_conditioning` {name: (B, ...)} and `image_conditioning` {name: (B, n, ...)}; where the reference's errors
    are known in advance, `ref_errors` (B, n, K). Besides them `prompts`, a list of B strings.

    A table of prompts belongs to each encoded dataset; `add_prompts` gives it a number that the rows carry.
    """

    def __init__(self) -> None:
        self.prompt_tables: list[Dataset] = []

    def add_prompts(self, prompts: Dataset) -> int:
        self.prompt_tables.append(prompts)
        return len(self.prompt_tables) - 1

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        prompts = [self.prompt_tables[example["prompt_table"]][example["prompt_index"]] for example in examples]
        texts = [row.pop("prompt") for row in prompts]
        image_keys = [key for key in examples[0] if key.startswith(IMAGE_CONDITIONING)]
        if "ref_errors" in examples[0]:
            ref_errors = [torch.tensor(example["ref_errors"]) for example in examples]
            known = {"ref_errors": pad_sequence(ref_errors, batch_first=True)}
        else:
            known = {}
        return {
            **known,
            "prompts": texts,
            "latents": pad_sequence([unpack(example["latents"]) for example in examples], batch_first=True),
            **_collate_lists(
                [example["ranks"] for example in examples],
                [example["psi"] for example in examples],
                [example["row_seed"] for example in examples],
            ),
            "prompt_conditioning": {key: torch.stack([unpack(row[key]) for row in prompts]) for key in prompts[0]},
            "image_conditioning": {
                key.removeprefix(IMAGE_CONDITIONING): pad_sequence(
                    [unpack(example[key]) for example in examples], batch_first=True
                )
                for key in image_keys
            },
        }


class RawRowCollator:
    """
    Batches of rows that are encoded at each step (`cache_latents=False`, streams).

    As [`EncodedRowCollator`], with `images` (B, n, 3, H, W) uint8 instead of `latents`, and without
    `prompt_conditioning`.
    """

    def __init__(self, family: Family, resolution: int):
        self.family = family
        self.resolution = resolution

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows: list[RankedRow] = []
        images: list[RowImages] = []
        for example in examples:
            where = f"A row with the prompt {example.get('prompt')!r}"
            row = read_row(example, where)
            rows.append(row)
            images.append(load_images(row, self.family, self.resolution, where))
        return {
            "images": pad_sequence([row_images.images for row_images in images], batch_first=True),
            "prompts": [row.prompt for row in rows],
            **_collate_lists(
                [row.ranks for row in rows],
                [row.psi for row in rows],
                [row_images.seed(row.prompt) for row, row_images in zip(rows, images, strict=True)],
            ),
            "image_conditioning": {
                key: pad_sequence([row_images.conditioning[key] for row_images in images], batch_first=True)
                for key in images[0].conditioning
            },
        }
