"""A run in a notebook: live while it goes, with buttons; an ordinary output when it has ended."""

import html
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from IPython import get_ipython
from IPython.display import HTML, display

from hpclab import plots
from hpclab.figures import Figure, source_word
from hpclab.language import translate as _
from hpclab.rows import attempts, kept, source, span
from hpclab.slurm.states import job_table, node_table
from hpclab.tables import Table, markup

log = logging.getLogger(__name__)

SHARE = 0.1
"""Share of the time that drawing may take: the CPU is the ranks'."""
LEAST_SECONDS, MOST_SECONDS = 0.5, 2.0
"""Between two drawings: the first one takes long, as fonts are looked for."""
LONG_SECONDS = 10.0
"""At most between two drawings of a run, whose rows may be so many that each takes seconds."""
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
        display(sendable(page(run)))


def pause(started: float, most: float = MOST_SECONDS) -> float:
    """Seconds to wait before the next drawing, after one that began at this time of the monotonic clock."""
    return min(most, max(LEAST_SECONDS, (time.monotonic() - started) / SHARE))


def drawn(draw: Callable[[], str]) -> str:
    """What is drawn as HTML; in its place the error, if that fails: it must not end what follows a run."""
    try:
        return draw()
    except Exception as error:
        return trouble(error)


def trouble(error: Exception) -> str:
    """An error as HTML: what it says, and its traceback folded away."""
    told = html.escape(f"{type(error).__name__}: {error}")
    lines = html.escape("".join(traceback.format_exception(error)))
    return f"<pre>{told}</pre><details><summary>{_('Traceback')}</summary><pre>{lines}</pre></details>"


def sendable(page: str) -> HTML:
    """A page as a message to a browser can hold it: half a surrogate pair, as in file names, is a question mark."""
    return HTML(page.encode("utf-8", "replace").decode())


def put(place: Any, page: str) -> None:
    """Show HTML where something was shown before, in a thread that must live on if it can't be shown."""
    try:
        place.update(sendable(page))
    except Exception:
        log.exception("a page can't be shown")


class LiveView:
    """What `page` shows, drawn anew as rows come, below a Stop button and one that kills a rank.

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
        self.controls = ipywidgets.HBox([self.stop, self.rank, self.kill])
        for control in self.controls.children:
            answer_in_subshell(control)
        self.news = threading.Event()

    def show(self) -> None:
        """Display it here, and begin to follow the run."""
        self.buttons = display(self.controls, display_id=True)
        self.place = display(sendable(drawn(lambda: page(self.run))), display_id=True)
        self.run.watch(lambda run, rows: self.news.set())
        threading.Thread(target=self._follow, name="hpclab-view", daemon=True).start()

    def _stop(self) -> None:
        self.stop.disabled = True
        threading.Thread(target=self.run.stop, name="hpclab-stop", daemon=True).start()

    def _follow(self) -> None:
        while not self.run.wait(0):  # its status is the last one before its last row, and its error, are there
            self.news.wait()
            self.news.clear()
            started = time.monotonic()
            put(self.place, drawn(lambda: page(self.run)))
            self.run.wait(pause(started, LONG_SECONDS))  # the last page must not be late
        put(self.place, drawn(lambda: page(self.run)))
        put(self.buttons, "")
        for control in (*self.controls.children, self.controls):
            control.close()


_followed: dict[Any, Any] = {}
"""By what is shown, the display that follows it: the newest only, as each costs time."""


def keep_up(key: Any, page: Callable[[], str], ended: Callable[[], bool]) -> None:
    """Show a page as the output of a cell, and anew when it changes, until that has ended or is shown elsewhere.

    What raises meanwhile is shown in its place, until it can be drawn again; the last page that could be is what stays.
    """
    first = page()
    handle = _followed[key] = display(sendable(first), display_id=True)

    def watch(good: str) -> None:
        shown = good
        while _followed.get(key) is handle and not ended():
            started = time.monotonic()
            try:
                new = good = page()
            except Exception as error:
                if ended():
                    break
                new = trouble(error)
            if new != shown:
                put(handle, new)
            shown = new
            time.sleep(pause(started))
        if shown != good:
            put(handle, good)
        if _followed.get(key) is handle:
            del _followed[key]

    threading.Thread(target=watch, args=[first], name="hpclab-view", daemon=True).start()


def follow(slurm: Any) -> None:
    """Show a private Slurm as the output of a cell, and keep it up to date while it is up; without a kernel, as text.

    When it has ended, or is shown elsewhere, the output stays as it was.
    """
    try:
        if in_notebook():
            keep_up(slurm.folder, lambda: queue(slurm), lambda: not slurm.up)
        else:
            print(slurm.status())
    except RuntimeError as error:  # it has ended, and says so
        print(error)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return hasattr(get_ipython(), "kernel")


def queue(slurm: Any) -> str:
    """A private Slurm as HTML: its jobs in time, and its nodes and jobs as tables."""
    jobs = slurm.jobs()
    shown = Figure(figsize=(8.5, 1.2 + 0.22 * min(len(jobs), plots.JOBS)))
    plots.gantt(jobs, shown.subplots())
    shown.set_layout_engine("constrained")
    parts = [shown.picture()] * bool(jobs)
    return "\n".join([*parts, markup(node_table(slurm.nodes())), markup(job_table(jobs))])


def answer_in_subshell(control: Any) -> None:
    """Have a control answer while a cell runs.

    ipykernel 7.4 brings what a control says to the shell that made it, which waits in the cell; this leaves it with the
    subshell that JupyterLab has chosen for it.
    """
    control.comm._reply_subshell_for = lambda data, chosen: chosen


def page(run: Any) -> str:
    """A run as HTML: its state, its figure, a row a rank, the newest lines of its logs, and its error if it failed."""
    every = plots.drawable(run.rows.copy())
    rows = kept(every)
    parts: list[Callable[[], str]] = [lambda: f"<p><strong>{html.escape(run.name)}</strong>: {_word(run)}</p>"]
    if run.going:
        parts.append(lambda: f"<p>{_seen(run)}</p>")
    if any(row["kind"] == "step" for row in rows):
        parts += [lambda: _figure(rows).picture(), lambda: markup(ranks(rows))]
    if any(row["kind"] == "restart" and "cause" in row for row in every):
        parts.append(lambda: f"<p>{_('Attempts')}</p>\n{markup(recovery(every))}")
    parts += [lambda: preformatted(_newest(run)), lambda: preformatted(run.error())]
    return "\n".join(filter(None, map(drawn, parts)))


def preformatted(text: str) -> str:
    """Text as HTML that keeps its lines; nothing if there is none."""
    return f"<pre>{html.escape(text)}</pre>" if text else ""


def ranks(rows: list[dict]) -> Table:
    """One row a rank: how far it is, its loss, and what its time went into, as shares of its steps so far."""
    steps: dict[int, list[dict]] = {}
    for row in rows:
        if row["kind"] == "step":
            steps.setdefault(row["rank"], []).append(row)
    return Table(_rank(rank, steps[rank]) for rank in sorted(steps))


def gang(rows: list[dict]) -> dict:
    """All ranks of a run in one row: how far they are, what they do a second, their loss, what their time went into."""
    steps = [row for row in kept(plots.drawable(rows)) if row["kind"] == "step"]
    first, last = span(steps)
    samples = sum(row.get("samples") or 0 for row in steps)
    losses = plots.loss_curve(steps)[1]
    return {
        _("step"): max((row["step"] for row in steps if row.get("step") is not None), default=None),
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
            _("steps"): f"{row['first']}-{row['last']}",
            _("steps lost"): row["last"] - row["first"] + 1 - row["kept"],
            _("seconds lost"): f"{row['lost_s'] + row['restart_s']:.1f}",
            _("ended by"): row["cause"] or "",
        }
        for row in attempts(rows)
    )


def _rank(rank: int, steps: list[dict]) -> dict:
    last = max(steps, key=lambda row: row["time_s"])
    shown = {_("rank"): rank, _("step"): last.get("step"), _("loss"): last.get("loss")}
    about = {_("seconds"): round(last["time_s"], 1), _("source"): source_word(source(steps))}
    return shown | _spent(steps) | about


def _spent(steps: list[dict]) -> dict[str, str]:
    """What the time of steps went into, as shares."""
    whole = sum(row.get("step_s") or 0.0 for row in steps)
    titles = {"compute_s": _("computing"), "data_s": _("data"), "wait_s": _("talking and waiting")}
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
        "interrupted": _("interrupted: its kernel went before it"),
    }
    return words[run.status]


def _seen(run: Any) -> str:
    """When a run that goes on was seen, for a reader whose kernel has gone since."""
    folder = str(run.folder)
    with suppress(OSError, ValueError):  # the current folder was removed; on Windows, another drive
        folder = os.path.relpath(folder)
    call = f"hpclab.open_run({folder!r})"
    told = _(
        "Seen at {time}. If its kernel has gone since, {call} shows what came after.",
        time=time.strftime("%H:%M:%S"),
        call=call,
    )
    return html.escape(told, quote=False)


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
