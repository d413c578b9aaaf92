"""Starting a stage with `accelerate launch`, as TRL's own command line does.

Importing this file imports no torch; everything in it that asks accelerate does.
"""

import signal
import subprocess
import sys
from argparse import Action
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from trl_diffusion_rank.recipe import PROGRAM, RecipeError, nearest


# `module` and the script are set here; `accelerate_config` is TRL's: a preset's name (zero2, fsdp2, ...) or a file
_OURS = ("help", "module", "no_python", "training_script", "training_script_args")
_CONFIGS = ("accelerate_config", "config_file")
_KINDS = ("--multi_gpu", "--cpu", "--tpu", "--use_deepspeed", "--use_fsdp", "--use_megatron_lm")


def flag_groups(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(`--option` or a stray word, its values): `--a=1 --b 2 3` -> `("--a", ["1"])`, `("--b", ["2", "3"])`."""
    group: tuple[str, list[str]] | None = None
    for token in argv:
        if token.startswith("--"):
            if group:
                yield group
            name, equals, value = token.partition("=")
            group = (name, [value] if equals else [])
        elif group:
            group[1].append(token)
        else:
            yield token, []
    if group:
        yield group


def launch_actions() -> dict[str, Action | None]:
    """Launch option -> accelerate's argparse action (None for TRL's `accelerate_config`)."""
    actions: dict[str, Action | None] = {"accelerate_config": None}
    for action in _accelerate_parser()._actions:
        if action.dest not in _OURS:
            actions |= {s[2:]: action for s in action.option_strings if s.startswith("--") and "-" not in s[2:]}
    return actions


def launch_argv(defaults: dict[str, Any], flags: dict[str, list[str]], where: str) -> list[str]:
    """
    The argument list of `accelerate launch`, checked.

    Args:
        defaults (`dict[str, Any]`): The recipe's `launch` section.
        flags (`dict[str, list[str]]`): Launch options of the command line with their values; they win.
        where (`str`): The recipe's name for error messages.
    """
    actions = launch_actions()
    if any(name in flags for name in _CONFIGS):
        defaults = {name: value for name, value in defaults.items() if name not in _CONFIGS}
    argv: list[str] = []
    for name, value in defaults.items():
        if name not in actions:
            raise RecipeError(f"unknown launch option `{name}` in section `launch` of {where}{nearest(name, actions)}")
        if isinstance(value, dict | list | None):
            raise RecipeError(f"`{name}` in section `launch` of {where}: got {value!r}, expected a single value")
        if name not in flags and value is not False:
            argv += _tokens(name, [] if value is True else [str(value)], actions[name])
    for name, values in flags.items():
        argv += _tokens(name, values, actions[name])
    argv = _resolve_config(argv)
    _accelerate_parser().parse_args([*argv, "--module", "none"])  # argparse refuses values of the wrong type
    return argv


def _tokens(name: str, values: list[str], action: Action | None) -> list[str]:
    wanted = 0 if action is not None and action.nargs == 0 else 1
    # a stray word would be taken for the script to launch
    if len(values) != wanted:
        takes = "one value" if wanted else "no value"
        raise RecipeError(f"the launch option `--{name}` takes {takes}, got {' '.join(values) or 'none'}")
    return [f"--{name}", *values]


def _resolve_config(argv: list[str]) -> list[str]:
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        return resolve_accelerate_config_argument(argv)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _accelerate_parser():
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.prog = PROGRAM
    parser.usage = f"{PROGRAM} COMMAND [--option VALUE ...] [accelerate launch options]"
    return parser


def quiet_defaults(argv: list[str]) -> list[str]:
    """
    What accelerate would choose by itself and warn about at every launch, and `--multi_gpu` for several processes,
    without which it starts only one where it sees no GPUs. Nothing when a configuration file decides: the one in
    `argv`, or the one that `accelerate config` wrote.
    """
    import torch
    from accelerate.commands.config import default_config_file

    if "--config_file" in argv or Path(default_config_file).is_file():
        return []
    defaults = {
        "--num_processes": str(max(1, torch.accelerator.device_count())),
        "--num_machines": "1",
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
    }
    given = dict(pairwise(argv))
    several = int(given.get("--num_processes", defaults["--num_processes"])) > 1
    kind = ["--multi_gpu"] if several and not any(kind in argv for kind in _KINDS) else []
    return [*kind, *(token for name, value in defaults.items() if name not in argv for token in (name, value))]


def launch(module: str, stage_args: list[str], launch_args: list[str]) -> int:
    """`accelerate launch <launch_args> --module <module> <stage_args>`; returns the launched module's exit code."""
    import torch
    from accelerate.commands.launch import launch_command
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    argv = [*quiet_defaults(launch_args), *launch_args, "--module", module, *stage_args]
    # Or each of several processes on CPUs would take itself for the only one
    environment = {} if torch.accelerator.is_available() else {"ACCELERATE_USE_CPU": "true"}
    try:
        with patch_environment(**environment):
            launch_command(_accelerate_parser().parse_args(argv))
    except subprocess.CalledProcessError as error:  # one process
        return _shell_code(error.returncode, "the process")
    except ChildFailedError as error:  # several processes
        rank, failure = error.get_first_failure()
        return _shell_code(failure.exitcode, f"the process of rank {rank}, and with it the others,")
    except SystemExit as end:  # `--quiet`, or SIGTERM
        return int(end.code or 0)
    except (ImportError, ValueError) as error:  # launch options that exclude each other, DeepSpeed not installed
        raise RecipeError(str(error)) from error
    finally:
        _end_children()
    return 0


def _shell_code(returncode: int, who: str) -> int:
    if returncode >= 0:
        return returncode
    name = signal.Signals(-returncode).name
    hint = ", as the system does when memory runs out" if -returncode == signal.SIGKILL else ""
    print(f"{PROGRAM}: {who} was ended by {name}{hint}", file=sys.stderr, flush=True)
    return 128 - returncode


def _end_children() -> None:
    """After Ctrl-C or SIGTERM accelerate leaves the launched processes behind. Ctrl-C has reached them as well: they
    get a moment to end by themselves."""
    import psutil

    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=3)
    for process in alive:
        process.terminate()
    psutil.wait_procs(alive, timeout=5)
