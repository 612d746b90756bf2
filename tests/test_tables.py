"""Tables: text on the left, numbers below each other by their points, names that a reader knows."""

import re

import numpy as np
import pytest

from hpclab.pages import Code
from hpclab.tables import Table

ROWS = Table(
    [
        {"case": "one", "step_s": 1.5, "samples_per_s": 1234.5, "share": "9%", "note": None, "loss": 1e-9},
        {"case": "other", "step_s": 12.25, "samples_per_s": 980.0, "share": "10%", "note": "late", "loss": 2.0},
    ]
)


def test_as_text():
    assert str(ROWS).splitlines() == [
        "case   step (s)  samples a second  share  note   loss",
        "-----  --------  ----------------  -----  ----  -----",
        "one        1.50             1,234     9%        1e-09",
        "other     12.25               980    10%  late      2",
    ]


def test_as_html():
    sides = re.findall(r'<td style="text-align: (\w+)[^"]*">([^<]*)</td>', ROWS._repr_html_())
    assert sides[:6] == [
        ("left", "one"),
        ("right", "1.50"),
        ("right", "1,234"),
        ("right", "9%"),
        ("left", ""),
        ("right", "1e-09"),
    ]
    assert '<th scope="col" style="text-align: right">samples a second</th>' in ROWS._repr_html_()


def test_what_was_rounded_gets_no_more_decimals():
    assert str(Table([{"ms": 10.1}, {"ms": 6.0}])).splitlines()[2:] == ["10.1", " 6.0"]


@pytest.mark.parametrize(
    ("numbers", "cells"),
    [
        ((0.7, 2.2, 1.0), ["0.7", "2.2", "1.0"]),
        ((np.float64(0.7), np.float64(2.25)), ["0.70", "2.25"]),
        ((0.00000005960,), ["5.96e-08"]),
        ((0.001234, 12.5), ["0.001234", "12.5"]),
        ((206_922, np.int64(77_754), 2026), ["206,922", "77,754", "2026"]),
    ],
)
def test_no_number_loses_what_it_says(numbers, cells):
    lines = str(Table({"n": number} for number in numbers)).splitlines()[2:]
    assert [line.strip() for line in lines] == cells


def test_code_is_set_in_letters_of_one_width():
    table = Table([{"mode": Code("drwx--x--x")}])
    assert "<code>drwx--x--x</code></td>" in table._repr_html_()
    assert str(table).splitlines()[2] == "drwx--x--x"


def test_empty_ones_show_nothing():
    assert str(Table()) == Table()._repr_html_() == ""


def test_a_short_cell_stays_on_one_line():
    """A browser breaks a line after a hyphen, also of 100-108."""
    page = Table([{"range": "100-108", "words": "what takes more than one line in a narrow window"}])._repr_html_()
    assert dict(re.findall(r'<td style="text-align: left(; white-space: nowrap)?">([^<]*)', page)) == {
        "; white-space: nowrap": "100-108", "": "what takes more than one line in a narrow window"
    }  # fmt: skip
