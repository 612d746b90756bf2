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
from pathlib import Path

from hpclab import _sandbox, _submissions, data
from hpclab._sandbox import Kernel, Stopped
from hpclab._submissions import Step, Unreadable
from hpclab.language import translate as _
from hpclab.tables import Table

TIME = 600.0
MEMORY = 2 * 10**9
OUTPUT = 20 * 10**6
"""Bytes of output, of all cells of a notebook, at which it is stopped."""
START_SECONDS = 120.0
"""How long a kernel may take to start, which is no fault of the student's."""


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
        Points for a check that couldn't tell, 0 to 1.
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
        "not reached"), ``points``, ``reason``.

    Raises
    ------
    ValueError
        If an argument can't be.
    RuntimeError
        If no sandbox can be made here and `trust` isn't set.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"folder (={folder}) is no folder; name one with the notebooks of a class.")
    if not 0 <= inconclusive <= 1:
        raise ValueError(f"inconclusive (={inconclusive:g}) must be from 0 to 1 points.")
    if not time_s > 0 or not memory > 0:
        raise ValueError(f"time_s (={time_s:g}) and memory (={memory}) must be above 0.")
    notebooks = _submissions.assignments(Path(course).expanduser().resolve() if course else data.share() / "notebooks")
    there = [(name, path) for name, path in _submissions.found(folder, notebooks) if path not in skip]
    if not there:
        raise ValueError(f"folder (={folder}) holds nothing to grade: no FOLDER/*.ipynb, no FOLDER/STUDENT/*.ipynb.")
    if not trust and (why := _sandbox.missing()):
        raise RuntimeError(f"{why}. Students' code isn't run without a sandbox, unless you say: --trust")
    limits = _Limits(time_s, memory, folder, trust, str(seed))
    points = {"pass": 1.0, "inconclusive": float(inconclusive)}
    rows = Table()
    for name, path in there:
        for exercise, verdict, reason in _judged(path, notebooks, limits):
            row = {"submission": _plain(name), "exercise": exercise, "verdict": verdict}
            rows.append(row | {"points": points.get(verdict, 0.0), "reason": _plain(reason)})
            told(rows[-1])
    return rows


def totals(rows: list[dict]) -> Table:
    """Points of each submission, and how many there were to get."""
    named: dict[str, list[dict]] = {}
    for row in rows:
        named.setdefault(row["submission"], []).append(row)
    return Table(
        {"submission": name, "points": sum(row["points"] for row in own), "of": len(own)} for name, own in named.items()
    )


def write(rows: list[dict], file: str | Path) -> None:
    """Write rows as CSV, whole or not at all; what a spreadsheet would take for a formula becomes plain text."""
    file = Path(file).expanduser()
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, newline="", encoding="utf-8") as part:
        try:
            written = csv.DictWriter(part, ["submission", "exercise", "verdict", "points", "reason"])
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
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _plain(text: str) -> str:
    """A line of what a student may have made up: a terminal must not obey it."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", text)
    line = "".join(letter if letter.isprintable() else " " for letter in line)
    return line if len(line) <= 200 else f"{line[:197]}..."


class _Limits:
    def __init__(self, time_s: float, memory: int, folder: Path, trust: bool, seed: str):
        self.time_s, self.memory, self.folder, self.trust, self.seed = time_s, memory, folder, trust, seed

    def why(self, stopped: Stopped) -> str:
        """What ended a notebook, in the teacher's language."""
        return {
            "time": _("stopped: it took more than {seconds:g} s", seconds=self.time_s),
            "memory": _("stopped: it took more than {gb:.3g} GB of memory", gb=self.memory / 1e9),
            "output": _("stopped: it printed more than {mb:.0f} MB", mb=OUTPUT / 1e6),
            "processes": _("stopped: it started more than {count} processes", count=_sandbox.PROCESSES),
            "disk": _("stopped: it filled the folder of its sockets"),
            "dead": _("its kernel died"),
        }[str(stopped)]


def _judged(path: Path, course: list[_submissions.Assignment], limits: _Limits) -> list[tuple[str, str, str]]:
    """Exercise, verdict and reason of all that a file should have answered."""
    try:
        notebook = _submissions.read(path)
        assignment = _submissions.of(path, notebook, course)
    except Unreadable as error:
        return [("", "not reached", _("not graded: {why}", why=str(error)))]
    steps = _submissions.steps(notebook, assignment)
    rows: list[tuple[str, str, str]] = []
    try:
        with _sandbox.kernel(limits.memory, [limits.folder], {}, limits.trust) as kernel:
            _Session(kernel, limits).run(steps, rows)
    except Stopped as stopped:
        done = [exercise for exercise, _verdict, _reason in rows]
        exercises = [step.exercise for step in steps if step.exercise]
        return rows + [(name, "not reached", limits.why(stopped)) for name in exercises if name not in done]
    return rows


class _Session:
    """Talks to one kernel: runs cells, throws away what they show, and asks for verdicts."""

    def __init__(self, kernel: Kernel, limits: _Limits):
        self.kernel, self.client, self.limits = kernel, kernel.client, limits
        self.output = 0
        self.trouble = ""
        """The first error of a cell, which may be why an answer isn't there."""
        self.deadline = time.monotonic() + START_SECONDS

    def run(self, steps: list[Step], rows: list[tuple[str, str, str]]) -> None:
        self._wait(self.client.kernel_info())
        self.deadline = time.monotonic() + self.limits.time_s
        for number, step in enumerate(steps, start=1):
            reply = self._wait(self.client.execute(step.code, allow_stdin=False, stop_on_error=False))
            if reply.get("status") == "error" and not self.trouble:
                told = {"number": number, "error": f"{reply.get('ename')}: {reply.get('evalue')}"}
                self.trouble = _("cell {number} raised {error}", **told)
            if step.exercise:
                rows.append((step.exercise, *self._verdict(step)))

    def _verdict(self, step: Step) -> tuple[str, str]:
        """What the course's check says: in the reply to a request that nothing printed can be mistaken for."""
        nonce = secrets.token_hex(16)
        call = f"__import__('hpclab.exercises').exercises.judged({nonce!r}, {step.exercise!r}, {self.limits.seed!r}, "
        asked = {"verdict": f"{call}lambda: ({step.answer}))"}
        reply = self._wait(self.client.execute("", silent=True, user_expressions=asked, allow_stdin=False))
        found = (reply.get("user_expressions") or {}).get("verdict", {})
        try:
            echoed, status, message = json.loads(ast.literal_eval(found["data"]["text/plain"]))
            if echoed != nonce or status not in ("pass", "fail", "inconclusive"):
                raise ValueError
        except (KeyError, ValueError, SyntaxError, TypeError):
            return "fail", self._with_trouble(f"{found.get('ename', '')}: {found.get('evalue', '')}")
        return status, self._with_trouble(message)

    def _with_trouble(self, message: str) -> str:
        return f"{message} ({self.trouble})" if self.trouble and self.trouble not in message else message

    def _wait(self, request: str) -> dict:
        """The reply to a request, once the kernel is idle again; meanwhile its output is counted and thrown away."""
        reply: dict | None = None
        looked = 0.0
        while True:
            now = time.monotonic()
            if now - looked > 0.2:
                self.kernel.look()
                looked = now
            if now > self.deadline:
                raise Stopped("time")
            self._discard()
            try:
                message = self.client.get_shell_msg(timeout=0.05)
            except queue.Empty:
                continue
            if message.get("parent_header", {}).get("msg_id") == request:
                reply = message["content"]
                self._discard()
                return reply

    def _discard(self) -> None:
        """Read for a while what the kernel shows."""
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            try:
                message = self.client.get_iopub_msg(timeout=0)
            except queue.Empty:
                return
            self.output += len(json.dumps(message.get("content"), default=str)) + sum(map(len, message["buffers"]))
            if self.output > OUTPUT:
                raise Stopped("output")
