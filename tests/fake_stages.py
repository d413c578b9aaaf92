"""
Three tiny stages without torch, and a heavy one whose module says so, for the tests of recipe, runner and CLI.

    grow -> count -> total,  heavy

The tests put their modules into `STAGES`; so does this file in the launched processes, which import it by name.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl_diffusion_rank import recipe


STAGES = {name: f"fake_{name}" for name in ("grow", "count", "total", "heavy")}


@dataclass
class GrowArguments:
    """Options of every kind that a recipe can hold."""

    number: int = field(default=3, metadata={"help": "How many."})
    rate: float = field(default=0.5, metadata={"help": "How fast."})
    title: str | None = field(default=None, metadata={"help": "A text."})
    strategy: Literal["no", "steps"] = field(default="no", metadata={"help": "When."})
    loud: bool = field(default=True, metadata={"help": "Whether to shout."})
    limit: int | None = field(default=7, metadata={"help": "At most."})
    weights: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "Several numbers."})
    # the order that TrainingArguments has and TRL's parser can read
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "One text or several."}
    )
    extra: dict[str, Any] | str | None = field(default=None, metadata={"help": "A mapping."})
    sources: list[dict] = field(default_factory=list, metadata={"help": "Several mappings."})
    data_file: str | None = field(default=None, metadata={"help": "A file."})
    exit_code: int = field(default=0, metadata={"help": "Ends with this."})
    sleep: float = field(default=0.0, metadata={"help": "Seconds to sleep."})
    seed: int = field(default=0, metadata={"help": "Seed."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write."})

    def __post_init__(self):
        if self.number < 0:
            raise ValueError(f"`number` is {self.number}; it must be at least 0")


@dataclass
class CountArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "What to count."})
    step: int = field(default=1, metadata={"help": "Count by."})
    exit_code: int = field(default=0, metadata={"help": "Ends with this."})
    seed: int = field(default=0, metadata={"help": "Seed."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write."})


@dataclass
class TotalArguments:
    counts: str | None = field(default=None, metadata={"help": "What to add up."})
    all_counts: list[str] | None = field(default=None, metadata={"help": "Several of them."})
    seed: int = field(default=0, metadata={"help": "Seed."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write."})


@dataclass
class HeavyArguments:
    counts: str | None = field(default=None, metadata={"help": "What to train on."})
    beta: float = field(default=1.0, metadata={"help": "Strength."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write."})


def check(options: Any) -> None:
    """What only the heavy stage is asked: its options are parsed but its dataclass isn't made."""
    if options.beta <= 0:
        raise ValueError(f"`beta` must be positive, got {options.beta}")


def main(args: Any) -> None:
    """Writes the options and the upstream's output, and one line per execution."""
    import time

    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    if getattr(args, "sleep", 0):
        (out / "sleeping").touch()
        time.sleep(args.sleep)
    with open(out / "executions", "a") as file:
        file.write(os.environ.get("RANK", "-") + "\n")
    if getattr(args, "exit_code", 0):
        sys.exit(args.exit_code)
    (out / "options.json").write_text(json.dumps(vars(args)))


MODULE = """
import sys
import fake_stages
HELP = "{help}"
INPUTS = {inputs}
{config_files}
def argument_classes():
    {heavy}
    return (fake_stages.{cls},)
main = fake_stages.main
check = fake_stages.check
if __name__ == "__main__":
    from trl_diffusion_rank.recipe import STAGES, parse_stage
    STAGES.clear()
    STAGES.update(fake_stages.STAGES)
    main(*parse_stage("{name}"))
"""


def install(folder: Path, monkeypatch: Any) -> None:
    """Puts the fakes in the place of the real stages, here and in launched processes, and works in `folder`."""
    write_modules(folder)
    (folder / "driver.py").write_text(DRIVER)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder), str(Path(__file__).parent), str(Path(__file__).parents[1])])
    )
    for name in reversed(list(recipe.STAGES)):  # put back in the reverse order of this
        monkeypatch.delitem(recipe.STAGES, name)
    for name, module in STAGES.items():
        monkeypatch.setitem(recipe.STAGES, name, module)


def write_modules(folder: Path) -> None:
    inputs = {"count": {"dataset_name": "grow"}, "total": {"counts": "count"}, "heavy": {"counts": "count"}}
    for name in STAGES:
        text = MODULE.format(
            name=name,
            help=f"the stage {name}",
            inputs=inputs.get(name, {}),
            cls=f"{name.capitalize()}Arguments",
            config_files='CONFIG_FILES = ("heavy_config",)' if name == "heavy" else "",
            heavy="import torch" if name == "heavy" else "",
        )
        (folder / f"fake_{name}.py").write_text(text)
    (folder / "heavy_config.py").write_text(HEAVY_CONFIG)


HEAVY_CONFIG = """
import torch
from dataclasses import dataclass, field
from trl import DPOConfig

from losses import LOSSES

@dataclass
class HeavyConfig(DPOConfig):
    loss_type: list[str] = field(default_factory=lambda: ["ipo"], metadata={"help": f"Some of {', '.join(LOSSES)}."})
    beta: float = field(default=2.5, metadata={"help": "Strength of "
        "the pull, 5%% more."})
    plain = 3
"""

DRIVER = """
import sys
import fake_stages
from trl_diffusion_rank import cli, recipe
recipe.STAGES.clear()
recipe.STAGES.update(fake_stages.STAGES)
code = cli.main()
print("imported:", *(m for m in ("torch", "transformers", "diffusers", "datasets") if m in sys.modules))
sys.exit(code)
"""
