"""Which exercises passed in a working copy of the course, and what was predicted: kept in its folder, sent nowhere."""

import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpclab import data
from hpclab.course import calibration
from hpclab.course.copy import MANIFEST, slug
from hpclab.course.submissions import check_cell
from hpclab.language import language
from hpclab.language import translate as _
from hpclab.pages import html
from hpclab.rows import append, lines
from hpclab.tables import Table, markup

LOG = ".hpclab-progress.jsonl"
"""In the reader's folder: a line for each exercise that passed, each prediction, and the first result of what was
predicted. Lines are only ever added, so none is lost."""
KINDS = ({"exercise", "day"}, {"prediction", "value", "unit", "written"}, {"result", "value", "written"})
"""What lines hold."""
SHORT = ("start", "cnn", "scaling")
"""Notebooks of the path of 90 minutes."""
LATER = ("cnn.learning_rate", "cnn.quiz_batch", "scaling.quiz_timeline")
"""Their exercises in parts headed *For later*, which that path leaves out."""
DAY = (*SHORT, "one-process", "ddp-from-scratch", "queues", "faults")
"""Notebooks of the path of one day; a term takes all."""
_warned: set[str] = set()


@dataclass
class Progress:
    """What is done of the course; shows itself in a notebook and in a terminal.

    Attributes
    ----------
    rows : list of dict
        One a notebook with exercises: ``notebook`` (its file), ``slug``, ``title``, ``minutes``, ``exercises`` (their
        ids), ``done`` (those that passed) and ``day`` (of the latest, or None).
    folder : Path or None
        The working copy; None outside of one, where nothing is remembered.
    predictions : Table
        How good the reader's predictions were, as from `calibration.table`; empty if there are none.
    """

    rows: list[dict]
    folder: Path | None
    predictions: Table

    @property
    def done(self) -> int:
        """Exercises that passed."""
        return sum(len(row["done"]) for row in self.rows)

    @property
    def exercises(self) -> int:
        """Exercises in all."""
        return sum(len(row["exercises"]) for row in self.rows)

    def paths(self) -> dict[str, list[dict]]:
        """Rows of each path through the course, by its name; the last one has all."""
        short, day = ([row for row in self.rows if row["slug"] in slugs] for slugs in (SHORT, DAY))
        now = [
            row | {kind: [name for name in row[kind] if name not in LATER] for kind in ("exercises", "done")}
            for row in short
        ]
        return {_("90 minutes"): now, _("one day"): day, _("a term"): self.rows}

    def __repr__(self) -> str:
        tables = [self._path_rows(), self._notebook_rows(), *([self.predictions] if self.predictions else [])]
        return "\n\n".join([self._headline(), *map(str, tables)])

    def _repr_html_(self) -> str:
        page = '<div class="hpclab-progress"><p><strong>{{ headline }}</strong></p>{{ paths }}<br>{{ notebooks }}'
        page += "{% if predictions %}<br>{{ predictions }}{% endif %}</div>"
        tables = {"paths": self._path_rows(), "notebooks": self._notebook_rows(), "predictions": self.predictions}
        return html(page, headline=self._headline(), **{name: markup(table) for name, table in tables.items()})

    def _headline(self) -> str:
        if self.folder is None:
            return _("This folder isn't a working copy of the course, so nothing is saved; hpclab lab makes one.")
        return _("{done} of {all} exercises done.", done=self.done, all=self.exercises)

    def _path_rows(self) -> Table:
        table = Table()
        for name, rows in self.paths().items():
            done, exercises = (sum(len(row[kind]) for row in rows) for kind in ("done", "exercises"))
            following = next((row for row in rows if len(row["done"]) < len(row["exercises"])), None)
            table.append(
                {
                    _("path"): name,
                    _("exercises"): _("{done} of {all}", done=done, all=exercises),
                    _("next"): _Link(following) if following else _("all done"),
                }
            )
        return table

    def _notebook_rows(self) -> Table:
        return Table(
            {
                _("notebook"): _Link(row),
                _("minutes"): row["minutes"],
                _("exercises"): _("{done} of {all}", done=len(row["done"]), all=len(row["exercises"])),
                _("done on"): row["day"] or "",
            }
            for row in self.rows
        )


def progress(folder: str | Path | None = None, course: Path | None = None) -> Progress:
    """Say which exercises of the course are done, and what comes next.

    Parameters
    ----------
    folder : str or Path, optional
        A working copy, as `hpclab lab` makes it; default the one that this notebook is in.
    course : Path, optional
        Folder with the course's notebooks, which say what exercises there are; default the bundled ones.
    """
    home = working_copy() if folder is None else Path(folder).expanduser()
    written = [] if home is None else _read(home / LOG)
    passed = _passed(written)
    rows = []
    for row in notebooks(course or data.share() / "notebooks"):
        done = [exercise for exercise in row["exercises"] if exercise in passed]
        rows.append(row | {"done": done, "day": max((passed[exercise] for exercise in done), default=None)})
    return Progress([row for row in rows if row["exercises"]], home, calibration.table(written))


def remember(exercise_id: str) -> None:
    """Note that an exercise passed today, if this is a working copy of the course and nobody is grading.

    What prevents it is said once, as a warning, and never raised: a check is worth more than its note.
    """
    if exercise_id not in _passed(notes()):
        note({"exercise": exercise_id, "day": time.strftime("%Y-%m-%d")})


def note(row: dict) -> None:
    """Add a line to the log of this working copy, as `remember` does."""
    if "NBGRADER_EXECUTION" in os.environ:
        return
    try:
        if (folder := working_copy()) is not None:
            append(folder / LOG, row, mode=0o600)
    except OSError as error:
        _warn_once(_("Your progress can't be saved: {error}", error=error))


def notes() -> list[dict]:
    """All that is written in the log of this working copy; nothing while somebody grades."""
    if "NBGRADER_EXECUTION" in os.environ:
        return []
    try:
        return [] if (folder := working_copy()) is None else _read(folder / LOG)
    except OSError:  # `note`, which comes next, has the same trouble, and tells it
        return []


def working_copy() -> Path | None:
    """The working copy of the course that this process runs in; None if it runs elsewhere."""
    here = Path.cwd()
    return next((folder for folder in (here, here.parent) if (folder / MANIFEST).is_file()), None)


def notebooks(course: Path) -> Iterator[dict]:
    """What the notebooks in a folder say of themselves, in the reader's language where there is a translation.

    Yields
    ------
    dict
        ``notebook``, ``slug``, ``title``, ``minutes`` (None if it doesn't say), and ``exercises``: the ids of what
        its check cells ask for, in their order.
    """
    for path in sorted(course.glob("*.ipynb")):
        translated = path.parent / "zh" / path.name
        edition = translated if language() == "zh" and translated.exists() else path
        cells = json.loads(edition.read_text("utf-8"))["cells"]
        checks = filter(None, (check_cell(_source(cell)) for cell in cells if cell["cell_type"] == "code"))
        first = _source(cells[0]) if cells else ""
        minutes = re.search(r"^\| *(?:minutes|用时) *\|\D*(\d+)", first, re.MULTILINE)
        yield {
            "notebook": path.name,
            "slug": slug(path.name),
            "title": first.partition("\n")[0].removeprefix("# "),
            "minutes": int(minutes[1]) if minutes else None,
            "exercises": [check.exercise for check in checks],
        }


def _source(cell: dict) -> str:
    return "".join(cell["source"])  # a text, or a list of lines


def _read(log: Path) -> list[dict]:
    """What is written in a log, oldest first."""
    written = []
    try:
        for number, row in lines(log):
            if row is None or not any(kind <= {*row} for kind in KINDS):
                place = {"number": number, "file": log}
                _warn_once(
                    _("Line {number} of {file} can't be read; it is left as it is, and the other lines count.", **place)
                )
            else:
                written.append(row)
    except FileNotFoundError:
        return []
    return written


def _passed(written: list[dict]) -> dict[str, str]:
    """Day on which each exercise first passed."""
    passed: dict[str, str] = {}
    for row in written:
        if "exercise" in row:
            passed.setdefault(str(row["exercise"]), str(row["day"]))
    return passed


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=2)


class _Link:
    """A notebook's title; in HTML a link, where the file lies beside this notebook or above it."""

    def __init__(self, row: dict):
        self.name, self.title = row["notebook"], row["title"]

    def __str__(self) -> str:
        return f"{self.title} ({self.name})"

    def __html__(self) -> str:
        file = next((path for path in (self.name, f"../{self.name}") if Path(path).is_file()), None)
        return html('<a href="{{ file }}">{{ title }}</a>' if file else "{{ title }}", file=file, title=self.title)
