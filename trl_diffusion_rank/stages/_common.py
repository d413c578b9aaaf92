"""What several stages need: where rows come from, which model a name means, and who writes."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset, DatasetDict, IterableDataset
    from diffusers import DiffusionPipeline


# The builders of `datasets` by the ending of a file's name.
FILE_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


# What `dtype` may be.
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown_key(f"`{option}` is", value, list(choices))


def check_at_least(least: int, **options: int | None) -> None:
    """Refuse options below `least`; unset ones are fine."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}.")


def require(stage: str, **options: Any) -> None:
    """Refuse a stage that was started by itself without one of the `options` that a `run` would have filled in."""
    for name, value in options.items():
        if value is None:
            raise ValueError(
                f"`{name}` is not set and the stage `{stage}` needs it: give --{name}, set it in the recipe's section "
                f"`{stage}`, or start the stages together with `trl-diffusion-rank run`."
            )


def unknown_key(kind: str, got: str, known: list[str]) -> ValueError:
    """The error for a name that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(got, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{kind} {got!r}, which is not known.{hint} Known: {', '.join(known)}.")


def is_main_process() -> bool:
    """Whether this process writes. The launcher tells, so that no library has to be imported to ask."""
    return os.environ.get("RANK", "0") == "0"


def process_state() -> PartialState:
    """Which of how many processes this is, and its device; the first call joins them."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # `Accelerator` looks at these, `PartialState` does not: processes launched on CPUs would each take themselves for
    # the only one.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
    return PartialState(cpu=on_cpu)


def load_for_sampling(model: str, dtype: str) -> DiffusionPipeline:
    """A pipeline on this process's device. `auto` is bfloat16 on an accelerator and float32 on a CPU."""
    from ..diffusion.loading import load_pipeline

    device = process_state().device
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    pipe = load_pipeline(model, dtype)
    pipe.set_progress_bar_config(disable=True)  # one bar over all images instead of one per batch
    return pipe.to(device)


def load_splits(
    name: str, config: str | None = None, streaming: bool = False
) -> DatasetDict | dict[str, Dataset | IterableDataset]:
    """
    All splits of a dataset by name.

    Args:
        name (`str`):
            A folder saved with `save_to_disk`, a parquet, json, jsonl, csv or txt file, a folder of such files, or a
            dataset on the Hub.
        config (`str`, *optional*):
            Configuration of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are asked for instead of downloading everything first.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    path = Path(name)
    if path.is_file():
        if path.suffix not in FILE_BUILDERS:
            raise ValueError(
                f"`dataset_name` is the file {name!r}; its name must end in one of {', '.join(FILE_BUILDERS)}."
            )
        return load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), streaming=streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        data = load_from_disk(str(path))
        return {"train": data} if isinstance(data, Dataset) else data
    try:
        return load_dataset(name, config, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"`dataset_name` is {name!r}, which is neither a file or folder on this machine nor a dataset on the Hub "
            f"that can be reached. ({error})"
        ) from error


def load_rows(
    name: str, split: str, config: str | None = None, columns: tuple[str, ...] = (), streaming: bool = False
) -> Dataset | IterableDataset:
    """One split of [`load_splits`], which must have the `columns`."""
    splits = load_splits(name, config, streaming)
    if split not in splits:
        raise ValueError(f"`dataset_split` is {split!r}; {name!r} has the splits {', '.join(splits)}.")
    rows = splits[split]
    names = rows.column_names or list(next(iter(rows), {}))  # a stream may not know its columns before its first row
    for column in columns:
        if column not in names:
            raise ValueError(f"There is no column {column!r} in {name!r}; its columns are {', '.join(names)}.")
    return rows


def format_table(header: list[str], rows: list[list[str]], names: int = 1) -> str:
    """
    An aligned table that reads as plain text and as Markdown: the first columns, so many as there are `names`, to the
    left, numbers to the right.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:names], widths[:names], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[names:], widths[names:], strict=True)]
        return f"| {' | '.join(left + right)} |"

    dashes = ["-" * (width + 2) if i < names else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), f"|{'|'.join(dashes)}|", *map(line, rows)])
