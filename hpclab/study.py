"""A scaling study as one page, made from its rows alone: machine, figures, laws, verdicts, and a forecast."""

import html
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distributed import Client

from hpclab import forecast, laws, models, plots, scaling
from hpclab.figures import Figure, source_word
from hpclab.language import language
from hpclab.language import translate as _
from hpclab.runs import Run, occupy
from hpclab.tables import Table, markup
from hpclab.training import train

HORIZON = 1024
"""Ranks to forecast to."""


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
        Takes the rows as they come; the same call again goes on where an interrupted one stopped.
    batch_size : int, default 192
        Samples a step: of all ranks together for strong scaling, of each for weak.
    steps, repeats : int, default 20 and 3
    oversubscribe : bool, default False
        Also run more ranks than CPUs, and say *emulated*.
    """
    place = Path(folder).absolute()
    counts = sorted({1, *ranks})
    if odd := [count for count in counts if count < 1 or batch_size % count]:
        raise ValueError(f"ranks (={odd[0]}) must be at least 1, and divide batch_size (={batch_size}).")
    if not (place / "strong").exists():
        occupy(place)
    rows: list[dict] = []
    for regime in ("strong", "weak"):

        def job(client: Client, ranks: int, regime: str = regime, **case: Any) -> Run:
            batch = batch_size // ranks if regime == "strong" else batch_size
            return train(
                client,
                models.CNN,
                "fashion_mnist",
                ranks=ranks,
                batch_size=batch,
                steps=steps,
                folder=tempfile.mkdtemp(prefix="run-", dir=place / regime),
                progress=False,
                **case,
            )

        cases = [{"ranks": count} | ({"oversubscribe": True} if oversubscribe else {}) for count in counts]
        found = scaling.sweep(client, job, cases=cases, repeats=repeats, folder=place / regime)
        rows += [row | {"regime": regime} for row in found]
    if len(counts) > 1:
        rows += scaling.allreduce(client, counts[1], oversubscribe=oversubscribe)
    work = forecast.Workload.of(models.CNN(), 1.0, samples=batch_size)
    rows.append({"kind": "workload", "gradient_bytes": work.gradient_bytes, "bucket_bytes": work.bucket_bytes})
    return write(rows, place / "index.html")


def write(rows: list[dict], path: str | os.PathLike) -> Path:
    """Write the page of a study, in one file that needs no other.

    Parameters
    ----------
    rows : list of dict
        Of the kinds "trial" (with their ``regime``), "allreduce" and "workload"; as from `read`.
    path : path
    """
    trials = [row for row in rows if row["kind"] == "trial"]
    if not trials:
        raise ValueError("rows hold no trial; measure with hpclab scale, or scaling.sweep.")
    machine = {name: trials[0][name] for name in ("host", "cpu", "cpus", "torch", "started")}
    parts = [f"<h2>{_('This machine')}</h2>{markup(Table([machine]))}"]
    titles = {
        "strong": _("Strong scaling: the batch of all ranks stays"),
        "weak": _("Weak scaling: the batch of each rank stays"),
    }
    for regime, title in titles.items():
        if kept := [row for row in trials if row.get("regime") == regime]:
            parts += [f"<h2>{title}</h2>", *_regime(kept)]
    if messages := [row for row in rows if row["kind"] == "allreduce"]:
        parts += [f"<h2>{_('The network')}</h2>", *_network(messages)]
        parts += _forecast(rows, trials, messages)
    carried = json.dumps(rows).replace("<", "\\u003c")
    parts.append(f'<script type="application/json" id="rows">{carried}</script>')
    place = Path(path)
    place.write_text(page(_("A scaling study"), parts), encoding="utf-8")
    return place


def read(path: str | os.PathLike) -> list[dict]:
    """Rows that a page carries: what `write` makes it from.

    Raises
    ------
    ValueError
        If it carries none.
    """
    found = re.search(r'<script type="application/json" id="rows">(.*?)</script>', Path(path).read_text("utf-8"), re.S)
    if found is None:
        raise ValueError(f"path (={str(path)!r}) is no page of a study: it carries no rows.")
    return json.loads(found[1])


def page(title: str, parts: list[str]) -> str:
    """A page of HTML, with its one style."""
    return PAGE.format(language=language(), title=html.escape(title), body="\n".join(parts))


def _regime(trials: list[dict]) -> list[str]:
    told = scaling.verdict(trials) if trials[0]["regime"] == "strong" else None
    fits = told.fits if told else [found for found in [_gustafson(trials)] if found]
    table = Table(
        {
            _("ranks"): row["ranks"],
            _("samples a second"): f"{row['samples_per_s']:,.0f}",
            _("speed-up"): f"{row['speedup']:.2f} ({row['speedup_low']:.2f}-{row['speedup_high']:.2f})",
            _("efficiency"): f"{row['efficiency']:.2f}",
            _("source"): source_word(row["source"]),
        }
        for row in scaling.summary(trials)
    )
    shown = Figure(figsize=(7, 4), layout="constrained")
    if fits:
        plots.law(trials, fits[-1], ax=shown.subplots())
    else:
        plots.throughput(scaling.summary(trials), shown.subplots())
    lines = [str(one) for one in fits] + ([str(told)] if told else []) + scaling.remarks(trials)
    return [shown.picture(), markup(table), *(f"<p>{html.escape(line)}</p>" for line in lines)]


def _gustafson(trials: list[dict]) -> laws.Fit | None:
    try:
        return scaling.fit(trials, "gustafson")
    except ValueError:  # too few points
        return None


def _network(messages: list[dict]) -> list[str]:
    line = laws.fit_alpha_beta([row["nbytes"] for row in messages], [row["duration_s"] for row in messages])
    shown = Figure(figsize=(7, 4), layout="constrained")
    plots.allreduce(messages, line, shown.subplots())
    return [shown.picture(), f"<p>{html.escape(str(line))}</p>"]


def _forecast(rows: list[dict], trials: list[dict], messages: list[dict]) -> list[str]:
    """From weak trials on several ranks, where the CPUs are as busy as they will be."""
    known = [row for row in trials if row.get("regime") == "weak" and row["ranks"] > 1]
    about = next((row for row in rows if row["kind"] == "workload"), None)
    if len(known) < 2 or about is None:
        return []
    jitter = sum(row["jitter_s"] for row in known) / len(known)
    samples = known[0]["batch"] // known[0]["ranks"]
    sizes = {name: about[name] for name in ("gradient_bytes", "bucket_bytes")}
    work = forecast.Workload(known[0]["step_s"], samples=samples, jitter_s=jitter, **sizes)
    counts, seconds = [row["ranks"] for row in known], [row["step_s"] for row in known]
    ahead = forecast.calibrate(work, scaling.network(messages), counts, seconds, ["compute_s"])
    powers = [2**power for power in range(HORIZON.bit_length())]
    found = ahead.rows(powers)
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
        for row in found
    )
    title = _("Forecast: more ranks of this kind, on this network")
    return [f"<h2>{title}</h2>", shown.picture(), markup(table)]


PAGE = """<!doctype html>
<html lang="{language}">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: .25rem .75rem; border-bottom: 1px solid #ddd; }}
</style>
<h1>{title}</h1>
{body}
"""
