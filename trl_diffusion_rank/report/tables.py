"""The Markdown that stages write beside their numbers, as parts of a page."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby


@dataclass
class Table:
    """A table of texts; the columns of numbers are those to the right."""

    header: list[str]
    numeric: list[bool]
    rows: list[list[str]]


def cells(line: str) -> list[str]:
    """Those of a line of a Markdown table; a `|` within a cell is written as `\\|`."""
    parts = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return [part.strip().replace("\\|", "|") for part in parts]


def read_table(lines: list[str]) -> Table:
    header, dashes, *rows = map(cells, lines)
    return Table(header, [dash.endswith(":") for dash in dashes], rows)


def read_markdown(text: str) -> Iterator[tuple[str, str | Table]]:
    """
    What a stage's `table.md` is made of, in its order: (`heading`, text), (`text`, paragraph), (`table`, [`Table`]).
    """
    for is_table, group in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        lines = [line.strip() for line in group if line.strip()]
        if is_table:
            yield "table", read_table(lines)
            continue
        for line in lines:
            yield ("heading", line.lstrip("# ")) if line.startswith("#") else ("text", line)
