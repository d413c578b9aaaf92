"""The prompts of a comparison: a stage's folder, a file, or a set on the Hub such as PartiPrompts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import NamedTuple

from trl_diffusion_rank.data.loading import evaluation_split, load_splits, stream_columns
from trl_diffusion_rank.data.prompts import check_column, check_row_numbers, prompt_column


# Columns of the categories in the datasets that we know
CATEGORY_COLUMNS = ("category", "Category")


class PromptSet(NamedTuple):
    """N prompts, the numbers of their rows, which the images' seeds are made of, and their categories."""

    prompts: list[str]
    rows: list[int]
    categories: list[str | None]


def read_prompt_set(
    name: str,
    config: str | None = None,
    split: str | None = None,
    column: str | None = None,
    category: str | None = None,
    num_prompts: int | None = None,
) -> PromptSet:
    """
    Prompts by name, checked.

    Of a dataset on the Hub the columns that are needed are streamed: the test split of Pick-a-Pic is text beside
    gigabytes of images.

    Args:
        name (`str`): as for [`~data.loading.load_splits`].
        config (`str`, *optional*): configuration of a Hub dataset.
        split (`str`, *optional*): `test` when unset, or the only one.
        column (`str`, *optional*): of the prompts; a known one when unset.
        category (`str`, *optional*): column of the categories; a known one when unset, where there is one.
        num_prompts (`int`, *optional*): the first so many; all when unset.
    """
    on_hub = not Path(name).exists()
    splits = load_splits(name, config, streaming=on_hub)
    split = evaluation_split(splits, split, name, "dataset_split")
    data = splits[split]
    names = data.column_names or list(next(iter(data), {}))  # a stream may not know them before its first row
    column = prompt_column(column, names, name)
    if category is not None:
        check_column("category_column", category, names, name)
    else:
        category = next((known for known in CATEGORY_COLUMNS if known in names), None)
    wanted = list(dict.fromkeys(filter(None, [column, category, "row" if "row" in names else None])))
    data = stream_columns(data, name, split, config, wanted) if on_hub else data.select_columns(wanted)
    rows = list(islice(data, num_prompts))
    if not rows or len(rows) < (num_prompts or 0):
        raise ValueError(
            f"`num_prompts` is {num_prompts} and the split {split!r} of {name!r} has {len(rows)} prompts."
        )

    prompts = [row[column] for row in rows]
    empty = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str) or not prompt.strip()]
    if empty:
        raise ValueError(
            f"Row {empty[0]} of the split {split!r} of {name!r} has no text in the column {column!r} ({len(empty)} "
            f"such rows), got {prompts[empty[0]]!r}: leave them out, or name another column by `prompt_column`."
        )
    numbers = [row["row"] for row in rows] if "row" in names else list(range(len(rows)))
    check_row_numbers(numbers, name)
    categories = [None if category is None or row[category] in (None, "") else str(row[category]) for row in rows]
    return PromptSet(prompts, numbers, categories)
