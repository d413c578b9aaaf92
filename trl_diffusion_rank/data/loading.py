"""Datasets by whatever name a user has for them."""

import copy
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image, IterableDataset, List, load_dataset, load_from_disk


# The builders of `datasets` by the ending of a file's name.
FILE_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


def load_splits(
    name: str, config: str | None = None, streaming: bool = False, option: str = "dataset_name"
) -> DatasetDict | dict[str, Dataset | IterableDataset]:
    """
    All splits of a dataset by name.

    Args:
        name (`str`):
            A folder that a stage has written, or saved with `save_to_disk`; a parquet, json, jsonl, csv or txt file; a
            folder of such files, or of images with a `metadata.jsonl` (lines of `file_name`, `prompt` and `rank` or
            `score`, or of `images_file_names`, `prompt` and `ranks`); or a dataset on the Hub.
        config (`str`, *optional*):
            Configuration of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are asked for instead of downloading everything first.
        option (`str`, *optional*, defaults to `"dataset_name"`):
            What errors call `name`.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix not in FILE_BUILDERS:
            raise ValueError(
                f"`{option}` is the file {name!r}; its name must end in one of {', '.join(FILE_BUILDERS)}."
            )
        return load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), streaming=streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        data = load_from_disk(str(path))
        return {"train": data} if isinstance(data, Dataset) else data
    try:
        return load_dataset(name, config, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"`{option}` is {name!r}, which is neither a file or folder on this machine nor a dataset on the Hub "
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


def evaluation_split(splits: DatasetDict | dict[str, Any], given: str | None, name: str, option: str) -> str:
    """The split `given` by the `option`, else `test`, or the only one that there is."""
    split = given or (next(iter(splits)) if len(splits) == 1 else "test")
    if split not in splits:
        raise ValueError(
            f"`{option}` is {given!r}{'' if given else ', which means test'}; {name!r} has the splits "
            f"{', '.join(splits)}."
        )
    return split


def stream_columns(
    rows: IterableDataset, name: str, split: str, config: str | None, columns: list[str]
) -> IterableDataset:
    """
    The stream `rows` of [`load_rows`] with these columns alone. Of parquet files the others, images say, aren't even
    downloaded, which `select_columns` can't spare.
    """
    path = Path(name)
    source = {"path": "parquet", "data_files": name} if path.is_file() else {"path": name, "name": config}
    try:
        return load_dataset(**source, split=split, streaming=True, columns=columns)
    except (TypeError, ValueError, FileNotFoundError):  # files of another kind have no such option
        return rows.select_columns(columns)


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same data with images as `{"bytes", "path"}`: they are decoded where a bad one can be named."""
    if isinstance(dataset, IterableDataset):
        return dataset.decode(False) if dataset.features is not None else dataset
    features = dataset.features.copy()
    for column, feature in features.items():
        if isinstance(feature, Image):
            features[column] = Image(decode=False)
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            features[column] = List(Image(decode=False))
    # `cast_column` would copy every image of a list column to a new table; only how they are read changes
    dataset = copy.copy(dataset)
    dataset._info = dataset.info.copy()
    dataset._info.features = features
    return dataset


def embedded(image: dict[str, Any]) -> dict[str, Any]:
    """An undecoded image with its bytes, read from its file where it has none yet."""
    content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return {"bytes": content, "path": None}
