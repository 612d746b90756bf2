"""Tables of rows: as text for a terminal, as HTML for a notebook or a page."""

import unicodedata
from typing import Any

from hpclab.pages import html

TABLE = (
    '<table><thead><tr>{% for name in rows[0] %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>'
    "{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ cell(value) }}</td>{% endfor %}</tr>{% endfor %}"
    "</tbody></table>"
)


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
    cells = [list(map(str, rows[0]))] + [[str(_cell(value)) for value in row.values()] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell + " " * (w - _width(cell)) for cell, w in zip(line, widths, strict=True)) for line in cells]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:]))


def markup(rows: list[dict]) -> str:
    """Rows as an HTML table whose header cells a screen reader can name; what has ``__html__`` is HTML already."""
    return html(TABLE, rows=rows, cell=_cell) if rows else ""


def _cell(value: Any) -> Any:
    if hasattr(value, "__html__"):
        return value
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _width(cell: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in cell)
