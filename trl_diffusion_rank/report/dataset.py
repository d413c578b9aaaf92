"""The ranked lists in numbers: sources, scores and how far the scorers agree."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trl_diffusion_rank.report.pictures import evenly
from trl_diffusion_rank.report.run import Stage, read_columns
from trl_diffusion_rank.scorers.aggregate import agreement


PREFIX = "score_"
# Rows over which Kendall's tau is averaged: each takes a millisecond for every pair of scorers
AGREEMENT_ROWS = 500
BINS = 30


@dataclass
class Lists:
    """
    Rows of images with their sources, ranks and scores, all images of all rows one after another (N images).

    Attributes:
        stage (`str`): `score`, or `generate` while there are no scores.
        counts (`np.ndarray`): (rows,) images in each row.
        sources (`np.ndarray`): (N,) names of the generators.
        ranks (`np.ndarray` or None): (N,) 1 is the best.
        scores (`dict[str, np.ndarray]`): scorer -> (N,).
    """

    stage: str
    counts: np.ndarray
    sources: np.ndarray
    ranks: np.ndarray | None
    scores: dict[str, np.ndarray]

    @property
    def rows(self) -> int:
        return len(self.counts)

    @property
    def source_names(self) -> list[str]:
        return sorted(set(self.sources.tolist()))

    def histograms(self, scorer: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """
        Edges (bins + 1,) over the middle 99.8 % of all scores, which an outlier would squeeze into one bin, and for
        each source the share of its images in each bin (bins,); what lies beyond counts in the outermost.
        """
        values = self.scores[scorer]
        low, high = np.percentile(values, [0.1, 99.9])
        if low == high:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, BINS + 1)
        shares = {}
        for source in self.source_names:
            own = np.clip(values[self.sources == source], low, high)
            shares[source] = np.histogram(own, edges)[0] / len(own)
        return edges, shares

    def source_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells: for each source its images, its mean rank and its mean scores, the best rank first."""
        header = ["source", "images", *(["mean rank"] if self.ranks is not None else []), *self.scores]
        lines = []
        for source in self.source_names:
            own = self.sources == source
            rank = [] if self.ranks is None else [float(self.ranks[own].mean())]
            means = [f"{values[own].mean():.3f}" for values in self.scores.values()]
            lines.append((rank, [source, f"{own.sum():,}", *(f"{mean:.2f}" for mean in rank), *means]))
        return header, [cells for _, cells in sorted(lines, key=lambda line: line[0])]

    def agreements(self) -> np.ndarray:
        """(S, S) Kendall's tau-b of each two scorers, in the mean over up to [`AGREEMENT_ROWS`] rows, evenly taken."""
        ends = np.cumsum(self.counts)
        chosen = evenly(self.rows, AGREEMENT_ROWS)
        rows = [
            [values[ends[row] - self.counts[row] : ends[row]].tolist() for row in chosen]
            for values in self.scores.values()
        ]
        taus = np.eye(len(rows))
        for i, first in enumerate(rows):
            for j in range(i):
                taus[i, j] = taus[j, i] = agreement(first, rows[j])
        return taus


def read_lists(stage: Stage) -> Lists | None:
    """The training rows of `score` or `generate`, without their images; None when they can't be read."""
    table = read_columns(stage.data_files(), lambda name: name in ("sources", "ranks") or name.startswith(PREFIX))
    if table is None or not table.column_names or not len(table):
        return None
    counts = np.array([len(row) for row in table[0].to_pylist()])
    flat = {name: flattened(table[name]) for name in table.column_names}
    scores = {name.removeprefix(PREFIX): values for name, values in flat.items() if name.startswith(PREFIX)}
    sources = flat.get("sources", np.full(counts.sum(), "all images"))
    return Lists(stage.name, counts, sources, flat.get("ranks"), scores)


def flattened(column: pa.ChunkedArray) -> np.ndarray:
    """All entries of a column of lists."""
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
