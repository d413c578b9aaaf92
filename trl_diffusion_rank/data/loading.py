"""Datasets by whatever name a user has for them."""

from pathlib import Path

from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError


FILE_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


def load_ranked_dataset(
    name: str, config: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """
    Load the splits of a dataset of ranked images.

    Args:
        name (`str`): a Hub id; a folder written by a stage (`save_to_disk`); a folder of images with a
            `metadata.jsonl` (rows of `file_name`, `prompt` and `rank` or `score`, or of `images_file_names`, `prompt`
            and `ranks`); or a parquet, json, jsonl or csv file.
        config (`str`, *optional*): the Hub dataset's configuration.
        streaming (`bool`, *optional*, defaults to `False`): don't download first.

    Raises:
        `ValueError`: if there is no such dataset.
    """
    path = Path(name)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        if streaming:
            raise ValueError(f"`{name}` lies on this disk already: leave `dataset_streaming` off.")
        dataset = load_from_disk(name)
        return dataset if isinstance(dataset, DatasetDict) else DatasetDict({"train": dataset})
    try:
        if path.is_file():
            if path.suffix not in FILE_BUILDERS:
                raise ValueError(f"`{name}`: expected a file ending in {', '.join(FILE_BUILDERS)}.")
            return load_dataset(FILE_BUILDERS[path.suffix], data_files=name, streaming=streaming)
        return load_dataset(name, name=config, streaming=streaming)
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"There is no dataset `{name}`: neither a folder or file here nor a dataset on the Hub you can reach. "
            f"({str(error).splitlines()[0]})"
        ) from error


def pick_split(dataset: DatasetDict | IterableDatasetDict, split: str, option: str):
    """The split called `split`; a `ValueError` that names the option and the splits there are if it's missing."""
    if split not in dataset:
        raise ValueError(f"`{option}={split}`: the dataset has the splits {', '.join(dataset)}.")
    return dataset[split]
