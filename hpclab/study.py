"""A scaling study as one page, made from its rows alone: machine, figures, laws, verdicts, and a forecast."""

import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from distributed import Client

from hpclab import forecast, laws, models, plots, scaling
from hpclab._arguments import whole_number
from hpclab.figures import Figure, source_word
from hpclab.gangs.record import occupy
from hpclab.gangs.run import Run
from hpclab.language import translate as _
from hpclab.pages import HEADING, html
from hpclab.pages import page as page
from hpclab.rows import some
from hpclab.tables import Table, markup
from hpclab.training.start import train

HORIZON = 1024
"""Ranks to forecast to."""
_SIZES = ("gradient_bytes", "bucket_bytes", "buckets")


def measure(
    client: Client,
    ranks: Iterable[int],
    folder: str | os.PathLike,
    *,
    batch_size: int = 192,
    steps: int = 20,
    repeats: int = 3,
    oversubscribe: bool = False,
) -> Path:
    """Measure strong and weak scaling of the course's CNN, and the network; write ``index.html`` and return its path.

    Parameters
    ----------
    client : distributed.Client
        From `connect`.
    ranks : iterable of int
        Numbers of ranks; 1 is the baseline, and added.
    folder : path
        Takes the rows as they come; the same call again goes on where an interrupted one stopped. One with another
        batch size or other steps is another study, and needs another folder.
    batch_size : int, default 192
        Samples a step: of all ranks together for strong scaling, of each for weak.
    steps, repeats : int, default 20 and 3
    oversubscribe : bool, default False
        Also run more ranks than CPUs, and say *emulated*.
    """
    place = Path(folder).expanduser().absolute()
    counts = sorted({1, *(whole_number("ranks", count) for count in ranks)})
    batch_size = whole_number("batch_size", batch_size)
    if odd := [count for count in counts if batch_size % count]:
        raise ValueError(f"ranks (={odd[0]}) must be at least 1, and divide batch_size (={batch_size}).")
    if not (place / "strong").exists():
        occupy(place)
    rows: list[dict] = []
    for regime in ("strong", "weak"):

        def job(client: Client, ranks: int, batch_size: int, regime: str = regime, **settings: Any) -> Run:
            batch = batch_size // ranks if regime == "strong" else batch_size
            folder = tempfile.mkdtemp(prefix="run-", dir=place / regime)
            settings |= {"ranks": ranks, "batch_size": batch, "folder": folder, "progress": False}
            return train(client, models.CNN, "fashion_mnist", **settings)

        fixed = {"batch_size": batch_size, "steps": steps, "oversubscribe": oversubscribe}
        trials = scaling.sweep(client, job, ranks=counts, fixed=fixed, repeats=repeats, folder=place / regime)
        rows += [row | {"regime": regime} for row in trials]
    if len(counts) > 1:
        folder = tempfile.mkdtemp(prefix="allreduce-", dir=place)
        rows += scaling.allreduce(client, counts[1], oversubscribe=oversubscribe, folder=folder)
    work = forecast.Workload.of(models.CNN(), 1.0, samples=batch_size)
    rows.append({"kind": "workload"} | {name: getattr(work, name) for name in _SIZES})
    return write(rows, place / "index.html")


def write(rows: list[dict], path: str | os.PathLike) -> Path:
    """Write the page of a study, in one file that needs no other.

    Parameters
    ----------
    rows : list of dict
        Of the kinds "trial", "allreduce" and "workload"; as from `read`, or `scaling.sweep` over ranks. Where trials
        don't say their ``regime``, their batches do.
    path : path
    """
    parts = sections(rows)
    parts.append(carried(rows))
    place = Path(path).expanduser()
    place.write_text(page(_("A scaling study"), parts), encoding="utf-8")
    return place


def sections(rows: list[dict]) -> list[str]:
    """What the rows of a study show, as HTML: the verdict, the machine, figures, laws and a forecast; see `write`."""
    trials = sorted(some(rows, "trial"), key=lambda row: row["started"])
    plain = [row for row in trials if "regime" not in row]
    trials = [row | {"regime": row.get("regime") or scaling.regime(plain)} for row in trials]
    names = ("host", "hosts", "cpu", "cpus", "torch")
    machines: dict[tuple, dict] = {}
    for row in trials:  # those of a study that went on elsewhere have others
        machine = {"hosts": 1} | {name: row[name] for name in names if name in row}
        machines.setdefault(tuple(machine.values()), machine | {"started": row["started"]})
    regimes = {name: [row for row in trials if row["regime"] == name] for name in ("strong", "weak")}
    regimes = {name: of_regime for name, of_regime in regimes.items() if of_regime}
    parts = _section(_("In short"), *(_headline(name, of_regime) for name, of_regime in regimes.items()))
    parts += _section(_("This machine"), markup(Table(machines.values())))
    titles = {
        "strong": _("Strong scaling: the total batch stays the same"),
        "weak": _("Weak scaling: each rank's batch stays the same"),
    }
    for regime, of_regime in regimes.items():
        parts += _section(titles[regime], *_regime(of_regime))
    if messages := [row for row in rows if row["kind"] == "allreduce"]:
        parts += _section(_("The network"), *_network(messages))
        parts += _forecast(rows, trials, messages)
    return parts


def carried(rows: list[dict]) -> str:
    """Rows as the part of a page from which `read` gets them back."""
    text = json.dumps(rows).replace("<", "\\u003c")
    return f'<script type="application/json" id="rows">{text}</script>'


def read(path: str | os.PathLike) -> list[dict]:
    """Rows that a page carries: what `write` makes it from.

    Raises
    ------
    ValueError
        If it carries none.
    """
    text = Path(path).expanduser().read_text("utf-8")
    if match := re.search(r'<script type="application/json" id="rows">(.*?)</script>', text, re.S):
        return json.loads(match[1])
    raise ValueError(f"path (={str(path)!r}) isn't a study's page: it has no rows.")


def _section(title: str, *parts: str) -> list[str]:
    return [html(HEADING, text=title), *parts]


def _headline(regime: str, trials: list[dict]) -> str:
    """How much the most ranks gain; and of strong scaling, which law that shows."""
    *_others, most = scaling.summary(trials)
    values = {name: most[name] for name in ("label", "repeats", "speedup", "speedup_low", "speedup_high")}
    messages = {
        "strong": _(
            "With {label} training is {speedup:.2f} times as fast ({speedup_low:.2f} to {speedup_high:.2f} in {repeats}"
            " rounds; {source}).",
            source=source_word(most["source"]),
            **values,
        ),
        "weak": _(
            "With {label}, each with its own batch, {speedup:.2f} times as many samples are processed in a second"
            " ({speedup_low:.2f} to {speedup_high:.2f} in {repeats} rounds; {source}).",
            source=source_word(most["source"]),
            **values,
        ),
    }
    law = scaling.verdict(trials) if regime == "strong" else ""
    return html("<p><strong>{{ headline }}</strong> {{ law }}</p>", headline=messages[regime], law=law)


def _regime(trials: list[dict]) -> list[str]:
    verdict = scaling.verdict(trials) if trials[0]["regime"] == "strong" else None
    fits = _gustafson(trials) if verdict is None else verdict.fits
    if any(row["source"] == "emulated" for row in trials):  # no law of this machine
        fits = []
    drawn = [fit for fit in fits if verdict is None or fit.law == verdict.law]
    summary = scaling.summary(trials)
    table = Table(
        {
            _("ranks"): row["ranks"],
            _("samples a second"): f"{row['samples_per_s']:,.0f}",
            _("speed-up"): f"{row['speedup']:.2f} ({row['speedup_low']:.2f}-{row['speedup_high']:.2f})",
            _("efficiency"): f"{row['efficiency']:.2f}",
            _("source"): source_word(row["source"]),
        }
        for row in summary
    )
    shown = Figure(figsize=(7, 4), layout="constrained")
    if drawn:
        plots.law(trials, drawn[0], ax=shown.subplots())
    else:
        plots.throughput(summary, shown.subplots())
    lines = [*fits, *([] if verdict is None else [verdict]), *scaling.remarks(trials)]
    return [shown.picture(), markup(table), *(html("<p>{{ line }}</p>", line=line) for line in lines)]


def _gustafson(trials: list[dict]) -> list[laws.LawFit]:
    """The fit, if there are enough points for one."""
    counts = {row["ranks"] for row in trials}
    return [scaling.fit(trials, "gustafson")] if len(counts) > 1 and len(trials) > 2 else []


def _network(messages: list[dict]) -> list[str]:
    line = laws.fit_alpha_beta([row["nbytes"] for row in messages], [row["duration_s"] for row in messages])
    shown = Figure(figsize=(7, 4), layout="constrained")
    plots.allreduce(messages, line, shown.subplots())
    return [shown.picture(), html("<p>{{ line }}</p>", line=line)]


def _forecast(rows: list[dict], trials: list[dict], messages: list[dict]) -> list[str]:
    """From weak trials on several ranks, where the CPUs are as busy as they will be."""
    known = [row for row in trials if row["regime"] == "weak" and row["ranks"] > 1 and row["source"] == "measured"]
    known.sort(key=lambda row: (row["ranks"], row["step_s"]))  # the same to the last bit, whatever the rows' order
    workload = next((row for row in rows if row["kind"] == "workload"), None)
    if len(known) < 2 or workload is None:
        return []
    jitter = fmean(row["jitter_s"] for row in known)
    samples = known[0]["batch"] // known[0]["ranks"]
    sizes = {name: workload[name] for name in _SIZES if name in workload}
    work = forecast.Workload(known[0]["step_s"], samples=samples, jitter_s=jitter, **sizes)
    counts, seconds = [row["ranks"] for row in known], [row["step_s"] for row in known]
    ahead = forecast.calibrate(work, scaling.network(messages), counts, seconds, ["compute_s"])
    powers = [2**power for power in range(HORIZON.bit_length())]
    shown = Figure(figsize=(7, 4), layout="constrained")
    plots.forecasts({_("forecast"): ahead.columns(powers)}, ax=shown.subplots())
    table = Table(
        {
            _("ranks"): row["ranks"],
            _("step (ms)"): f"{1e3 * row['step_s']:.1f} ({1e3 * row['step_low_s']:.1f}-{1e3 * row['step_high_s']:.1f})",
            _("samples a second"): f"{row['samples_per_s']:,.0f}",
            _("efficiency"): f"{row['efficiency']:.2f}",
            _("core-hours for a million samples"): f"{row['core_h']:.3g}",
        }
        for row in ahead.rows(powers)
    )
    return _section(_("Forecast: more ranks of this kind, on this network"), shown.picture(), markup(table))
