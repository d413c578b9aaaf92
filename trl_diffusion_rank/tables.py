"""Tables as text."""


def format_table(header: list[str], rows: list[list[str]], names: int = 1) -> str:
    """
    An aligned table that reads as plain text and as Markdown: the first columns, so many as there are `names`, to the
    left, numbers to the right.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:names], widths[:names], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[names:], widths[names:], strict=True)]
        return f"| {' | '.join(left + right)} |"

    dashes = ["-" * (width + 2) if i < names else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), f"|{'|'.join(dashes)}|", *map(line, rows)])
