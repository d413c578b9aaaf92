"""What a run folder holds, read as it is: a run that is going on has any part of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trl_diffusion_rank.recipe import PROGRAM, STAGES, RecipeError


TRAINING = ("discriminator", "dpo", "cpo")
# The latest of these is the dataset that the report sums up
LISTS = ("score", "generate")

# What reading a file can end in while its stage is being run again
UNREADABLE = (OSError, pa.ArrowException)


@dataclass
class Stage:
    """One stage's folder and its `stage.json`."""

    name: str
    folder: Path
    record: dict[str, Any]

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def options(self) -> dict[str, Any]:
        return self.record["options"]

    @cached_property
    def metrics(self) -> dict[str, Any] | None:
        """`metrics.json`, of the stages that measure something."""
        return read_json(self.folder / "metrics.json")

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The trainer's log, of the stages that train."""
        return read_log(self.folder / "log_history.jsonl")

    @cached_property
    def rows(self) -> dict[str, int]:
        """Split -> number of rows, of the stages that make a dataset; empty while they are at it."""
        return (read_json(self.folder / "artefact.json") or {}).get("rows", {})

    def data_files(self) -> list[Path]:
        """The parquet files of the train split, or of the first one where there is none."""
        split = "train" if "train" in self.rows else next(iter(self.rows), None)
        return sorted((self.folder / "data").glob(f"{split}-*.parquet"))

    @property
    def grids(self) -> list[tuple[int, Path]]:
        """(step, picture) of the samples drawn during training."""
        record = read_json(self.folder / "samples" / "samples.json") or {}
        paths = {step: self.folder / "samples" / f"step-{step:06d}.png" for step in record.get("steps", [])}
        return [(step, path) for step, path in sorted(paths.items()) if path.is_file()]


@dataclass
class Run:
    """A run folder: its stages in the order of the pipeline, and the recipe where there is one."""

    name: str
    stages: dict[str, Stage]
    recipe: dict[str, Any] | None

    @property
    def training(self) -> list[Stage]:
        return [stage for name, stage in self.stages.items() if name in TRAINING and stage.log]

    @property
    def lists(self) -> Stage | None:
        """The latest stage that has finished lists of images."""
        return next((self.stages[name] for name in LISTS if name in self.stages and self.stages[name].rows), None)


def read_run(folder: str | Path) -> Run:
    """
    Read a run folder, or the folder of a single stage.

    Raises:
        `RecipeError`: if no stage has written there.
    """
    folder = Path(folder)
    stages = {name: stage for name in STAGES if (stage := read_stage(folder / name)) is not None}
    alone = read_stage(folder)
    if not stages and alone is not None:
        stages = {alone.name: alone}
    if not stages:
        raise RecipeError(
            f"nothing to report in `{folder}`: it is neither a run folder (`{PROGRAM} run` names it when it ends) nor "
            "the output folder of a stage, which holds a stage.json"
        )
    return Run(folder.resolve().name, stages, read_recipe(folder / "recipe.yaml"))


def read_stage(folder: Path) -> Stage | None:
    record = read_json(folder / "stage.json")
    return None if record is None else Stage(record["stage"], folder, record)


def read_recipe(path: Path) -> dict[str, Any] | None:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file; None when it is not there, or only half of it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def read_log(path: Path) -> list[dict[str, Any]]:
    """A log of one JSON object a line, but for a line that is just being written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def read_columns(files: list[Path], wanted: Callable[[str], bool]) -> pa.Table | None:
    """The columns whose names are `wanted`; None when there are no files, or they can't be read."""
    try:
        tables = [pq.read_table(file, columns=list(filter(wanted, pq.read_schema(file).names))) for file in files]
    except UNREADABLE:
        return None
    return pa.concat_tables(tables) if tables else None
