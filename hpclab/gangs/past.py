"""Kernel: the runs that lie in a folder of results, the newest first."""

import os
from pathlib import Path
from typing import Any

from hpclab.gangs.record import titled
from hpclab.language import translate as _
from hpclab.pages import html
from hpclab.rows import parsed
from hpclab.tables import Table, markup

TAIL = 2**16
"""Bytes at the end of a run's rows in which its last loss, accuracy and end are looked for."""


class _Call(str):
    """A call to copy, which a narrow page may break anywhere."""

    def __html__(self) -> str:
        return html('<span style="overflow-wrap: anywhere">{{ call }}</span>', call=str(self))


class PastRuns(list):
    """Rows of `past_runs`, which show themselves as a table: in a notebook, and as text."""

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return markup(self._table()) or _("There are no runs here.")

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self) or _("There are no runs here."))

    def _table(self) -> Table:
        words = {
            "finished": _("finished"),
            "failed": _("failed"),
            "stopped": _("stopped"),
            "interrupted": _("interrupted, or still going"),
        }
        return Table(
            {
                _("when"): row["started"][:16].replace("T", " "),
                _("what"): row["name"],
                _("ranks"): row["ranks"],
                _("state"): words.get(row["status"], row["status"]),
                _("seconds"): None if row["time_s"] is None else f"{row['time_s']:.1f}",
                _("last loss"): None if row["loss"] is None else f"{row['loss']:.3f}",
                _("test accuracy"): None if row["accuracy"] is None else f"{row['accuracy']:.3f}",
                _("to open it again"): _Call(f"hpclab.open_run({row['folder']!r})"),
            }
            for row in self
        )


def past_runs(folder: str | os.PathLike = "results") -> PastRuns:
    """List the runs in a folder of results and in the folders below it, the newest first.

    Parameters
    ----------
    folder : path, default "results"
        Where runs lie that weren't given a folder of their own.

    Returns
    -------
    list of dict
        One row a run: ``folder`` (for `open_run`), ``name``, ``started``, ``ranks``, ``status`` ("interrupted" also
        while it goes on), ``time_s``, ``loss`` (the last that a rank reported) and ``accuracy``; None if it has none. A
        notebook shows it as a table.
    """
    found = [row for file in Path(folder).expanduser().rglob("rows.jsonl") if (row := _summary(file))]
    return PastRuns(sorted(found, key=lambda row: row["started"], reverse=True))


def _summary(file: Path) -> dict | None:
    """A run in a row; None for a file that isn't one of a run, or can't be read."""
    try:
        with open(file, "rb") as rows:
            first = parsed(rows.readline())
            rows.seek(max(rows.tell(), file.stat().st_size - TAIL))
            last = [row for line in rows.read().splitlines() if (row := parsed(line))]  # the first may be cut off
    except OSError:
        return None
    if first is None or first.get("kind") != "run":
        return None
    newest = {name: row[name] for row in last for name in ("loss", "test_accuracy") if row.get(name) is not None}
    end: dict = next((row for row in reversed(last) if row.get("kind") == "end" and "status" in row), {})
    return {
        "folder": str(file.parent),
        "name": titled(first["run"]),
        "started": first["started"],
        "ranks": first["ranks"],
        "status": end.get("status", "interrupted"),
        "time_s": end.get("time_s"),
        "loss": newest.get("loss"),
        "accuracy": newest.get("test_accuracy"),
    }
