"""
How well a discriminator tells real images from generated ones, and how much of that a shortcut explains.

Rows are caption groups (`trl_diffusion_rank.data.caption_groups`). Without `sources`, what is said of real images is
said of those that are ranked first.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import binomtest, kendalltau, rankdata

from trl_diffusion_rank.data.caption_groups import (
    Equalizer,
    decode_row,
    group_ranks,
    group_sources,
    same_caption,
    through_jpeg,
)
from trl_diffusion_rank.data.images import RASTER_FORMATS, fit_image
from trl_diffusion_rank.data.loading import embedded
from trl_diffusion_rank.evaluation.grid import image_grid, shown_size
from trl_diffusion_rank.evaluation.statistics import bootstrap_interval
from trl_diffusion_rank.tables import format_table


if TYPE_CHECKING:
    from datasets import Dataset


# Train rows that a baseline is fitted on: it has four numbers an image to learn from
BASELINE_ROWS = 2000
# Rows in the picture, and the most images of a row in it
PICTURE_ROWS, PICTURE_COLUMNS = 8, 8
LABEL_HEIGHT, LABEL_SIZE = 30, 11

Measure = dict[str, Any]  # `value`, `interval`, `n`; `json` takes it as it is


@dataclass
class ScoredGroups:
    """
    Rows with the scores of their images.

    Attributes:
        captions (`list[str]`): of each row.
        sources (`list[list[str]]`): of each row's n images.
        ranks (`list[np.ndarray]`): (n,), 1 for the real images.
        scores (`list[np.ndarray]`): (n,), higher is better.
    """

    captions: list[str]
    sources: list[list[str]]
    ranks: list[np.ndarray]
    scores: list[np.ndarray]

    @classmethod
    def of(cls, dataset: Dataset, scores: list[np.ndarray], real_source: str) -> ScoredGroups:
        rows = list(dataset.remove_columns("images"))
        return cls(
            captions=[same_caption(row["prompt"]) for row in rows],
            sources=[group_sources(row) for row in rows],
            ranks=[np.array(group_ranks(row, real_source)) for row in rows],
            scores=scores,
        )


# One row --------------------------------------------------------------


def top_share(scores: np.ndarray, which: np.ndarray) -> float:
    """The share of the highest of `scores` (n,) that are among `which` (n,): 1 or 0, but for ties."""
    return float(which[scores == scores.max()].mean())


def pair_share(first: np.ndarray, second: np.ndarray) -> float:
    """Over all pairs of one of `first` and one of `second`, the share in which the first is higher, ties one half."""
    return float((0.5 + 0.5 * np.sign(np.subtract.outer(first, second))).mean())


def area_under_curve(values: np.ndarray) -> float:
    """AUC of scores and labels (N, 2): the probability that an image labelled 1 is above one labelled 0."""
    scores, real = values[:, 0], values[:, 1] == 1
    count = real.sum()
    if count in (0, len(real)):
        return float("nan")  # a resampled set may hold one kind only
    return float((rankdata(scores)[real].sum() - count * (count + 1) / 2) / (count * (len(real) - count)))


# All rows -------------------------------------------------------------


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n independent cases."""
    interval = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def measured(
    values: Sequence[float] | np.ndarray,
    captions: Sequence[str],
    statistic: Callable[[np.ndarray], float] = np.mean,
    is_share: bool = False,
) -> Measure:
    """
    A statistic of `values` (N, ...) with its 95 % interval: Wilson's for the share of hits where every caption is
    there once, else a bootstrap of whole captions, since rows of one caption are no independent evidence.
    """
    values = np.asarray(values, dtype=np.float64)
    value = float(statistic(values))
    distinct = len(set(captions))
    # All or none would be all or none in every resample too: then each caption counts as one case
    if is_share and (distinct == len(values) or value in (0, 1)):
        interval = wilson_interval(value, distinct)
    else:
        interval = bootstrap_interval(values, lambda sample: _number(statistic(sample)), clusters=list(captions))
    return {"value": value, "interval": [float(end) for end in interval], "n": len(values)}


def _number(value: float) -> float:
    return 0.5 if math.isnan(value) else value  # an AUC of one kind only says nothing


def top1(groups: ScoredGroups) -> Measure:
    """In how many rows the highest score is a real image's."""
    hits = [top_share(scores, ranks == 1) for scores, ranks in zip(groups.scores, groups.ranks, strict=True)]
    return measured(hits, groups.captions, is_share=True)


def discrimination(groups: ScoredGroups) -> dict[str, Any]:
    """Everything that is measured on rows with their scores, by name."""
    rows = list(zip(groups.captions, groups.sources, groups.ranks, groups.scores, strict=True))
    sizes = [len(scores) for *_, scores in rows]
    per_image = [
        (caption, score, float(rank == 1))
        for caption, _, ranks, scores in rows
        for rank, score in zip(ranks, scores, strict=True)
    ]
    metrics: dict[str, Any] = {
        "rows": len(rows),
        "captions": len(set(groups.captions)),
        "images": [min(sizes), max(sizes)],
        "chance": float(np.mean([(ranks == 1).mean() for _, _, ranks, _ in rows])),
        "top1": top1(groups),
        "auc": measured([image[1:] for image in per_image], [image[0] for image in per_image], area_under_curve),
        "sources": {},
    }
    if any(len(set(ranks.tolist())) > 2 for _, _, ranks, _ in rows):
        orders = [(caption, kendalltau(-ranks, scores).statistic) for caption, _, ranks, scores in rows]
        orders = [(caption, 0.0 if math.isnan(tau) else tau) for caption, tau in orders]  # all scores the same
        metrics["kendall_tau"] = measured([tau for _, tau in orders], [caption for caption, _ in orders])
    for source in dict.fromkeys(source for _, sources, *_ in rows for source in sources):
        metrics["sources"][source] = _by_source(source, rows)
    return metrics


def _by_source(source: str, rows: list[tuple[str, list[str], np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Mean score, share of rows won, and how often a real image is above the source's own."""
    own = [(caption, np.array(sources) == source, ranks, scores) for caption, sources, ranks, scores in rows]
    own = [row for row in own if row[1].any()]
    captions = [caption for caption, *_ in own]
    result = {
        "rows": len(own),
        "mean_score": measured([scores[which].mean() for _, which, _, scores in own], captions),
        "wins": measured([top_share(scores, which) for _, which, _, scores in own], captions, is_share=True),
    }
    # A real image isn't compared with real ones
    rivals = [(caption, scores[ranks == 1], scores[which & (ranks > 1)]) for caption, which, ranks, scores in own]
    rivals = [row for row in rivals if len(row[2])]
    if rivals:
        shares = [pair_share(real, rival) for _, real, rival in rivals]
        result["real_above"] = measured(shares, [caption for caption, *_ in rivals], is_share=_pairs_once(rivals))
    return result


def _pairs_once(rivals: list[tuple[str, np.ndarray, np.ndarray]]) -> bool:
    return all(len(real) == len(rival) == 1 for _, real, rival in rivals)


# Shortcuts ------------------------------------------------------------


def other_paths(path: Equalizer, shorter_side: int) -> dict[str, Equalizer]:
    """Ways of bringing all images to one size and codec that training never took: 3/4 of the size, another quality."""
    size = max(8, round(0.75 * (path.size or shorter_side)))
    jpeg = 90 if path.jpeg is None else max(10, path.jpeg - 25)
    return {
        "all at another size": Equalizer(size, path.jpeg),
        "all through another codec": Equalizer(path.size, jpeg),
        "both": Equalizer(size, jpeg),
    }


@dataclass
class ImageFacts:
    """
    What there is to know of the images of all rows without looking at them: per row an array (n, numbers).

    Attributes:
        files: width, height and codec of each file.
        sizes: of each file in bytes.
        equalized: width and height behind the path of the images, and the bytes of its JPEG where it has one.
        looks: mean red, green, blue, and the logarithm of the Laplacian's variance, which is the sharpness.
    """

    files: list[np.ndarray]
    sizes: list[np.ndarray]
    equalized: list[np.ndarray]
    looks: list[np.ndarray]

    @classmethod
    def of(cls, dataset: Dataset, path: Equalizer) -> ImageFacts:
        facts = cls([], [], [], [])
        for row in dataset:
            contents = [embedded(image)["bytes"] for image in row["images"]]
            equalized = [Equalizer(path.size)(image) for image in decode_row(row)]
            facts.files.append(np.array([_header(content) for content in contents], dtype=np.float64))
            facts.sizes.append(np.array([[len(content)] for content in contents], dtype=np.float64))
            facts.equalized.append(
                np.array([[*image.size, *_jpeg_size(image, path.jpeg)] for image in equalized], dtype=np.float64)
            )
            seen = equalized if path.jpeg is None else [through_jpeg(image, path.jpeg) for image in equalized]
            facts.looks.append(np.array([_looks(image) for image in seen]))
        return facts


def _header(content: bytes) -> list[int]:
    with Image.open(io.BytesIO(content), formats=RASTER_FORMATS) as image:
        return [*image.size, RASTER_FORMATS.index(image.format) if image.format in RASTER_FORMATS else -1]


def _jpeg_size(image: Image.Image, quality: int | None) -> list[int]:
    if quality is None:
        return []  # pixels go on as they are: there is no file that could differ
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return [buffer.tell()]


def _looks(image: Image.Image) -> list[float]:
    pixels = np.asarray(image, dtype=np.float64) / 255
    grey = pixels.mean(axis=2)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    return [*pixels.mean(axis=(0, 1)), math.log(laplacian.var() + 1e-9)]


def baseline_scores(
    train: list[np.ndarray], train_ranks: list[np.ndarray], test: list[np.ndarray], seed: int = 0
) -> list[np.ndarray]:
    """Scores of the test images by boosted trees that were fitted to tell real from generated by these numbers."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(class_weight="balanced", max_iter=100, random_state=seed)
    model.fit(np.concatenate(train), np.concatenate(train_ranks) == 1)
    flat = model.predict_proba(np.concatenate(test))[:, 1]
    return np.split(flat, np.cumsum([len(row) for row in test])[:-1])


def median_side(dataset: Dataset) -> int:
    """The median over all images of their shorter side, read off the heads of their files."""
    sides = [min(_header(embedded(image)["bytes"])[:2]) for row in dataset for image in row["images"]]
    return int(np.median(sides))


def closed_shortcuts(
    test: Dataset, path: Equalizer, score: Callable[[Dataset, Equalizer], list[np.ndarray]], real_source: str
) -> dict[str, Measure]:
    """
    The discriminator's top-1 on images that all went the same way, to a size and through a codec it wasn't trained on.

    Args:
        test: rows of captions that were never trained.
        path: of the images in evaluation.
        score: scores of all images of rows that have come by a path.
        real_source: what `sources` calls the real images.
    """
    paths = other_paths(path, median_side(test))
    return {
        f"{name} ({other})": top1(ScoredGroups.of(test, score(test, other), real_source))
        for name, other in paths.items()
    }


def baselines(train: Dataset, test: Dataset, path: Equalizer, real_source: str, seed: int = 0) -> dict[str, Measure]:
    """
    Top-1 on the test captions of boosted trees that were fitted on the train captions and see a few numbers of each
    image, which are all that a shortcut could be made of.

    Args:
        train: rows of caption groups; `BASELINE_ROWS` of them are read.
        test: rows of other captions.
        path: of the images in evaluation.
        real_source: what `sources` calls the real images.
        seed: of the choice of train rows.
    """
    if len(train) > BASELINE_ROWS:
        train = train.select(np.sort(np.random.default_rng(seed).permutation(len(train))[:BASELINE_ROWS]))
    known: dict[str, Callable[[ImageFacts], list[np.ndarray]]] = {
        "dimensions and codec of the files": lambda facts: facts.files,
        "dimensions, codec and bytes of the files": lambda facts: _side_by_side(facts.files, facts.sizes),
        f"dimensions{'' if path.jpeg is None else ' and bytes'} as equalised": lambda facts: facts.equalized,
        "mean colour and sharpness as equalised": lambda facts: facts.looks,
    }
    seen, asked = ImageFacts.of(train, path), ImageFacts.of(test, path)
    ranks = [np.array(group_ranks(row, real_source)) for row in train.remove_columns("images")]
    results = {}
    for name, numbers in known.items():
        scores = baseline_scores(numbers(seen), ranks, numbers(asked), seed)
        results[name] = top1(ScoredGroups.of(test, scores, real_source))
    return results


def _side_by_side(*columns: list[np.ndarray]) -> list[np.ndarray]:
    return [np.concatenate(rows, axis=1) for rows in zip(*columns, strict=True)]


# In words -------------------------------------------------------------


def among(metrics: dict[str, Any]) -> str:
    """How many images a row has: `5`, or `3 to 5`."""
    low, high = metrics["images"]
    return f"{low}" if low == high else f"{low} to {high}"


def sentence(metrics: dict[str, Any]) -> str:
    """The one number that the deck shows, with what it is to be compared with."""
    low, high = (f"{100 * end:.0f}" for end in metrics["top1"]["interval"])
    return (
        f"picks the real image in {100 * metrics['top1']['value']:.0f} % of cases [{low}, {high}] among "
        f"{among(metrics)} (chance {100 * metrics['chance']:.0f} %)"
    )


def _share(measure: Measure | None) -> str:
    if measure is None:
        return ""
    low, high = measure["interval"]
    return f"{100 * measure['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _value(measure: Measure) -> str:
    low, high = measure["interval"]
    return f"{measure['value']:.2f} [{low:.2f}, {high:.2f}]"


def tables(metrics: dict[str, Any]) -> dict[str, str]:
    """Heading -> text, for the console, `table.md` and the model card."""
    by_source = [
        [source, f"{own['rows']}", _share(own["wins"]), _share(own.get("real_above")), _value(own["mean_score"])]
        for source, own in sorted(metrics["sources"].items(), key=lambda item: -item[1]["mean_score"]["value"])
    ]
    overall = [
        ["highest score is the real image's", _share(metrics["top1"])],
        ["chance", f"{100 * metrics['chance']:.1f} %"],
        ["AUC, images of all captions together", _value(metrics["auc"])],
    ]
    if "kendall_tau" in metrics:
        overall.append(["Kendall tau-b of scores and ranks", _value(metrics["kendall_tau"])])
    header = ["source", "rows", "wins its caption", "real image above it", "mean score"]
    text = (
        f"On {metrics['rows']} rows of {metrics['captions']} captions that were never trained, of {among(metrics)} "
        f"images each, it {sentence(metrics)}. In brackets 95 % intervals, by resampling captions where rows share "
        f"them.\n\n{format_table(['measure', 'value'], overall)}\n\n{format_table(header, by_source)}"
    )
    compared = [["the discriminator", _share(metrics["top1"])]]
    compared += [[f"the discriminator, {name}", _share(measure)] for name, measure in metrics["closed"].items()]
    compared += [[f"baseline: {name}", _share(measure)] for name, measure in metrics["baselines"].items()]
    return {
        "Held-out captions": text,
        "Shortcuts": (
            "How often the real image has the highest score when a shortcut is closed, and for baselines that see "
            "nothing else. The bytes of a file without loss also tell how busy its image is, as do colour and "
            "sharpness: these are part of how an image looks, and no shortcut by themselves.\n\n"
            + format_table(["what is compared", "real image first"], compared)
        ),
    }


# In a picture ---------------------------------------------------------


def labelled(image: Image.Image, *lines: str) -> Image.Image:
    """The centre of an image, square, with two lines of text under it, cut to its width."""
    side, _ = shown_size(*[min(image.size)] * 2)
    square, _ = fit_image(image, min(image.size))
    how = Image.Resampling.NEAREST if side >= square.width else Image.Resampling.LANCZOS
    tile = Image.new("RGB", (side, side + LABEL_HEIGHT), "white")
    tile.paste(square.resize((side, side), how))
    font = ImageFont.load_default(size=LABEL_SIZE)
    draw = ImageDraw.Draw(tile)
    for place, line in enumerate(lines):
        while draw.textlength(line, font) > side - 4:
            line = line[:-1]
        draw.text((2, side + place * LABEL_HEIGHT // 2), line, "black", font=font)
    return tile


def picture(dataset: Dataset, scores: list[np.ndarray]) -> Image.Image:
    """A few rows of the dataset, spread over it, the images of each by their score from left to right."""
    n = min(PICTURE_COLUMNS, max(map(len, scores)))
    full = [index for index, row in enumerate(scores) if len(row) >= n]
    chosen = full[:: max(1, len(full) // PICTURE_ROWS)][:PICTURE_ROWS]
    rows = []
    for index in chosen:
        row = dataset[index]
        order = np.argsort(-scores[index], kind="stable")
        order = order[np.linspace(0, len(order) - 1, n).round().astype(int)]  # the first and the last stay
        images, sources = decode_row(row), group_sources(row)
        rows.append((row["prompt"], [labelled(images[i], sources[i], f"{scores[index][i]:.1f}") for i in order]))
    return image_grid(rows, ["most real", *[""] * (n - 2), "least real"])


def save_report(folder: str | Path, metrics: dict[str, Any], image: Image.Image) -> None:
    """`metrics.json`, `table.md` and `rows.png`."""
    folder = Path(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    text = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in tables(metrics).items())
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    image.save(folder / "rows.png")
