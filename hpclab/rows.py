"""Rows: plain dicts, in lists, that ranks report, runs write as JSON lines, and figures take.

Every row has ``kind``. One that a rank reports has ``run``, ``attempt``, ``rank`` and ``ranks``, ``time_s`` (seconds
since the launch) and ``source`` ("measured" or "emulated"; others know "recorded" and "forecast"); no two of them agree
in run, attempt, rank, kind and step. What else is in it has its unit in its name. The kinds:

========  ==========================================================================================================
run       the first of a run: ``run``, ``started``, ``ranks``, ``threads``, and the machine (see `machine.describe`)
step      one of a rank: ``step``, ``loss``, ``samples``, ``step_s``, and of it ``data_s`` (waiting for data),
          ``compute_s`` (the CPU time of the rank's main thread), ``wait_s`` (the rest: talking to other ranks, waiting
          for them or for a CPU); ``cpu_s`` is the CPU time of the whole rank
epoch     one of a gang: ``epoch``, ``test_loss``, ``test_accuracy``, ``samples``
end       the last of a run: ``status``, ``time_s``, and ``error`` if it failed
trial     one run of a sweep, summed up; see `scaling.trial`
summary   the trials of one case; see `scaling.summary`
split     where the time of a rank's steps went; see `scaling.split`
allreduce one sum of an array over the ranks; see `scaling.allreduce`
span      what a rank did for a time; see `timeline.spans`
forecast  a step on some number of ranks; see `forecast.Forecast.rows`
========  ==========================================================================================================
"""

import json
import math
from pathlib import Path


def line(row: dict) -> str:
    """A row as a line of JSON, which knows neither NaN nor infinity: they become null."""
    try:
        return json.dumps(row, allow_nan=False) + "\n"
    except ValueError:
        odd = {name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        return json.dumps(row | dict.fromkeys(odd)) + "\n"


def read(path: Path) -> list[dict]:
    """Rows of a file of JSON lines; a last line that was cut off is left out."""
    found = []
    with open(path, encoding="utf-8") as file:
        for text in file:
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return found


def span(rows: list[dict]) -> tuple[float, float]:
    """Seconds from the launch to the start of the first training step, and to the end of the last."""
    steps = [row for row in rows if row["kind"] == "step"]
    return min(row["time_s"] - row.get("step_s", 0.0) for row in steps), max(row["time_s"] for row in steps)


def some(rows: list[dict], kind: str) -> list[dict]:
    """Return the rows of a kind that a caller needs, or raise a ValueError if there are none."""
    if not rows:
        raise ValueError(f"rows hold no {kind}; give those of a measurement.")
    return rows


def label(ranks: int, threads: int = 1) -> str:
    """Name of a case: "2 ranks", "1 rank x 2 threads"."""
    return f"{ranks} rank{'s' * (ranks > 1)}" + f" x {threads} threads" * (threads > 1)


def source(rows: list[dict]) -> str:
    """Provenance of rows taken together: "measured" only if all are, "unknown" if none says its own."""
    kinds = {row["source"] for row in rows if "source" in row}
    if not kinds:
        return "unknown"
    return kinds.pop() if len(kinds) == 1 else "emulated" if kinds == {"measured", "emulated"} else "mixed"
