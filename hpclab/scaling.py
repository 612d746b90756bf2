"""Measure how a job scales: interleaved repeats in, rows out."""

import random
import statistics
from collections.abc import Callable, Iterable

from distributed import Client
from tqdm.auto import tqdm

from hpclab.launcher import gang_size, whole_number
from hpclab.rows import label, source, span
from hpclab.runs import Run

WARM_UP = 5
"""First steps of each rank that no throughput counts: they allocate memory and build the buckets of DDP."""


def sweep(
    client: Client,
    job: Callable[..., Run],
    *,
    ranks: Iterable[int] | None = None,
    cases: Iterable[dict] | None = None,
    repeats: int = 3,
    seed: int | None = 0,
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
        ``lambda client, ranks: hpclab.train(client, hpclab.models.CNN, "fashion_mnist", ranks=ranks, steps=50)``.
    ranks : iterable of int, optional
        Short for the cases ``{"ranks": n}``.
    cases : iterable of dict, optional
        Arguments of the job, a dict a case. The first case is the baseline of speed-ups. Where one says ``ranks``, the
        cluster must have room for them, unless it also says ``oversubscribe=True``.
    repeats : int, default 3
        Rounds; in each, every case runs once, in an order shuffled anew.
    seed : int or None, default 0
        Of the order; None keeps the given one in every round.
    progress : bool, default True
        Show a progress bar.
    watch : callable, optional
        ``watch(label, rows)`` is called about once a second, and at the end, with the case and all rows of the run in
        hand.

    Returns
    -------
    list of dict
        Rows of kind "trial", see `trial`, in the order in which they were measured.

    Raises
    ------
    ValueError
        If neither or both of `ranks` and `cases` are given, or none is in them, or a case has more ranks than fit.
    Exception
        What a run raised; runs before it are lost, as a sweep with a failed case shows nothing.
    """
    if (ranks is None) == (cases is None):
        raise ValueError(f"give either ranks (={ranks!r}) or cases (={cases!r}).")
    chosen = [{"ranks": n} for n in ranks] if ranks is not None else list(cases or ())
    if not chosen:
        raise ValueError("ranks or cases is empty; give at least one, such as ranks=[1, 2].")
    whole_number("repeats", repeats)
    for case in chosen:
        if "ranks" in case:
            gang_size(client, case["ranks"], case.get("threads", 1), bool(case.get("oversubscribe")))
    dice = random.Random(seed)
    rows: list[dict] = []
    with tqdm(total=repeats * len(chosen), desc="sweep", unit="run", disable=not progress) as bar:
        for repeat in range(repeats):
            order = range(len(chosen)) if seed is None else dice.sample(range(len(chosen)), len(chosen))
            for place in order:
                run = _watched(job(client, **chosen[place]), watch)
                rows.append({"case": place, "repeat": repeat, "order": len(rows)} | trial(run.rows))
                bar.update()
    return rows


def trial(rows: list[dict]) -> dict:
    """Sum up the rows of one training run.

    Parameters
    ----------
    rows : list of dict
        As from ``Run.rows`` of `train`.

    Returns
    -------
    dict
        ``kind`` "trial", ``run``, ``label``, ``ranks``, ``threads``, ``samples_per_s`` (see `throughput`), ``step_s``
        (mean), ``data_share`` (of the step's time), ``start_s`` (launch to first step), ``train_s`` (first step to
        last), ``loss`` (mean of the last five steps), ``accuracy`` (None if untested), ``source``, and the machine.
    """
    about = next(row for row in rows if row["kind"] == "run")
    steps = _warm(rows)
    start_s, end_s = span(rows)
    last = max(row["step"] for row in steps)
    tests = [row["test_accuracy"] for row in rows if row["kind"] == "epoch"]
    return {
        "kind": "trial",
        "run": about["run"],
        "label": label(about["ranks"], about["threads"]),
        "ranks": about["ranks"],
        "threads": about["threads"],
        "samples_per_s": throughput(rows),
        "step_s": statistics.fmean(row["step_s"] for row in steps),
        "data_share": sum(row["data_s"] for row in steps) / sum(row["step_s"] for row in steps),
        "start_s": start_s,
        "train_s": end_s - start_s,
        "loss": statistics.fmean(row["loss"] for row in steps if row["step"] > last - 5),
        "accuracy": tests[-1] if tests else None,
        "source": source(rows),
    } | {name: about[name] for name in ("started", "host", "cpu", "cpus", "torch")}


def throughput(rows: list[dict]) -> float:
    """Samples a second that a training run took in, over all ranks, tests and the first `WARM_UP` steps left out."""
    spent: dict[int, float] = {}
    for row in (steps := _warm(rows)):
        spent[row["rank"]] = spent.get(row["rank"], 0.0) + row["step_s"]
    return sum(row["samples"] for row in steps) / max(spent.values())


def summary(rows: list[dict]) -> list[dict]:
    """Compare the cases of a sweep with its first case.

    Parameters
    ----------
    rows : list of dict
        As from `sweep`.

    Returns
    -------
    list of dict
        One row of kind "summary" a case: ``label``, ``ranks``, ``threads``, ``repeats``; ``samples_per_s``, ``speedup``
        and ``efficiency``, each the median, with ``..._low`` and ``..._high``, the smallest and the largest. A speed-up
        divides two throughputs of the same round, so that what slowed both falls out; the efficiency divides it by the
        number of CPUs that the case uses (ranks times threads) over the baseline's.
    """
    trials: dict[int, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["repeat"]):
        trials.setdefault(row["case"], []).append(row)
    baseline = trials[min(trials)]
    return [_summary(trials[case], baseline) for case in sorted(trials)]


def _summary(trials: list[dict], baseline: list[dict]) -> dict:
    speed = [row["samples_per_s"] for row in trials]
    speedup = [row["samples_per_s"] / base["samples_per_s"] for row, base in zip(trials, baseline, strict=True)]
    first = trials[0]
    cpus = first["ranks"] * first["threads"] / (baseline[0]["ranks"] * baseline[0]["threads"])
    measures = {"samples_per_s": speed, "speedup": speedup, "efficiency": [ratio / cpus for ratio in speedup]}
    row = {"kind": "summary"} | {
        name: first[name] for name in ("label", "ranks", "threads", "started", "cpu", "cpus", "torch")
    }
    for name, values in measures.items():
        row |= {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
    return row | {"repeats": len(trials), "source": source(trials)}


def _warm(rows: list[dict]) -> list[dict]:
    steps = [row for row in rows if row["kind"] == "step" and row["step"] >= WARM_UP]
    if not steps:
        raise ValueError(f"rows hold no step after the first {WARM_UP}, which are left out as warm-up; train longer.")
    return steps


def _watched(run: Run, watch: Callable[[str, list[dict]], None] | None) -> Run:
    """Wait for a run while it is watched, and raise what it raised."""
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
