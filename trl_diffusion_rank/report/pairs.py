"""The images that `evaluate` drew, base beside tuned, as thumbnails within a number of bytes."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from trl_diffusion_rank.report.pictures import LADDER, Rung, encode, encode_all, evenly, to_base64
from trl_diffusion_rank.report.run import UNREADABLE, Stage, read_columns


BASE = "base"
# Images on which a rung's size is estimated, and the room left for the error of that
SAMPLED, ROOM = 64, 0.95

COLUMNS = ("prompt", "row", "category", "index", "seed", "num_inference_steps", "model")


@dataclass
class Pairs:
    """
    The evaluation's images, one entry for each prompt, number of steps and seed.

    Attributes:
        models (`list[str]`): `base`, then the adapters.
        metrics (`list[dict]`): `column` and `label` of what the judges said, headline metrics first.
        entries (`list[dict]`): `prompt`, `row`, `category`, `index`, `seed`, `steps`, and `scores`: for each metric a
            number of every model, None where there is none.
        rows (`np.ndarray`): (entries, models) where the image stands in the files, -1 if it is not there.
        files (`list[Path]`): the parquet files, which hold the images.
        num_prompts (`int`): how many prompts were evaluated, of which the entries may show a part.
    """

    models: list[str]
    metrics: list[dict[str, str]]
    entries: list[dict[str, Any]]
    rows: np.ndarray
    files: list[Path]
    num_prompts: int

    @property
    def num_shown(self) -> int:
        return len({entry["row"] for entry in self.entries})

    def some_prompts(self, keep: int) -> "Pairs":
        """The entries of `keep` of the prompts, evenly taken."""
        prompts = list(dict.fromkeys(entry["row"] for entry in self.entries))
        kept = {prompts[place] for place in evenly(len(prompts), keep)}
        chosen = [place for place, entry in enumerate(self.entries) if entry["row"] in kept]
        entries = [self.entries[place] for place in chosen]
        return Pairs(self.models, self.metrics, entries, self.rows[chosen], self.files, self.num_prompts)


def metric_columns(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """What the judges' metrics are called in the parquet files and on the page, headline metrics first."""
    found = []
    for judge in metrics["judges"]:
        for metric in judge["metrics"]:
            same = metric == judge["name"]
            column = f"score_{metric}" if same else f"score_{judge['name']}_{metric}"
            label = metric if same else f"{judge['name']} {metric}"
            found.append((metric != judge["headline"], {"column": column, "label": label}))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def read_pairs(evaluate: Stage) -> Pairs | None:
    """All pairs of the stage `evaluate`, without their images; None as long as it has not finished them."""
    files, metrics = evaluate.data_files(), evaluate.metrics
    if metrics is None:
        return None
    wanted = metric_columns(metrics)
    columns = {*COLUMNS, *(metric["column"] for metric in wanted)}
    table = read_columns(files, columns.__contains__)
    if table is None or not len(table):
        return None
    wanted = [metric for metric in wanted if metric["column"] in table.column_names]
    models = [BASE, *metrics["adapters"]]

    entries: dict[tuple[int, int, int], dict[str, Any]] = {}
    places: dict[tuple[int, int, int], list[int]] = {}
    for place, row in enumerate(table.to_pylist()):
        if row["model"] not in models:  # the stage is being run again, with other adapters
            continue
        key = row["row"], row["num_inference_steps"], row["index"]
        entry = entries.setdefault(
            key,
            {
                "prompt": row["prompt"],
                "row": row["row"],
                "category": row.get("category"),
                "index": row["index"],
                "seed": row["seed"],
                "steps": row["num_inference_steps"],
                "scores": [[None] * len(models) for _ in wanted],
            },
        )
        model = models.index(row["model"])
        places.setdefault(key, [-1] * len(models))[model] = place
        for metric, scores in zip(wanted, entry["scores"], strict=True):
            scores[model] = shortened(row[metric["column"]])
    order = sorted(entries)
    num_prompts = len({row for row, _, _ in order})
    rows = np.array([places[key] for key in order])
    return Pairs(models, wanted, [entries[key] for key in order], rows, files, num_prompts)


def shortened(value: float | None) -> float | None:
    """Six digits are enough to sort by, and JSON knows no infinity."""
    return float(f"{value:.6g}") if value is not None and np.isfinite(value) else None


# Images ----------------------------------------------------------------


def read_images(files: Sequence[Path], rows: Sequence[int]) -> Iterator[bytes]:
    """The images at the ascending `rows` of the files together; a row group in memory at a time."""
    wanted = np.asarray(rows)
    start = 0
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                end = start + parquet.metadata.row_group(group).num_rows
                here = wanted[(start <= wanted) & (wanted < end)] - start
                if len(here):
                    images = parquet.read_row_group(group, columns=["image"])["image"].take(pa.array(here))
                    yield from (image["bytes"].as_py() for image in images)
                start = end


def thumbnails(pairs: Pairs, max_bytes: int) -> tuple[Pairs, list[list[str]]] | None:
    """
    The pairs that are shown, and of each the models' images, in base64, "" where there is none.

    The finest of the `LADDER` is taken whose images fit in `max_bytes`. Where even the coarsest don't, an even part of
    the prompts is shown. None when the files can't be read.
    """
    try:
        rung, share = choose_rung(pairs, max_bytes)
        while True:
            shown = pairs.some_prompts(max(1, int(pairs.num_prompts * share)))
            encoded = encode_rows(shown, rung)
            if sum(map(len, encoded.values())) <= max_bytes or shown.num_shown == 1:
                images = [[to_base64(encoded[row]) if row in encoded else "" for row in rows] for rows in shown.rows]
                return shown, images
            if rung != LADDER[-1]:  # the sample was easier than the whole
                rung = LADDER[LADDER.index(rung) + 1]
            else:
                share *= 0.8
    except UNREADABLE:
        return None


def choose_rung(pairs: Pairs, max_bytes: int) -> tuple[Rung, float]:
    """The finest rung that fits by a sample of the images, and the share of the images for which there is room."""
    rows = np.sort(pairs.rows[pairs.rows >= 0])
    sample = [Image.open(io.BytesIO(image)) for image in read_images(pairs.files, rows[evenly(len(rows), SAMPLED)])]
    for image in sample:
        image.thumbnail([LADDER[0].side] * 2)  # once, and not for every rung from the full size
    for rung in LADDER:
        expected = np.mean([len(encode(image, rung)) for image in sample]) * len(rows)
        if expected <= ROOM * max_bytes:
            return rung, 1.0
    return LADDER[-1], ROOM * max_bytes / expected


def encode_rows(pairs: Pairs, rung: Rung) -> dict[int, bytes]:
    """Row of the files -> its image at the rung."""
    rows = np.sort(pairs.rows[pairs.rows >= 0]).tolist()
    return dict(zip(rows, encode_all(read_images(pairs.files, rows), rung), strict=True))
