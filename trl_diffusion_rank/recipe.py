"""Recipes and options: one YAML file is one experiment, a section per stage.

    shared:                  # optional: given to every stage of the recipe that has an option of that name
      seed: 0
    launch:                  # optional: options of `accelerate launch`
      num_processes: 1
    prompts: {...}           # then one mapping per stage, in the order in which `run` executes them
    generate: {...}

Importing this file imports no torch; building the parser of a training stage does.
"""

import contextlib
import importlib
import sys
import traceback
import types
from argparse import SUPPRESS, Action, ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from trl_diffusion_rank.options import did_you_mean


if TYPE_CHECKING:
    from trl.scripts.utils import TrlParser


STAGES: dict[str, str] = {
    "prompts": "trl_diffusion_rank.stages.prompts",
    "caption": "trl_diffusion_rank.stages.caption",
    "generate": "trl_diffusion_rank.stages.generate",
    "discriminator": "trl_diffusion_rank.stages.discriminator",
    "score": "trl_diffusion_rank.stages.score",
    "dpo": "trl_diffusion_rank.stages.dpo",
    "cpo": "trl_diffusion_rank.stages.cpo",
    "evaluate": "trl_diffusion_rank.stages.evaluate",
    "push": "trl_diffusion_rank.stages.push",
}

PROGRAM = "trl-diffusion-rank"


class RecipeError(ValueError):
    """A recipe or a command line that cannot be carried out: shown as one line, without a traceback."""


@dataclass
class Recipe:
    """A recipe file, read. `sections` maps stage to its options, in the file's order."""

    path: Path
    shared: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def default_run_dir(self) -> Path:
        return Path("runs", self.name)


# the file --------------------------------------------------------------


def nearest(name: str, names: Iterable[str]) -> str:
    """`"; did you mean `x`?"` for the most similar of `names`, or `""` when none is similar."""
    return did_you_mean(name, names, "; did you mean `{}`?")


class _Loader(yaml.SafeLoader):
    """YAML lets a repeated key silently replace the first one; a recipe with two `dpo:` sections is a mistake."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(problem=f"the key `{repeated}` appears twice in one mapping")
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path) -> Recipe:
    """
    Reads a recipe and checks its structure: the file, the names and the order of its sections. Option names and values
    are checked by [`stage_options`] and [`check_shared`], which need the stages' parsers.
    """
    path = Path(path)
    if not path.is_file():
        there = [str(p) for p in path.parent.glob("*.yaml")]
        raise RecipeError(f"the recipe `{path}` does not exist{nearest(str(path), there)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe `{path}` is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"the recipe `{path}` holds a {type(content).__name__}, expected a mapping with one section per stage: "
            f"{', '.join(STAGES)}"
        )
    for name, section in content.items():
        if name not in (*STAGES, "shared", "launch"):
            raise RecipeError(
                f"unknown stage `{name}` in {path}{nearest(str(name), [*STAGES, 'shared', 'launch'])} "
                f"(stages: {', '.join(STAGES)}; also `shared` and `launch`)"
            )
        if not isinstance(section, dict | None):
            raise RecipeError(
                f"the section `{name}` in {path} is {section!r}, expected a mapping of options to values "
                "(`option: value`, one a line)"
            )
        if name != "launch" and "output_dir" in (section or {}):
            raise RecipeError(
                f"`output_dir` in section `{name}` of {path}: remove it, every stage writes to <run folder>/<stage> "
                f"and `{PROGRAM} run --output_dir` sets the run folder"
            )
    sections = {name: section or {} for name, section in content.items()}
    recipe = Recipe(path, sections.pop("shared", {}), sections.pop("launch", {}), sections)
    _check_order(recipe)
    return recipe


def _check_order(recipe: Recipe) -> None:
    order = list(recipe.sections)
    for stage in order:
        for upstreams in stage_inputs_of(stage).values():
            for upstream in upstreams:
                if upstream in order and order.index(upstream) > order.index(stage):
                    raise RecipeError(
                        f"in {recipe.path} the stage `{stage}` reads what `{upstream}` writes, but stands before it: "
                        f"move the section `{upstream}` above `{stage}`"
                    )


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Writes `recipe` as a file that [`load_recipe`] reads back. A token is not written."""
    for name, section in {"shared": recipe.shared, **recipe.sections}.items():
        if "hub_token" in section:
            raise RecipeError(
                f"`hub_token` in section `{name}`: a run writes its recipe to a file, where no token belongs. Log in "
                "with `hf auth login`, or set HF_TOKEN"
            )
    head = {name: value for name, value in (("shared", recipe.shared), ("launch", recipe.launch)) if value}
    path.write_text(yaml.safe_dump({**head, **recipe.sections}, sort_keys=False, allow_unicode=True), encoding="utf-8")


# stages and parsers ----------------------------------------------------


def stage_module(stage: str) -> types.ModuleType:
    return importlib.import_module(STAGES[stage])


def stage_inputs_of(stage: str) -> dict[str, tuple[str, ...] | list[str]]:
    """Option -> the stages whose output can fill it: one of a tuple, all of a list that the recipe has."""
    inputs = stage_module(stage).INPUTS
    return {name: (up,) if isinstance(up, str) else up for name, up in inputs.items()}


def stages_before(stage: str) -> set[str]:
    """All stages whose output can have come into this one's, through others too."""
    direct = {upstream for upstreams in stage_inputs_of(stage).values() for upstream in upstreams}
    return direct.union(*map(stages_before, direct))


def is_heavy(stage: str) -> bool:
    """Whether building the stage's parser imports torch: then its module names the `CONFIG_FILES` to read instead."""
    return hasattr(stage_module(stage), "CONFIG_FILES")


def stage_parser(stage: str) -> "TrlParser":
    """The stage's own options, and `--recipe`, `--run_dir`."""
    from trl.scripts.utils import TrlParser

    module = stage_module(stage)
    parser = TrlParser(
        module.argument_classes(),
        prog=f"{PROGRAM} {stage}",
        usage=f"{PROGRAM} {stage} [--recipe FILE] [--option VALUE ...] [accelerate launch options]",
        description=module.HELP,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("recipe")
    group.add_argument("--recipe", default=SUPPRESS, metavar="FILE", help="YAML file; flags win over its values")
    group.add_argument(
        "--run_dir", default=SUPPRESS, metavar="DIR", help="run folder of the recipe (default: runs/<recipe's name>)"
    )
    return parser


def stage_actions(parser: "TrlParser") -> dict[str, Action]:
    """Option name -> its argparse action. The `--no_x` twins share the name of their `x` and are left out."""
    actions: dict[str, Action] = {}
    for action in parser._actions:
        if action.dest not in ("help", "recipe", "run_dir"):
            actions.setdefault(action.dest, action)
    return actions


def option_hints(parser: "TrlParser") -> dict[str, Any]:
    """Option name -> its type."""
    return {name: hint for cls in parser.dataclass_types for name, hint in get_type_hints(cls).items()}


# values of options -----------------------------------------------------


def stage_options(recipe: Recipe, stage: str, parser: "TrlParser") -> dict[str, Any]:
    """`shared` as far as the stage has the option, then the stage's own section; names and types checked."""
    actions = stage_actions(parser)
    hints = option_hints(parser)
    options = {}
    for where, values in (("shared", recipe.shared), (stage, recipe.sections.get(stage, {}))):
        for name, value in values.items():
            if name in actions:
                try:
                    options[name] = convert(value, hints[name], actions[name])
                except (TypeError, ValueError, ArgumentTypeError) as error:
                    raise RecipeError(f"`{name}` in section `{where}` of {recipe.path}: {error}") from error
            elif where != "shared":
                raise RecipeError(unknown_option(name, actions, f"section `{stage}` of {recipe.path}"))
    return options


def unknown_option(name: str, names: Iterable[str], where: str) -> str:
    names = list(names)
    if str(name).startswith("no_") and name[3:] in names:
        return f"unknown option `{name}` in {where}; write `{name[3:]}: false`"
    return f"unknown option `{name}` in {where}{nearest(str(name), names)}"


def check_shared(recipe: Recipe, has_option: Callable[[str, str], bool]) -> None:
    """Refuses an option of `shared` that no stage of the recipe has; `has_option(stage, name)` is asked as little as
    possible, light stages first, since a heavy one may have to import torch to answer."""
    stages = sorted(recipe.sections, key=is_heavy)
    for name in recipe.shared:
        if not any(has_option(stage, name) for stage in stages):
            names = {option for stage in stages for option in stage_actions(stage_parser(stage))}
            raise RecipeError(unknown_option(name, names, f"section `shared` of {recipe.path}: no stage there has it"))


def convert(value: Any, hint: Any, action: Action) -> Any:
    """
    A recipe's value as the option's type. Strings go through argparse's own conversion: YAML 1.1 reads `1e-5` (no dot)
    as a string. A value of a plainly different type is refused instead of reaching the trainer.
    """
    members = _members(hint)
    origins = [get_origin(member) or member for member in members]
    if Any in origins or (value is None and (type(None) in origins or action.default is None)):
        return value
    if isinstance(value, dict) and any(
        is_dataclass(o) or (isinstance(o, type) and issubclass(o, dict)) for o in origins
    ):
        return value
    list_hint = next((member for member in members if (get_origin(member) or member) is list), None)
    if list_hint is not None and (isinstance(value, list) or str not in origins):
        element = (get_args(list_hint) or (Any,))[0]
        return [convert(item, element, action) for item in (value if isinstance(value, list) else [value])]
    if type(value) in origins:
        return _chosen(value, action)
    if type(value) is int and float in origins:
        return float(value)
    if isinstance(value, str):
        if value.lower() in ("none", "null") and type(None) in origins:
            return None
        return _chosen(_from_text(value, hint, action), action)
    if type(value) is int and bool in origins:
        return _from_text(str(value), hint, action)
    if action.choices is not None and value in action.choices:
        return value
    # `eval_strategy: no` is the classic of YAML 1.1
    is_text = str in origins or action.choices is not None
    quotes = " (in YAML, put words like no, off and numbers meant as text in quotes)" if is_text else ""
    raise TypeError(f"got {value!r} of type {type(value).__name__}, expected {_type_name(hint)}{quotes}")


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _from_text(text: str, hint: Any, action: Action) -> Any:
    try:
        return action.type(text)
    except (TypeError, ValueError, ArgumentTypeError):
        raise TypeError(f"got {text!r}, expected {_type_name(hint)}") from None


def _chosen(value: Any, action: Action) -> Any:
    if action.choices is not None and value not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise ValueError(f"got {value!r}, expected one of {', '.join(choices)}{nearest(str(value), choices)}")
    return value


def _type_name(hint: Any) -> str:
    names = []
    for member in _members(hint):
        if get_origin(member) is Literal:
            names.append(f"one of {', '.join(map(repr, get_args(member)))}")
        elif isinstance(member, type) and issubclass(member, Enum):
            names.append(f"one of {', '.join(repr(choice.value) for choice in member)}")
        elif member is type(None):
            names.append("null")
        else:
            names.append(str(member) if get_origin(member) else getattr(member, "__name__", str(member)))
    return " or ".join(names)


# a stage's own ---------------------------------------------------------


def stage_inputs(recipe: Recipe, stage: str, given: Iterable[str]) -> dict[str, str | list[str]]:
    """Unset option -> the stage of this recipe whose output fills it, or the stages where it takes several."""
    inputs: dict[str, str | list[str]] = {}
    for name, upstreams in stage_inputs_of(stage).items():
        present = [upstream for upstream in upstreams if upstream in recipe.sections]
        # Captioned prompts are read instead of the prompts they were made from
        present = [up for up in present if not any(up in stages_before(other) for other in present)]
        if name in given or not present:
            continue
        if isinstance(upstreams, list):
            inputs[name] = present
            continue
        if len(present) > 1:
            raise RecipeError(
                f"{recipe.path} has the stages {' and '.join(f'`{up}`' for up in present)}, and either could fill "
                f"`{name}` of the stage `{stage}`: set `{name}` in its section to the output folder of one of them, "
                f"<run folder>/{present[-1]} say"
            )
        inputs[name] = present[0]
    return inputs


def input_folders(run_dir: Path, upstream: str | list[str]) -> str | list[str]:
    """What an option that [`stage_inputs`] fills is set to."""
    return str(run_dir / upstream) if isinstance(upstream, str) else [str(run_dir / up) for up in upstream]


def set_defaults(parser: "TrlParser", stage: str, recipe: Recipe, run_dir: Path, flags: Iterable[str] = ()) -> None:
    """The recipe's values, the outputs of the stages before and the output folder become the parser's defaults."""
    options = stage_options(recipe, stage, parser)
    inputs = stage_inputs(recipe, stage, {*options, *flags})
    actions, hints = stage_actions(parser), option_hints(parser)
    options |= {
        name: convert(input_folders(run_dir, upstream), hints[name], actions[name])
        for name, upstream in inputs.items()
    }
    parser.set_defaults_with_config(**options, output_dir=str(run_dir / stage))


def read_flags(stage: str, argv: list[str]) -> dict[str, Any]:
    """The options that stand on the command line, converted; unknown ones are refused with the nearest right name."""
    parser = stage_parser(stage)
    for action in parser._actions:
        action.default, action.required = SUPPRESS, False
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(unknown_flag(unknown[0], parser._option_string_actions))
    return vars(flags)


def unknown_flag(token: str, known: Iterable[str]) -> str:
    name = token.split("=")[0]
    if not name.startswith("--"):
        return f"unexpected argument `{token}`: options are written `--option VALUE`"
    if name == "--config":
        return "unknown option `--config`; recipes are given with `--recipe FILE`"
    return f"unknown option `{name}`{nearest(name, known)}"


def locate(stage: str, flags: dict[str, Any]) -> tuple[Recipe | None, Path | None, Path]:
    """The recipe (if any), its run folder and the stage's output folder that the flags ask for."""
    if "recipe" not in flags:
        if "run_dir" in flags:
            raise RecipeError("`--run_dir` is the run folder of a recipe: give `--recipe FILE` as well")
        if flags.get("output_dir") is None:
            raise RecipeError(f"the stage `{stage}` needs `--output_dir DIR` (or `--recipe FILE`, which implies it)")
        return None, None, Path(flags["output_dir"])
    recipe = load_recipe(flags["recipe"])
    run_dir = Path(flags.get("run_dir") or recipe.default_run_dir)
    return recipe, run_dir, Path(flags.get("output_dir") or run_dir / stage)


@contextlib.contextmanager
def usage_errors(parser: "TrlParser") -> Iterator[None]:
    """Wrong values end the program with one line and exit code 2, whoever finds them: argparse, a recipe, a
    dataclass's `__post_init__`."""
    try:
        yield
    except (ImportError, TypeError, ValueError) as error:
        parser.error(str(error))


def parse_stage(stage: str, argv: list[str] | None = None) -> tuple[Any, ...]:
    """
    The stage's dataclasses from `--recipe FILE` and the command line, whose flags win.

    Args:
        stage (`str`): Name of the stage, a key of `STAGES`.
        argv (`list[str]`, *optional*, defaults to `sys.argv[1:]`): The command line.

    Returns:
        One instance per class of the stage's `argument_classes()`.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = stage_parser(stage)
    with usage_errors(parser):
        if "-h" in argv or "--help" in argv:
            parser.parse_args(["--help"])
        flags = read_flags(stage, argv)
        recipe, run_dir, _ = locate(stage, flags)
        if recipe is not None:
            set_defaults(parser, stage, recipe, run_dir, flags)
        parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return parsed[: len(parser.dataclass_types)]  # what follows holds `--recipe` and `--run_dir`


def run_stage(stage: str) -> None:
    """
    What a launched stage module does: parse, then work. Bad input that only shows while working ends with one line
    too; where it came from is kept in `<output_dir>/traceback.txt`.
    """
    arguments = parse_stage(stage)
    origin = Path(next(args.output_dir for args in arguments if hasattr(args, "output_dir")), "traceback.txt")
    try:
        stage_module(stage).main(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)  # the launching process says what to do next
    except (ImportError, TypeError, ValueError) as error:
        origin.parent.mkdir(parents=True, exist_ok=True)
        origin.write_text(traceback.format_exc())
        print(f"{PROGRAM} {stage}: error: {error} ({origin})", file=sys.stderr)
        sys.exit(1)
    origin.unlink(missing_ok=True)  # of an attempt before this one


def check_stage(stage: str, recipe: Recipe, run_dir: Path) -> None:
    """
    Refuses what [`parse_stage`] would refuse, before anything is started. A heavy stage's dataclasses are not built:
    `TrainingArguments` looks for devices and joins a process group, which is the launched process's business.
    """
    parser = stage_parser(stage)
    with usage_errors(parser):
        set_defaults(parser, stage, recipe, run_dir)
        if is_heavy(stage):
            stage_module(stage).check(parser.parse_args([]))
        else:
            parser.parse_args_into_dataclasses([], look_for_args_file=False)
