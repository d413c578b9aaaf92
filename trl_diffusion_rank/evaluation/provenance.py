"""Where a comparison's parts come from: the weights of its models, and who ranked the images they learnt from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_diffusion_rank.evaluation.judges import Judge, ScorerJudge
from trl_diffusion_rank.options import NameOrMapping
from trl_diffusion_rank.runner import read_record


WEIGHTS = (".safetensors", ".bin")


# Adapters --------------------------------------------------------------


def name_adapters(entries: list[Mapping[str, Any]]) -> dict[str, str]:
    """
    Name -> path of each adapter, checked; nothing is looked up.

    Args:
        entries: mappings with the keys `path` and `name`. The name is by default the last part of the path, with the
            part before it where another adapter is called so.
    """
    for entry in entries:
        if not isinstance(entry.get("path"), str) or not {"name", "path"}.issuperset(entry):
            raise ValueError(
                f"An entry of `adapters` is {dict(entry)!r}; a folder or Hub id is expected, or a mapping with the "
                "keys `path` and `name`."
            )
    last = [entry.get("name") or Path(entry["path"]).name for entry in entries]
    names = [
        "/".join(Path(entry["path"]).parts[-2:]) if "name" not in entry and last.count(name) > 1 else name
        for entry, name in zip(entries, last, strict=True)
    ]
    for name, entry in zip(names, entries, strict=True):
        if fault := _name_fault(name, names):
            raise ValueError(
                f"The adapter {entry['path']!r} of `adapters` would be called {name!r}, which {fault}: give it one of "
                f"its own, as in {{name: another, path: {entry['path']}}}."
            )
    return {name: entry["path"] for name, entry in zip(names, entries, strict=True)}


def _name_fault(name: Any, names: list[Any]) -> str | None:
    if name == "base":
        return "is the base model's name"
    if names.count(name) > 1:
        return "is another one's name too"
    if not isinstance(name, str) or not name.strip() or "|" in name or "\n" in name:
        return "is no name for a table"
    return None


def check_adapter(path: str) -> None:
    """Refuse what is neither a folder with weights nor can be a Hub id."""
    folder = Path(path)
    if not folder.exists():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            raise ValueError(
                f"An entry of `adapters` is {path!r}, which is neither a folder on this machine nor a Hub id "
                "(user/name). Train first, or correct the path."
            )
    elif not weight_files(path):
        raise ValueError(
            f"An entry of `adapters` is {path!r}, which holds no weights: a folder with a LoRA that diffusers loads "
            "(pytorch_lora_weights.safetensors), or with full weights in unet/ or transformer/, is expected."
        )


def weight_files(path: str) -> list[Path]:
    """The weights in a local folder and in the folders of its components, checkpoints left out."""
    folder = Path(path)
    found = [file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.suffix in WEIGHTS]
    return sorted(file for file in found if not file.relative_to(folder).parts[0].startswith("checkpoint-"))


def weights_stamp(path: str) -> list[tuple[str, int, int]]:
    """(name, size, modification time) of the weights in a local folder; nothing for what is on the Hub."""
    stats = ((file, file.stat()) for file in weight_files(path))
    return [(str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


# Who ranked ------------------------------------------------------------


def labelling_scorers(adapter: str) -> list[dict[str, Any]]:
    """
    The scorers that ranked the images an adapter was trained on, as `name` and, where it is known, `model`: by the
    records of the stage that trained it and of the stage `score` before that. Empty where there are none.
    """
    folder = Path(adapter)
    trained = next(filter(None, map(read_record, (folder, folder.parent))), None)  # a checkpoint lies in its run
    ranked = trained and trained["options"].get("dataset_name")
    record = read_record(Path(ranked)) if isinstance(ranked, str) else None
    if record is None or record["stage"] != "score":
        return []
    options = record["options"]
    entries = options.get("scorers") or []
    scorers = [NameOrMapping(entry) for entry in (entries if isinstance(entries, list) else [entries])]
    rank_by = options.get("rank_by", "psi")
    scorers = [scorer for scorer in scorers if rank_by in ("psi", scorer.get("label", scorer["name"]))]
    for scorer in scorers:
        if scorer["name"] == "discriminator":
            scorer.setdefault("model", options.get("discriminator"))
    return [{key: scorer[key] for key in ("name", "model") if scorer.get(key)} for scorer in scorers]


def partial_judges(judges: list[Judge], adapters: dict[str, str]) -> list[str]:
    """A warning for each adapter that no other judges look at than those that ranked the images it learnt from."""
    warnings = []
    for name, path in adapters.items():
        scorers = labelling_scorers(path)
        if scorers and all(any(_same(judge, scorer) for scorer in scorers) for judge in judges):
            names = ", ".join(f"`{judge.name}`" for judge in judges)
            only, it = ("only judge", "it") if len(judges) == 1 else ("judges", "they")
            ranked = "ranked" if len(judges) == 1 else "all ranked"
            warnings.append(
                f"The {only}, {names}, {ranked} the images that {name} was trained on. The table says how well that "
                f"taste was learnt, no more: whatever {it} took for quality, artefacts too, counts as better. Add a "
                "judge that took no part (`judges`), and look at the pictures."
            )
    return warnings


def _same(judge: Judge, scorer: dict[str, Any]) -> bool:
    """Whether a judge is the scorer: of the same name, and of the same model where both name one."""
    if not isinstance(judge, ScorerJudge) or judge.spec.name != scorer["name"]:
        return False
    models = [_resolved(model) for model in (judge.spec.options.get("model"), scorer.get("model")) if model]
    return len(set(models)) < 2


def _resolved(model: str) -> str:
    return os.path.realpath(model) if os.path.exists(model) else model
