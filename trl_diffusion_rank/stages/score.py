"""Scores of every image, and the ranks they give: the preferences that training learns.

    trl-diffusion-rank score --dataset_name runs/mine/generate --scorers pickscore clip --output_dir runs/mine/score

Adds to the rows `score_<name>` for each scorer, `psi` (the share of scorers and rivals that an image wins against,
ties one half) and `ranks` by `psi` (1 best, ties equal). With one scorer the ranks are its order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl_diffusion_rank.scorers import check_scorer
from trl_diffusion_rank.stages._common import check_at_least, format_table, is_main_process, require


if TYPE_CHECKING:
    from datasets import Dataset

    from trl_diffusion_rank.scorers import Scorer


HELP = "score the images and rank them"
INPUTS = {"dataset_name": "generate"}


@dataclass
class ScoreArguments:
    """
    Arguments of the stage `score`.

    Args:
        dataset_name (`str`, *optional*):
            Dataset with the columns `prompt` and `images`; in a run the images of the stage `generate`.
        scorers (`list[str]`, *optional*):
            Names of scorers, built in (`clip`, `pickscore`, `digits_clean`) or from installed packages.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows that are decoded at once.
        min_margin (`float`, *optional*, defaults to `0.0`):
            Images of one prompt whose scores differ by no more than this are tied. In standard deviations of the
            scorer's scores over the dataset, so that one number serves scorers of any scale.
        output_dir (`str`, *optional*):
            Folder the ranked rows are saved to.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset with columns `prompt` and `images`; in a run the output of `generate`."},
    )
    scorers: list[str] | None = field(
        default=None, metadata={"help": "Names of scorers: clip, pickscore, digits_clean, or an installed package's."}
    )
    batch_size: int = field(default=32, metadata={"help": "Rows that are decoded at once."})
    min_margin: float = field(
        default=0.0,
        metadata={"help": "Scores that differ by no more are tied, in standard deviations of the scorer's scores."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder the ranked rows are saved to."})

    def __post_init__(self) -> None:
        if not self.scorers:
            raise ValueError("`scorers` is empty; name at least one, for example --scorers pickscore.")
        if len(set(self.scorers)) < len(self.scorers):
            raise ValueError(f"`scorers` is {self.scorers}; each may be named once.")
        for name in self.scorers:
            check_scorer(name)
        check_at_least(1, batch_size=self.batch_size)
        check_at_least(0, min_margin=self.min_margin)


def argument_classes() -> tuple[type, ...]:
    return (ScoreArguments,)


def score_rows(scorer: Scorer, data: Dataset, batch_size: int) -> list[list[float]]:
    """A scorer's numbers for every image of every row. A number that is none is an error that names the row."""
    import numpy as np
    from tqdm import tqdm

    scores: list[list[float]] = []
    with tqdm(total=len(data), desc=scorer.name, unit="row") as bar:
        for batch in data.select_columns(["prompt", "images"]).iter(batch_size):
            sizes = [len(images) for images in batch["images"]]
            flat = np.asarray(
                scorer.score(
                    [image for images in batch["images"] for image in images],
                    [prompt for prompt, n in zip(batch["prompt"], sizes, strict=True) for _ in range(n)],
                ),
                dtype=np.float64,
            )
            if flat.shape != (sum(sizes),):
                raise ValueError(
                    f"The scorer {scorer.name!r} returned shape {flat.shape} for {sum(sizes)} images; it must return "
                    "one number for each."
                )
            for row in np.split(flat, np.cumsum(sizes)[:-1]):
                if not np.isfinite(row).all():
                    raise ValueError(
                        f"Row {len(scores)}: the scorer {scorer.name!r} gave {row.tolist()}; every score must be a "
                        "finite number. Look at the row's images, or leave the row or the scorer out."
                    )
                scores.append(row.tolist())
            bar.update(len(sizes))
    return scores


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


def rank_rows(scores: list[list[list[float]]], min_margin: float) -> tuple[list[list[float]], list[list[int]]]:
    """
    `psi` and `ranks` of every row.

    Args:
        scores: for each of S scorers and each row, n numbers.
        min_margin: in standard deviations of each scorer's numbers.
    """
    import numpy as np

    from trl_diffusion_rank.data.ranked_rows import dense_ranks
    from trl_diffusion_rank.scorers.aggregate import win_shares

    margins = np.array([min_margin * np.concatenate(of_scorer).std() for of_scorer in scores])  # (S,)
    psi = [win_shares(np.array(row), margins) for row in zip(*scores, strict=True)]
    return [row.tolist() for row in psi], [dense_ranks(row.tolist()) for row in psi]


def agreement(first: list[list[float]], second: list[list[float]]) -> float:
    """Mean Kendall tau-b of two scorers over the rows, those left out in which one of them sees no difference."""
    import numpy as np
    from scipy.stats import kendalltau

    varied = [(a, b) for a, b in zip(first, second, strict=True) if len(set(a)) > 1 and len(set(b)) > 1]
    return float(np.mean([kendalltau(a, b).statistic for a, b in varied])) if varied else float("nan")


def summary(data: Dataset, names: list[str]) -> str:
    """Mean scores and ranks by source, the share of ties, and how far the scorers agree."""
    import numpy as np

    columns = {name: np.concatenate(data[f"score_{name}"]) for name in names}
    ranks = np.concatenate(data["ranks"])
    if "sources" in data.column_names:
        sources = np.concatenate(data["sources"])
    else:
        sources = np.full(len(ranks), "all images")
    rows = []
    for source in dict.fromkeys(sources.tolist()):
        own = sources == source
        cells = [f"{own.sum()}", *(f"{columns[name][own].mean():.3f}" for name in names), f"{ranks[own].mean():.2f}"]
        rows.append([source, *cells])
    text = format_table(["source", "images", *names, "mean rank"], rows)
    n = np.array([len(row) for row in data["ranks"]])
    pairs = n * (n - 1) / 2
    tied = [sum(m * (m - 1) / 2 for m in np.unique(row, return_counts=True)[1]) for row in data["ranks"]]
    text += f"\nPairs that are tied: {sum(tied) / pairs.sum():.1%}"
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            tau = agreement(list(data[f"score_{first}"]), list(data[f"score_{second}"]))
            text += f"\nKendall tau of {first} and {second}, mean over rows: {tau:.2f}"
    return text


def main(args: ScoreArguments) -> None:
    require("score", dataset_name=args.dataset_name, output_dir=args.output_dir)
    if not is_main_process():
        return
    from datasets import DatasetDict

    from trl_diffusion_rank.data.loading import load_splits
    from trl_diffusion_rank.scorers import load_scorer

    splits = load_splits(args.dataset_name)
    for split, data in splits.items():
        check_rows(data, split)

    ranked = {}
    for split, data in splits.items():
        scores = []
        for name in args.scorers:
            scores.append(score_rows(load_scorer(name), data, args.batch_size))  # one scorer in memory at a time
        psi, ranks = rank_rows(scores, args.min_margin)
        if all(max(row) == 1 for row in ranks):
            raise ValueError(
                f"All images of every row of the split {split!r} are tied, so there is nothing to learn from. "
                f"`scorers` is {args.scorers} and `min_margin` is {args.min_margin}: lower the margin, or use scorers "
                "that tell these images apart."
            )
        columns = {f"score_{name}": row for name, row in zip(args.scorers, scores, strict=True)}
        columns |= {"psi": psi, "ranks": ranks}
        data = data.remove_columns([column for column in columns if column in data.column_names])
        for column, values in columns.items():
            data = data.add_column(column, values)
        ranked[split] = data
        print(f"{split}\n{summary(data, args.scorers)}")
    DatasetDict(ranked).save_to_disk(args.output_dir)
    print(f"{sum(map(len, ranked.values()))} ranked rows, in {args.output_dir}")


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("score")
