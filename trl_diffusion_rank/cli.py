"""The console script `trl-diffusion-rank`: a stage, or a whole recipe, started through `accelerate launch`."""

import argparse
import ast
import importlib.metadata
import importlib.util
import signal
import sys
from pathlib import Path
from typing import Any

from trl_diffusion_rank.launch import flag_groups, launch_actions, launch_argv
from trl_diffusion_rank.recipe import (
    PROGRAM,
    STAGES,
    Recipe,
    RecipeError,
    check_shared,
    is_heavy,
    load_recipe,
    locate,
    nearest,
    parse_stage,
    read_flags,
    stage_actions,
    stage_module,
    stage_options,
    stage_parser,
    unknown_flag,
)
from trl_diffusion_rank.runner import check_output, execute, make_step, plan, run_recipe


def main(argv: list[str] | None = None) -> int:
    if argv is None:  # the console script
        argv = sys.argv[1:]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, which ends the launched stage too
    try:
        return _dispatch(argv)
    except RecipeError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command continues", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"{PROGRAM} {importlib.metadata.version(PROGRAM)}")
        return 0
    command, rest = argv[0], argv[1:]
    if command == "run":
        return run_command(rest)
    if command == "report":
        return report_command(rest)
    if command not in STAGES:
        known = [*STAGES, "run", "report"]
        raise RecipeError(f"unknown command `{command}`{nearest(command, known)} (see `{PROGRAM} --help`)")
    return stage_command(command, rest)


def overview() -> str:
    width = max(map(len, STAGES))
    return "\n".join(
        [
            f"usage: {PROGRAM} run --recipe FILE [--output_dir DIR] [--<stage>.<option> VALUE ...] [--only STAGE ...]",
            f"       {PROGRAM} report RUN_DIR [--output FILE]",
            f"       {PROGRAM} STAGE [--recipe FILE] [--option VALUE ...] [accelerate launch options]",
            f"       {PROGRAM} COMMAND --help | --version",
            "",
            "Fine-tunes text-to-image diffusion models on ranked images.",
            "",
            f"  {'run':<{width}}  all stages of a recipe in order; finished ones are skipped",
            f"  {'report':<{width}}  a page that says what a run did, one file; at any time, also in the middle",
            "",
            "stages:",
            *(f"  {stage:<{width}}  {stage_module(stage).HELP}" for stage in STAGES),
        ]
    )


# one stage -------------------------------------------------------------


def stage_command(stage: str, argv: list[str]) -> int:
    if "--help_all" in argv or (("-h" in argv or "--help" in argv) and not is_heavy(stage)):
        stage_parser(stage).print_help()
        return 0
    if "-h" in argv or "--help" in argv:
        print(static_help(stage))
        return 0
    stage_args, launch_flags = split_stage_argv(stage, argv)
    flags = read_flags(stage, stage_args)
    recipe, run_dir, output = locate(stage, flags)
    if recipe is not None:
        check_recipe(recipe, stage)
    if not is_heavy(stage):
        parse_stage(stage, stage_args)
    given = {name: value for name, value in flags.items() if name not in ("recipe", "run_dir", "output_dir")}
    step = make_step(stage, output, given, recipe, run_dir)
    check_output(step)
    launch_args = launch_argv(recipe.launch if recipe else {}, launch_flags, str(recipe.path) if recipe else "")
    return execute(step, stage_args, launch_args, label=stage)


def check_recipe(recipe: Recipe, stage: str) -> None:
    """The stage's section and `shared`; the other sections are the other stages' business."""
    stage_options(recipe, stage, stage_parser(stage))
    check_shared(recipe, lambda other, name: name in stage_actions(stage_parser(other)))


def split_stage_argv(stage: str, argv: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The stage's own arguments, and the options that it does not know but accelerate's launcher does."""
    own = stage_parser(stage)._option_string_actions
    stage_args: list[str] = []
    launch_flags: dict[str, list[str]] = {}
    for name, values in flag_groups(argv):
        if name in own:
            stage_args += [name, *values]
        else:
            launch_flags[_launch_name(name, own)] = values
    return stage_args, launch_flags


def _launch_name(flag: str, own: Any = ()) -> str:
    """`--num-processes` -> `num_processes`; refuses what neither the command nor the launcher knows."""
    name = flag[2:].replace("-", "_")
    launcher = launch_actions() if flag.startswith("--") else {}
    if name not in launcher:
        raise RecipeError(unknown_flag(flag, [*own, *(f"--{option}" for option in launcher)]))
    return name


# run -------------------------------------------------------------------


def run_command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} run",
        usage=f"{PROGRAM} run --recipe FILE [--output_dir DIR] [--<stage>.<option> VALUE ...] [--only STAGE ...] "
        "[accelerate launch options]",
        description="Runs the stages of a recipe in order. Finished ones are skipped; a changed option reruns its "
        "stage and what depends on it, and keeps the old output in <run folder>/.superseded.",
        epilog=f"example: {PROGRAM} run --recipe recipes/digits_rank4.yaml --dpo.beta 500 --only dpo evaluate",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, metavar="FILE", help="YAML file with a section per stage")
    parser.add_argument("--output_dir", metavar="DIR", help="run folder (default: runs/<recipe's name>)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="run these stages of the recipe only")
    own_args: list[str] = []
    overrides: list[tuple[str, list[str]]] = []
    launch_flags: dict[str, list[str]] = {}
    for name, values in flag_groups(argv):
        if name in parser._option_string_actions or name == "-h":
            own_args += [name, *values]
        elif "." in name and name.startswith("--"):
            overrides.append((name, values))
        else:
            launch_flags[_launch_name(name, parser._option_string_actions)] = values
    args = parser.parse_args(own_args)

    recipe = override(load_recipe(args.recipe), overrides)
    run_dir = Path(args.output_dir) if args.output_dir else recipe.default_run_dir
    steps = plan(recipe, run_dir, args.only)
    todo = any(not step.finished for step in steps)
    # looking at launch options imports torch: not when there is nothing to launch
    launch_args = launch_argv(recipe.launch, launch_flags, str(recipe.path)) if todo else []
    return run_recipe(recipe, run_dir, steps, launch_args)


def override(recipe: Recipe, flags: list[tuple[str, list[str]]]) -> Recipe:
    """The recipe with `--<stage>.<option> VALUE ...` written into its sections."""
    for flag, values in flags:
        stage, _, option = flag[2:].partition(".")
        if stage not in recipe.sections:
            raise RecipeError(
                f"`{flag}`: {recipe.path} has no section `{stage}`{nearest(stage, recipe.sections)} "
                f"(sections: {', '.join(recipe.sections)})"
            )
        if option == "output_dir":
            raise RecipeError(f"`{flag}`: a stage writes to <run folder>/<stage>; `--output_dir` sets the run folder")
        recipe.sections[stage][option] = True if not values else values[0] if len(values) == 1 else values
    return recipe


# report ----------------------------------------------------------------


def report_command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} report",
        description="Writes a page that says what a run did: one file, which needs no network. At any time, also "
        "while the run goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run folder, or the output folder of a single stage")
    parser.add_argument("--output", metavar="FILE", help="the page (default: RUN_DIR/report.html)")
    args = parser.parse_args(argv)
    from trl_diffusion_rank.report import make_report

    try:
        print(make_report(args.run_dir, args.output))
    except OSError as error:
        raise RecipeError(f"the report could not be written: {error}; `--output` names another file") from error
    return 0


# heavy help ------------------------------------------------------------


def static_help(stage: str) -> str:
    """
    The help of a stage whose options come from classes that import torch: this project's own options, read from the
    source, and the names of the classes that bring the rest.
    """
    module = stage_module(stage)
    lines = [f"usage: {PROGRAM} {stage} [--recipe FILE] [--option VALUE ...] [accelerate launch options]", ""]
    lines += [module.HELP, "", "  --recipe FILE", "      YAML file; flags win over its values", "  --run_dir DIR"]
    lines += ["      run folder of the recipe (default: runs/<recipe's name>)"]
    own: list[str] = []
    rest: list[str] = _returned_names(module.__name__)
    for name in module.CONFIG_FILES:
        for config in _dataclasses(name):
            own.append(config.name)
            rest += [ast.unparse(base) for base in config.bases]
            lines += ["", f"{config.name}:", *_option_lines(config)]
    rest = [name for name in dict.fromkeys(rest) if name not in own]
    lines += ["", f"The rest comes from {', '.join(rest)}.", f"`{PROGRAM} {stage} --help_all` lists it too (slow)."]
    return "\n".join(lines)


def _source(module: str) -> ast.Module:
    # `find_spec` of a submodule would import its parents
    top, *below = module.split(".")
    spec = importlib.util.find_spec(top)
    path = Path(spec.submodule_search_locations[0], *below).with_suffix(".py") if below else Path(spec.origin)
    return ast.parse(path.read_text(encoding="utf-8"))


def _dataclasses(module: str) -> list[ast.ClassDef]:
    return [
        node
        for node in _source(module).body
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    ]


def _returned_names(module: str) -> list[str]:
    """The names in the `return` of the module's `argument_classes()`."""
    function = next(n for n in _source(module).body if isinstance(n, ast.FunctionDef) and n.name == "argument_classes")
    returned = next(node.value for node in ast.walk(function) if isinstance(node, ast.Return))
    return [ast.unparse(element) for element in getattr(returned, "elts", [returned])]


def _option_lines(config: ast.ClassDef) -> list[str]:
    lines = []
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
            if "metadata" in keywords:
                metadata = keywords["metadata"]
                entries = {key.value: value for key, value in zip(metadata.keys, metadata.values, strict=True)}
                choices = ast.literal_eval(entries["choices"]) if "choices" in entries else []
                one_of = f" (one of {', '.join(choices)})" if choices else ""
                default = keywords.get("default", keywords.get("default_factory"))
                default = default.body if isinstance(default, ast.Lambda) else default
                ending = f" (default: {ast.unparse(default)})" if default is not None else ""
                lines += [f"  --{node.target.id} ({ast.unparse(node.annotation)})"]
                lines += [f"      {_text(entries['help'])}{one_of}{ending}"]
    return lines


def _text(node: ast.expr) -> str:
    """A help text; what an f-string puts in is not known without running the file, its name is shown."""
    if isinstance(node, ast.JoinedStr):
        text = "".join(
            part.value
            if isinstance(part, ast.Constant)
            else next(n.id for n in ast.walk(part) if isinstance(n, ast.Name))
            for part in node.values
        )
    else:
        text = ast.literal_eval(node)
    return text.replace("%%", "%")


if __name__ == "__main__":
    sys.exit(main())
