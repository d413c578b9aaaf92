"""
What a stage leaves behind: a dataset as parquet files with its images inside, and a card that says how it was made.

    <output_dir>/data/train-00000-of-00003.parquet     `load_dataset("<output_dir>")` reads them, the Hub shows them
    <output_dir>/README.md                             the dataset card
    <output_dir>/artefact.json                         what it was made of; written last, so it says "finished"
    <output_dir>/partial-<hash>/                       finished pieces, while the stage is at work
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData

from trl_diffusion_rank.data.parts import Parts
from trl_diffusion_rank.files import replace_file
from trl_diffusion_rank.hub.upload import upload
from trl_diffusion_rank.versions import package_versions


# Rows with images are large: few of them in memory at a time, and files of a size that the Hub's viewer likes.
ROWS_PER_GROUP = 32
BYTES_PER_FILE = 500 * 2**20

FINISHED = "artefact.json"
# Options that say where a dataset goes and not what it is
PRIVATE = ("output_dir", "push_to_hub", "hub_dataset_id", "hub_model_id", "hub_private_repo", "hub_token")


class Artefact:
    """
    The dataset that one stage makes, from its first piece to the Hub.

    Args:
        output_dir (`str` or `Path`): folder of the dataset.
        made_of (`dict`): all that decides what is in it: the options but those of speed, and the fingerprints of what
            is read. Pieces made of something else are not taken for its own.
    """

    def __init__(self, output_dir: str | Path, made_of: dict[str, Any]):
        self.folder = Path(output_dir)
        text = json.dumps(made_of, sort_keys=True, default=str)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def finished(self) -> bool:
        path = self.folder / FINISHED
        if not path.is_file() or json.loads(path.read_text())["made_of"] != self.digest:
            return False
        shutil.rmtree(self._partial, ignore_errors=True)  # a kill may have come between the two
        return True

    @property
    def _partial(self) -> Path:
        return self.folder / f"partial-{self.digest}"

    def parts(self, name: str, key: tuple[str, ...], features: Features) -> Parts:
        """The finished pieces of one kind, kept until the artefact is saved."""
        return Parts(self._partial / name, key, features)

    def save(
        self, splits: dict[str, Iterable[dict[str, list[Any]]]], features: Features, card: "Card"
    ) -> dict[str, int]:
        """
        Write all rows, then the card, and drop the pieces. Returns the number of rows of each split.

        Args:
            splits: batches of rows of each split, as columns; images as `{"bytes": ..., "path": None}`. They are
                written as they come. A split without rows is left out.
            features: of all splits.
            card: what the README says.
        """
        (self.folder / FINISHED).unlink(missing_ok=True)
        unfinished = self.folder / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        counts = {split: write_split(unfinished, split, batches, features) for split, batches in splits.items()}
        counts = {split: count for split, count in counts.items() if count}
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        unfinished.rename(self.folder / "data")
        (self.folder / "README.md").write_text(card.render(counts, features), encoding="utf-8")
        replace_file(self.folder / FINISHED, json.dumps({"made_of": self.digest, "rows": counts}) + "\n")
        for partial in self.folder.glob("partial-*"):
            shutil.rmtree(partial)
        return counts


def common_features(splits: dict[str, Dataset]) -> Features:
    """The features of all splits. Different ones could not be saved as one dataset, which is told before the work."""
    (first, data), *others = splits.items()
    for split, other in others:
        if other.features != data.features:
            raise ValueError(
                f"The splits {first!r} and {split!r} have different columns, {dict(data.features)} and "
                f"{dict(other.features)}: give them the same, of the same types."
            )
    return data.features.copy()


def write_split(folder: Path, split: str, batches: Iterable[dict[str, list[Any]]], features: Features) -> int:
    """One split as `<split>-00000-of-00003.parquet`, ...; returns its number of rows. Without rows no file is made."""
    schema = features.arrow_schema
    paths: list[Path] = []
    rows = size = 0
    writer: pq.ParquetWriter | None = None
    try:
        for group in _regrouped(batches):
            table = pa.table(group, schema=schema)
            if writer is None or size + table.nbytes > BYTES_PER_FILE:
                if writer is not None:
                    writer.close()
                paths.append(folder / f"{split}-{len(paths):05d}.parquet")
                # Dictionaries and statistics of images are nothing but time
                writer, size = pq.ParquetWriter(paths[-1], schema, use_dictionary=False, write_statistics=False), 0
            writer.write_table(table)
            size += table.nbytes
            rows += len(table)
    finally:
        if writer is not None:
            writer.close()
    for index, path in enumerate(paths):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # the pieces, which a power cut leaves, are removed after this
        path.rename(folder / f"{split}-{index:05d}-of-{len(paths):05d}.parquet")
    return rows


def _regrouped(batches: Iterable[dict[str, list[Any]]]) -> Iterator[dict[str, list[Any]]]:
    """Batches of any size as groups of `ROWS_PER_GROUP` rows: the files don't tell in which batches they were made."""
    waiting: dict[str, list[Any]] = {}
    for batch in batches:
        for name, values in batch.items():
            waiting.setdefault(name, []).extend(values)
        while waiting and len(next(iter(waiting.values()))) >= ROWS_PER_GROUP:
            yield {name: values[:ROWS_PER_GROUP] for name, values in waiting.items()}
            waiting = {name: values[ROWS_PER_GROUP:] for name, values in waiting.items()}
    if waiting and next(iter(waiting.values())):
        yield waiting


# The card


@dataclass
class Card:
    """
    What the README of an artefact says.

    Attributes:
        title (`str`)
        text (`str`): what the rows are, a sentence or two.
        columns (`dict[str, str]`): what each column means.
        stage (`str`): the stage that made it.
        options (`dict`): the stage's options, defaults among them.
        versions (`dict[str, str]`): of the packages; those that are installed, unless given.
        sections (`dict[str, str]`): further headings and their Markdown: summaries, tables, pictures.
        tags (`list[str]`): for the Hub.
    """

    title: str
    text: str
    columns: dict[str, str]
    stage: str
    options: dict[str, Any]
    versions: dict[str, str] = field(default_factory=package_versions)
    sections: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def render(self, rows: dict[str, int], features: Features) -> str:
        """The README as text: the Hub's metadata, counts, columns, the options it was made with."""
        # No `configs`: `datasets` finds the splits by their names, and where a card lists them it caches a folder by
        # the card alone, so that new data under the same names would be taken for the old
        data = DatasetCardData(tags=sorted({"trl-diffusion-rank", *self.tags}))
        counts = ", ".join(f"{count:,} in `{split}`" for split, count in rows.items()) or "none"
        table = ["| column | type | meaning |", "|---|---|---|"]
        table += [
            f"| `{name}` | {_type_name(kind)} | {self.columns.get(name, '')} |" for name, kind in features.items()
        ]
        options = {name: public(value) for name, value in self.options.items() if name not in PRIVATE}
        made = {"stage": self.stage, "options": options, "versions": self.versions}
        body = [
            f"# {self.title}",
            self.text,
            f"Rows: {counts}.",
            "\n".join(table),
            *(f"## {heading}\n\n{text}" for heading, text in self.sections.items()),
            "## How it was made",
            f"By the stage `{self.stage}` of trl-diffusion-rank.",
            "```json\n" + json.dumps(made, indent=2, default=str, ensure_ascii=False) + "\n```",
        ]
        return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def public(value: Any) -> Any:
    """An option as a card shows it, which the world may read: of a path on this machine only the last name."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item) for item in value]
    is_path = isinstance(value, str) and (os.path.exists(value) or os.path.isabs(os.path.expanduser(value)))
    return Path(value).name if is_path else value


def _type_name(feature: Any) -> str:
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return f"list of {_type_name(inner)}"
    return getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else type(feature).__name__.lower()


# The Hub


def push_dataset(folder: str | Path, repo_id: str, private: bool | None = None) -> CommitInfo:
    """
    Upload an artefact to the Hub as a dataset; the commit that is returned prints as its address. Nothing is lost when
    it fails: the folder stays, and files that have arrived are not sent again.

    Raises:
        `ValueError`: with what went wrong, and what to do.
    """
    return upload(
        folder,
        repo_id,
        repo_type="dataset",
        option="hub_dataset_id",
        private=private,
        allow_patterns=["README.md", "data/*.parquet", "*.jsonl", "*.png"],
        delete_patterns=["data/*.parquet"],
    )
