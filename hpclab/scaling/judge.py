"""What the trials of a sweep show: cases against their baseline, a law, and what a reader must know."""

import dataclasses
import statistics

from hpclab import laws, ratios
from hpclab.rows import MACHINE, grouped, some, source

COUNTS = ("ranks", "threads", "oversubscribe")
"""What a case may differ in without being of another setting."""
IDEAL = 1.05
"""Efficiency beyond which a case is said to gain more than its CPUs give."""
NOISY = 0.1
"""Relative spread (standard deviation) of a case's repeats beyond which a machine is called noisy."""


def fit(rows: list[dict], law: str = "usl", noise: str = "relative", level: float = laws.LEVEL) -> laws.LawFit:
    """Fit a scaling law to the throughput of a sweep over ranks; see `laws.fit`.

    Timings scatter in proportion to themselves, so the noise is taken as relative by default.

    Raises
    ------
    ValueError
        If the law is for another kind of scaling (Gustafson's is for weak, Amdahl's for strong), if the cases differ in
        more than their ranks, or if there are too few.
    """
    kind = regime(rows)
    if {"gustafson": "strong", "amdahl": "weak"}.get(law) == kind:
        other = {"strong": "amdahl", "weak": "gustafson"}[kind]
        raise ValueError(f"law (={law!r}) is not for {kind} scaling, which these rows are; use {other!r} or 'usl'.")
    return laws.fit(law, *_points(rows), noise, level)


def verdict(rows: list[dict], level: float = laws.LEVEL) -> laws.LawVerdict:
    """Say which law a sweep over ranks identifies, or what to measure next; see `laws.choose`.

    Raises
    ------
    ValueError
        If the rows are of weak scaling, or the cases differ in more than their ranks.
    """
    n, x = _points(rows)
    if regime(rows) == "weak":
        raise ValueError("rows are of weak scaling, which these laws aren't for; use scaling.fit(rows, 'gustafson').")
    choice = laws.choose(n, x, level=level)
    if any(row["source"] == "emulated" for row in some(rows, "trial")):
        turns = (
            "Rows are emulated: they come from ranks that take turns, or from a dialled network, so this isn't a"
            " machine's law."
        )
        return dataclasses.replace(choice, why=f"{choice.why} {turns}")
    return choice


def summary(rows: list[dict]) -> list[dict]:
    """Compare the cases of a sweep with its first case.

    Parameters
    ----------
    rows : list of dict
        As from `sweep`.

    Returns
    -------
    list of dict
        One row of kind "summary" per case: ``case`` (0 is the first), ``label``, ``ranks``, ``threads``, ``repeats``;
        ``samples_per_s``, ``speedup`` and ``efficiency``, each the median, with ``..._low`` and ``..._high``, the
        smallest and the largest. A speed-up divides two throughputs of the same round, so that whatever slowed both
        cancels out; rounds without both are left out. The efficiency divides the speed-up by the number of CPUs that
        the case uses (ranks times threads) over the baseline's.

    Raises
    ------
    ValueError
        If there are no rows, or a case shares no round with the first.
    """
    cases = _cases(rows)
    return [_summary(trials, cases[min(cases)]) | {"case": case} for case, trials in cases.items()]


def paired(rows: list[dict], level: float = laws.LEVEL) -> list[dict]:
    """How many times as fast as a sweep's first case each other one is, with an interval; drawn by `plots.ratios`.

    Parameters
    ----------
    rows : list of dict
        As from `sweep`, with at least two rounds.
    level : float, default laws.LEVEL
        Level of the interval, by Student's t on the logarithms of the rounds' ratios.

    Returns
    -------
    list of dict
        One row per case but the first: ``measure`` (its label), ``ratio`` (the geometric mean of the rounds' ratios),
        ``low``, ``high``, ``rounds``, ``source``, and the machine.

    Raises
    ------
    ValueError
        If a case shares fewer than two rounds with the first: one ratio has no interval.
    """
    cases = _cases(rows)
    baseline = cases.pop(min(cases))
    compared = []
    for case in cases.values():
        speedups, label = _speedups(case, baseline), case[0]["label"]
        if len(speedups) < 2:
            raise ValueError(
                f"rows hold {len(speedups)} rounds of {label} with the baseline; measure at least 2 in turn."
            )
        known = {name: case[0][name] for name in MACHINE if name in case[0]}
        ends = ratios.interval(speedups, level)
        compared.append({"measure": label, **ends, "rounds": len(speedups), "source": source(case + baseline), **known})
    return compared


def remarks(rows: list[dict]) -> list[str]:
    """Sentences that a reader of these trials must know; none if all is well."""
    sentences = []
    cases = _cases(rows)
    for case in cases.values():
        name, speed = case[0]["label"], [row["samples_per_s"] for row in case]
        if len(speed) > 1 and (spread := statistics.stdev(speed) / statistics.fmean(speed)) > NOISY:
            sentences.append(
                f"{name}: its repeats differ by {spread:.0%} (standard deviation); the machine was too noisy to show"
                " differences below that."
            )
        if source(case) == "emulated":
            sentences.append(f"{name}: emulated; not a speed-up of this machine.")
        elif (gain := _gain(case, cases[min(cases)])) > IDEAL:
            sentences.append(
                f"{name}: {gain:.2f} times as fast as its CPUs explain. Caches can do that; a function that reports the"
                " samples of all ranks on each of them looks the same."
            )
    if min(map(len, cases.values())) == 1:
        sentences.append("Each case was measured once: nothing is known about the noise.")
    return sentences


def regime(rows: list[dict]) -> str:
    """What trials over ranks keep the same: "strong" the batch of all ranks together, "weak" that of each rank.

    Raises
    ------
    ValueError
        If they keep neither the same.
    """
    rows = sorted(some(rows, "trial"), key=lambda row: row["ranks"])
    if len({row["batch"] for row in rows}) == 1:
        return "strong"
    if len({row["batch"] / row["ranks"] for row in rows}) == 1:
        return "weak"
    batches = ", ".join(dict.fromkeys(f"{row['ranks']} ranks: {row['batch']}" for row in rows))
    raise ValueError(
        f"rows keep neither the total batch nor that of each rank constant ({batches}); sweep one thing at a time."
    )


def _points(rows: list[dict]) -> tuple[list[int], list[float]]:
    rows = some(rows, "trial")
    if len(threads := {row["threads"] for row in rows}) > 1:
        raise ValueError(f"rows also differ in threads (={sorted(threads)}); keep those of one thread count.")
    settings: dict[tuple, str] = {}
    for row in rows:
        asked = tuple(item for item in row.get("asked", {}).items() if item[0] not in COUNTS)
        settings[asked] = row.get("setting", "")
    if len(settings) > 1:
        several = "; ".join(sorted(settings.values()))
        raise ValueError(f"rows differ in more than ranks ({several}); keep those of one setting.")
    return [row["ranks"] for row in rows], [row["samples_per_s"] for row in rows]


def _cases(rows: list[dict]) -> dict[int, list[dict]]:
    """Trials of each case, by rounds."""
    return grouped(sorted(some(rows, "trial"), key=lambda row: row["repeat"]), "case")


def _speedups(case: list[dict], baseline: list[dict]) -> list[float]:
    """How many times as fast as the baseline a case was, in each round that both took part in."""
    base = {row["repeat"]: row["samples_per_s"] for row in baseline}
    return [row["samples_per_s"] / base[row["repeat"]] for row in case if row["repeat"] in base]


def _cpus(case: list[dict], baseline: list[dict]) -> float:
    """How many times the baseline's CPUs a case uses."""
    return case[0]["ranks"] * case[0]["threads"] / (baseline[0]["ranks"] * baseline[0]["threads"])


def _gain(case: list[dict], baseline: list[dict]) -> float:
    """The least efficiency of a case, in any round, if it is the baseline with more ranks; else 0."""
    same = all(case[0].get(name) == baseline[0].get(name) for name in ("setting", "threads", "source"))
    if not same or case[0]["ranks"] <= baseline[0]["ranks"]:
        return 0.0
    return min(_speedups(case, baseline), default=0.0) / _cpus(case, baseline)


def _summary(case: list[dict], baseline: list[dict]) -> dict:
    first = case[0]
    rounds = {row["repeat"] for row in baseline}
    if not (case := [row for row in case if row["repeat"] in rounds]):
        raise ValueError(f"rows hold no round with both {first['label']} and the baseline; measure them in turn.")
    speedup, cpus = _speedups(case, baseline), _cpus(case, baseline)
    measures = {
        "samples_per_s": [row["samples_per_s"] for row in case],
        "speedup": speedup,
        "efficiency": [ratio / cpus for ratio in speedup],
    }
    row = {"kind": "summary"} | {name: first[name] for name in ("label", "ranks", "threads", *MACHINE) if name in first}
    for name, values in measures.items():
        row |= {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
    return row | {"repeats": len(case), "source": source(case)}
