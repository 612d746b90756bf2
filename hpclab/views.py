"""A run in a notebook: live while it goes, with buttons; an ordinary output when it has ended."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from IPython.display import display

from hpclab import figures, live, plots
from hpclab.figures import Figure, source_word
from hpclab.language import translate as _
from hpclab.live import answer_in_subshell, drawn, preformatted, sendable
from hpclab.pages import html
from hpclab.rows import attempts, grouped, kept, source, span
from hpclab.tables import Table, markup

LONG_SECONDS = 10.0
"""At most between two drawings of a run, whose rows may be so many that each takes seconds."""
LINES = 12
"""Newest lines of the logs that are shown."""
in_notebook, keep_up, pause, put, trouble = live.in_notebook, live.show, live.pause, live.put, live.trouble  # of 0.1.0


def show(run: Any) -> None:
    """Show a run as the output of a cell, and keep it up to date until it has ended.

    Parameters
    ----------
    run : Run or Record
    """
    if run.going:
        LiveView(run).show()
    else:
        display(sendable(page(run)))


class LiveView:
    """What `page` shows, redrawn as rows come, below a Stop button and one that kills a rank.

    The buttons work while a cell waits in ``run.result()``, as the kernel has subshells (ipykernel 7, JupyterLab 4.4).
    They go when the run has ended; the page is an ordinary output from the start, which a notebook keeps if its kernel
    goes first.
    """

    def __init__(self, run: Any):
        import ipywidgets

        self.run = run
        self.stop = ipywidgets.Button(description=_("Stop"), icon="stop", button_style="warning")
        self.rank = ipywidgets.Dropdown(options=list(range(run.ranks)), description=_("rank"))
        self.kill = ipywidgets.Button(description=_("Kill this rank"), icon="bolt", button_style="danger")
        self.stop.on_click(lambda button: self._stop())
        self.kill.on_click(lambda button: run.kill(self.rank.value))
        self.controls = ipywidgets.HBox([self.stop, self.rank, self.kill], layout={"flex_flow": "row wrap"})
        for control in self.controls.children:
            answer_in_subshell(control)

    def show(self) -> None:
        """Display it here, and begin to follow the run."""
        news = threading.Event()
        self.run.watch(lambda run, rows: news.set())
        live.show(
            self.run.folder,
            lambda: drawn(lambda: page(self.run)),
            lambda: self.run.wait(0),  # its status is the last one before its last row, and its error, are there
            controls=self.controls,
            news=news,
            most=LONG_SECONDS,
        )

    def _stop(self) -> None:
        self.stop.disabled, self.stop.description = True, _("Stopping")
        threading.Thread(target=self.run.stop, name="hpclab-stop", daemon=True).start()


def page(run: Any) -> str:
    """A run as HTML: its state, its figure, a row a rank, the newest lines of its logs, and its error if it failed."""
    every = plots.drawable(run.rows.copy())
    rows = kept(every)
    parts: list[Callable[[], str]] = [
        lambda: html("<p><strong>{{ name }}</strong>: {{ state }}</p>", name=run.title, state=_word(run))
    ]
    if any(row["kind"] == "step" for row in rows):
        parts += [lambda: _figure(rows).picture(), lambda: markup(ranks(rows))]
    if any(row["kind"] == "restart" and "cause" in row for row in every):
        parts.append(lambda: html("<p>{{ title }}</p>\n", title=_("Attempts")) + markup(recovery(every)))
    return live.stacked(
        *parts, lambda: preformatted(_newest(run)), lambda: preformatted(run.error()), lambda: _where(run)
    )


def ranks(rows: list[dict]) -> Table:
    """One row a rank: how far it is, its loss, and what its time went into, as shares of its steps so far.

    Steps count from 1 here, as in all that is shown; in rows they count from 0.
    """
    steps = grouped([row for row in rows if row["kind"] == "step"], "rank")
    return Table(_rank(rank, of_rank) for rank, of_rank in steps.items())


def gang(rows: list[dict]) -> dict:
    """All ranks of a run in one row: how far they are, what they do a second, their loss, what their time went into."""
    steps = [row for row in kept(plots.drawable(rows)) if row["kind"] == "step"]
    first, last = span(steps)
    samples = sum(row.get("samples") or 0 for row in steps)
    losses = plots.loss_curve(steps)[1]
    return {
        _("step"): max((row["step"] + 1 for row in steps if row.get("step") is not None), default=None),
        _("samples a second"): f"{samples / (last - first):,.0f}" if last > first else None,
        _("loss"): losses[-1] if losses else None,
        **_spent(steps),
        _("source"): source_word(source(steps)),
    }


def recovery(rows: list[dict]) -> Table:
    """One row an attempt: the steps that it did, those that were lost, and why it ended."""
    return Table(
        {
            _("attempt"): row["attempt"] + 1,
            _("ranks"): row["ranks"],
            _("steps"): f"{row['first'] + 1}-{row['last'] + 1}",
            _("steps lost"): row["last"] - row["first"] + 1 - row["kept"],
            _("seconds lost"): f"{row['lost_s'] + row['restart_s']:.1f}",
            _("ended by"): row["cause"] or "",
        }
        for row in attempts(rows)
    )


def _rank(rank: int, steps: list[dict]) -> dict:
    last = max(steps, key=lambda row: row["time_s"])
    return {
        _("rank"): rank,
        _("step"): None if last.get("step") is None else last["step"] + 1,
        _("loss"): last.get("loss"),
        **_spent(steps),
        _("seconds"): round(last["time_s"], 1),
        _("source"): source_word(source(steps)),
    }


def _spent(steps: list[dict]) -> dict[str, str]:
    """What the time of steps went into, as shares."""
    whole = sum(row.get("step_s") or 0.0 for row in steps)
    alone = all(row.get("ranks") == 1 for row in steps)  # then it can only have waited for a CPU
    wait = _("waiting for a CPU") if alone else _("talking and waiting")
    titles = {"compute_s": _("computing"), "data_s": _("data"), "wait_s": wait}
    return {
        title: f"{sum(row.get(name) or 0.0 for row in steps) / whole:.0%}"
        for name, title in titles.items()
        if whole and any(name in row for row in steps)
    }


def _word(run: Any) -> str:
    words = {
        "waiting": _("waiting, {place} in the queue", place=run.place),
        "running": _("running"),
        "recovering": _("recovering: another attempt waits for room"),
        "finished": _("finished"),
        "failed": _("failed"),
        "stopped": _("stopped"),
        "interrupted": _("interrupted: its kernel ended first"),
    }
    return words[run.status]


def _where(run: Any) -> str:
    """Folded away: how to open the run again; of one that goes on, when it was seen, as its kernel may go."""
    folder = str(run.folder)
    with suppress(OSError, ValueError):  # the current folder was removed; on Windows, another drive
        folder = os.path.relpath(folder)
    call = f"hpclab.open_run({folder!r})"
    head, text = run.name, _("{call} shows it again.", call=call)
    if run.going:
        head = _("As seen at {time}", time=time.strftime("%H:%M:%S"))
        text = _("If the kernel has stopped since then, {call} shows what happened afterwards.", call=call)
    return html("<details><summary>{{ head }}</summary>{{ text }}</details>", head=head, text=text)


def _figure(rows: list[dict]) -> Figure:
    """Loss and throughput against seconds."""
    shown = Figure(figsize=(8, 3))
    left, right = shown.subplots(1, 2)
    shown.subplots_adjust(left=0.08, right=0.99, bottom=0.18, top=0.8, wspace=0.25)  # a layout engine takes far longer
    if any(row.get("loss") is not None for row in rows):
        figures.legend_above(plots.loss({"": rows}, left), columns=3)
        left.set_title("", loc="right")  # the other one says it for both, and needs the room
        if legend := left.get_legend():
            legend.set_bbox_to_anchor((0.07, 0.87), shown.transFigure)
    else:
        left.set_axis_off()
    plots.rate(rows, right)
    return shown


def _newest(run: Any) -> str:
    """The newest lines of the logs, each with its rank."""
    lines = []
    for rank in range(run.ranks):
        lines += [f"[rank {rank}] {line}" for line in run.tail(rank, max(2, LINES // run.ranks))]
    return "\n".join(lines[:200])
