"""Running stages: what is finished is skipped, what changed is run again, what it replaces is kept.

    <run folder>/recipe.yaml                    the recipe as `run` executed it, overrides included
    <run folder>/<stage>/stage.json             what the stage was made from
    <run folder>/report.html                    what came out
    <run folder>/.superseded/<stage>-<8 hex>/   the output made with other options; brought back when they return

A stage is identified by its fingerprint: its name, the options that were given, and the fingerprints of the stages it
reads. Options that were not given are left out, so that deciding what to skip needs no parser and imports no torch.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trl_diffusion_rank.files import replace_file
from trl_diffusion_rank.launch import launch
from trl_diffusion_rank.recipe import (
    PROGRAM,
    STAGES,
    Recipe,
    RecipeError,
    check_shared,
    check_stage,
    dump_recipe,
    input_folders,
    is_heavy,
    nearest,
    stage_actions,
    stage_inputs,
    stage_parser,
)
from trl_diffusion_rank.versions import hardware, package_versions


# folders that a stage writes to while it runs: their content says nothing about what it was made from
WRITTEN = ("output_dir", "logging_dir", "cache_dir")
REPORT = "report.html"
# options that publish what a stage has made: turning them on makes nothing anew
PUBLISHING = ("push_to_hub", "hub_dataset_id", "hub_model_id", "hub_private_repo")
# options that are written nowhere, not even as part of a hash
SECRET = ("hub_token",)


# fingerprints ----------------------------------------------------------


def fingerprint(stage: str, options: dict[str, Any], inputs: dict[str, str | list[str]]) -> str:
    """
    sha256 that changes when the stage would write something else.

    Args:
        stage (`str`): Name of the stage.
        options (`dict[str, Any]`): The options given, from the recipe or the command line.
        inputs (`dict[str, str | list[str]]`): Option -> fingerprint of the stage whose output fills it, or of several.
    """
    left_out = ("output_dir", *SECRET, *(() if stage == "push" else PUBLISHING))  # publishing is all that `push` does
    given = {name: canonical(value, name not in WRITTEN) for name, value in options.items() if name not in left_out}
    text = json.dumps({"stage": stage, "options": given, "inputs": inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def canonical(value: Any, read: bool = True) -> Any:
    """One form for what means the same: `500`, `500.0`, `"500"` (a flag) and `"5e2"` (YAML 1.1's string). A local file
    or folder that is `read` is stamped, so that the stage runs again when it has changed."""
    if isinstance(value, dict):
        return {str(key): canonical(item, read) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return canonical(value[0], read) if len(value) == 1 else [canonical(item, read) for item in value]
    if value is None or isinstance(value, bool):
        return value
    words = {"true": True, "false": False, "none": None, "null": None}
    text = str(value)
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text)
    except ValueError:
        return {"path": text, "stamp": stamp(text)} if read and os.path.exists(text) else text


def stamp(path: str) -> list[list[Any]]:
    """(name, size, modification time) of a file, or of every file of a folder."""
    if os.path.isfile(path):
        files = [path]
    else:
        files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return [[os.path.relpath(file, path), os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files]


# stage.json ------------------------------------------------------------


def read_record(output: Path) -> dict[str, Any] | None:
    """The stage.json of an output folder, None when there is none."""
    path = output / "stage.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_record(output: Path, record: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / "stage.json", json.dumps(record, indent=2, default=str) + "\n")


# planning --------------------------------------------------------------


@dataclass
class Step:
    """One stage about to be run or skipped."""

    stage: str
    output: Path
    fingerprint: str
    options: dict[str, Any]
    run_dir: Path | None = None
    upstreams: dict[str, str | list[str]] = field(default_factory=dict)  # option -> stages whose output fills it
    inputs: dict[str, str | list[str]] = field(default_factory=dict)  # option -> their fingerprints
    shared_elsewhere: list[str] = field(default_factory=list)  # options of `shared` that this stage does not have

    @property
    def superseded(self) -> Path:
        """Where an output of this stage is kept while other options are in force."""
        return superseded_folder(self.output, self.fingerprint)

    @property
    def in_place(self) -> bool:
        record = read_record(self.output)
        return record is not None and record["fingerprint"] == self.fingerprint

    @property
    def finished(self) -> bool:
        """Whether the output exists, in its place or among the superseded ones."""
        return self.is_done(read_record(self.output if self.in_place else self.superseded))

    def is_done(self, record: dict[str, Any] | None) -> bool:
        """Whether `record` is of this step, finished, and published as it now shall be."""
        if record is None or (record["fingerprint"], record["status"]) != (self.fingerprint, "finished"):
            return False
        wanted, had = (
            {name: canonical(options[name], read=False) for name in PUBLISHING if name in options}
            for options in (self.options, record["options"])
        )
        return wanted == had or not wanted.get("push_to_hub")


def superseded_folder(output: Path, fingerprint: str) -> Path:
    return output.parent / ".superseded" / f"{output.name}-{fingerprint[:8]}"


def make_step(
    stage: str,
    output: Path,
    options: dict[str, Any],
    recipe: Recipe | None = None,
    run_dir: Path | None = None,
    planned: dict[str, str] | None = None,
) -> Step:
    """
    Args:
        stage, output: Name and output folder of the stage.
        options (`dict[str, Any]`): What the command line gave; wins over the recipe.
        recipe, run_dir: The recipe and its run folder, None for a stage that is run on its own.
        planned (`dict[str, str]`, *optional*): Fingerprints of the stages that are run before this one. Those of other
            stages are read from their outputs.
    """
    if recipe is None:
        return Step(stage, output, fingerprint(stage, options, {}), options)
    shared, elsewhere = split_shared(recipe, stage, read_record(output))
    options = {**shared, **recipe.sections.get(stage, {}), **options}
    upstreams = stage_inputs(recipe, stage, options)

    def found(upstream: str) -> str:
        return (planned or {}).get(upstream) or finished_fingerprint(stage, upstream, run_dir)

    inputs = {name: found(up) if isinstance(up, str) else list(map(found, up)) for name, up in upstreams.items()}
    return Step(stage, output, fingerprint(stage, options, inputs), options, run_dir, upstreams, inputs, elsewhere)


def split_shared(recipe: Recipe, stage: str, record: dict[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """The options of `shared` that the stage has, and the names of the others. A heavy stage's last record usually
    knows; its parser, which imports torch, is asked when it doesn't."""
    known = {*record["options"], *record["shared_elsewhere"]} if record else set()
    if is_heavy(stage) and known.issuperset(recipe.shared):
        names = set(record["options"]) if record else set()
    else:
        names = set(stage_actions(stage_parser(stage)))
    return (
        {name: value for name, value in recipe.shared.items() if name in names},
        [name for name in recipe.shared if name not in names],
    )


def finished_fingerprint(stage: str, upstream: str, run_dir: Path) -> str:
    record = read_record(run_dir / upstream)
    if record is None or record["status"] != "finished":
        raise RecipeError(
            f"the stage `{stage}` reads what `{upstream}` writes, which is not finished in {run_dir}: "
            f"run `{upstream}` first"
        )
    return record["fingerprint"]


def plan(recipe: Recipe, run_dir: Path, only: Iterable[str]) -> list[Step]:
    """The recipe's stages (those of `only`, all when it is empty) in order, everything checked that can be checked
    before the first one starts. What is finished has been checked when it was run."""
    only = list(only)
    for stage in only:
        if stage not in recipe.sections:
            known = ", ".join(recipe.sections)
            raise RecipeError(
                f"`--only {stage}`: {recipe.path} has no such section{nearest(stage, recipe.sections)} "
                f"(sections: {known})"
            )
    if not recipe.sections:
        raise RecipeError(f"{recipe.path} has no stage to run: add a section named {', '.join(STAGES)}")
    steps: dict[str, Step] = {}
    for stage in recipe.sections:
        if not only or stage in only:
            planned = {done.stage: done.fingerprint for done in steps.values()}
            steps[stage] = make_step(stage, run_dir / stage, {}, recipe, run_dir, planned)
    check_shared(recipe, lambda stage, name: name in split_shared(recipe, stage, read_record(run_dir / stage))[0])
    for step in steps.values():
        if not step.finished:
            check_output(step)
            check_stage(step.stage, recipe, run_dir)
    return list(steps.values())


def check_output(step: Step) -> None:
    """A folder that no stage has written is somebody's: it is neither mixed with a stage's output nor moved away."""
    if read_record(step.output) is None and step.output.is_dir() and any(step.output.iterdir()):
        raise RecipeError(
            f"the output folder `{step.output}` of stage `{step.stage}` holds files that {PROGRAM} did not write: "
            "choose another folder or empty it"
        )
    if step.output.exists() and not step.output.is_dir():
        raise RecipeError(f"the output folder `{step.output}` of stage `{step.stage}` is a file: choose another one")


# executing -------------------------------------------------------------


def execute(step: Step, stage_args: list[str], launch_args: list[str], label: str) -> int:
    """Runs one stage unless it is finished; returns its exit code. `stage_args` are for the launched module."""
    was_in_place = step.in_place
    if not was_in_place:
        _swap(step)
    if step.is_done(read_record(step.output)):
        how = "unchanged, skipped" if was_in_place else "finished earlier with these options, brought back"
        print(f"{label}: {how}", flush=True)
        return 0

    print(f"{label} ...", flush=True)
    start = time.monotonic()
    record = {
        "stage": step.stage,
        "status": "running",
        "fingerprint": step.fingerprint,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": None,
        "options": {
            **{name: value for name, value in step.options.items() if name not in SECRET},
            **{name: input_folders(step.run_dir, up) for name, up in step.upstreams.items()},
        },
        "inputs": {
            name: {"stage": upstream, "fingerprint": step.inputs[name]} for name, upstream in step.upstreams.items()
        },
        "shared_elsewhere": step.shared_elsewhere,
        "versions": package_versions(),
        "hardware": hardware(),
    }
    write_record(step.output, record)
    code = launch(STAGES[step.stage], stage_args, launch_args)
    seconds = time.monotonic() - start
    if code:
        print(
            f"{label} failed with exit code {code} after {duration(seconds)}. Finished stages are kept: once the "
            "cause is removed, the same command continues here.",
            flush=True,
        )
        return code
    write_record(step.output, {**record, "status": "finished", "seconds": round(seconds, 2)})
    print(f"{label} ... finished in {duration(seconds)}", flush=True)
    return 0


def _swap(step: Step) -> None:
    """Puts away the output made with other options and brings back the one made with these, if there is one."""
    record = read_record(step.output)
    if record is not None:
        old = superseded_folder(step.output, record["fingerprint"])
        old.parent.mkdir(exist_ok=True)
        step.output.rename(old)
    if read_record(step.superseded) is not None:
        if step.output.is_dir():
            step.output.rmdir()  # empty: `check_output` has looked
        step.superseded.rename(step.output)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def run_recipe(recipe: Recipe, run_dir: Path, steps: list[Step], launch_args: list[str]) -> int:
    """Executes the planned stages in order until one fails; returns its exit code."""
    start = time.monotonic()
    run_dir.mkdir(parents=True, exist_ok=True)
    # the launched stages read this copy: a recipe edited during a long run changes nothing in it
    frozen = run_dir / "recipe.yaml"
    dump_recipe(recipe, frozen)
    changed = not (run_dir / REPORT).is_file()
    for number, step in enumerate(steps, 1):
        stage_args = ["--recipe", str(frozen), "--run_dir", str(run_dir)]
        changed |= not (step.in_place and step.finished)
        code = execute(step, stage_args, launch_args, label=f"[{number}/{len(steps)}] {step.stage}")
        if code:
            return code
    print(f"{recipe.name}: {len(steps)} stages in {duration(time.monotonic() - start)}, in {run_dir}", flush=True)
    if changed:
        write_report(run_dir)
    return 0


def write_report(run_dir: Path) -> None:
    """Leaves the page about the run. It is made of what is finished, so what goes wrong here costs nothing."""
    from trl_diffusion_rank.report import make_report

    try:
        print(f"Report: {make_report(run_dir)}", flush=True)
    except Exception as error:
        print(
            f"The report could not be made ({type(error).__name__}: {error}). All stages are finished; "
            f"`{PROGRAM} report {run_dir}` tries again.",
            flush=True,
        )
