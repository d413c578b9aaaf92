"""Scores of every image, and the ranks they give: the preferences that training learns.

    trl-diffusion-rank score --dataset_name runs/mine/generate --scorers pickscore clip --output_dir runs/mine/score

Adds to the rows `score_<name>` for each scorer, `psi` (the share of scorers and rivals that an image wins against,
ties one half, scorers by their weight) and `ranks` by `psi` (1 best, ties equal). With one scorer the ranks are its
order. In a recipe a scorer may have a weight and options of its own, and `keep` leaves out images that say little:

    score:
      scorers: [pickscore, {name: clip, weight: 0.5, model: laion/CLIP-ViT-H-14-laion2B-s32B-b79K}]
      keep: 4

The scorer `discriminator` is the one that the stage `discriminator` of the run has trained. The real images that it
learned from, and which `generate` had put into the lists, leave them by `exclude_sources: [real]`.

Every finished batch of scores is on disk; processes share the rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trl_diffusion_rank.options import NameOrMapping, check_at_least, check_choice
from trl_diffusion_rank.processes import process_state
from trl_diffusion_rank.scorers import read_scorers
from trl_diffusion_rank.stages._common import PublishingOptions, require
from trl_diffusion_rank.tables import format_table


if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from PIL.Image import Image

    from trl_diffusion_rank.data.parts import Parts
    from trl_diffusion_rank.scorers import Scorer, ScorerSpec


HELP = "score the images and rank them"
INPUTS = {"dataset_name": ("generate", "prompts"), "discriminator": "discriminator"}

# Columns with an entry for each image of a row, beside the scores
PER_IMAGE = ("images", "sources", "seeds", "psi", "ranks", "scores")
# Rows in the picture, and the most images of a row in it
PICTURE_ROWS, PICTURE_COLUMNS = 8, 10


@dataclass
class ScoreArguments(PublishingOptions):
    """
    Arguments of the stage `score`.

    Args:
        dataset_name (`str`, *optional*):
            Dataset with the columns `prompt` and `images`; in a run the images of the stage `generate`, or those that
            `prompts` has kept.
        scorers (`list`, *optional*):
            Names of scorers, built in or from installed packages, or mappings with the keys `name`, `label` (what the
            column `score_<label>` is called), `weight` and the scorer's own options. On the command line a mapping is
            a piece of JSON.
        discriminator (`str`, *optional*):
            Folder or Hub id that the scorer `discriminator` loads where its entry names no `model`; in a run the
            output of the stage `discriminator`.
        exclude_sources (`list[str]`, *optional*):
            Images of these sources leave the rows and don't count in the ranks.
        rank_by (`str`, *optional*, defaults to `"psi"`):
            What the ranks come from: `psi`, or the label of one scorer, the others being scored for the record.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows that are decoded at once, and written at once.
        min_margin (`float`, *optional*, defaults to `0.0`):
            Images of one prompt whose scores differ by no more than this are tied. In standard deviations of the
            scorer's scores over the dataset, so that one number serves scorers of any scale.
        keep (`int`, *optional*):
            Images of a row that are kept: the best, the worst and those between that are spread best in `psi`. All
            when unset.
        output_dir (`str`, *optional*):
            Folder of the ranked rows.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset with columns `prompt` and `images`; in a run the output of `generate`."},
    )
    scorers: list[NameOrMapping] | None = field(
        default=None,
        metadata={
            "help": "Scorers: names (clip, pickscore, laion_aesthetic, ..., or an installed package's), or mappings "
            "(JSON on the command line) with the keys name, label, weight and the scorer's own options."
        },
    )
    discriminator: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id that the scorer `discriminator` loads where it names no `model`."},
    )
    exclude_sources: list[str] | None = field(
        default=None, metadata={"help": "Images of these sources leave the rows, the real ones say."}
    )
    rank_by: str = field(
        default="psi", metadata={"help": "What the ranks come from: psi, or the label of one scorer."}
    )
    batch_size: int = field(default=32, metadata={"help": "Rows that are decoded and written at once."})
    min_margin: float = field(
        default=0.0,
        metadata={"help": "Scores that differ by no more are tied, in standard deviations of the scorer's scores."},
    )
    keep: int | None = field(
        default=None, metadata={"help": "Images of a row that are kept, those spread best; all when unset."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the ranked rows."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scorers:
            raise ValueError("`scorers` is empty; name at least one, for example --scorers pickscore.")
        # Here and not in `main`: a run refuses them before its first stage
        check_choice("rank_by", self.rank_by, ("psi", *(spec.label for spec in self.read_scorers())))
        check_at_least(1, batch_size=self.batch_size)
        check_at_least(0, min_margin=self.min_margin)
        check_at_least(2, keep=self.keep)

    def read_scorers(self) -> list[ScorerSpec]:
        """`scorers`, checked, with the run's discriminator where an entry means it."""
        specs = read_scorers(self.scorers)
        return [
            replace(spec, options={"model": self.discriminator} | spec.options)
            if spec.name == "discriminator" and self.discriminator is not None
            else spec
            for spec in specs
        ]


def argument_classes() -> tuple[type, ...]:
    return (ScoreArguments,)


# scoring ---------------------------------------------------------------


def check_rows(data: Dataset, split: str) -> None:
    """Refuse rows that no ranking can be made of, before a scorer is loaded."""
    from trl_diffusion_rank.data.ranked_rows import image_counts

    for column in ("prompt", "images"):
        if column not in data.column_names:
            names = ", ".join(data.column_names)
            raise ValueError(f"There is no column {column!r} in the split {split!r}; its columns are {names}.")
    for index, n in enumerate(image_counts(data, "images")):
        if n < 2:
            raise ValueError(f"Row {index} of the split {split!r} has {n} images; a ranking needs at least two.")


def score_rows(
    scorer: Scorer, label: str, data: Dataset, split: str, batches: list[list[int]], parts: Parts, quiet: bool
) -> None:
    """Write a scorer's numbers for every image of the rows. A number that is none is an error that names the row."""
    import numpy as np
    from tqdm import tqdm

    from trl_diffusion_rank.data.images import decoded_batches

    data = data.select_columns(["prompt", "images"])
    with tqdm(total=sum(map(len, batches)), desc=f"{label}, {split}", unit="row", disable=quiet) as bar:
        for batch, columns in decoded_batches(data, split, batches):
            sizes = [len(images) for images in columns["images"]]
            images = [image for images in columns["images"] for image in images]
            prompts = [prompt for prompt, n in zip(columns["prompt"], sizes, strict=True) for _ in range(n)]
            flat = np.asarray(scorer.score(images, prompts), dtype=np.float64)
            if flat.shape != (sum(sizes),):
                raise ValueError(
                    f"The scorer {label!r} returned shape {flat.shape} for {sum(sizes)} images; it must return one "
                    "number for each."
                )
            scores = [of_row.tolist() for of_row in np.split(flat, np.cumsum(sizes)[:-1])]
            for row, of_row in zip(batch, scores, strict=True):
                if not np.isfinite(of_row).all():
                    raise ValueError(
                        f"Row {row} of the split {split!r}: the scorer {label!r} gave {of_row}; every score must be a "
                        "finite number. Look at the row's images, or leave the row or the scorer out."
                    )
            n = len(batch)
            parts.write({"scorer": [label] * n, "split": [split] * n, "row": batch, "scores": scores})
            bar.update(n)


# ranking ---------------------------------------------------------------


def rank_rows(
    scores: list[list[list[float]]], min_margin: float, weights: list[float] | None = None
) -> tuple[list[list[float]], list[list[int]]]:
    """
    `psi` and `ranks` of every row.

    Args:
        scores: for each of S scorers and each row, n numbers.
        min_margin: in standard deviations of each scorer's numbers.
        weights: of the S scorers; equal when unset.
    """
    import numpy as np

    from trl_diffusion_rank.data.ranked_rows import dense_ranks
    from trl_diffusion_rank.scorers.aggregate import win_shares

    margins = np.array([min_margin * np.concatenate(of_scorer).std() for of_scorer in scores])  # (S,)
    weights = np.ones(len(scores)) if weights is None else np.array(weights)  # (S,)
    psi = [win_shares(np.array(row), margins, weights) for row in zip(*scores, strict=True)]
    return [row.tolist() for row in psi], [dense_ranks(row.tolist()) for row in psi]


def kept_images(psi: list[list[float]], keep: int | None) -> list[list[int]]:
    """Which images of every row are kept, in their order."""
    import numpy as np

    from trl_diffusion_rank.scorers.aggregate import spread_best

    return [list(range(len(row))) if keep is None else spread_best(np.array(row), keep).tolist() for row in psi]


def summary(scores: dict[str, list[list[float]]], ranks: list[list[int]], sources: list[list[str]] | None) -> str:
    """Mean scores and ranks by source, the share of ties, and how far the scorers agree; over all images."""
    import numpy as np

    from trl_diffusion_rank.scorers.aggregate import agreement

    columns = {label: np.concatenate(rows) for label, rows in scores.items()}
    flat = np.concatenate(ranks)
    source_of = np.full(len(flat), "all images") if sources is None else np.concatenate(sources)
    table = []
    for source in dict.fromkeys(source_of.tolist()):
        own = source_of == source
        means = (f"{column[own].mean():.3f}" for column in columns.values())
        table.append([source, f"{own.sum()}", *means, f"{flat[own].mean():.2f}"])
    text = format_table(["source", "images", *columns, "mean rank"], table)
    n = np.array([len(row) for row in ranks])
    tied = [sum(m * (m - 1) / 2 for m in np.unique(row, return_counts=True)[1]) for row in ranks]
    text += f"\n\nPairs that are tied: {sum(tied) / (n * (n - 1) / 2).sum():.1%}"
    labels = list(scores)
    for i, first in enumerate(labels):
        for second in labels[i + 1 :]:
            tau = agreement(scores[first], scores[second])
            text += f"\n\nKendall tau of {first} and {second}, mean over rows: {tau:.2f}"
    return text


def picture(data: Dataset, ranks: list[list[int]], chosen: list[list[int]]) -> Image:
    """
    A few rows of the dataset, spread over it, the images of each from best to worst.

    Args:
        chosen: which images of each row are shown, with a rank for each.
    """
    from trl_diffusion_rank.data.images import decode_image
    from trl_diffusion_rank.evaluation.grid import image_grid

    longest = min(PICTURE_COLUMNS, max(map(len, chosen)))
    full = [index for index, row in enumerate(chosen) if len(row) >= longest]
    rows = []
    for index in full[:: max(1, len(full) // PICTURE_ROWS)][:PICTURE_ROWS]:
        row = data[index]
        order = [image for _, image in sorted(zip(ranks[index], chosen[index], strict=True))]
        if len(order) > longest:  # the best and the worst stay
            order = [order[round(i * (len(order) - 1) / (longest - 1))] for i in range(longest)]
        rows.append((row["prompt"], [decode_image(row["images"][image]) for image in order]))
    return image_grid(rows, ["best", *[""] * (longest - 2), "worst"])


# the stage -------------------------------------------------------------


def taking_part(data: Dataset, split: str, exclude: list[str] | None) -> list[list[int]]:
    """Which images of every row are ranked."""
    from trl_diffusion_rank.data.ranked_rows import image_counts

    if not exclude:
        return [list(range(n)) for n in image_counts(data, "images")]
    if "sources" not in data.column_names:
        raise ValueError(f"`exclude_sources` is {exclude}, and the split {split!r} has no column `sources`.")
    images = [[i for i, source in enumerate(of_row) if source not in exclude] for of_row in data["sources"]]
    for row, left in enumerate(images):
        if len(left) < 2:
            raise ValueError(
                f"Row {row} of the split {split!r} has {len(left)} images of other sources than {exclude} "
                "(`exclude_sources`); a ranking needs at least two."
            )
    return images


def pick(rows: list[list[Any]], places: list[list[int]]) -> list[list[Any]]:
    """Of every row what is at its `places`."""
    return [[row[i] for i in own] for row, own in zip(rows, places, strict=True)]


def ranked_batches(
    data: Dataset, columns: dict[str, list[list[Any]]], chosen: list[list[int]], batch_size: int
) -> Iterator[dict[str, list[Any]]]:
    """The rows with the images that are `chosen`, and their new `columns`."""
    from trl_diffusion_rank.data.loading import embedded

    start = 0
    for batch in data.iter(batch_size):
        rows = slice(start, start + len(batch["prompt"]))
        start = rows.stop
        for name, values in batch.items():
            if name in PER_IMAGE or name.startswith("score_"):
                batch[name] = pick(values, chosen[rows])
        batch["images"] = [[embedded(image) for image in images] for images in batch["images"]]
        yield batch | {name: values[rows] for name, values in columns.items()}


def main(args: ScoreArguments) -> None:
    require("score", dataset_name=args.dataset_name, output_dir=args.output_dir)
    specs = args.read_scorers()
    if any(spec.name == "discriminator" and "model" not in spec.options for spec in specs):
        require("score", discriminator=args.discriminator)
    from datasets import Features, Image, List, Value

    from trl_diffusion_rank.data.artefact import Artefact, Card, common_features
    from trl_diffusion_rank.data.loading import load_splits, undecoded
    from trl_diffusion_rank.data.parts import missing_batches
    from trl_diffusion_rank.data.ranked_rows import dense_ranks

    state = process_state()
    splits = {split: undecoded(data) for split, data in load_splits(args.dataset_name).items()}
    for split, data in splits.items():
        check_rows(data, split)
    common_features(splits)
    made_of = {
        "scorers": [asdict(spec) for spec in specs],
        "ranking": (args.rank_by, args.min_margin, args.keep, args.exclude_sources),
        "input": {split: data._fingerprint for split, data in splits.items()},
    }
    artefact = Artefact(args.output_dir, made_of)
    if artefact.finished:
        if state.is_main_process:
            print(f"The ranked rows in {args.output_dir} are finished.")
            args.publish(args.output_dir)
        return

    key = ("scorer", "split", "row")
    kinds = {"scorer": Value("string"), "split": Value("string"), "row": Value("int64")}
    parts = artefact.parts("scores", key, Features(kinds | {"scores": List(Value("float64"))}))
    done = parts.scan()
    state.wait_for_everyone()  # all have looked before the first one writes
    for spec in specs:
        mine = {}
        for split, data in splits.items():
            keys = [(spec.label, split, row) for row in range(len(data))]
            rest = missing_batches(keys, done, args.batch_size)
            mine[split] = rest[state.process_index :: state.num_processes]
        if any(mine.values()):
            scorer = spec.load()  # one scorer in memory at a time
            for split, batches in mine.items():
                score_rows(scorer, spec.label, splits[split], split, batches, parts, not state.is_main_process)
            del scorer
    state.wait_for_everyone()
    if not state.is_main_process:
        return

    parts.scan()
    ranked, kinds, sections, grid = {}, {}, {}, None
    for split, data in splits.items():
        images = taking_part(data, split, args.exclude_sources)
        scores = {}
        for spec in specs:
            results = parts.read([(spec.label, split, row) for row in range(len(data))], columns=["scores"])
            scores[spec.label] = pick([result["scores"] for result in results], images)
        if args.rank_by == "psi":
            ranking = list(scores.values()), args.min_margin, [spec.weight for spec in specs]
        else:
            ranking = [scores[args.rank_by]], args.min_margin
        psi, ranks = rank_rows(*ranking)
        if all(max(row) == 1 for row in ranks):
            raise ValueError(
                f"All images of every row of the split {split!r} are tied, so there is nothing to learn from. "
                f"`scorers` is {[spec.label for spec in specs]} and `min_margin` is {args.min_margin}: lower the "
                "margin, or use scorers that tell these images apart."
            )
        sources = pick(list(data["sources"]), images) if "sources" in data.column_names else None
        sections[f"Scores, {split}"] = summary(scores, ranks, sources)
        print(f"{split}\n{sections[f'Scores, {split}']}")

        kept = kept_images(psi, args.keep)  # places among the images that take part
        chosen = pick(images, kept)
        columns = {f"score_{label}": rows for label, rows in scores.items()} | {"psi": psi, "ranks": ranks}
        columns = {name: pick(rows, kept) for name, rows in columns.items()}
        # Where images are left out the ranks of the others close up
        columns["ranks"] = [dense_ranks([-rank for rank in row]) for row in columns["ranks"]]
        if grid is None:
            grid = picture(data, columns["ranks"], chosen)
        data = data.remove_columns([name for name in (*columns, "scores") if name in data.column_names])
        ranked[split] = ranked_batches(data, columns, chosen, args.batch_size)
        kinds = data.features | {name: List(Value("float64")) for name in columns} | {"ranks": List(Value("int32"))}
    grid.save(artefact.folder / "rows.png")
    sections["A few rows, from best to worst"] = "![Rows of images from best to worst](rows.png)"
    kinds["images"] = List(Image())
    card = Card(
        title="Ranked images",
        text="Each row is a prompt and its images, ranked by what scorers say of them.",
        columns={
            "prompt": "what the row's images are of",
            "images": "images of the prompt",
            "sources": "of each image the generator",
            "seeds": "of each image the seed of its noise",
            "row": "number of the prompt",
            "psi": "share of scorers and rivals that each image wins against, ties one half",
            "ranks": "1 is the best, ties are equal",
            **{f"score_{spec.label}": f"by the scorer `{spec.name}`, higher is better" for spec in specs},
        },
        stage="score",
        options=asdict(args),
        sections=sections,
        tags=["preference", "text-to-image"],
    )
    counts = artefact.save(ranked, Features(kinds), card)
    print(f"{sum(counts.values())} ranked rows, in {args.output_dir}")
    args.publish(args.output_dir)


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("score")
