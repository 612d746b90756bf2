"""Measure how a job scales: interleaved repeats in, rows out; and say what they show."""

import dataclasses
import math
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distributed import Client
from tqdm.auto import tqdm

from hpclab import laws
from hpclab._arguments import plain
from hpclab.gangs.launch import gang_size, launch, whole_number
from hpclab.gangs.rank import report
from hpclab.gangs.run import Run
from hpclab.network import Network
from hpclab.rows import MACHINE, append, kept, label, machine, read, some, source, span

LEAST_STEPS = 6
"""Steps that a throughput needs, so that there are some after the warm-up."""
STEADY, SLOWER = 3, 1.25
"""How many steps in a row end the warm-up, and how much slower than later ones they may be."""
WARM_ROUNDS = 3
"""Rounds of all-reduces that aren't counted."""
_COUNTS = ("ranks", "threads", "oversubscribe")
"""What a case may differ in without being of another setting."""
IDEAL = 1.05
"""Efficiency beyond which a case is said to gain more than its CPUs give."""
NOISY = 0.1
"""Relative spread (standard deviation) of a case's repeats beyond which a machine is called noisy."""


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
    watch: Callable[[str, list[dict]], None] | None = None,
) -> list[dict]:
    """Run a job in several cases, again and again in turn, so that a drift of the machine meets all cases alike.

    Parameters
    ----------
    client : distributed.Client
        From `connect`.
    job : callable
        ``job(client, **case)`` starts one run and returns it, for instance
        ``lambda client, ranks: hpclab.train(client, hpclab.models.CNN, "fashion_mnist", ranks=ranks, steps=50)``; or a
        `launch` of your own function, in which every rank calls ``hpclab.report(step=..., samples=...)`` each step,
        with the samples that it worked on itself; those of all ranks are added up.
    ranks : iterable of int, optional
        Short for the cases ``{"ranks": n}``.
    cases : iterable of dict, optional
        Arguments of the job, a dict a case, such as ``[{"ranks": 2, "network": link} for link in links]``. The first
        case is the baseline of speed-ups. Where one says ``ranks``, the cluster must have room for them, unless it also
        says ``oversubscribe=True``. Functions among them go by their names.
    fixed : dict, optional
        Arguments that the job gets in all cases.
    repeats : int, default 3
        Rounds; in each, every case runs once, in an order shuffled anew.
    seed : int or None, default 0
        Of the order; None keeps the given one in every round.
    folder : path, optional
        Keeps the rows in ``trials.jsonl`` as they come. A sweep that was interrupted and is called again, with the same
        folder, cases, fixed arguments and seed, measures only what is missing. Default: the rows are returned alone.
    progress : bool, default True
        Show a progress bar, with the time that is left.
    watch : callable, optional
        ``watch(label, rows)`` is called about once a second, and at the end, with the case and all rows of the run in
        hand.

    Returns
    -------
    list of dict
        Rows of kind "trial", see `trial`, in the order in which they were measured; ``setting`` says what else than
        its ranks and threads was asked of the case, and so does the ``label``.

    Raises
    ------
    ValueError
        If neither or both of `ranks` and `cases` are given, or none is in them, or a case has more ranks than fit, or
        the folder holds rows of another sweep.
    TypeError
        If a case is no dict, or the job returns no run.
    Exception
        What a run raised; the rows before it are in the folder.
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
    with tqdm(total=repeats * len(chosen), initial=done, desc="sweep", unit="run", disable=not progress) as bar:
        for repeat in range(repeats):
            order = range(len(chosen)) if seed is None else dice.sample(range(len(chosen)), len(chosen))
            for place in order:
                if not trials.has(place, repeat):
                    run = _watched(job(client, **fixed | chosen[place]), watch)
                    trials.add(place, repeat, trial(run.rows))
                    bar.update()
    return trials.of(repeats)


def _cases(ranks: Iterable[int] | None, cases: Iterable[dict] | None) -> list[dict]:
    if (ranks is None) == (cases is None):
        raise ValueError(f"give either ranks (={ranks!r}) or cases (={cases!r}).")
    for name, given in (("ranks", ranks), ("cases", cases)):
        if given is not None and (isinstance(given, str | dict) or not isinstance(given, Iterable)):
            raise TypeError(f"{name} (={given!r}) must be a list, such as ranks=[1, 2] or cases=[{{'ranks': 2}}].")
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
        """Rows of the first so many rounds; there may be more on disk."""
        return [row for row in self.rows if row["repeat"] < repeats]

    def add(self, case: int, repeat: int, found: dict) -> None:
        about = {"case": case, "asked": self.cases[case], "repeat": repeat, "order": len(self.rows)}
        setting = self.settings[case]
        label = ", ".join(filter(None, (found["label"], setting)))
        row = about | found | {"label": label, "setting": setting}
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
            raise ValueError(f"cases hold two functions called {_name(value)}; define each once, by a name of its own.")


def _setting(case: dict) -> str:
    """What a case asks for besides its ranks, to show."""
    asked = {name: getattr(value, "__name__", value) for name, value in case.items()}
    return ", ".join(f"{name} {value}" for name, value in asked.items() if name not in _COUNTS)


def trial(rows: list[dict]) -> dict:
    """Sum up the rows of one training run.

    Parameters
    ----------
    rows : list of dict
        As from ``Run.rows`` of `train`.

    Returns
    -------
    dict
        ``kind`` "trial", ``run``, ``label``, ``ranks``, ``threads``, ``batch`` (samples a step, of all ranks),
        ``samples_per_s`` (see `throughput`), ``warm_up`` (steps that aren't counted), ``step_s`` and its `split`
        (means), ``jitter_s`` (standard deviation of a rank's computing), ``data_share`` (of the step's time),
        ``start_s`` (launch to first step), ``train_s`` (first step to last), ``loss`` (mean of the last five steps;
        None if none is told), ``accuracy`` (None if untested), ``source``, and the machine. What the rows of a function
        of one's own don't tell is None.

    Raises
    ------
    ValueError
        If there are too few steps, some don't tell their ``samples``, or a rank tells of none.
    """
    about = some(rows, "run")[0]
    steps = _warm(rows)
    starts = [row for row in rows if row["kind"] in ("run", "restart")]
    ranks = max(starts, key=lambda row: row.get("attempt", 0) if row["kind"] == "restart" else -1)["ranks"]
    if silent := sorted({*range(ranks)} - {row["rank"] for row in steps}):
        raise ValueError(
            f"rows hold no steps of rank {silent[0]} of {ranks} after the warm-up; every rank must report each of its"
            " steps, with the samples that it worked on itself."
        )
    means = _means(split(rows))
    start_s, end_s = span(rows)
    last = max(row["step"] for row in steps)
    losses = [row["loss"] for row in steps if row["step"] > last - 5 and row.get("loss") is not None]
    tests = [row for row in rows if row["kind"] == "epoch"]
    newest: dict = max(tests, key=lambda row: (row.get("attempt", 0), row.get("epoch") or 0), default={})
    return (
        {
            "kind": "trial",
            "run": about["run"],
            "label": label(about["ranks"], about["threads"]),
            "ranks": about["ranks"],
            "threads": about["threads"],
            "batch": sum(row["samples"] for row in steps if row["step"] == last),
            "samples_per_s": throughput(rows),
            "warm_up": min(row["step"] for row in steps),
            "jitter_s": _jitter(steps),
            "data_share": None if means["data_s"] is None else means["data_s"] / means["step_s"],
            "start_s": start_s,
            "train_s": end_s - start_s,
            "loss": statistics.fmean(losses) if losses else None,
            "accuracy": newest.get("test_accuracy"),
            "source": source(rows),
        }
        | means
        | machine(rows)
    )


def throughput(rows: list[dict]) -> float:
    """Samples a second that a training run took in, over all ranks, tests and the warm-up left out."""
    spent: dict[int, float] = {}
    for row in (steps := _warm(rows)):
        spent[row["rank"]] = spent.get(row["rank"], 0.0) + row["step_s"]
    return sum(row["samples"] for row in steps) / max(spent.values())


def warm_up(seconds: list[float]) -> int:
    """How many first steps of a run are slower than its later ones: they allocate memory, and build DDP's buckets.

    Parameters
    ----------
    seconds : list of float
        Of each step.

    Returns
    -------
    int
        The first step from which `STEADY` in a row take at most `SLOWER` times the median of the second half; at most
        half of the steps.

    Examples
    --------
    >>> warm_up([2.0, 0.5, 0.1, 0.11, 0.1, 0.1, 0.11, 0.1, 0.1, 0.11])
    2
    """
    half = len(seconds) // 2
    usual = statistics.median(seconds[half:]) if seconds else 0.0
    for place in range(half):
        if all(value <= SLOWER * usual for value in seconds[place : place + STEADY]):
            return place
    return half


def split(rows: list[dict]) -> list[dict]:
    """Where the time of a run's steps went, by rank, after the warm-up.

    Parameters
    ----------
    rows : list of dict
        As from ``Run.rows`` of `train`.

    Returns
    -------
    list of dict
        One row of kind "split" a rank: ``rank``, and the means of a step: ``step_s``, and of it ``data_s``,
        ``compute_s``, ``comm_s`` and ``straggle_s``. The rank that comes last to an all-reduce waits for the network
        alone, so the shortest wait of a step is its exposed communication, and what others wait longer is for that
        rank. A rank by itself doesn't communicate: its wait, for a CPU, is ``straggle_s``. What the rows don't tell is
        None.
    """
    steps = _warm(rows)
    alone = len({row["rank"] for row in steps}) == 1
    told = all("wait_s" in row for row in steps)
    shortest: dict[int, float] = {}
    for row in steps:
        wait = row.get("wait_s", 0.0)
        shortest[row["step"]] = 0.0 if alone else min(wait, shortest.get(row["step"], math.inf))
    found = []
    for rank in sorted({row["rank"] for row in steps}):
        mine = [row for row in steps if row["rank"] == rank]
        means = {name: _mean([row.get(name) for row in mine]) for name in ("step_s", "data_s", "compute_s")}
        comm = statistics.fmean(shortest[row["step"]] for row in mine)
        straggle = statistics.fmean(row.get("wait_s", 0.0) for row in mine) - comm
        waits = {"comm_s": comm, "straggle_s": straggle} if told else {"comm_s": None, "straggle_s": None}
        found.append({"kind": "split", "rank": rank} | means | waits)
    return [row | {"source": source(rows)} for row in found]


def fit(rows: list[dict], law: str = "usl", noise: str = "relative", level: float = laws.LEVEL) -> laws.Fit:
    """Fit a scaling law to the throughput of a sweep over ranks; see `laws.fit`.

    Timings repeat to a share of themselves, so the noise is relative unless said otherwise.

    Raises
    ------
    ValueError
        If the law isn't one for this kind of scaling (Gustafson's is for weak, Amdahl's for strong), if the cases
        differ in more than their ranks, or if there are too few.
    """
    kind = regime(rows)
    if {"gustafson": "strong", "amdahl": "weak"}.get(law) == kind:
        other = {"strong": "amdahl", "weak": "gustafson"}[kind]
        raise ValueError(f"law (={law!r}) is not for {kind} scaling, which these rows are; use {other!r} or 'usl'.")
    return laws.fit(law, *_points(rows), noise, level)


def verdict(rows: list[dict], level: float = laws.LEVEL) -> laws.Verdict:
    """Say which law a sweep over ranks names, or what to measure next; see `laws.choose`.

    Raises
    ------
    ValueError
        If the rows are of weak scaling, or the cases differ in more than their ranks.
    """
    n, x = _points(rows)
    if regime(rows) == "weak":
        raise ValueError("rows are of weak scaling, which these laws aren't for; use scaling.fit(rows, 'gustafson').")
    told = laws.choose(n, x, level=level)
    if any(row["source"] == "emulated" for row in some(rows, "trial")):
        turns = "Rows are emulated: this is of ranks that take turns, or of a dialled network, and no law of a machine."
        return dataclasses.replace(told, why=f"{told.why} {turns}")
    return told


def allreduce(
    client: Client,
    ranks: int = 2,
    sizes: Iterable[int] = (1_000, 10_000, 100_000, 1_000_000, 4_000_000),
    repeats: int = 20,
    **settings: Any,
) -> list[dict]:
    """Measure the network between ranks: how long they take to sum arrays of several sizes.

    Parameters
    ----------
    client : distributed.Client
        From `connect`.
    ranks : int, default 2
    sizes : iterable of int
        Bytes, each a multiple of 4.
    repeats : int, default 20
        Of each size, in turn, after a few that don't count.
    **settings
        For `launch`, such as ``oversubscribe=True``.

    Returns
    -------
    list of dict
        Rows of kind "allreduce": ``ranks``, ``nbytes``, ``duration_s`` (of the slowest rank), ``source``, and the
        machine.
    """
    repeats = whole_number("repeats", repeats)
    sizes = tuple(whole_number("sizes", size, 4) for size in sizes)
    if not sizes:
        raise ValueError("sizes is empty; give some bytes, such as sizes=[1_000, 1_000_000].")
    if odd := [size for size in sizes if size % 4]:
        raise ValueError(f"sizes (={odd[0]}) must be a multiple of 4 bytes, which a number takes.")
    run = launch(client, _time_allreduce, sizes, repeats, ranks=ranks, name="allreduce", **settings)
    run.result()
    about = {"run": run.name} | machine(run.rows)
    found: dict[int, dict] = {}
    for row in run.rows:
        if row["kind"] == "allreduce":
            one = found.setdefault(row["step"], {name: row[name] for name in ("kind", "ranks", "nbytes", "source")})
            one["duration_s"] = max(row["duration_s"], one.get("duration_s", 0.0))
    return [row | about for row in found.values()]


def _time_allreduce(sizes: tuple[int, ...], repeats: int) -> None:
    """What each rank runs: reports its seconds of each all-reduce, once all are done."""
    import torch
    import torch.distributed as dist

    order = sizes * (repeats + WARM_ROUNDS)
    seconds = []
    for size in order:
        tensor = torch.zeros(size // 4)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - start)
    for step in range(len(sizes) * WARM_ROUNDS, len(order)):
        report(kind="allreduce", step=step, nbytes=order[step], duration_s=seconds[step])


def network(rows: list[dict]) -> Network:
    """Latency and bandwidth of a ring that takes as long as these all-reduces; by `laws.fit_alpha_beta`.

    Parameters
    ----------
    rows : list of dict
        As from `allreduce`, of one number of ranks.
    """
    rows = some(rows, "allreduce")
    if len(counts := {row["ranks"] for row in rows}) != 1 or min(counts) < 2:
        raise ValueError(f"rows are of {sorted(counts)} ranks; a network is fitted to those of one number, at least 2.")
    ranks = counts.pop()
    found = laws.fit_alpha_beta([row["nbytes"] for row in rows], [row["duration_s"] for row in rows]).values
    hops = 2 * (ranks - 1)
    bandwidth = 8 * hops / ranks / found["beta"] if found["beta"] else math.inf  # more bytes took no longer
    return Network(latency=found["alpha"] / hops, bandwidth=bandwidth)


def regime(rows: list[dict]) -> str:
    """What trials over ranks keep: "strong" the batch of all ranks together, "weak" that of each.

    Raises
    ------
    ValueError
        If they keep neither.
    """
    rows = sorted(some(rows, "trial"), key=lambda row: row["ranks"])
    if len({row["batch"] for row in rows}) == 1:
        return "strong"
    if len({row["batch"] / row["ranks"] for row in rows}) == 1:
        return "weak"
    told = ", ".join(dict.fromkeys(f"{row['ranks']} ranks: {row['batch']}" for row in rows))
    raise ValueError(f"rows keep neither the batch of all ranks nor that of each ({told}); sweep one thing at a time.")


def remarks(rows: list[dict]) -> list[str]:
    """What a reader of these trials must know: sentences; none if all is well."""
    told = []
    trials: dict[int, list[dict]] = {}
    for row in some(rows, "trial"):
        trials.setdefault(row["case"], []).append(row)
    baseline = trials[min(trials)]
    for _case, case in sorted(trials.items()):
        speed = [row["samples_per_s"] for row in case]
        if len(speed) > 1 and (spread := statistics.stdev(speed) / statistics.fmean(speed)) > NOISY:
            told.append(
                f"{case[0]['label']}: its repeats differ by {spread:.0%} (standard deviation); the machine was too"
                " noisy to show differences below that."
            )
        if source(case) == "emulated":
            told.append(f"{case[0]['label']}: emulated; no speed-up of this machine.")
        elif (gain := _gain(case, baseline)) > IDEAL:
            told.append(
                f"{case[0]['label']}: {gain:.2f} times as fast as its CPUs explain. Caches can do that; a function that"
                " reports the samples of all ranks on each of them looks the same."
            )
    if min(len(case) for case in trials.values()) == 1:
        told.append("Each case was measured once: nothing is known of the noise.")
    return told


def _gain(case: list[dict], baseline: list[dict]) -> float:
    """The least efficiency of a case, in any round, if it is the baseline with more ranks; else 0."""
    same = all(case[0].get(name) == baseline[0].get(name) for name in ("setting", "threads", "source"))
    if not same or case[0]["ranks"] <= baseline[0]["ranks"]:
        return 0.0
    base = {row["repeat"]: row["samples_per_s"] for row in baseline}
    ratios = [row["samples_per_s"] / base[row["repeat"]] for row in case if row["repeat"] in base]
    return min(ratios, default=0.0) / _cpus(case, baseline)


def _cpus(case: list[dict], baseline: list[dict]) -> float:
    """How many times the baseline's CPUs a case uses."""
    return case[0]["ranks"] * case[0]["threads"] / (baseline[0]["ranks"] * baseline[0]["threads"])


def _points(rows: list[dict]) -> tuple[list[int], list[float]]:
    rows = some(rows, "trial")
    if len(threads := {row["threads"] for row in rows}) > 1:
        raise ValueError(f"rows differ in threads (={sorted(threads)}) as well; keep those of one number.")
    settings: dict[tuple, str] = {}
    for row in rows:
        asked = tuple(item for item in row.get("asked", {}).items() if item[0] not in _COUNTS)
        settings[asked] = row.get("setting", "")
    if len(settings) > 1:
        told = "; ".join(sorted(settings.values()))
        raise ValueError(f"rows differ in more than ranks ({told}); keep those of one setting.")
    return [row["ranks"] for row in rows], [row["samples_per_s"] for row in rows]


def summary(rows: list[dict]) -> list[dict]:
    """Compare the cases of a sweep with its first case.

    Parameters
    ----------
    rows : list of dict
        As from `sweep`.

    Returns
    -------
    list of dict
        One row of kind "summary" a case: ``case`` (0 is the first), ``label``, ``ranks``, ``threads``, ``repeats``;
        ``samples_per_s``, ``speedup`` and ``efficiency``, each the median, with ``..._low`` and ``..._high``, the
        smallest and the largest. A speed-up divides two throughputs of the same round, so that what slowed both falls
        out, and rounds without both are left out; the efficiency divides it by the number of CPUs that the case uses
        (ranks times threads) over the baseline's.

    Raises
    ------
    ValueError
        If there are no rows, or a case shares no round with the first.
    """
    trials: dict[int, list[dict]] = {}
    for row in sorted(some(rows, "trial"), key=lambda row: row["repeat"]):
        trials.setdefault(row["case"], []).append(row)
    baseline = trials[min(trials)]
    return [_summary(trials[case], baseline) | {"case": case} for case in sorted(trials)]


def _summary(trials: list[dict], baseline: list[dict]) -> dict:
    base = {row["repeat"]: row["samples_per_s"] for row in baseline}
    first = trials[0]
    trials = [row for row in trials if row["repeat"] in base]
    if not trials:
        raise ValueError(f"rows hold no round with both {first['label']} and the baseline; measure them in turn.")
    speed = [row["samples_per_s"] for row in trials]
    speedup = [row["samples_per_s"] / base[row["repeat"]] for row in trials]
    cpus = _cpus(trials, baseline)
    measures = {"samples_per_s": speed, "speedup": speedup, "efficiency": [ratio / cpus for ratio in speedup]}
    row = {"kind": "summary"} | {name: first[name] for name in ("label", "ranks", "threads", *MACHINE) if name in first}
    for name, values in measures.items():
        row |= {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
    return row | {"repeats": len(trials), "source": source(trials)}


def _mean(values: list) -> float | None:
    """The mean; None if one isn't known."""
    return None if None in values else statistics.fmean(values)


def _means(splits: list[dict]) -> dict[str, Any]:
    return {name: _mean([row[name] for row in splits]) for name in splits[0] if name.endswith("_s")}


def _jitter(steps: list[dict]) -> float | None:
    """Standard deviation of the computing of a rank's step, the mean over the ranks; of a lone rank's whole step."""
    ranks: dict[int, list[float]] = {}
    for row in steps:
        ranks.setdefault(row["rank"], []).append(row["step_s"] - row.get("wait_s", 0.0))
    if len(ranks) == 1:
        return statistics.pstdev(row["step_s"] for row in steps)
    if not all("wait_s" in row for row in steps):
        return None
    return statistics.fmean(statistics.pstdev(values) for values in ranks.values())


def _warm(rows: list[dict]) -> list[dict]:
    """Rows of the steps after the warm-up."""
    steps = _timed([row for row in kept(rows) if row["kind"] == "step"])
    slowest: dict[int, float] = {}
    for row in steps:
        slowest[row["step"]] = max(row["step_s"], slowest.get(row["step"], 0.0))
    if len(slowest) < LEAST_STEPS:
        raise ValueError(f"rows hold {len(slowest)} steps; a throughput needs {LEAST_STEPS}: train longer.")
    order = sorted(slowest)
    first = order[warm_up([slowest[step] for step in order])]
    return [row for row in steps if row["step"] >= first]


def _timed(steps: list[dict]) -> list[dict]:
    """Steps with their seconds; where they don't tell them, since the same rank's step before, so without its first."""
    if lacks := [name for name in ("step", "samples") if any(row.get(name) is None for row in steps)]:
        raise ValueError(
            f"rows of steps lack {lacks[0]!r}; a sweep needs hpclab.report(step=..., samples=...) each step."
        )
    before: dict[int, float] = {}
    found = []
    for row in sorted(steps, key=lambda row: row["time_s"]):
        start = before.get(row["rank"])
        before[row["rank"]] = row["time_s"]
        if "step_s" in row:
            found.append(row)
        elif start is not None:
            found.append(row | {"step_s": row["time_s"] - start})
    return found


def _watched(run: Run, watch: Callable[[str, list[dict]], None] | None) -> Run:
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


def _look(run: Run, watch: Callable[[str, list[dict]], None] | None) -> None:
    if watch is not None and len(rows := run.rows.copy()) > 1:
        watch(label(rows[0]["ranks"], rows[0]["threads"]), rows)
