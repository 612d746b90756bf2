"""What every rank does when, for a few steps, on one clock: from the traces that torch's profiler writes.

Needs no annotations in the training loop: torch names data loading, DDP's forward, each operation of the backward pass,
each bucket's all-reduce and the optimiser's step by itself. A pipeline's stages name the passes of each micro-batch.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from hpclab.gangs.rank import clock_ahead, run_folder
from hpclab.rows import machine, read, source

WAIT_STEPS = 5
"""Steps before a trace begins, the last of which warms the profiler up."""
_NAMES = {
    "data": re.compile(r"enumerate\(DataLoader\)"),
    "forward": re.compile(r"(DistributedDataParallel\.|hpclab:)forward$"),
    "backward": re.compile(r"autograd::engine::evaluate_function"),
    "all-reduce": re.compile(r"(gloo|nccl):all_?reduce"),
    "optimizer": re.compile(r"Optimizer\.step#"),
}
"""How torch names the parts of a step."""
_PASS = re.compile(r"hpclab:backward$")
"""How a pipeline names the backward pass of a micro-batch, which holds many operations."""


def profiler(steps: int) -> Any:
    """A profiler of a rank that traces so many steps into the run's folder; its ``step()`` is called after each.

    Example, in a function of `launch` (in `train`: ``trace=3``)::

        with hpclab.timeline.profiler(3) as traced:
            for inputs, labels in loader:
                ...
                traced.step()
    """
    from torch.distributed import get_rank
    from torch.profiler import ProfilerActivity, profile, schedule

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it announces itself among the prints of each rank
    path = run_folder() / f"trace-{get_rank()}.json"
    return profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=WAIT_STEPS - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda traced: _write(traced, path),
    )


def _write(traced: Any, path: Path) -> None:
    """Write a rank's trace, its times by the kernel's clock."""
    traced.export_chrome_trace(str(path))
    if ahead := clock_ahead():
        trace = json.loads(path.read_text(encoding="utf-8"))
        trace["baseTimeNanoseconds"] -= round(ahead * 1e9)
        path.write_text(json.dumps(trace), encoding="utf-8")


def spans(folder: str | os.PathLike) -> list[dict]:
    """Read the traces of a run.

    Parameters
    ----------
    folder : path
        Of a run that traced, such as ``run.folder``.

    Returns
    -------
    list of dict
        Rows of kind "span", by rank and start: ``rank``, ``name`` ("data", "forward", "backward", "all-reduce",
        "waiting", "optimizer"), ``start_s`` since the first of all, ``duration_s``, ``source``, and the machine.
        "waiting" is the time between the last operation of a backward pass and the optimiser's step: what no
        computing hides. In a pipeline, each micro-batch has its own "forward" and "backward".

    Raises
    ------
    FileNotFoundError
        If the folder holds no trace.
    """
    rows = [row for rank, events in _traces(folder).items() for row in _rank_spans(rank, events)]
    first = min(row["start_s"] for row in rows)
    run = read(Path(folder, "rows.jsonl").expanduser())
    origin = {"source": source(run)} | machine(run)
    return [row | {"start_s": row["start_s"] - first} | origin for row in rows]


def named(traced: Any) -> list[dict]:
    """Rows, as from `spans`, of one process whose step names its parts by ``torch.profiler.record_function``.

    Parameters
    ----------
    traced : torch.profiler.profile
        After its ``with`` block; other names than "data", "forward", "backward" and "optimizer" are left out.
    """
    events = [event for event in traced.events() if event.name in _NAMES]
    first = min((event.time_range.start for event in events), default=0)
    return [
        _span(0, event.name, (event.time_range.start - first) / 1e6, event.time_range.elapsed_us() / 1e6)
        | {"source": "measured"}
        for event in events
    ]


def merge(folder: str | os.PathLike) -> Path:
    """Write the traces of all ranks as one, ``trace.json``, for Perfetto or chrome://tracing; a process a rank."""
    path = Path(folder, "trace.json").expanduser()
    merged: list[dict] = []
    for rank, events in _traces(folder).items():
        merged.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        merged += [event | {"pid": rank} for event in events if event.get("ph") == "X"]
    path.write_text(json.dumps({"traceEvents": merged, "displayTimeUnit": "ms"}), encoding="utf-8")
    return path


def _traces(folder: str | os.PathLike) -> dict[int, list[dict]]:
    """Events of each rank, their times moved to one clock: microseconds since the epoch."""
    files = {int(file.stem.split("-")[1]): file for file in Path(folder).expanduser().glob("trace-*.json")}
    if not files:
        raise FileNotFoundError(
            f"folder (={str(folder)!r}) holds no trace; run train(..., trace=3), for more than {WAIT_STEPS} steps."
        )
    traces = {}
    for rank, file in sorted(files.items()):
        trace = json.loads(file.read_text(encoding="utf-8"))
        base = trace.get("baseTimeNanoseconds", 0) / 1e3
        traces[rank] = [event | {"ts": event["ts"] + base} for event in trace["traceEvents"] if "ts" in event]
    return traces


def _rank_spans(rank: int, events: list[dict]) -> list[dict]:
    """The parts of one rank's steps, in order."""
    events = sorted((event for event in events if event.get("ph") == "X"), key=lambda event: event["ts"])
    pipelined = any(_PASS.search(event["name"]) for event in events)
    names = _NAMES | ({"backward": _PASS} if pipelined else {})
    rows: list[dict] = []
    backward: dict | None = None
    for event in events:
        name = next((name for name, pattern in names.items() if pattern.search(event["name"])), None)
        if name is None:
            continue
        start, duration = event["ts"] / 1e6, event["dur"] / 1e6
        if name == "backward" and backward is not None and not pipelined:  # one operation of many: it stretches the
            backward["duration_s"] = max(backward["duration_s"], start + duration - backward["start_s"])  # pass's span
            continue
        if name == "optimizer" and backward is not None:
            ended = backward["start_s"] + backward["duration_s"]
            rows.append(_span(rank, "waiting", ended, max(0.0, start - ended)))
            backward = None
        rows.append(_span(rank, name, start, duration))
        if name == "backward":
            backward = rows[-1]
    return rows


def _span(rank: int, name: str, start_s: float, duration_s: float) -> dict:
    return {"kind": "span", "rank": rank, "name": name, "start_s": start_s, "duration_s": duration_s}
