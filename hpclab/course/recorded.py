"""What the notebook *queues* printed and measured on a real private Slurm, for machines that have none.

To record it again, on a machine with Slurm, run the notebook with ``HPCLAB_RECORD=hpclab/course/recorded.jsonl``.
"""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpclab import machine, slurm
from hpclab.language import translate as _
from hpclab.rows import append, lines
from hpclab.slurm import programs

FILE = Path(__file__).with_suffix(".jsonl")
"""A line for each function that was recorded: ``name``, what it ``printed``, its ``value``, the day and the machine."""
STEP = ("kind", "attempt", "rank", "ranks", "step", "time_s", "step_s", "source")
"""What is kept of a training's steps, of which there are many."""


def notice() -> str:
    """Whether there is a Slurm here; if not, how to get one, and what is shown meanwhile."""
    if not (lacks := slurm.missing()):
        return _("Slurm is installed here: everything below runs on it.")
    words = {"lacks": ", ".join(lacks), "install": slurm.install_line()}
    way_out = _(
        "There is no Slurm here (missing: {lacks}). To get it: {install}. Or open this notebook on Binder.", **words
    )
    return f"{way_out}\n{_('Until then you see what was recorded elsewhere; its figures say so.')}"


def on_slurm(function: Callable[[], Any], show: Callable[[Any], object] | None = None) -> Any:
    """Call a function that needs Slurm; where there is none, print and return what it gave when it was recorded.

    Parameters
    ----------
    function : callable
        Without arguments. What it returns is rows, or dicts of such, as JSON has them.
    show : callable, optional
        Shows a recorded value whose function would have shown it live.
    """
    if slurm.missing():
        row = recorded()[function.__name__]
        print(_("Recorded on {day} with Slurm {version} ({cpu}, {cpus} CPU):", **row))
        print(row["printed"], end="")
        value = _said_so(row["value"])
        if show is not None:
            show(value)
        return value
    with contextlib.redirect_stdout(_Tee()) as printed:
        value = function()
    if file := os.environ.get("HPCLAB_RECORD"):
        where = {name: machine.describe()[name] for name in ("cpu", "cpus")}
        row = {"name": function.__name__, "printed": printed.getvalue(), "value": _shortened(value)}
        append(file, row | {"day": time.strftime("%Y-%m-%d"), "version": programs.find()["version"]} | where)
    return value


def recorded() -> dict[str, dict]:
    """What was recorded of each function, by its name; of several times, the last."""
    return {row["name"]: row for _number, row in lines(FILE) if row is not None}


class _Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = sys.stdout

    def write(self, text: str) -> int:
        self.out.write(text)
        return super().write(text)


def _said_so(value: Any) -> Any:
    """The same, where every row says that it was recorded."""
    if isinstance(value, list):
        return [_said_so(item) for item in value]
    if isinstance(value, dict):
        return {name: "recorded" if name == "source" else _said_so(item) for name, item in value.items()}
    return value


def _shortened(value: Any) -> Any:
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, dict) and value.get("kind") == "step":
        return {name: value[name] for name in STEP}
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    return value
