"""Tables of rows: as text for a terminal, as HTML for a notebook or a page.

Text is on the left, and numbers are below each other by their decimal points.
"""

import math
import re
import unicodedata
from decimal import Decimal
from numbers import Integral
from typing import Any

from hpclab.pages import html

TABLE = (
    '<table><thead><tr>{% for name, side, _cells in columns %}<th scope="col" style="text-align: {{ side }}">{{ name }}'
    "</th>{% endfor %}</tr></thead><tbody>{% for number in range(rows) %}<tr>{% for _name, side, cells in columns %}"
    '<td style="text-align: {{ side }}{% if cells[number] | string | length <= whole %}; white-space: nowrap{% endif %}'
    '">{{ cells[number] }}</td>{% endfor %}</tr>{% endfor %}</tbody></table>'
)
NUMBER = re.compile(r"[-+]?[\d,]+(\.\d+)?(e[-+]?\d+)?( ?%)?")
DIGITS = 4
"""Of the largest number of a column; the others have as many decimals."""
MOST_DECIMALS = 6
"""More zeros than that nobody counts: such columns have exponents."""
WHOLE = 20
"""Longest cell that stays on one line: a number with its interval would break."""
GROUPED = 10_000
"""Whole numbers from here on have commas; years and seeds have none."""
UNITS = ((r"_per_s$", " a second"), (r"_(s|h|ms)$", r" (\1)"), (r"_mb$", " (MB)"), ("_", " "))
"""What names of rows have, and what a reader finds in their place."""


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
    columns = []
    for name, side, cells in _columns(rows):
        words = [name, *map(str, cells)]
        width = max(map(_width, words))
        title, *padded = [_padded(word, width, side) for word in words]
        columns.append([title, "-" * width, *padded])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def markup(rows: list[dict]) -> str:
    """Rows as an HTML table whose header cells a screen reader can name; what has ``__html__`` is HTML already."""
    return html(TABLE, columns=_columns(rows), rows=len(rows), whole=WHOLE) if rows else ""


def heading(name: str) -> str:
    """A column's name to read: that of a measure, which has its unit at its end, in words.

    Examples
    --------
    >>> heading("samples_per_s"), heading("step_s"), heading("racer")
    ('samples a second', 'step (s)', 'racer')
    """
    if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", name):
        for unit, words in UNITS:
            name = re.sub(unit, words, name)
    return name


def _columns(rows: list[dict]) -> list[tuple[str, str, list]]:
    """Name, side and cells of each column."""
    columns = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        cells = [value if hasattr(value, "__html__") else _cell(value, _decimals(values)) for value in values]
        numbers = [bool(NUMBER.fullmatch(str(cell))) for cell in cells if cell]
        columns.append((heading(str(name)), "right" if numbers and all(numbers) else "left", cells))
    return columns


def _decimals(values: list) -> int | None:
    """Decimals that all numbers of a column have; None if some would lose what they say, or there are none."""
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value) and value]
    if not sizes:
        return None
    # Numbers that were rounded before get no more decimals than they have.
    written = max(0 if size.is_integer() else _written(size) for size in sizes)
    decimals = min(written, max(0, DIGITS - 1 - math.floor(math.log10(max(sizes)))))
    if decimals > MOST_DECIMALS:
        return None
    return decimals if decimals == written or min(sizes) >= 10 ** (1 - decimals) else None


def _written(size: float) -> int:
    """Decimals of the shortest text that stands for a number below 1e16."""
    return -int(Decimal(repr(float(size))).as_tuple().exponent)


def _cell(value: Any, decimals: int | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, Integral) and abs(int(value)) >= GROUPED else str(value)
    if decimals is None:
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,.{decimals}f}"


def _padded(cell: str, width: int, side: str) -> str:
    spaces = " " * (width - _width(cell))
    return spaces + cell if side == "right" else cell + spaces


def _width(cell: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in cell)
