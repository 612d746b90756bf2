"""Tables of rows: as text for a terminal, as HTML for a notebook or a page."""

import html
import unicodedata
from typing import Any


class Table(list):
    """A list of rows (dicts with the same keys) that shows itself as a table, in a terminal and in a notebook."""

    def __str__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        return markup(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def text(rows: list[dict]) -> str:
    """Rows as aligned columns; wide (Chinese) characters count as two."""
    if not rows:
        return ""
    cells = [list(map(str, rows[0]))] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell + " " * (w - _width(cell)) for cell, w in zip(line, widths, strict=True)) for line in cells]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:]))


def markup(rows: list[dict]) -> str:
    """Rows as an HTML table whose header cells a screen reader can name; what has ``__html__`` is HTML already."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_markup(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _markup(value: Any) -> str:
    return value.__html__() if hasattr(value, "__html__") else html.escape(_cell(value))


def _width(cell: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in cell)
