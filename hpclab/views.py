"""A run in a notebook: live while it goes, with buttons; an ordinary output when it has ended."""

import html
import threading
import time
from typing import Any

from IPython.display import HTML, display

from hpclab import plots
from hpclab.figures import Figure, source_word
from hpclab.language import translate as _
from hpclab.rows import attempts, kept, source
from hpclab.tables import Table, markup

SHARE = 0.1
"""Share of the time that drawing may take: the CPU is the ranks'."""
LEAST_SECONDS = 0.5
LINES = 12
"""Newest lines of the logs that are shown."""


def show(run: Any) -> None:
    """Show a run as the output of a cell, and keep it up to date until it has ended.

    Parameters
    ----------
    run : Run or Record
    """
    if run.going:
        LiveView(run).show()
    else:
        display(HTML(page(run)))


class LiveView:
    """What `page` shows, drawn anew as rows come, with a Stop button and one that kills a rank.

    The buttons work while a cell waits in ``run.result()``, as the kernel has subshells (ipykernel 7, JupyterLab 4.4).
    When the run has ended, an ordinary output takes the place of the controls, so that a saved notebook shows it too.
    """

    def __init__(self, run: Any):
        import ipywidgets

        self.run = run
        self.content = ipywidgets.HTML()
        self.stop = ipywidgets.Button(description=_("Stop"), icon="stop", button_style="warning")
        self.rank = ipywidgets.Dropdown(options=list(range(run.ranks)), description=_("rank"))
        self.kill = ipywidgets.Button(description=_("Kill this rank"), icon="bolt", button_style="danger")
        self.stop.on_click(lambda button: self._stop())
        self.kill.on_click(lambda button: run.kill(self.rank.value))
        for control in (self.stop, self.rank, self.kill):
            answer_in_subshell(control)
        self.controls = ipywidgets.VBox([ipywidgets.HBox([self.stop, self.rank, self.kill]), self.content])
        self.handle: Any = None
        self.news = threading.Event()

    def show(self) -> None:
        """Display it here, and begin to follow the run."""
        self.content.value = page(self.run)
        self.handle = display(self.controls, display_id=True)
        self.run.watch(lambda run, rows: self.news.set())
        threading.Thread(target=self._follow, name="hpclab-view", daemon=True).start()

    def _stop(self) -> None:
        self.stop.disabled = True
        threading.Thread(target=self.run.stop, name="hpclab-stop", daemon=True).start()

    def _follow(self) -> None:
        while self.run.going:
            self.news.wait()
            self.news.clear()
            started = time.monotonic()
            self.content.value = page(self.run)
            time.sleep(max(LEAST_SECONDS, (time.monotonic() - started) / SHARE))
        self.handle.update(HTML(page(self.run)))
        self.controls.close()


def answer_in_subshell(control: Any) -> None:
    """Have a control answer while a cell runs.

    ipykernel 7.4 brings what a control says to the shell that made it, which waits in the cell; this leaves it with the
    subshell that JupyterLab has chosen for it.
    """
    control.comm._reply_subshell_for = lambda data, chosen: chosen


def page(run: Any) -> str:
    """A run as HTML: its state, its figure, a row a rank, the newest lines of its logs, and its error if it failed."""
    every = run.rows.copy()
    rows = kept(every)
    parts = [f"<p><strong>{html.escape(run.name)}</strong>: {_word(run)}</p>"]
    if any(row["kind"] == "step" for row in rows):
        parts += [_figure(rows).picture(), markup(ranks(rows))]
    if any(row["kind"] == "restart" for row in every):
        parts += [f"<p>{_('Attempts')}</p>", markup(recovery(every))]
    if lines := _newest(run):
        parts.append(f"<pre>{html.escape(lines)}</pre>")
    if rows and "error" in rows[-1]:
        parts.append(f"<pre>{html.escape(rows[-1]['error'])}</pre>")
    return "\n".join(parts)


def ranks(rows: list[dict]) -> Table:
    """One row a rank: how far it is, its loss, and what its time went into, as shares of its steps so far."""
    steps: dict[int, list[dict]] = {}
    for row in rows:
        if row["kind"] == "step":
            steps.setdefault(row["rank"], []).append(row)
    return Table(_rank(rank, steps[rank]) for rank in sorted(steps))


def recovery(rows: list[dict]) -> Table:
    """One row an attempt: the steps that it did, those that were lost, and why it ended."""
    return Table(
        {
            _("attempt"): row["attempt"] + 1,
            _("ranks"): row["ranks"],
            _("steps"): f"{row['first']}-{row['last']}",
            _("steps lost"): row["last"] - row["first"] + 1 - row["kept"],
            _("seconds lost"): f"{row['lost_s'] + row['restart_s']:.1f}",
            _("ended by"): row["cause"] or "",
        }
        for row in attempts(rows)
    )


def _rank(rank: int, steps: list[dict]) -> dict:
    last = steps[-1]
    shown = {_("rank"): rank, _("step"): last.get("step"), _("loss"): last.get("loss")}
    spent = sum(row.get("step_s") or 0.0 for row in steps)
    for name, title in (("compute_s", _("computing")), ("data_s", _("data")), ("wait_s", _("talking and waiting"))):
        if spent and name in last:
            shown[title] = f"{sum(row.get(name) or 0.0 for row in steps) / spent:.0%}"
    return shown | {_("seconds"): round(last["time_s"], 1), _("source"): source_word(source(steps))}


def _word(run: Any) -> str:
    words = {
        "waiting": _("waiting, {place} in the queue", place=run.place),
        "running": _("running"),
        "recovering": _("recovering: another attempt waits for room"),
        "finished": _("finished"),
        "failed": _("failed"),
        "stopped": _("stopped"),
        "interrupted": _("interrupted: its kernel went before it"),
    }
    return words[run.status]


def _figure(rows: list[dict]) -> Figure:
    """Loss and throughput against seconds."""
    shown = Figure(figsize=(8.5, 2.8))
    left, right = shown.subplots(1, 2)
    shown.subplots_adjust(left=0.08, right=0.99, bottom=0.18, top=0.9, wspace=0.25)  # a layout engine takes far longer
    if any(row.get("loss") is not None for row in rows):
        plots.loss({"": rows}, left)
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
