"""Values of options, checked, and the errors that say what is wrong with them. Imports no torch."""

import difflib
import json
from collections.abc import Iterable
from typing import Any, ClassVar


# What `dtype` may be.
DTYPES = ("auto", "float32", "bfloat16", "float16")


class NameOrMapping(dict):
    """
    An entry of a list that is a name, or a mapping: in a recipe as it is, on the command line as JSON. A subclass says
    with `key` which of the mapping's keys a bare name stands for.
    """

    key: ClassVar[str] = "name"

    def __init__(self, value: str | dict[str, Any]):
        if isinstance(value, str):
            value = json.loads(value) if value.lstrip().startswith("{") else {self.key: value}
        super().__init__(value)


def did_you_mean(name: str, names: Iterable[str], hint: str = " Did you mean {!r}?") -> str:
    """`hint` with the most similar of `names`, or `""` when none is similar."""
    match = difflib.get_close_matches(name, list(names), n=1)
    return hint.format(match[0]) if match else ""


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown_key(f"`{option}` is", value, list(choices))


def check_at_least(least: int, **options: int | None) -> None:
    """Refuse options below `least`; unset ones are fine."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}.")


def unknown_key(kind: str, got: str, known: list[str]) -> ValueError:
    """The error for a name that is not known, with the nearest one that is."""
    return ValueError(f"{kind} {got!r}, which is not known.{did_you_mean(got, known)} Known: {', '.join(known)}.")
