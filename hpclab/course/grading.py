"""Grade a class's notebooks: each in a fresh kernel, in a sandbox, under limits, by the course's own checks."""

import ast
import csv
import json
import os
import queue
import re
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hpclab import data
from hpclab.course import sandbox, submissions
from hpclab.course.sandbox import Kernel, Stopped
from hpclab.course.submissions import Step, Unreadable
from hpclab.language import language
from hpclab.language import translate as _
from hpclab.tables import Table

TIME = 600.0
MEMORY = 2 * 10**9
OUTPUT = 20 * 10**6
"""Bytes of output, of all cells of a notebook, at which it is stopped."""
LONGEST = 200
"""Characters that are shown of the text of a check or an error."""
START_SECONDS = 120.0
"""How long a kernel may take to start; that time isn't the student's."""


def grade(
    folder: str | Path,
    *,
    course: str | Path | None = None,
    seed: str | int = "",
    inconclusive: float = 0.0,
    time_s: float = TIME,
    memory: int = MEMORY,
    trust: bool = False,
    skip: tuple[Path, ...] = (),
    told: Callable[[dict], None] = lambda row: None,
) -> Table:
    """Run and judge every notebook of a class, one after the other.

    Parameters
    ----------
    folder : str or Path
        With notebooks, one a student, or with a folder for each student.
    course : str or Path, optional
        Folder with the notebooks as they were handed out; default the bundled course.
    seed : str or int
        For the hidden variants of the checks; by default those of the class.
    inconclusive : float
        Share of the points for a check that couldn't tell, 0 to 1.
    time_s : float
        Seconds for a notebook.
    memory : int
        Bytes for all processes of a notebook together.
    trust : bool
        Run without a sandbox.
    skip : tuple of Path
        Files that nobody has handed in.
    told : callable
        Called with each row as soon as it is known.

    Returns
    -------
    Table
        A row a submission and exercise: ``submission``, ``exercise``, ``verdict`` ("pass", "fail", "inconclusive" or
        "not reached"), ``points``, ``of`` (what a pass is worth), ``reason``.

    Raises
    ------
    ValueError
        If an argument can't be, or a setting in the environment; if the course has a check that hpclab hasn't.
    RuntimeError
        If no sandbox can be made here and `trust` isn't set.
    OSError
        If there is no temporary folder for the kernels, the path to it is too long, or no kernel can be started for
        want of disk, memory, descriptors or processes.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"folder (={folder}) isn't a folder; name one with a class's notebooks.")
    if not 0 <= inconclusive <= 1:
        raise ValueError(f"inconclusive (={inconclusive:g}) must be from 0 to 1, a share of the points.")
    if not time_s > 0 or not memory > 0:
        raise ValueError(f"time_s (={time_s:g}) and memory (={memory}) must be above 0.")
    notebooks = submissions.assignments(Path(course).expanduser().resolve() if course else data.share() / "notebooks")
    _askable(notebooks)
    handed_in = [(name, path) for name, path in submissions.handed_in(folder, notebooks) if path not in skip]
    if not handed_in:
        raise ValueError(f"folder (={folder}) holds nothing to grade: no FOLDER/*.ipynb, no FOLDER/STUDENT/*.ipynb.")
    sandbox.base()
    if not trust and (why := sandbox.missing()):
        raise RuntimeError(f"{why}. Students' code isn't run without a sandbox, unless you pass --trust")
    limits = _Limits(time_s, memory, folder, trust, str(seed), language())
    shares = {"pass": 1.0, "inconclusive": float(inconclusive)}
    worth = {step.exercise: step.points for notebook in notebooks for step in notebook.checks.values()}
    rows = Table()
    for name, path in handed_in:
        try:
            judged = _judged(path, notebooks, limits)
        except Exception as error:  # what a student can have caused is a verdict by now
            raise OSError(
                f"{_name(name)} can't be graded here, and no student is to blame ({type(error).__name__}: {error}): is"
                f" TMPDIR (={tempfile.gettempdir()}) full, or ulimit -n or -u too low?"
            ) from error
        for exercise, verdict, reason in judged:
            row = {"submission": _name(name), "exercise": exercise, "verdict": verdict}
            of = worth.get(exercise, 1.0)
            rows.append(row | {"points": shares.get(verdict, 0.0) * of, "of": of, "reason": _line(reason)})
            told(rows[-1])
    return rows


def _askable(course: list[submissions.Assignment]) -> None:
    """Raise what would fail every student's checks, and is no student's fault."""
    from hpclab.course import checks, fork

    fork.patience()
    ids = checks.ids()
    for assignment in course:
        for step in assignment.checks.values():
            if step.exercise not in ids:
                raise ValueError(
                    f"course: {assignment.stem}.ipynb checks {step.exercise!r}, which isn't an exercise; hpclab.check"
                    f" has {', '.join(ids)}."
                )


def totals(rows: list[dict]) -> Table:
    """Points of each submission, and how many there were to get."""
    named: dict[str, list[dict]] = {}
    for row in rows:
        named.setdefault(row["submission"], []).append(row)
    return Table(
        {"submission": name} | {key: sum(row[key] for row in own) for key in ("points", "of")}
        for name, own in named.items()
    )


def write(rows: list[dict], file: str | Path) -> None:
    """Write rows as CSV, whole or not at all; what a spreadsheet would take for a formula becomes plain text."""
    file = Path(file).expanduser()
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, newline="", encoding="utf-8") as part:
        try:
            written = csv.DictWriter(part, ["submission", "exercise", "verdict", "points", "of", "reason"])
            written.writeheader()
            for row in rows:
                written.writerow({name: _harmless(value) for name, value in row.items()})
            part.close()
            os.chmod(part.name, 0o600)  # marks are nobody else's business
            os.replace(part.name, file)
        except BaseException:
            os.unlink(part.name)
            raise


def _harmless(value: object) -> object:
    """Text of which no cell, also where a spreadsheet splits it at a semicolon, begins as a formula does."""
    return re.sub(r"(^\s*|;\s*)(?=[=+\-@＝＋－＠])", r"\1'", value) if isinstance(value, str) else value


def _name(text: str) -> str:
    """A submission's name as one line; no two become the same."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        letter if letter.isprintable() and letter != "\\" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _line(text: str) -> str:
    """A line of what a student may have made up: a terminal must not obey it."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return "".join(letter if letter.isprintable() else " " for letter in line)


def _short(text: str) -> str:
    """As much of a text as goes into a table."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


@dataclass
class _Limits:
    """What holds for every notebook of a class; `grade` says what each of these is."""

    time_s: float
    memory: int
    folder: Path
    trust: bool
    seed: str
    language: str

    def why(self, stopped: Stopped) -> str:
        """What ended a notebook early, in the teacher's language."""
        return {
            "start": _("its kernel didn't start within {seconds:g} s", seconds=START_SECONDS),
            "time": _("stopped: it took more than {seconds:g} s", seconds=self.time_s),
            "memory": _("stopped: it took more than {gb:.3g} GB of memory", gb=self.memory / 1e9),
            "output": _("stopped: it printed more than {mb:.0f} MB", mb=OUTPUT / 1e6),
            "processes": _("stopped: it started more than {count} processes", count=sandbox.PROCESSES),
            "disk": _("stopped: it filled or changed the folder of its sockets"),
            "dead": _("its kernel died"),
        }[str(stopped)]


def _judged(path: Path, course: list[submissions.Assignment], limits: _Limits) -> list[tuple[str, str, str]]:
    """Exercise, verdict and reason of all that a file should have answered."""
    try:
        notebook = submissions.read(path, limits.folder)
        assignment = submissions.began_as(path, notebook, course)
    except Unreadable as error:
        return [("", "not reached", _("not graded: {why}", why=str(error)))]
    steps = submissions.steps(notebook, assignment)
    notes = _Notes()
    rows: list[tuple[str, str, str]] = []
    why = ""
    try:
        with tempfile.TemporaryFile() as archive:
            notes.left = submissions.beside(path, limits.folder, archive)
            notes.hiding = submissions.hiding(path, limits.folder)
            inner = Path(*path.relative_to(limits.folder).parts[1:-1])
            settings = {"HPCLAB_LANG": limits.language}
            with sandbox.kernel(limits.memory, [limits.folder], settings, limits.trust, archive, inner) as kernel:
                why = _ended(_Session(kernel, limits, notes), steps, rows)
    except Unreadable as error:
        why = _("not graded: {why}", why=str(error))
    missing = [step for step in steps if step.exercise][len(rows) :]
    return rows + [(step.exercise, "not reached", notes.before(step, "not reached", why)) for step in missing]


def _ended(session: "_Session", steps: list[Step], rows: list[tuple[str, str, str]]) -> str:
    """Run a notebook; says what ended it before its end."""
    try:
        session.run(steps, rows)
    except Stopped as stopped:
        return session.limits.why(stopped)
    except Exception as error:  # a kernel can answer whatever it likes, and that is no reason to stop the class
        if getattr(error, "errno", None) in submissions.OURS:
            raise
        return _("not graded: {why}", why=_short(f"{type(error).__name__}: {error}"))
    return ""


@dataclass
class _Notes:
    """What a teacher must know to understand a verdict: which cell was judged, and what lay beside the notebook."""

    left: list[str] = field(default_factory=list)
    hiding: list[str] = field(default_factory=list)

    def before(self, step: Step, verdict: str, reason: str) -> str:
        """The reason of a verdict, after what is to be said of its check."""
        notes = []
        if step.copies > 1:
            notes.append(_("the last of {count} copies of this check counts", count=step.copies))
        if step.changed:
            notes.append(_("this check was changed; the course's own version counts"))
        if verdict != "pass" and self.hiding:
            notes.append(_("{file} beside the notebook has a module's name, and may hide it", file=_some(self.hiding)))
        if verdict != "pass" and self.left:
            notes.append(_("{file} wasn't copied beside it: too large, or unreadable", file=_some(self.left)))
        return f"({'; '.join(notes)}) {reason}" if notes else reason


def _some(names: list[str]) -> str:
    shown = ", ".join(_short(_name(name)) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown}, ..."


class _Session:
    """Talks to one kernel: runs cells, throws away what they show, and asks for verdicts."""

    def __init__(self, kernel: Kernel, limits: _Limits, notes: _Notes):
        self.kernel, self.client, self.limits, self.notes = kernel, kernel.client, limits, notes
        self.output = 0
        self.heard = False
        """Whether anything that the kernel shows has come."""
        self.trouble = ""
        """The first error of a cell, which may be why an answer isn't there."""
        self.late = "start"
        self.deadline = time.monotonic() + START_SECONDS

    def run(self, steps: list[Step], rows: list[tuple[str, str, str]]) -> None:
        while not self.heard:  # what it shows before this client's subscription has reached it is lost
            self._wait(self.client.kernel_info())
        self.late, self.deadline = "time", time.monotonic() + self.limits.time_s
        for step in steps:
            if step.code.strip():
                reply = self._wait(self.client.execute(step.code, allow_stdin=False, stop_on_error=False))
                if reply.get("status") == "error" and not self.trouble:
                    self.trouble = _("cell {number} raised {error}", number=step.cell, error=_error(reply))
            if step.exercise:
                verdict, message = self._verdict(step)
                rows.append((step.exercise, verdict, self.notes.before(step, verdict, message)))

    def _verdict(self, step: Step) -> tuple[str, str]:
        """What the course's check says: in the reply to a request that nothing printed can be mistaken for."""
        nonce = secrets.token_hex(16)
        judged = "__import__('hpclab.course.check').course.check.judged"
        call = f"{judged}({nonce!r}, {step.exercise!r}, {self.limits.seed!r}, lambda: ({step.answer}))"
        expressions = {"verdict": call}
        reply = self._wait(self.client.execute("", silent=True, user_expressions=expressions, allow_stdin=False))
        try:
            answer = reply if reply["status"] == "error" else reply["user_expressions"]["verdict"]
            if answer["status"] == "error":
                return "fail", self._with_trouble(_("The check raised {error}", error=_error(answer)))
            echoed, status, message = json.loads(ast.literal_eval(answer["data"]["text/plain"]))
            if echoed != nonce or status not in ("pass", "fail", "inconclusive") or not isinstance(message, str):
                raise ValueError
        except (KeyError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return "fail", self._with_trouble(_("Its kernel gave no verdict: does the notebook change the checks?"))
        return status, self._with_trouble(message)

    def _with_trouble(self, message: str) -> str:
        message = _short(message)
        return f"{message} ({self.trouble})" if self.trouble and self.trouble not in message else message

    def _wait(self, request: str) -> dict:
        """The reply to a request, once the kernel is idle again; meanwhile its output is counted and thrown away."""
        looked = 0.0
        while True:
            now = time.monotonic()
            if now - looked > 0.2:
                self.kernel.look()
                looked = now
            if now > self.deadline:
                raise Stopped(self.late)
            self._discard()
            try:
                message = self.client.get_shell_msg(timeout=0.05)
            except queue.Empty:
                continue
            if message.get("parent_header", {}).get("msg_id") == request:
                self._discard()
                return message["content"]

    def _discard(self) -> None:
        """Read for a while what the kernel shows."""
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            try:
                message = self.client.get_iopub_msg(timeout=0)
            except queue.Empty:
                return
            self.heard = True
            self.output += len(json.dumps(message.get("content"), default=str)) + sum(map(len, message["buffers"]))
            if self.output > OUTPUT:
                raise Stopped("output")


def _error(reply: dict) -> str:
    """The error in a reply of a kernel's, which may be of any length."""
    return _short(_line(f"{str(reply.get('ename'))[:LONGEST]}: {str(reply.get('evalue'))[:LONGEST]}"))
