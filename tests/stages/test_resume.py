"""
A stage that is killed, at whatever moment, goes on where it was, and its dataset is that of an undisturbed run.

The tests run this file as a program, since a test can't `kill -9` itself. Where a process dies is given as
`module:function` and the number of its call, so every run dies in the same places.
"""

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest


ROWS = {"train": 36, "test": 7}  # `train` is written in two groups
BATCH_SIZE = {"caption": 4, "score": 3}

# Where `Artefact.save` can be killed, in the order in which it gets there
SAVING = [
    ("trl_diffusion_rank.data.artefact:write_split", 1, "before"),
    ("trl_diffusion_rank.data.loading:embedded", 35, "before"),  # the first group of rows is written
    ("trl_diffusion_rank.data.artefact:write_split", 2, "before"),
    ("trl_diffusion_rank.data.artefact:Card.render", 1, "before"),  # the dataset is in its place
    ("pathlib:Path.replace", 1, "before"),  # so is the card
    ("shutil:rmtree", 3, "before"),  # finished, and the pieces are still there
]
# "after" is when the call is done
KILLS = {
    "caption": [
        ("trl_diffusion_rank.captions:Captioner.caption", 3, "after"),  # its captions are lost
        ("os:fsync", 2, "after"),  # on disk and not in its place
        ("trl_diffusion_rank.data.parts:Parts.write", 4, "after"),  # between two batches
        *SAVING,
    ],
    "score": [
        ("trl_diffusion_rank.scorers.clip:CLIPScorer.score", 3, "after"),
        ("os:fsync", 4, "after"),
        ("trl_diffusion_rank.data.parts:Parts.write", 6, "after"),
        ("trl_diffusion_rank.scorers.aesthetic:LaionAestheticScorer.score", 3, "before"),
        ("trl_diffusion_rank.stages.score:picture", 1, "before"),
        *SAVING,
    ],
}
# Attempts of `KILLS` that find everything made
SAVE_ONLY = {"caption": slice(4, None), "score": slice(5, None)}


# The program -----------------------------------------------------------


def nothing(*args) -> None:
    pass


def wrap(place: str, before: Callable = nothing, after: Callable = nothing) -> None:
    """Have `before` and `after` called with the arguments of whatever is at `place`, around its own call."""
    module, _, path = place.partition(":")
    owner = import_module(module)
    *path, name = path.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def wrapped(*args, **kwargs):
        before(*args)
        result = function(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, wrapped)


def die_at(place: str, call: int, when: str) -> None:
    calls = []

    def count(*args) -> None:
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    wrap(place, **{when: count})


def attempt(stage: str, options: dict, folder: str, kill: list | None) -> None:
    """The stage, whose results are logged before and after they are written. Of several processes the last dies."""
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)  # not a part of the options, so the cards are equal

    def log(event: str, details=None) -> None:
        with open(f"log{os.environ.get('RANK', '0')}.jsonl", "a") as file:
            file.write(json.dumps([event, details]) + "\n")

    def keys(parts, columns: dict) -> list:
        return list(zip(*(columns[name] for name in parts.key), strict=True))

    log("started")
    wrap(
        "trl_diffusion_rank.data.parts:Parts.write",
        before=lambda parts, columns: log("made", keys(parts, columns)),
        after=lambda parts, columns: log("kept", keys(parts, columns)),
    )
    loader = {"caption": "captions.captioner:Captioner._load", "score": "scorers:load_scorer"}[stage]
    wrap(f"trl_diffusion_rank.{loader}", before=lambda *args: log("loaded"))
    if kill is not None and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
        die_at(*kill)
    module = import_module(f"trl_diffusion_rank.stages.{stage}")
    (arguments,) = module.argument_classes()
    module.main(arguments(**options, output_dir="out"))


def run_jobs(jobs: list[tuple]) -> None:
    """All attempts, each in a fork of this process, which has imported what they need and run nothing."""
    own = ("scorers.clip", "scorers.aesthetic", "captions", "data.images", "diffusion.loading")
    others = ("accelerate", "scipy.stats", "transformers.models.clip", "transformers.models.llava.modeling_llava")
    for module in (*others, *(f"trl_diffusion_rank.{name}" for name in own)):
        import_module(module)
    fork = multiprocessing.get_context("fork")
    statuses = []
    for job in jobs:
        process = fork.Process(target=attempt, args=job)
        process.start()
        process.join()
        statuses.append(process.exitcode)
    print(json.dumps(statuses))


# The tests -------------------------------------------------------------


def run_program(folder: Path, jobs: list[tuple], *launcher: str) -> subprocess.CompletedProcess:
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_DATASETS_CACHE": str(folder / "cache"),  # empty, so the first attempt reads the dataset into it
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launcher, __file__, json.dumps(jobs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


def read_log(folder: Path, rank: int = 0) -> list[dict[str, list]]:
    """Of each attempt of a process the keys that were made and those that were kept, and loaded models."""
    attempts = []
    for line in (folder / f"log{rank}.jsonl").read_text().splitlines():
        event, keys = json.loads(line)
        if event == "started":
            attempts.append({"made": [], "kept": [], "loaded": []})
        else:
            attempts[-1][event] += [event] if keys is None else map(tuple, keys)
    return attempts


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_png(generator: np.random.Generator) -> dict:
    from tiny import random_image

    buffer = io.BytesIO()
    random_image(generator, tuple(generator.integers(6, 20, size=2))).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, dict]:
    """Of each stage; what it reads is an artefact, as a stage before leaves it."""
    from datasets import Features, Image, List, Value
    from tiny_scorers import save_tiny_aesthetic, save_tiny_clip
    from tiny_vlm import tiny_llava

    from trl_diffusion_rank.data.artefact import Artefact, Card

    folder = tmp_path_factory.mktemp("resume")
    generator = np.random.default_rng(0)
    for name, column, kind in (("captions", "image", Image()), ("lists", "images", List(Image()))):
        splits = {}
        for split, n in ROWS.items():
            columns = {"prompt": [f"{split} {chr(97 + i % 26)}" for i in range(n)], "row": list(range(n))}
            if column == "images":
                columns[column] = [[random_png(generator) for _ in range(3 + i % 2)] for i in range(n)]
            else:
                columns[column] = [random_png(generator) for _ in range(n)]
            splits[split] = [columns]
        features = Features({"prompt": Value("string"), "row": Value("int64"), column: kind})
        Artefact(folder / name, {}).save(splits, features, Card(name, "", {}, "prompts", {}, {}))
    scorers = [
        {"name": "clip", "model": save_tiny_clip(folder / "clip")},
        {"name": "laion_aesthetic", "model": save_tiny_aesthetic(folder / "aesthetic"), "weight": 0.5},
    ]
    return {
        "caption": {
            "dataset_name": str(folder / "captions"),
            "batch_size": BATCH_SIZE["caption"],
            "model": tiny_llava(folder / "llava"),
            "tokenizer": "digits",
            "max_new_tokens": 12,
        },
        "score": {
            "dataset_name": str(folder / "lists"),
            "batch_size": BATCH_SIZE["score"],
            "scorers": scorers,
            "keep": 2,
        },
    }


@pytest.fixture(scope="module")
def runs(options, tmp_path_factory) -> Path:
    """Folder of, for each stage, `killed` and then finished, and `whole`."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for stage, kills in KILLS.items():
        for name, of_run in (("killed", [*kills, None]), ("whole", [None])):
            (folder / stage / name).mkdir(parents=True)
            jobs += [(stage, options[stage], str(folder / stage / name), kill) for kill in of_run]
    result = run_program(folder, jobs)
    assert result.returncode == 0, result.stderr[-5000:]
    statuses = json.loads(result.stdout.splitlines()[-1])
    assert statuses == [0 if kill is None else -signal.SIGKILL for *_, kill in jobs], result.stderr[-5000:]
    return folder


@pytest.mark.parametrize("stage", KILLS)
def test_killed_at_any_moment_the_dataset_is_the_same(runs, stage):
    killed, whole = (contents(runs / stage / name / "out") for name in ("killed", "whole"))
    assert set(whole) >= {"README.md", "artefact.json", *(f"data/{split}-00000-of-00001.parquet" for split in ROWS)}
    assert killed == whole  # every byte, the images among them; and no pieces are left
    for split, n in ROWS.items():
        assert (
            pq.read_metadata(runs / stage / "killed" / "out" / "data" / f"{split}-00000-of-00001.parquet").num_rows
            == n
        )


@pytest.mark.parametrize("stage", KILLS)
def test_nothing_finished_is_made_twice(runs, stage):
    (whole,) = read_log(runs / stage / "whole")
    assert len(whole["kept"]) == len(set(whole["kept"])) == sum(ROWS.values()) * (2 if stage == "score" else 1)
    attempts = read_log(runs / stage / "killed")
    assert len(attempts) == len(KILLS[stage]) + 1
    kept = []
    for number, this in enumerate(attempts):
        assert not set(this["made"]) & set(kept), number
        kept += this["kept"]
    assert sorted(kept) == sorted(whole["kept"])
    for this in attempts[SAVE_ONLY[stage]]:
        assert this == {"made": [], "kept": [], "loaded": []}


@pytest.mark.slow  # four times two processes that import torch and transformers
@pytest.mark.parametrize("stage", KILLS)
def test_two_processes_give_what_one_gives(runs, options, stage, tmp_path):
    """... and so they do when one of them is killed, and its launcher ends the other at some moment."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for name, kills in (
        ("two", [None]),
        ("killed", [("trl_diffusion_rank.data.parts:Parts.write", 3, "before"), None]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for kill in kills:
            result = run_program(tmp_path, [(stage, options[stage], str(folder), kill)], *launcher)
            assert (result.returncode == 0) == (kill is None), result.stderr[-5000:]
            assert (folder / "out" / "artefact.json").exists() == (kill is None)
        shares = [[key for this in read_log(folder, rank) for key in this["kept"]] for rank in (0, 1)]
        assert all(shares) and len(shares[0] + shares[1]) == len({*shares[0], *shares[1]})
        assert contents(folder / "out") == contents(runs / stage / "whole" / "out")


# What the above rests on ------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_bounds_of_batches_do_not_depend_on_what_is_done(processes):
    from trl_diffusion_rank.data.parts import missing_batches

    keys = [("train", row) for row in range(10)]
    assert missing_batches(keys, set(), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    done = {("train", 1), *keys[4:8], ("test", 0)}
    assert missing_batches(keys, done, 4) == [[0, 2, 3], [8, 9]]
    shares = [missing_batches(keys, done, 4)[process::processes] for process in range(processes)]
    assert sorted(row for share in shares for batch in share for row in batch) == [0, 2, 3, 8, 9]
    assert missing_batches(keys, set(keys), 4) == missing_batches([], set(), 4) == []


def test_pieces_that_can_not_be_read_right_now_are_not_thrown_away(tmp_path, monkeypatch):
    """A drive on the network that is away for a moment isn't a damaged file."""
    from datasets import Features, Value

    from trl_diffusion_rank.data.parts import Parts

    parts = Parts(tmp_path, ("row",), Features({"row": Value("int64")}))
    parts.write({"row": [1, 2]})

    def away(*args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Stale file handle"):
        patch.setattr(pq, "read_table", away)
        parts.scan()
    assert parts.scan() == {(1,), (2,)}
    next(tmp_path.glob("*.parquet")).write_bytes(b"")  # and this is one
    assert parts.scan() == set() and not list(tmp_path.iterdir())
    with pytest.raises(KeyError, match=r"1 of 1 results are not in .*, the first being \(1,\)"):
        parts.read([(1,)])


def test_only_its_own_pieces_go_with_a_finished_dataset(tmp_path):
    from datasets import Features, Value

    from trl_diffusion_rank.data.artefact import Artefact, Card

    features = Features({"row": Value("int64")})
    first, other = Artefact(tmp_path, {"seed": 0}), Artefact(tmp_path, {"seed": 1})
    first.save({"train": [{"row": [1]}]}, features, Card("Rows", "", {}, "score", {}, {}))
    for artefact in (first, other):
        artefact.parts("rows", ("row",), features).write({"row": [1]})
    assert first.finished and not other.finished
    assert other.parts("rows", ("row",), features).scan() == {(1,)}
    assert len(list(tmp_path.glob("partial-*"))) == 1


@pytest.mark.parametrize("stage", KILLS)
def test_splits_that_can_not_be_saved_together_are_refused_before_the_work(options, stage, tmp_path):
    from datasets import DatasetDict

    from trl_diffusion_rank.data.loading import load_splits

    splits = load_splits(options[stage]["dataset_name"])
    DatasetDict(train=splits["train"], test=splits["test"].remove_columns("row")).save_to_disk(tmp_path / "in")
    module = import_module(f"trl_diffusion_rank.stages.{stage}")
    (arguments,) = module.argument_classes()
    given = options[stage] | {"dataset_name": str(tmp_path / "in"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"The splits 'train' and 'test' have different columns, .*'row'"):
        module.main(arguments(**given))
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    if "WORLD_SIZE" in os.environ:
        attempt(*jobs[0])
    else:
        run_jobs(jobs)
