"""Measure how a job scales: interleaved repeats in, rows out."""

import os
import random
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from distributed import Client

from hpclab import live
from hpclab._arguments import plain, whole_number
from hpclab.gangs.launch import gang_size
from hpclab.gangs.run import Run
from hpclab.language import translate as _
from hpclab.rows import append, label, read
from hpclab.scaling.judge import COUNTS
from hpclab.scaling.trials import trial

Watch = Callable[[str, list[dict]], None] | None


def sweep(
    client: Client,
    job: Callable[..., Run],
    *,
    ranks: Iterable[int] | None = None,
    cases: Iterable[dict] | None = None,
    fixed: dict | None = None,
    repeats: int = 3,
    seed: int | None = 0,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
    title: str | None = None,
    watch: Watch = None,
) -> list[dict]:
    """Run a job in several cases, in interleaved repeats, so that a drift of the machine affects all cases alike.

    Parameters
    ----------
    client : distributed.Client
        From `connect`.
    job : callable
        ``job(client, **case)`` starts one run and returns it, for instance
        ``lambda client, ranks: hpclab.train(client, hpclab.models.CNN, "fashion_mnist", ranks=ranks, steps=50)``; or a
        `launch` of your own function, in which every rank calls ``hpclab.report(step=..., samples=...)`` each step,
        with the samples that it processed itself; the sweep adds up those of all ranks.
    ranks : iterable of int, optional
        Short for the cases ``{"ranks": n}``.
    cases : iterable of dict, optional
        Arguments of the job, a dict per case, such as ``[{"ranks": 2, "network": link} for link in links]``. The first
        case is the baseline of speed-ups. The cluster must have room for a case's ``ranks``, unless the case also
        has ``oversubscribe=True``. Functions among the arguments are identified by their names.
    fixed : dict, optional
        Arguments that the job gets in all cases.
    repeats : int, default 3
        Rounds; in each, every case runs once, in a newly shuffled order.
    seed : int or None, default 0
        Seed of the order; None keeps the given order in every round.
    folder : path, optional
        Where to keep the rows, in ``trials.jsonl``, as they come. If a sweep was interrupted, call it again with the
        same folder, cases, fixed arguments and seed: it measures only what is missing. Default: only return the rows.
    progress : bool, default True
        Show a progress bar, in a notebook one line, with the remaining time.
    title : str, optional
        What the progress bar calls this. Default: "sweep".
    watch : callable, optional
        ``watch(label, rows)`` is called about once a second, and at the end, with the label of the current case and all
        rows of its run.

    Returns
    -------
    list of dict
        Rows of kind "trial", see `trial`, in the order of measurement; ``setting`` has the arguments of the case other
        than ranks and threads, and so does the ``label``.

    Raises
    ------
    ValueError
        If neither or both of `ranks` and `cases` are given, if they are empty, if a case has more ranks than fit, or if
        the folder has rows of another sweep.
    TypeError
        If a case isn't a dict, or the job doesn't return a run.
    Exception
        What a run raised; the folder has the rows before it.
    """
    chosen, fixed = _cases(ranks, cases), {name: plain(value) for name, value in (fixed or {}).items()}
    repeats, seed = whole_number("repeats", repeats), None if seed is None else whole_number("seed", seed, least=None)
    for case in chosen:
        asked = fixed | case
        if "ranks" in asked:
            gang_size(client, asked["ranks"], asked.get("threads", 1), bool(asked.get("oversubscribe")))
    trials = _Kept(folder, chosen, fixed)
    dice = random.Random(seed)
    done = len(trials.of(repeats))
    total, title = repeats * len(chosen), title or _("sweep")
    with live.bar(total, title, _("run"), initial=done) if progress else nullcontext() as bar:
        for repeat in range(repeats):
            order = range(len(chosen)) if seed is None else dice.sample(range(len(chosen)), len(chosen))
            for place in order:
                if not trials.has(place, repeat):
                    run = _watched(job(client, **fixed | chosen[place]), _watcher(bar, watch))
                    trials.add(place, repeat, trial(run.rows))
                    if bar is not None:
                        bar.failures += sum(row["kind"] == "restart" for row in run.rows)
                        bar.set_postfix_str("")
                        bar.update()
    return trials.of(repeats)


def _watcher(bar: Any, watch: Watch) -> Watch:
    """What is called with a run's rows: `watch`, and a bar that says how far the run is."""

    def look(name: str, rows: list[dict]) -> None:
        if bar is not None:
            steps = [row["step"] for row in rows if row["kind"] == "step" and row.get("step") is not None]
            bar.set_postfix_str(_("{label}, step {step}", label=name, step=max(steps, default=-1) + 1))
        if watch is not None:
            watch(name, rows)

    return look


def _cases(ranks: Iterable[int] | None, cases: Iterable[dict] | None) -> list[dict]:
    if (ranks is None) == (cases is None):
        raise ValueError(f"give either ranks (={ranks!r}) or cases (={cases!r}).")
    for name, value in (("ranks", ranks), ("cases", cases)):
        if value is not None and (isinstance(value, str | dict) or not isinstance(value, Iterable)):
            raise TypeError(f"{name} (={value!r}) must be a list, such as ranks=[1, 2] or cases=[{{'ranks': 2}}].")
    chosen = [{"ranks": n} for n in ranks] if ranks is not None else list(cases or ())
    if not chosen:
        raise ValueError("ranks or cases is empty; give at least one, such as ranks=[1, 2].")
    if odd := [case for case in chosen if not isinstance(case, dict)]:
        raise TypeError(f"cases (={odd[0]!r}) must be dicts of the job's arguments, such as {{'ranks': 2}}.")
    return [{name: plain(value) for name, value in case.items()} for case in chosen]


class _Kept:
    """The trials of a sweep so far, also on disk if there is a folder."""

    def __init__(self, folder: str | os.PathLike | None, cases: list[dict], fixed: dict):
        self.cases = [_asked(fixed | case) for case in cases]
        self.settings = [_setting(case) for case in cases]
        _refuse_namesakes(cases)
        self.file = None if folder is None else Path(folder, "trials.jsonl").expanduser()
        self.rows = []
        if self.file is not None and self.file.exists():
            self.rows = read(self.file)
        for row in self.rows:
            case, asked = row.get("case"), row.get("asked")
            if not isinstance(case, int) or self.cases[case : case + 1] != [asked]:
                raise ValueError(f"folder (={str(folder)!r}) holds another sweep, of {asked}; name a new one.")
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)

    def has(self, case: int, repeat: int) -> bool:
        return any((row["case"], row["repeat"]) == (case, repeat) for row in self.rows)

    def of(self, repeats: int) -> list[dict]:
        """Rows of the first `repeats` rounds; there may be more on disk."""
        return [row for row in self.rows if row["repeat"] < repeats]

    def add(self, case: int, repeat: int, summed: dict) -> None:
        place = {"case": case, "asked": self.cases[case], "repeat": repeat, "order": len(self.rows)}
        setting = self.settings[case]
        row = place | summed | {"label": ", ".join(filter(None, (summed["label"], setting))), "setting": setting}
        self.rows.append(row)
        if self.file is not None:
            append(self.file, row)


def _asked(case: dict) -> dict[str, str]:
    """What a case asks for, in words that another session finds again."""
    return {name: _name(value) for name, value in sorted(case.items())}


def _name(value: Any) -> str:
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _refuse_namesakes(cases: list[dict]) -> None:
    """Raise if two functions or classes, such as lambdas, have one name: their rows would be taken for each other's."""
    known: dict[str, Any] = {}
    for value in (value for case in cases for value in case.values() if hasattr(value, "__qualname__")):
        if known.setdefault(_name(value), value) is not value:
            raise ValueError(f"cases hold two functions called {_name(value)}; define each once, under its own name.")


def _setting(case: dict) -> str:
    """What a case asks for besides its ranks, to show."""
    asked = {name: getattr(value, "__name__", value) for name, value in case.items()}
    return ", ".join(f"{name} {value}" for name, value in asked.items() if name not in COUNTS)


def _watched(run: Run, watch: Watch) -> Run:
    """Wait for a run while it is watched, and raise what it raised."""
    if not isinstance(run, Run):
        raise TypeError(f"job returned {run!r}; it must return its run, such as hpclab.train(...), without .result().")
    try:
        while not run.wait(1.0):
            _look(run, watch)
        run.result()
        _look(run, watch)
    except BaseException:
        run.stop()
        raise
    return run


def _look(run: Run, watch: Watch) -> None:
    if watch is not None and len(rows := run.rows.copy()) > 1:
        watch(label(rows[0]["ranks"], rows[0]["threads"]), rows)
