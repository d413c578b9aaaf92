"""The page: what a run folder holds, put into the template."""

import json
import os
from collections import defaultdict
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
import yaml
from plotly.offline import get_plotlyjs

from trl_diffusion_rank.data.artefact import public
from trl_diffusion_rank.evaluation.comparison import results_table
from trl_diffusion_rank.report import figures, words
from trl_diffusion_rank.report.dataset import read_lists
from trl_diffusion_rank.report.pairs import Pairs, read_pairs, thumbnails
from trl_diffusion_rank.report.pictures import data_uri, encode_picture, evenly, to_base64
from trl_diffusion_rank.report.run import Run, Stage, read_run
from trl_diffusion_rank.report.tables import Table, read_markdown, read_table
from trl_diffusion_rank.runner import duration


# What the whole page may take: thumbnails of the pairs take what the rest leaves
PAGE_BYTES = 29_000_000
# Of a picture of rows, and of all grids of samples that a stage has drawn together
PICTURE_BYTES, GRIDS_BYTES, GRIDS = 500_000, 1_200_000, 40
# Pairs whose images stand in one piece of the page
PAIRS_PER_CHUNK = 12


def make_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """
    Write a run's report, a page of one file that needs no network. What is not there yet is left out.

    Args:
        run_dir: A run folder, or the folder of a single stage.
        output: The file; by default `report.html` in `run_dir`.

    Returns:
        The file that was written.

    Raises:
        `RecipeError`: if no stage has written to `run_dir`.
        `OSError`: if the file can't be written.
    """
    run = read_run(run_dir)
    output = Path(output) if output is not None else Path(run_dir, "report.html")
    if output.is_dir():
        raise IsADirectoryError(f"`{output}` is a folder, where the file of the report was expected")
    text = render(run)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}.{os.getpid()}.tmp")  # a reader sees the old page or the new one
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    return output


def render(run: Run) -> str:
    """The page as text."""
    plots = Plots()
    sections = {
        "comparison": comparison_section(run, plots),
        "pairs": None,
        "samples": samples_section(run),
        "training": training_section(run, plots),
        "dataset": dataset_section(run, plots),
        "discriminator": discriminator_section(run),
        "made": made_section(run),
    }

    def page() -> str:
        return template().render(
            name=run.name,
            done=words.what_was_done(run),
            findings=words.findings(run),
            total=words.total_time(run),
            published=published(run),
            sections=sections,
            contents=["summary", *(name for name, section in sections.items() if section)],
            plots=plots.figures,
            plotly=get_plotlyjs() if plots.figures else "",
            now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            css=resource("report.css"),
            js=resource("report.js"),
        )

    sections["pairs"] = pairs_section(run, PAGE_BYTES - len(page().encode()))
    return page()


def resource(name: str) -> str:
    return (files("trl_diffusion_rank.report") / name).read_text(encoding="utf-8")


@cache
def template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    return environment.from_string(resource("report.html.jinja"))


class Plots:
    """The figures of the page, which its script draws when they come into view."""

    def __init__(self):
        self.figures: dict[str, Any] = {}

    def add(self, figure: go.Figure) -> dict[str, Any]:
        """What the template needs of a figure: its name, and its height, kept free until it is drawn."""
        name = f"plot-{len(self.figures)}"
        self.figures[name] = json.loads(figure.to_json())
        return {"id": name, "height": figure.layout.height}


# Sections: what the template shows of each, None where there is nothing ----------------------------------------


def comparison_section(run: Run, plots: Plots) -> dict[str, Any] | None:
    metrics = words.comparison(run)
    if metrics is None:
        return None
    paired = [result for result in metrics["results"] if "win_rate" in result]
    categories: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in metrics["by_category"]:
        if "win_rate" in result:
            categories[figures.metric_name(result)].append(result)
    return {
        "plot": plots.add(figures.forest(paired)) if paired else None,
        "table": read_table(results_table(metrics["results"]).splitlines()),
        "by_category": [(name, plots.add(figures.forest(own, "category"))) for name, own in categories.items()],
        "images": metrics["num_images"],
        "prompts": metrics["num_prompts"],
    }


def pairs_section(run: Run, max_bytes: int) -> dict[str, Any] | None:
    """The pairs, in `max_bytes` of the page: base64 makes four bytes of three."""
    if words.comparison(run) is None:
        return None
    pairs = read_pairs(run.stages["evaluate"])
    if pairs is None:
        return None
    texts = len(json.dumps(pairs_data(pairs)))
    made = thumbnails(pairs, (max_bytes - texts) * 3 // 4)
    if made is None:
        return None
    shown, images = made
    chunks = [images[start : start + PAIRS_PER_CHUNK] for start in range(0, len(images), PAIRS_PER_CHUNK)]
    return {
        "data": pairs_data(shown),
        "chunks": ["\n".join(image for pair in chunk for image in pair) for chunk in chunks],
        "shown": shown.num_shown,
        "prompts": shown.num_prompts,
    }


def pairs_data(pairs: Pairs) -> dict[str, Any]:
    """What the page's script reads: a prompt is written once, and a pair names it by its place."""
    prompts = {row: place for place, row in enumerate(dict.fromkeys(entry["row"] for entry in pairs.entries))}
    texts = {entry["row"]: (entry["prompt"], entry["category"]) for entry in pairs.entries}
    return {
        "models": pairs.models,
        "metrics": [metric["label"] for metric in pairs.metrics],
        "chunk": PAIRS_PER_CHUNK,
        "prompts": [texts[row][0] for row in prompts],
        "categories": [texts[row][1] for row in prompts],
        "pairs": [
            # Seeds are beyond the whole numbers that JavaScript has
            [prompts[entry["row"]], entry["steps"], entry["index"], str(entry["seed"]), entry["scores"]]
            for entry in pairs.entries
        ],
    }


def samples_section(run: Run) -> list[dict[str, Any]] | None:
    shown = []
    for stage in run.stages.values():
        grids = stage.grids
        kept = [grids[place] for place in evenly(len(grids), GRIDS)]
        encoded = [(step, encode_picture(path, GRIDS_BYTES // len(kept))) for step, path in kept]
        encoded = [(step, image) for step, image in encoded if image is not None]
        if encoded:
            shown.append(
                {
                    "stage": stage.name,
                    "steps": [step for step, _ in encoded],
                    "images": "\n".join(to_base64(image) for _, image in encoded),
                    "last": data_uri(encoded[-1][1]),
                    "left_out": len(grids) - len(encoded),
                }
            )
    return shown or None


def training_section(run: Run, plots: Plots) -> list[dict[str, Any]] | None:
    return [
        {
            "stage": stage.name,
            "remark": "" if stage.finished else words.progress(stage),
            "displaced": figures.displacement_step(stage.log),
            "panels": [
                (panel, plots.add(figure))
                for panel in figures.PANELS
                if (figure := figures.panel_figure(stage.log, panel)) is not None
            ],
        }
        for stage in run.training
    ] or None


def dataset_section(run: Run, plots: Plots) -> dict[str, Any] | None:
    """Counts of the prompts, and the lists by source and scorer."""
    counts = []
    if "prompts" in run.stages and run.stages["prompts"].rows:
        splits = ", ".join(f"{count:,} in {split}" for split, count in run.stages["prompts"].rows.items())
        counts.append(f"Prompts: {splits}.")
    lists = read_lists(run.lists) if run.lists is not None else None
    if lists is None:
        return {"counts": counts, "lists": None} if counts else None
    counts.append(f"{lists.rows:,} rows of {per_row(lists.counts)} images, as the stage {lists.stage} left them.")
    header, rows = lists.source_table()
    scorers = list(lists.scores)
    taus = lists.agreements().tolist() if len(scorers) > 1 else []
    return {
        "counts": counts,
        "lists": Table(header, [False] + [True] * (len(header) - 1), rows),
        "histograms": [(scorer, plots.add(figures.histogram(lists, scorer))) for scorer in scorers],
        "scorers": scorers,
        "taus": [[None if np.isnan(tau) else tau for tau in line] for line in taus],
        "picture": picture(run.lists),
    }


def per_row(counts: np.ndarray) -> str:
    low, high = counts.min(), counts.max()
    return f"{low}" if low == high else f"{low} to {high}"


def discriminator_section(run: Run) -> dict[str, Any] | None:
    stage = run.stages.get("discriminator")
    table = stage.folder / "table.md" if stage else None
    if table is None or stage.metrics is None or not table.is_file():
        return None
    return {"parts": list(read_markdown(table.read_text(encoding="utf-8"))), "picture": picture(stage)}


def picture(stage: Stage) -> str | None:
    """The stage's `rows.png` as a data URI."""
    encoded = encode_picture(stage.folder / "rows.png", PICTURE_BYTES)
    return data_uri(encoded) if encoded is not None else None


def made_section(run: Run) -> dict[str, Any]:
    """Recipe, times, versions and machines."""
    recipe = run.recipe or {name: stage.options for name, stage in run.stages.items()}
    longest = max((stage.record["seconds"] or 0 for stage in run.stages.values()), default=0)
    return {
        "recipe": yaml.safe_dump(public(recipe), sort_keys=False, allow_unicode=True),
        "times": [
            {
                "stage": stage.name,
                "started": stage.record["started"].replace("T", " ").removesuffix("+00:00"),
                "time": duration(stage.record["seconds"]) if stage.finished else "not finished",
                "share": 100 * (stage.record["seconds"] or 0) / longest if longest else 0,
            }
            for stage in run.stages.values()
        ],
        "versions": versions(run),
        "hardware": hardware(run),
    }


def versions(run: Run) -> list[tuple[str, str]]:
    """Of each package the version, or the versions with the stages that had them."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for stage in run.stages.values():
        for package, version in stage.record["versions"].items():
            found[package][version].append(stage.name)
    return [(package, by_stage(stages)) for package, stages in found.items()]


def hardware(run: Run) -> str:
    """The machine, or the machines with the stages that ran on them; empty for runs that did not write it down."""
    found: dict[str, list[str]] = defaultdict(list)
    for stage in run.stages.values():
        if "hardware" in stage.record:
            found[machine(stage.record["hardware"])].append(stage.name)
    return by_stage(found)


def machine(hardware: dict[str, Any]) -> str:
    gpus = [f"{gpu['name']} ({gpu['memory_gb']:g} GB)" for gpu in hardware["gpus"]]
    parts = [f"{gpus.count(gpu)} × {gpu}" for gpu in dict.fromkeys(gpus)] or ["no GPU"]
    processor = f"{hardware['cpu']}, {hardware['cpu_cores']} cores, {hardware['memory_gb']:g} GB of memory"
    return f"{', '.join(parts)}; {processor}; {hardware['platform']}, Python {hardware['python']}"


def by_stage(found: dict[str, list[str]]) -> str:
    """`x` when all agree, else `x (prompts, score); y (dpo)`."""
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{what} ({', '.join(stages)})" for what, stages in found.items())


def published(run: Run) -> list[str]:
    """The addresses of what `push` has uploaded."""
    if "push" not in run.stages:
        return []
    record = run.stages["push"].folder / "push.json"
    if not record.is_file():
        return []
    return [entry["url"] for entry in json.loads(record.read_text(encoding="utf-8")).values() if entry]
