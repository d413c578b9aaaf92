"""What was probably meant by a name that isn't known, for the error that says so. Imports no torch."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str], hint: str = " Did you mean {!r}?") -> str:
    """`hint` with the most similar of `names`, or `""` when none is similar."""
    match = difflib.get_close_matches(name, list(names), n=1)
    return hint.format(match[0]) if match else ""
