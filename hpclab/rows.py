"""Rows: plain dicts, in lists, that ranks report, runs write as JSON lines, and figures take.

Every row has ``kind``. One that a rank reports has ``run``, ``attempt``, ``rank`` and ``ranks``, ``time_s`` (seconds
since the launch) and ``source`` ("measured" or "emulated"; others know "recorded" and "forecast"); no two of them agree
in run, attempt, rank, kind and step. What else is in it has its unit in its name. The kinds:

==========  ============================================================================================================
run         the first of a run: ``run``, ``started``, ``ranks``, ``threads``, and the machines of its ranks' workers
            (see `machine.together`)
step        one of a rank: ``step``, ``loss``, ``samples``, ``step_s``, and of it ``data_s`` (waiting for data),
            ``compute_s`` (the CPU time of the rank's main thread), ``wait_s`` (the rest: talking to other ranks,
            waiting for them or for a CPU); ``cpu_s`` is the CPU time of the whole rank, ``peak_mb`` the most memory
            that it has held so far, beyond what it held before it made its model (see `training.memory.Peak`)
epoch       one of a gang: ``epoch``, ``test_loss``, ``test_accuracy`` or ``test_bits`` (a character), ``samples``
checkpoint  one that rank 0 wrote: ``step``, ``save_s``, ``nbytes``
resume      where an attempt began, if not at the start: ``step``, ``checkpoint``
restart     one of a new attempt: ``attempt``, ``ranks``, ``cause``, ``failed_s`` and ``time_s`` (since the launch), and
            its machines, which may be others
attempt     what became of one; see `attempts`
end         the last of a run: ``status``, ``time_s``, and ``error`` if it failed
trial       one run of a sweep, summed up; see `scaling.trial`
summary     the trials of one case; see `scaling.summary`
split       where the time of a rank's steps went; see `scaling.split`
allreduce   one sum of an array over the ranks; see `scaling.allreduce`
span        what a rank did for a time; see `timeline.spans`
grain       one run of work that was cut into tasks; see `tasks.sweep`
task        what a worker did for a task; see `tasks.spans`
forecast    a step on some number of ranks; see `forecast.Forecast.rows`
progress    how far a run had come after a step; see `course.links.progress`
wait        what a rank computes and waits in a step, by how its data are dealt; see `course.ragged.waits`
plan        a layout of a large model, with its memory and speed; see `forecast.plan`
action      what a rank of a simulated cluster does for some steps; see `course.simulated.Schedule`
==========  ============================================================================================================
"""

import json
import math
import os
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

CUT_OFF = b"\x18\n"
"""What `append` ends a line with that was cut off: ASCII's CANCEL, so that no reader takes it for damage."""
LONGEST = 2**20
"""Bytes from the end of a file in which its last line is looked for."""


def line(row: dict) -> str:
    """A row as a line of JSON, which knows neither NaN nor infinity: they become null."""
    try:
        return json.dumps(row, allow_nan=False) + "\n"
    except ValueError:
        odd = {name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        return json.dumps(row | dict.fromkeys(odd)) + "\n"


def lines(path: str | os.PathLike) -> Iterator[tuple[int, dict | None]]:
    """Number and row of each line of a file of JSON lines; None for the row where the line holds none.

    A line without its end counts if it is a whole row; else it was cut off as its writer was, and is left out.
    """
    with open(path, "rb") as file:  # as bytes, since one line that isn't UTF-8 must not hide the others
        for number, text in enumerate(file, start=1):
            row = parsed(text)
            cut_off = not text.endswith(b"\n") or text.endswith(CUT_OFF)
            if text.strip() and (row is not None or not cut_off):
                yield number, row


def read(path: str | os.PathLike) -> list[dict]:
    """Rows of a file of JSON lines.

    A last line that was cut off is left out. A line before it that holds no row is skipped, with a warning that names
    it, and stays in the file.
    """
    rows = []
    for number, row in lines(path):
        if row is None:
            message = f"line {number} of {os.fspath(path)} holds no row; it is skipped, and the other lines count."
            warnings.warn(message, UserWarning, stacklevel=2)
        else:
            rows.append(row)
    return rows


def append(path: str | os.PathLike, row: dict, mode: int = 0o666) -> None:
    """Add a row to a file of JSON lines, on a line of its own: what is in the file stays as it is.

    It is one write at the file's end, so this row stays whole whatever becomes of this process, and so do rows that
    others add at the same time. There is no lock, which a shared disk may not keep.

    Parameters
    ----------
    path : path
    row : dict
    mode : int, default 0o666
        Permissions of a new file, less the umask.

    Raises
    ------
    OSError
        If the file can't be written, or took a part of the line only, such as on a full disk.
    """
    binary = getattr(os, "O_BINARY", 0)  # else Windows would write its own end of line after the mark of a cut-off one
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | binary, mode)
    try:
        size = os.fstat(handle).st_size
        os.lseek(handle, max(0, size - LONGEST), os.SEEK_SET)
        last = os.read(handle, LONGEST).rpartition(b"\n")[2]
        end = b"" if not last else CUT_OFF if parsed(last) is None else b"\n"
        text = end + line(row).encode()
        if os.write(handle, text) < len(text):
            raise OSError(f"{os.fspath(path)} took only part of a line; is the disk full?")
    finally:
        os.close(handle)


def parsed(text: bytes) -> dict | None:
    """The row that a line of a file of JSON lines holds; None if it holds none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # also what isn't UTF-8, and brackets without end
        return None
    return row if isinstance(row, dict) else None


MACHINE = ("started", "host", "hosts", "cpu", "cpus", "torch")
"""What rows that sum up a run take over from its first."""


def machine(rows: list[dict]) -> dict:
    """When and where a run ran, of its rows: its `MACHINE`.

    Of one that went on on other machines, the names of all: "X; Y"; numbers are those of its last attempt.
    """
    restarts = [row for row in rows if row["kind"] == "restart" and "cpu" in row]
    first, *later = some(rows, "run")[0], *sorted(restarts, key=lambda row: row["attempt"])
    facts = {name: first[name] for name in MACHINE if name in first}
    for row in later:
        for name, value in facts.items():
            if name in row and isinstance(value, str):
                names = dict.fromkeys([*value.split("; "), *str(row[name]).split("; ")])
                facts[name] = "; ".join(names)
            elif name in row:
                facts[name] = row[name]
    return facts


def span(rows: list[dict]) -> tuple[float, float]:
    """Seconds from the launch to the start of the first training step, and to the end of the last."""
    steps = some(rows, "step")
    return min(row["time_s"] - (row.get("step_s") or 0.0) for row in steps), max(row["time_s"] for row in steps)


def kept(rows: list[dict]) -> list[dict]:
    """Rows without the steps that were lost: those that a later attempt did again, or never reached.

    Examples
    --------
    >>> steps = [{"kind": "step", "attempt": 0, "step": step} for step in range(4)]
    >>> again = {"kind": "step", "attempt": 1, "step": 2}
    >>> [row["step"] for row in kept([*steps, again]) if row["attempt"] == 0]
    [0, 1]
    """
    ends = _ends(rows)
    if len(ends) < 2:
        return rows
    return [
        row
        for row in rows
        if row["kind"] not in ("step", "epoch")
        or row.get("step") is None
        or _counts(row, ends.get(row.get("attempt", 0), math.inf))
    ]


def attempts(rows: list[dict]) -> list[dict]:
    """What each attempt of a run did, and what its end cost.

    Returns
    -------
    list of dict
        One row of kind "attempt" for each that took a step: ``attempt``, ``ranks``, ``first`` and ``last`` (its steps),
        ``kept`` (those that no later attempt did again); ``start_s``, ``last_s`` and ``end_s`` (since the launch: the
        start of its first step, the end of its last, and its failure or ``last_s``), ``kept_s`` (the end of the last
        kept step), ``lost_s`` (from then to the failure), ``save_s`` (writing checkpoints), ``restart_s`` (from the
        failure to the next attempt's first step), and ``cause`` (of the failure, or None).
    """
    ends = _ends(rows)
    # In older files, a function's own rows may have these kinds: ours have the keys that we need.
    restarts = {row["attempt"]: row for row in rows if row["kind"] == "restart" and "cause" in row}
    broken = next((row for row in rows if row["kind"] == "end" and row.keys() >= {"status", "error"}), None)
    all_steps = [row for row in rows if row["kind"] == "step" and row.get("step") is not None]
    summaries = []
    for attempt in sorted({row["attempt"] for row in all_steps}):
        steps = [row for row in all_steps if row["attempt"] == attempt]
        kept_steps = [row for row in steps if row["step"] < ends[attempt]]
        saved = [row for row in rows if row["kind"] == "checkpoint" and row["attempt"] == attempt]
        start_s, last_s = span(steps)
        failure = next((restarts[later] for later in sorted(restarts) if later > attempt), None)
        end_s = last_s if failure is None else failure["failed_s"]
        kept_s = max((row["time_s"] for row in kept_steps), default=start_s)
        summaries.append(
            {
                "kind": "attempt",
                "attempt": attempt,
                "ranks": steps[0]["ranks"],
                "first": min(row["step"] for row in steps),
                "last": max(row["step"] for row in steps),
                "kept": len({row["step"] for row in kept_steps}),
                "start_s": start_s,
                "last_s": last_s,
                "end_s": end_s,
                "kept_s": kept_s,
                "lost_s": 0.0 if failure is None else end_s - kept_s,
                "save_s": math.fsum(row.get("save_s") or 0.0 for row in saved),
                "restart_s": 0.0,
                "cause": failure["cause"] if failure else broken["error"].splitlines()[0] if broken else None,
                "source": source(steps),
            }
        )
    for row, later in pairwise(summaries):
        row["restart_s"] = later["start_s"] - row["end_s"]
    return summaries


def _ends(rows: list[dict]) -> dict[int, float]:
    """By attempt, the step at which a later one began; infinite for the last."""
    firsts: dict[str, dict[int, int]] = {"resume": {}, "step": {}}
    for row in rows:
        if row["kind"] in firsts and row.get("step") is not None:
            of_kind, attempt = firsts[row["kind"]], row.get("attempt", 0)
            of_kind[attempt] = min(row["step"], of_kind.get(attempt, row["step"]))
    starts = firsts["resume"] | firsts["step"]  # its first step counts, once it has taken one
    return {attempt: min((s for later, s in starts.items() if later > attempt), default=math.inf) for attempt in starts}


def _counts(row: dict, end: float) -> bool:
    """Whether a row of an attempt is before the step at which a later one began; an epoch's row counts steps done."""
    return row["step"] < end if row["kind"] == "step" else row["step"] <= end


def some(rows: list[dict], kind: str) -> list[dict]:
    """Return the rows of a kind that a caller needs, or raise a ValueError if there are none.

    A row without a kind is taken for one of this kind.
    """
    wanted = [row for row in rows if row.get("kind", kind) == kind]
    if not wanted:
        others = f" (but {', '.join(sorted({str(row['kind']) for row in rows}))})" if rows else ""
        raise ValueError(f"rows hold no {kind}{others}; give those of a measurement.")
    return wanted


def grouped(rows: list[dict], name: str) -> dict[Any, list[dict]]:
    """Rows by the value that they have for a name, in its order.

    Examples
    --------
    >>> grouped([{"rank": 1, "step": 0}, {"rank": 0, "step": 0}, {"rank": 1, "step": 1}], "rank")[1]
    [{'rank': 1, 'step': 0}, {'rank': 1, 'step': 1}]
    """
    groups: dict[Any, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return dict(sorted(groups.items()))


def label(ranks: int, threads: int = 1) -> str:
    """Name of a case: "2 ranks", "1 rank x 2 threads"."""
    return f"{ranks} rank{'s' * (ranks > 1)}" + f" x {threads} threads" * (threads > 1)


def source(rows: list[dict]) -> str:
    """Provenance of rows taken together: "measured" only if all are, "unknown" if none says its own."""
    kinds = {row["source"] for row in rows if "source" in row}
    if not kinds:
        return "unknown"
    return kinds.pop() if len(kinds) == 1 else "emulated" if kinds == {"measured", "emulated"} else "mixed"
