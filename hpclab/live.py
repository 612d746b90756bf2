"""The one loop that draws what lives in a notebook: a run, a playground, a private Slurm, a cluster.

A view that can't be drawn shows its error in its place: that ends neither the loop nor what is drawn. A race has no
loop here: its sweep calls `racing.LiveFigure`, which keeps the same pace.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar
from uuid import uuid4

from IPython import get_ipython
from IPython.display import HTML, display
from tqdm import tqdm

from hpclab.language import translate as _
from hpclab.pages import html

log = logging.getLogger(__name__)
Item = TypeVar("Item")

SHARE = 0.1
"""Share of the time that drawing may take: the CPU is the ranks'."""
LEAST_SECONDS, MOST_SECONDS = 0.5, 2.0
"""Between two drawings: the first one takes long, as fonts are looked for."""
LOOK_SECONDS = 0.05
"""Between two looks whether there is something new, of what tells so itself."""

_newest: dict[Any, tuple[str, Any]] = {}
"""By what is shown, the id and the handle of its newest display; the loop of an older one ends, as each costs time."""


def show(
    key: Any,
    page: Callable[[], str],
    ended: Callable[[], bool],
    *,
    controls: Any = None,
    news: threading.Event | None = None,
    most: float = MOST_SECONDS,
) -> None:
    """Show a page as the output of a cell, and anew as `follow` does, until that has ended or is shown elsewhere.

    Parameters
    ----------
    key : hashable
        What is shown. Displays of one thing have one id, and so one page, which the loop of the newest draws.
    page, ended, news, most
        As for `follow`. What the first page raises is raised here.
    controls : ipywidgets.Widget, optional
        Shown above the page until that has ended, or is shown elsewhere.
    """
    first = page()
    buttons = None if controls is None else display(controls, display_id=True)
    display_id, _older = _newest.get(key, (uuid4().hex, None))
    handle = display(sendable(first), display_id=display_id)
    entry = _newest[key] = display_id, handle

    def newest() -> bool:
        return _newest.get(key) is entry

    def live() -> None:
        follow(lambda latest: put(handle, latest), page, ended, news=news, most=most, current=newest)
        if newest():  # else the entry is another's; one that comes just now is of what has ended, and ends by itself
            _newest.pop(key, None)
        if controls is not None:
            put(buttons, "")
            for control in (*getattr(controls, "children", ()), controls):
                control.close()

    threading.Thread(target=live, name="hpclab-view", daemon=True).start()


def bar(total: int, what: str, unit: str, *, initial: int = 0) -> Any:
    """A bar that says how a loop gets on: in a notebook a `Line`, which a saved one shows too; else one of tqdm's."""
    if in_notebook():
        return Line(total, what, unit, initial)
    return _Bar(total=total, initial=initial, desc=what, unit=unit, mininterval=0.2)


def tracked(items: Iterable[Item], what: str, unit: str) -> Iterator[Item]:
    """Go through items, and say in a `bar` how many are done."""
    every = list(items)
    with bar(len(every), what, unit) as line:
        for item in every:
            yield item
            line.update()


def progress(
    what: str, done: int, total: int, unit: str, seconds: float, *, note: str = "", failures: int = 0, left_s: float = 0
) -> str:
    """How far something is, in a line."""
    parts = [_("{what}: {done} of {total} {unit}s", what=what, done=done, total=total, unit=unit), note]
    parts.append(_("failures: {count}", count=failures) if failures else "")
    parts.append(_("{seconds:.0f} s", seconds=seconds))
    parts.append(_("about {seconds:.0f} s left", seconds=left_s) if left_s else "")
    return ", ".join(filter(None, parts))


class _Bar(tqdm):
    """A bar of tqdm's that says how often a run had to begin another attempt, too."""

    failures = 0

    @property
    def format_dict(self) -> dict[str, Any]:
        known = super().format_dict
        failures = _("failures: {count}", count=self.failures) if self.failures else None
        return known | {"postfix": ", ".join(filter(None, (known["postfix"], failures)))}


class StepBar:
    """A progress bar over a run's steps, for `Run.watch`; it falls back to where a later attempt goes on.

    Parameters
    ----------
    total : int
        Steps of a rank.
    title : str
    """

    def __init__(self, total: int, title: str) -> None:
        self.bar = bar(total, title, _("step"))

    def __call__(self, run: Any, rows: list[dict]) -> None:
        for row in rows:
            if scores := [
                f"{name.removeprefix('test_')}={row[name]:.3f}"
                for name in ("test_accuracy", "test_bits")
                if name in row
            ]:
                self.bar.set_postfix_str(", ".join(scores), refresh=False)
            self.bar.failures += row["kind"] == "restart"
            if row["kind"] in ("resume", "restart"):
                self.bar.update(row.get("step", 0) - self.bar.n)
        self.bar.update(sum(row["kind"] == "step" and row["rank"] == 0 for row in rows))
        if not run.going:
            self.bar.close()


class Line:
    """One line that says how a loop gets on, drawn anew while it goes on; used as a bar of tqdm's is.

    Attributes
    ----------
    n : int
        How much is done.
    failures : int
        How often a run had to begin another attempt.
    """

    def __init__(self, total: int, what: str, unit: str, initial: int = 0) -> None:
        self.total, self.what, self.unit, self.n, self.initial = total, what, unit, initial, initial
        self.note, self.failures = "", 0
        self.started = time.monotonic()
        self.took: float | None = None
        show(self, lambda: html("<p>{{ text }}</p>", text=self.text()), lambda: self.took is not None)

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Take note that so much more is done."""
        self.n += count

    def set_postfix_str(self, note: str, refresh: bool = True) -> None:
        """Say this, too."""
        self.note = note

    def close(self) -> None:
        """Leave what it took."""
        if self.took is None:
            self.took = time.monotonic() - self.started

    def text(self) -> str:
        """What it says now."""
        spent = time.monotonic() - self.started if self.took is None else self.took
        going = self.took is None and self.n > self.initial
        left_s = spent * (self.total - self.n) / (self.n - self.initial) if going else 0.0
        count = self.n, self.total, self.unit
        return progress(self.what, *count, spent, note=self.note, failures=self.failures, left_s=left_s)


def follow(
    update: Callable[[str], None],
    page: Callable[[], str],
    ended: Callable[[], bool],
    *,
    news: threading.Event | None = None,
    most: float = MOST_SECONDS,
    current: Callable[[], bool] = lambda: True,
) -> None:
    """Draw a page anew when there is something new, until what it shows has ended.

    The last page that can be drawn is what stays.

    Parameters
    ----------
    update : callable
        Given a page that differs from the one before, shows it.
    page : callable
        Draws the page, as HTML. What it raises is shown in place of the page, until that can be drawn again.
    ended : callable
        Whether what is drawn has ended, and will change no more.
    news : threading.Event, optional
        Set by others when there is something new. Default: there may be at any time.
    most : float, default MOST_SECONDS
        Seconds between two drawings at most, however long one takes.
    current : callable, optional
        Whether to go on; where not, nothing more is drawn.
    """
    shown, last_good, due = "", "", 0.0
    while current():
        over = ended()  # asked before the page is drawn, so that what came last is on the last page
        if not over and (time.monotonic() < due or (news is not None and not news.is_set())):
            time.sleep(LEAST_SECONDS if news is None else LOOK_SECONDS)
            continue
        if news is not None:
            news.clear()  # before the page is drawn, so that what comes meanwhile is drawn next
        started = time.monotonic()
        try:
            latest = last_good = page()
        except Exception as error:
            over = over or ended()  # a page that fails since its subject has just ended tells of no trouble
            latest = last_good if over and last_good else trouble(error)
        if latest != shown and current():  # it may have been replaced while it was drawn
            update(latest)
            shown = latest
        if over:
            return
        due = time.monotonic() + pause(started, most)


def pause(started: float, most: float = MOST_SECONDS) -> float:
    """Seconds to wait before the next drawing, after one that began at this time of the monotonic clock."""
    return min(most, max(LEAST_SECONDS, (time.monotonic() - started) / SHARE))


def drawn(draw: Callable[[], str]) -> str:
    """What is drawn as HTML; in its place the error, if that fails: it must not end what follows a run."""
    try:
        return draw()
    except Exception as error:
        return trouble(error)


def stacked(*parts: Callable[[], str]) -> str:
    """Parts of a page, one below the other; one that can't be drawn leaves the others as they are."""
    return "\n".join(filter(None, map(drawn, parts)))


def trouble(error: Exception) -> str:
    """An error as HTML: what it says, and its traceback folded away."""
    return html(
        "<pre>{{ error }}</pre><details><summary>{{ title }}</summary><pre>{{ lines }}</pre></details>",
        error=f"{type(error).__name__}: {error}",
        title=_("Traceback"),
        lines="".join(traceback.format_exception(error)),
    )


def preformatted(text: str) -> str:
    """Text as HTML that keeps its lines; nothing if there is none."""
    return html("<pre>{{ text }}</pre>", text=text) if text else ""


def sendable(page: str) -> HTML:
    """A page as a message to a browser can hold it: half a surrogate pair, as in file names, is a question mark."""
    return HTML(page.encode("utf-8", "replace").decode())


def put(place: Any, page: str) -> None:
    """Show HTML where something was shown before, in a thread that must live on if it can't be shown."""
    try:
        place.update(sendable(page))
    except Exception:
        log.exception("a page can't be shown")


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return hasattr(get_ipython(), "kernel")


def answer_in_subshell(control: Any) -> None:
    """Have a control answer while a cell runs.

    ipykernel 7.4 brings what a control says to the shell that made it, which waits in the cell; this leaves it with the
    subshell that JupyterLab has chosen for it.
    """
    control.comm._reply_subshell_for = lambda message, chosen: chosen
