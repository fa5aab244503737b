"""The tables of the report."""

from textwrap import fill


def markdown(*rows: tuple[str, ...]) -> str:
    """A table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return f"| {' | '.join([row[0].ljust(widths[0]), *cells[1:]])} |"

    rule = "|".join(["-" * (widths[0] + 2), *(f"{'-' * (width + 1)}:" for width in widths[1:])])
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])


def section(name: str, text: str, *rows: tuple[str, ...]) -> str:
    """A part of the report: what was done, and its table."""
    return f"## {name}\n\n{fill(text, 100)}\n\n{markdown(*rows)}"
