"""What the quizzes at the notebooks' ends show: planted rows, and their figure or table.

Nothing here says which answers are right: the checks work that out from the same rows. They are the same for everybody,
whatever `HPCLAB_SEED` is, as their answers are typed.
"""

from collections.abc import Callable
from typing import Any

from hpclab.language import translate as _
from hpclab.pages import Code
from hpclab.tables import Table

Rows = list[dict[str, Any]]

RACE: Rows = [
    {"racer": "1 rank", "CPUs": 1, "seconds to loss 0.4": 60.0},
    {"racer": "1 rank x 4 threads", "CPUs": 4, "seconds to loss 0.4": 24.0},
    {"racer": "4 ranks", "CPUs": 4, "seconds to loss 0.4": 20.0},
]

CEILING: dict[str, Any] = {"flops_per_s": 100e9, "bytes_per_s": 20e9, "ridge": 5.0, "source": "planted"}
PROGRAMS: Rows = [
    {"kind": "roofline", "name": name, "intensity": intensity, "flops_per_s": rate, "source": "planted"}
    for name, intensity, rate in (("A", 0.25, 4.5e9), ("B", 20.0, 90e9), ("C", 20.0, 10e9), ("D", 1.0, 8e9))
]

STEP: Rows = [
    {"part": part, "milliseconds": milliseconds}
    for part, milliseconds in (("data", 10.0), ("forward", 30.0), ("backward", 50.0), ("optimiser", 10.0))
]

EXCHANGE = {
    0: [(3, "receive", 3), (4, "send", 1)],
    1: [(6, "send", 2), (7, "receive", 0)],
    2: [(9, "receive", 1), (10, "receive", 3)],
    3: [(12, "receive", 2), (13, "send", 0)],
}
"""By rank: line of the program, what it does, and with which other rank."""

MESSAGES: Rows = [
    {"kind": "allreduce", "nbytes": nbytes, "duration_s": (2e-4 + 2e-9 * nbytes) * wobble, "source": "planted"}
    for nbytes in (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
    for wobble in (0.97, 1.0, 1.03)
]

RATIOS: Rows = [
    {"measure": name, "ratio": ratio, "low": low, "high": high, "rounds": 6, "source": "planted"}
    for name, ratio, low, high in (("A", 1.55, 1.3, 1.85), ("B", 1.08, 0.93, 1.25), ("C", 1.3, 1.05, 1.6))
]

TIMELINE: Rows = [
    {"kind": "span", "rank": rank, "name": name, "start_s": start / 1e3, "duration_s": (end - start) / 1e3}
    | {"source": "planted"}
    for rank, bars in {
        0: (
            *(("data", 0, 5), ("forward", 5, 30), ("backward", 30, 70), ("waiting", 70, 95), ("optimizer", 95, 100)),
            *(("all-reduce", 50, 72), ("all-reduce", 73, 95)),
        ),
        1: (
            *(("data", 0, 5), ("forward", 5, 40), ("backward", 40, 90), ("waiting", 90, 95), ("optimizer", 95, 100)),
            *(("all-reduce", 65, 72), ("all-reduce", 90, 95)),
        ),
    }.items()
    for name, start, end in bars
]

PIPELINE: Rows = [
    {"kind": "span", "rank": rank, "name": name, "start_s": start / 1e3, "duration_s": duration / 1e3}
    | {"source": "planted"}
    for rank in range(3)
    for part in range(4)
    for name, start, duration in (
        ("forward", 10 * (rank + part), 10),
        ("backward", 60 + 20 * (2 - rank + part), 20),
    )
]

SWEEP: Rows = [
    {"ranks": ranks, "samples a rank and step": 64, "step (ms)": step}
    for ranks, step in ((1, 100.0), (2, 110.0), (4, 125.0), (8, 160.0))
]

TASKS: Rows = [
    {"kind": "task", "worker": worker, "action": action, "start_s": start / 1e3, "duration_s": (end - start) / 1e3}
    | {"source": "planted"}
    for worker, action, start, end in (
        *((0, "compute", 0, 20), (0, "compute", 25, 45), (0, "compute", 50, 70)),
        *((1, "transfer", 0, 10), (1, "compute", 10, 110)),
    )
]

CPUS = 4
"""Of both nodes of the Gantt chart together."""
JOBS: Rows = [
    {"job": job, "name": name, "nodes": nodes, "cpus": cpus, "walltime_s": walltime, "state": "COMPLETED"}
    | {"submitted_s": submitted, "started_s": started, "ended_s": ended, "source": "planted"}
    for job, name, nodes, cpus, walltime, submitted, started, ended in (
        (1, "long", "n1", 2, 120, 0, 0, 80),
        (2, "wide", "n[1-2]", 4, 60, 2, 80, 110),
        (3, "short", "n2", 1, 60, 4, 5, 35),
        (4, "short", "n2", 1, 60, 6, 7, 37),
        (5, "greedy", "n2", 1, 600, 8, 110, 140),
    )
]

RECOVERY: Rows = [
    {"kind": "step", "run": "quiz", "attempt": attempt, "rank": 0, "ranks": 1, "step": step, "source": "planted"}
    | {"time_s": began + 0.1 * (step - first), "step_s": 0.1, "loss": 1.0, "samples": 32}
    for attempt, began, first, last in ((0, 0.1, 0, 54), (1, 8.5, 40, 119))
    for step in range(first, last + 1)
] + [
    {"kind": "restart", "run": "quiz", "attempt": 1, "failed_s": 5.5, "cause": "killed", "source": "planted"},
    {"kind": "resume", "run": "quiz", "attempt": 1, "step": 40, "source": "planted"},
]

FILES: Rows = [
    {"letter": letter, "mode of the folder": Code(folder), "mode of the file": Code(file), "file": name}
    for letter, folder, file, name in (
        ("a", "drwxr-xr-x", "-rw-r--r--", "job/run.sh"),
        ("b", "drwxr-xr-x", "-rw-r-----", "job/token"),
        ("c", "drwx------", "-rw-r--r--", "keys/key.pem"),
        ("d", "drwx--x--x", "-rw-r--r--", "data/seed"),
        ("e", "drwxrwxrwx", "-rw-------", "tmp/secret"),
        ("f", "drwxr--r--", "-rw-r--r--", "old/password"),
    )
]

FRAMES: Rows = [
    {"step": step, "rank 0": first, "rank 1": second}
    for step, (first, second) in enumerate(((100, 60), (40, 80), (80, 60), (60, 80)), start=1)
]

COMPUTING_S = 0.02
"""Of a step, in the next table."""
MESSAGES_SENT: Rows = [
    {"strategy": name, "latencies a step": latencies, "MB a step": megabytes, "steps to the loss": steps}
    for name, latencies, megabytes, steps in (
        ("ddp", 2, 10.0, 100),
        ("bf16", 2, 5.0, 100),
        ("low rank", 6, 0.5, 110),
        ("top-k", 1, 0.2, 240),
    )
]

FORECASTS: Rows = [
    {"run": run, "A": (0.0, 20.0), "B": (8.0, 12.0), "C": (9.8, 10.2), "measured": value}
    for run, value in enumerate((10.5, 9.0, 13.0, 11.0), start=1)
]


def show(quiz: str) -> Table | None:
    """Draw the figure of a quiz, or return its table.

    Parameters
    ----------
    quiz : str
        Its id, as in ``hpclab.check``.

    Raises
    ------
    ValueError
        If it has neither.
    """
    if quiz not in _SHOWN:
        raise ValueError(f"quiz (={quiz!r}) must be one of {', '.join(_SHOWN)}.")
    shown, titles = _SHOWN[quiz](), _titles()
    if not isinstance(shown, Table):
        return None
    return Table({titles.get(name, name): value for name, value in row.items()} for row in shown)


def _titles() -> dict[str, str]:
    """Names of columns in the reader's language."""
    return {
        "racer": _("racer"),
        "CPUs": _("CPUs"),
        "seconds to loss 0.4": _("seconds to loss 0.4"),
        "part": _("part"),
        "milliseconds": _("milliseconds"),
        "ranks": _("ranks"),
        "samples a rank and step": _("samples a rank and step"),
        "step (ms)": _("step (ms)"),
        "step": _("step"),
        "strategy": _("strategy"),
        "latencies a step": _("latencies a step"),
        "MB a step": _("MB a step"),
        "steps to the loss": _("steps to the loss"),
        "rank 0": _("rank {rank}", rank=0),
        "rank 1": _("rank {rank}", rank=1),
        "job": _("job"),
        "time limit (s)": _("time limit (s)"),
        "letter": _("letter"),
        "mode of the folder": _("mode of the folder"),
        "mode of the file": _("mode of the file"),
        "file": _("file"),
        "run": _("run"),
        "measured": _("measured"),
    }


def _job_table() -> Table:
    from hpclab import plots

    plots.gantt(JOBS, now=200)
    limits = {"long": 1, "wide": 2, "short": 3, "greedy": 5}
    rows = {job["job"]: job for job in JOBS}
    return Table(
        {"job": name, "CPUs": rows[job]["cpus"], "time limit (s)": rows[job]["walltime_s"]}
        for name, job in limits.items()
    )


def _plotted(name: str, *arguments: object) -> Callable[[], object]:
    def draw() -> object:
        from hpclab import plots

        return getattr(plots, name)(*arguments)

    return draw


_SHOWN: dict[str, Callable[[], object]] = {
    "start.quiz_race": lambda: Table(RACE),
    "one-process.quiz_roofline": _plotted("roofline", PROGRAMS, CEILING),
    "one-process.quiz_split": lambda: Table(STEP),
    "ddp-from-scratch.quiz_line": _plotted("allreduce", MESSAGES),
    "cnn.quiz_interval": _plotted("ratios", RATIOS, "times as fast as the baseline"),
    "scaling.quiz_timeline": _plotted("timeline", TIMELINE),
    "scaling.quiz_regime": lambda: Table(SWEEP),
    "dask.quiz_tasks": _plotted("tasks", TASKS),
    "queues.quiz_gantt": _job_table,
    "rnn.quiz_waits": lambda: Table(FRAMES),
    "autoencoder.quiz_links": lambda: Table(MESSAGES_SENT),
    "too-big.quiz_bubble": _plotted("timeline", PIPELINE),
    "faults.quiz_recovery": _plotted("recovery", RECOVERY),
    "security.quiz_modes": lambda: Table(FILES),
    "capstone.quiz_score": lambda: Table(
        row | {name: f"{row[name][0]:g} to {row[name][1]:g}" for name in "ABC"} for row in FORECASTS
    ),
}
