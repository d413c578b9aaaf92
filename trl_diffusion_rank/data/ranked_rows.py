"""
The ranked row, the project's one data contract, and the formats that are read as ranked rows.

A row is `prompt`, n >= 2 `images`, and one of `ranks` (1 best, ties equal), `scores` (higher is better) or neither,
when the images stand in order from best to worst; optionally `psi`, the mean win rate of each image in [0, 1].

Read without the user's help: TRL's preference format (`prompt`, `chosen`, `rejected`), Pick-a-Pic (`caption`,
`jpg_0`, `jpg_1`, `label_0`), and one image a row (`image`, `prompt`, `rank` or `score`), which is what a folder of
images with a `metadata.jsonl` gives.
"""

import hashlib
import logging
import math
import numbers
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.fingerprint import Hasher

from trl_diffusion_rank.data.loading import undecoded


logger = logging.getLogger(__name__)

IMAGES = "ranked_images"  # TRL takes a column called `images` for a vision-language dataset
ROW_COLUMNS = ("prompt", IMAGES, "ranks", "scores", "psi", "chosen", "rejected")
PICKAPIC_COLUMNS = {"caption", "jpg_0", "jpg_1", "label_0"}
_RAW_IMAGE = Image(decode=False)


class BadRowError(ValueError):
    """A row that breaks the contract; the message names the row and its fault."""


@dataclass
class RankedRow:
    """
    One checked row of n images.

    Attributes:
        prompt (`str`)
        images (`list`): n images, not yet decoded.
        ranks (`list[int]`): n ranks, 1 best, dense (1, 2, 2, 3), ties equal.
        psi (`list[float]` or `None`): n mean win rates, where the dataset has them.
    """

    prompt: str
    images: list[Any]
    ranks: list[int]
    psi: list[float] | None

    @property
    def has_preference(self) -> bool:
        return len(set(self.ranks)) > 1


def dense_ranks(scores: list[float]) -> list[int]:
    """Scores, higher is better, to ranks from 1; equal scores share a rank and the next rank follows: 1, 2, 2, 3."""
    place = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True), start=1)}
    return [place[score] for score in scores]


def read_row(example: dict[str, Any], where: str) -> RankedRow:
    """
    Check an example of one of the row formats and give it as a [`RankedRow`].

    Args:
        example: columns of `ROW_COLUMNS`; others are ignored.
        where (`str`): how messages name it, `row 17 of the train dataset`.

    Raises:
        [`BadRowError`]: naming the row, what was found and what is expected.
    """
    prompt = example.get("prompt")
    if not isinstance(prompt, str):
        raise BadRowError(f"{where}: `prompt` must be a string, got {prompt!r}.")
    if "chosen" in example:
        images, ranks = [example["chosen"], example["rejected"]], [1, 2]
    else:
        images = example.get(IMAGES)
        ranks = _read_ranks(example, len(images or []), where)
    if not isinstance(images, list) or len(images) < 2:
        count = len(images) if isinstance(images, list) else 0
        raise BadRowError(f"{where}: a ranking needs at least two images, got {count}.")
    psi = example.get("psi")
    if psi is not None:
        psi = _read_numbers(psi, len(images), "psi", where)
    return RankedRow(prompt, images, ranks, psi)


def _read_ranks(example: dict[str, Any], n: int, where: str) -> list[int]:
    """Ranks from whichever of `ranks`, `scores` or the order the example has."""
    if (ranks := example.get("ranks")) is not None:
        if not _all_of_type(ranks, numbers.Integral):
            raise BadRowError(f"{where}: `ranks` must be integers, 1 for the best, got {ranks!r}.")
        if len(ranks) != n:
            raise BadRowError(f"{where}: {len(ranks)} `ranks` for {n} images; there must be one for each.")
        if min(ranks, default=1) < 1:
            raise BadRowError(f"{where}: `ranks` start at 1 for the best, got {ranks!r}.")
        return dense_ranks([-rank for rank in ranks])
    if (scores := example.get("scores")) is not None:
        return dense_ranks(_read_numbers(scores, n, "scores", where))
    return list(range(1, n + 1))


def _all_of_type(values: Any, number: type) -> bool:
    return isinstance(values, list) and all(isinstance(v, number) and not isinstance(v, bool) for v in values)


def _read_numbers(values: Any, n: int, column: str, where: str) -> list[float]:
    if not _all_of_type(values, numbers.Real):
        raise BadRowError(f"{where}: `{column}` must be numbers, got {values!r}.")
    if len(values) != n:
        raise BadRowError(f"{where}: {len(values)} `{column}` for {n} images; there must be one for each.")
    if not all(math.isfinite(value) for value in values):
        raise BadRowError(f"{where}: `{column}` must be finite, got {values!r}.")
    return [float(value) for value in values]


def to_ranked(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """
    Bring a dataset of any accepted format into rows that [`read_row`] reads, with the images left undecoded.

    Formats of several dataset rows a ranked row (Pick-a-Pic, one image a row) are merged by prompt; a stream can't be
    merged, so there every Pick-a-Pic pair stays a row of two. Applying it twice does no harm.

    Args:
        dataset: the user's dataset.
        name (`str`): how messages name it, `train`.

    Raises:
        `ValueError`: if the columns are of no accepted format.
    """
    columns = set(_column_names(dataset, name))
    if columns >= PICKAPIC_COLUMNS:
        return _pickapic_stream(dataset) if isinstance(dataset, IterableDataset) else _merge_pickapic(dataset, name)
    if {"image", "prompt"} <= columns and columns & {"rank", "score"} and isinstance(dataset, Dataset):
        return _merge_single_images(dataset, name)
    if "images" in columns:
        dataset = dataset.rename_column("images", IMAGES)
        columns = columns - {"images"} | {IMAGES}
    if not ({"prompt", IMAGES} <= columns or {"prompt", "chosen", "rejected"} <= columns):
        raise ValueError(
            f"The {name} dataset has the columns {sorted(columns)}, of no format that is known: expected `prompt` and "
            "`images` (with `ranks` or `scores`, or in order from best to worst), TRL's `prompt`, `chosen`, "
            "`rejected`, Pick-a-Pic's `caption`, `jpg_0`, `jpg_1`, `label_0`, or one image a row as `image`, `prompt` "
            "and `rank` or `score`."
        )
    return undecoded(dataset.select_columns([column for column in ROW_COLUMNS if column in columns]))


def _column_names(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    if dataset.column_names is not None:
        return dataset.column_names
    first = next(iter(dataset), None)  # a stream that doesn't know its features yet
    if first is None:
        raise ValueError(f"The {name} dataset is empty.")
    return list(first)


def check_rows(dataset: Dataset, name: str, skip: bool = False) -> list[int]:
    """
    Read every row but its pixels, before hours of encoding, and say which to keep.

    Rows that break the contract are refused, or dropped and counted with `skip`; rows in which all images tie teach
    nothing and are dropped and counted.

    Raises:
        [`BadRowError`]: at the first bad row, unless `skip`.
        `ValueError`: if no row is left.
    """
    columns = [column for column in ("prompt", "ranks", "scores", "psi") if column in dataset.column_names]
    lengths = [2] * len(dataset) if "chosen" in dataset.column_names else image_counts(dataset, IMAGES)
    kept, bad, tied = [], [], 0
    for index, (example, length) in enumerate(zip(dataset.select_columns(columns), lengths, strict=True)):
        placeholder = [None] * length
        images = {"chosen": None, "rejected": None} if "chosen" in dataset.column_names else {IMAGES: placeholder}
        try:
            row = read_row({**example, **images}, f"Row {index} of the {name} dataset")
        except BadRowError as error:
            if not skip:
                raise
            bad.append(str(error))
            continue
        if row.has_preference:
            kept.append(index)
        else:
            tied += 1
    if bad:
        logger.warning(f"Skipped {len(bad)} bad rows of the {name} dataset (`on_bad_row='skip'`). First: {bad[0]}")
    if tied and kept:
        logger.warning(f"Dropped {tied} rows of the {name} dataset in which all images tie: they teach nothing.")
    if not kept:
        raise ValueError(
            f"There is nothing to learn from the {name} dataset: of {len(lengths)} rows, in {tied} all images are tied"
            f" and {len(bad)} are bad. Give ranks or scores that differ."
        )
    return kept


def image_counts(dataset: Dataset, column: str) -> list[int]:
    """Number of images in the lists of `column`, read off Arrow's offsets without touching an image."""
    counts = []
    for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        counts += pc.list_value_length(batch[column]).fill_null(0).to_pylist()
    return counts


# Pick-a-Pic: pairs of images with a vote, many pairs a caption (https://huggingface.co/papers/2305.01569)


def _encoded(value: bytes | dict[str, Any]) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"bytes": value, "path": None}


def _pickapic_stream(dataset: IterableDataset) -> IterableDataset:
    def pair_to_row(example: dict[str, Any]) -> dict[str, Any]:
        label = float(example["label_0"])
        return {
            "prompt": example["caption"],
            IMAGES: [_encoded(example["jpg_0"]), _encoded(example["jpg_1"])],
            "scores": [label, 1.0 - label],
        }

    features = Features({"prompt": Value("string"), IMAGES: List(_RAW_IMAGE), "scores": List(Value("float32"))})
    return dataset.map(pair_to_row, remove_columns=dataset.column_names, features=features)


@dataclass
class Votes:
    """
    The labelled pairs of a Pick-a-Pic dataset, by caption.

    Attributes:
        images (`dict[str, dict[str, tuple[int, str]]]`): caption -> image id -> the first (row, column) that holds it.
        pairs (`dict[str, list[tuple[str, str, float]]]`): caption -> (image id, image id, vote for the first).
        left_out (`Counter`): other pairs, by what is wrong with them.
    """

    images: dict[str, dict[str, tuple[int, str]]]
    pairs: dict[str, list[tuple[str, str, float]]]
    left_out: Counter = field(default_factory=Counter)

    @property
    def labelled(self) -> int:
        return sum(map(len, self.pairs.values()))

    @property
    def ties(self) -> int:
        """Votes for neither image."""
        return sum(label == 0.5 for pairs in self.pairs.values() for _, _, label in pairs)

    @property
    def contradictions(self) -> int:
        """Pairs of images with votes for both sides: they are divided."""
        return sum(map(_count_contradictions, self.pairs.values()))

    def __str__(self) -> str:
        return (
            f"{self.labelled} pairs of {len(self.images)} captions; {self.ties} votes are ties, {self.contradictions} "
            "pairs have votes for both sides; left out: "
            f"{', '.join(f'{n} pairs {reason}' for reason, n in sorted(self.left_out.items())) or 'none'}"
        )


def read_votes(dataset: Dataset, name: str) -> Votes:
    """The votes of a Pick-a-Pic dataset, read without decoding an image; captions without space around them."""
    dataset = undecoded(dataset)  # the original stores bytes, some mirrors images
    optional = ("has_label", "image_0_uid", "image_1_uid")
    columns = ["caption", "label_0", *(column for column in optional if column in dataset.column_names)]
    has_uids = {"image_0_uid", "image_1_uid"} <= set(columns)
    votes = Votes(defaultdict(dict), defaultdict(list))
    for index, pair in enumerate(dataset.select_columns(columns)):
        caption, label = (pair["caption"] or "").strip(), pair["label_0"]
        if not pair.get("has_label", True):
            votes.left_out["without a vote"] += 1
            continue
        if not caption:
            votes.left_out["without a caption"] += 1
            continue
        if label not in (0.0, 0.5, 1.0):
            raise BadRowError(f"Row {index} of the {name} dataset: `label_0` must be 0, 0.5 or 1, got {label!r}.")
        ids = (
            [pair["image_0_uid"], pair["image_1_uid"]]
            if has_uids
            else [hashlib.sha256(_encoded(dataset[index][c])["bytes"]).hexdigest() for c in ("jpg_0", "jpg_1")]
        )
        if ids[0] == ids[1]:  # alone under its caption it would be a list of one
            votes.left_out["of an image with itself"] += 1
            continue
        for image_id, column in zip(ids, ("jpg_0", "jpg_1"), strict=True):
            votes.images[caption].setdefault(image_id, (index, column))
        votes.pairs[caption].append((ids[0], ids[1], float(label)))
    return votes


def merge_votes(dataset: Dataset, votes: Votes) -> Dataset:
    """One row for each caption of `votes`, its images ranked by the share of their votes that they won."""
    dataset = undecoded(dataset)

    def rows() -> Iterator[dict[str, Any]]:
        for caption, places in votes.images.items():
            won, met = Counter(), Counter()
            for first, second, label in votes.pairs[caption]:
                won[first] += label
                won[second] += 1.0 - label
                met.update((first, second))
            share = [won[image_id] / met[image_id] for image_id in places]
            yield {
                "prompt": caption,
                IMAGES: [_encoded(dataset[index][column]) for index, column in places.values()],
                "ranks": dense_ranks(share),
                "psi": share,
            }

    return _from_rows(rows, ("pickapic", dataset._fingerprint, list(votes.images)), with_psi=True)


def _merge_pickapic(dataset: Dataset, name: str) -> Dataset:
    """Pairs that share a caption to one row."""
    votes = read_votes(dataset, name)
    logger.info(f"Merged the Pick-a-Pic pairs of the {name} dataset into ranked lists: {votes}.")
    if votes.contradictions:
        logger.warning(
            f"{votes.contradictions} pairs of the {name} dataset have votes for both sides: they are divided."
        )
    return merge_votes(dataset, votes)


def _count_contradictions(pairs: list[tuple[str, str, float]]) -> int:
    """Pairs of images between which some votes went one way and some the other."""
    directions: dict[frozenset[str], set[str]] = defaultdict(set)
    for first, second, label in pairs:
        if label != 0.5:
            directions[frozenset((first, second))].add(first if label == 1.0 else second)
    return sum(len(winners) > 1 for winners in directions.values())


# One image a row, as the `imagefolder` of datasets reads a folder with a metadata.jsonl


def _merge_single_images(dataset: Dataset, name: str) -> Dataset:
    """Rows that share a prompt to one ranked row."""
    value_column = "rank" if "rank" in dataset.column_names else "score"
    dataset = undecoded(dataset)
    members: dict[str, list[int]] = defaultdict(list)
    values = dataset[value_column][:]
    for index, prompt in enumerate(dataset["prompt"]):
        members[prompt].append(index)
    logger.info(f"Merged {len(dataset)} images of the {name} dataset into {len(members)} lists by their prompt.")

    def rows() -> Iterator[dict[str, Any]]:
        for prompt, indices in members.items():
            chosen = [values[index] for index in indices]
            where = f"The images of prompt {prompt!r} of the {name} dataset"
            ranks = _read_ranks({f"{value_column}s": chosen}, len(indices), where)
            images = [dataset[index]["image"] for index in indices]
            yield {"prompt": prompt, IMAGES: images, "ranks": ranks}

    return _from_rows(rows, ("single images", dataset._fingerprint), with_psi=False)


def _from_rows(rows: Any, fingerprint_of: Any, with_psi: bool) -> Dataset:
    features = {"prompt": Value("string"), IMAGES: List(_RAW_IMAGE), "ranks": List(Value("int32"))}
    if with_psi:
        features["psi"] = List(Value("float32"))
    return Dataset.from_generator(rows, features=Features(features), fingerprint=Hasher.hash(fingerprint_of))
