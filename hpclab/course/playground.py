"""A playground: a move of a slider trains anew, for real, and the curve answers while one looks."""

import shutil
import tempfile
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets
from distributed import Client
from IPython.display import HTML, DisplayHandle, display

from hpclab import live, plots, views
from hpclab._arguments import whole_number
from hpclab.figures import Figure
from hpclab.gangs.launch import gang_size
from hpclab.gangs.run import Run
from hpclab.language import translate as _
from hpclab.network import Network
from hpclab.pages import html
from hpclab.tables import Table, markup
from hpclab.training.start import Model, train

Rows = list[dict]

STEPS = 400
"""Of a run that nobody replaces."""
BATCHES = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Wish:
    """What is to be trained."""

    label: str
    settings: dict[str, Any]
    """Of `train`."""


class Playground:
    """Controls for ranks, batch and network, and the loss of the run that they ask for.

    A control acts when it is released: the run of before ends at once, and its curve stays as a ghost behind that of
    the new one. The figure and the table below it are an ordinary output, so a saved notebook shows them too.

    Parameters
    ----------
    client, model, data
        As for `train`.
    networks : dict of str to Network or None, optional
        What may lie between the ranks, by the name to show. Default: the machine's own, and emulated links of 1 Gb/s
        and 100 Mb/s.
    steps : int, default 400
        Steps of a run.
    **settings
        Further ones of `train`.

    Attributes
    ----------
    run : Run or None
        The newest one.

    Raises
    ------
    ValueError
        If an argument can't be.
    """

    def __init__(
        self,
        client: Client,
        model: Model,
        data: str,
        *,
        networks: dict[str, Network | None] | None = None,
        steps: int = STEPS,
        **settings: Any,
    ) -> None:
        self.arguments = (client, model, data)
        self.settings = settings | {"steps": whole_number("steps", steps)}
        self.networks = networks or {
            _("this machine's network"): None,
            "1 Gb/s": Network(1e-4, 1e9),
            "100 Mb/s": Network(1e-4, 1e8),
        }
        most = max(2, gang_size(client, None, 1, True))
        self.controls = {
            "ranks": ipywidgets.SelectionSlider(options=range(1, most + 1), value=2, description=_("ranks")),
            "batch": ipywidgets.SelectionSlider(options=BATCHES, value=128, description=_("samples a step")),
            "network": ipywidgets.Dropdown(options=[*self.networks], description=_("network")),
        }
        for control in self.controls.values():
            control.continuous_update = False
            control.style.description_width = "9em"
            control.layout.width = "28em"
            control.observe(lambda change: self.train(), "value")
            live.answer_in_subshell(control)
        self.stop = ipywidgets.Button(description=_("Stop"), icon="stop", button_style="warning", disabled=True)
        self.stop.on_click(lambda button: self._stop())
        self.again = ipywidgets.Button(description=_("Run again"), icon="refresh")
        self.again.on_click(lambda button: self.train())
        for control in (self.stop, self.again):
            live.answer_in_subshell(control)
        self.run: Run | None = None
        self.label = ""
        self.before: dict[str, Rows] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="playground-")
        self._runs = 0
        self._lock = threading.Lock()
        self._wishes: list[Wish | None] = []
        self._thread: threading.Thread | None = None
        self.place: DisplayHandle | None = None

    def train(self) -> None:
        """Train as the controls say, in place of what is under way; returns at once."""
        ranks, samples, network = self.controls.values()
        share = max(1, samples.value // ranks.value)
        label = _(
            "{ranks} ranks, {batch} a step, {network}",
            ranks=ranks.value,
            batch=share * ranks.value,
            network=network.value,
        )
        self._ask(Wish(label, {"ranks": ranks.value, "batch_size": share, "network": self.networks[network.value]}))

    def _stop(self) -> None:
        self.stop.disabled, self.stop.description = True, _("Stopping")
        self._ask(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (default: no limit) until nothing is under way; return whether that is so."""
        if thread := self._thread:
            thread.join(timeout)
        return self._thread is None

    def _ask(self, wish: "Wish | None") -> None:
        """Take note of what is wanted, None if nothing; of several wishes the newest counts."""
        with self._lock:
            self._wishes = [wish]
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="hpclab-playground", daemon=True)
                self._thread.start()

    def _serve(self) -> None:
        """Do what is asked, and show what comes of it, until there is nothing left to do.

        What raises is shown, and ends nothing: this thread answers the next move of a control.
        """
        while True:
            with self._lock:
                wishes, self._wishes = self._wishes, []
            try:
                if wishes:
                    self._begin(wishes[0])
                self._watch()
            except Exception as error:
                self._show(live.trouble(error))
            with self._lock:  # a wish finds this thread, or sees that it has to start another
                if not self._wishes:
                    self._thread = None
                    self.stop.disabled, self.stop.description = True, _("Stop")
                    return

    def _watch(self) -> None:
        """Show how the newest run gets on, until it has ended or something else is asked."""
        if (run := self.run) is None:
            return
        news = threading.Event()
        run.watch(lambda run, rows: news.set() if stepped(rows) else None)

        def current() -> bool:
            return not self._wishes

        live.follow(self._show, lambda: self.page(run.rows.copy()), partial(run.wait, 0), news=news, current=current)

    def _begin(self, wish: "Wish | None") -> None:
        """End what is under way, and start what is wanted."""
        if self.run is not None:
            self.run.stop(now=True)
        if wish is None:
            return
        if self.run is not None:
            if stepped(self.run.rows):
                self.before = {_("before: {run}", run=self.label): self.run.rows}
            shutil.rmtree(self.run.folder, ignore_errors=True)  # it may have gone, with all that is temporary
        self._runs += 1
        try:
            self.run = train(
                *self.arguments,
                oversubscribe=True,
                folder=Path(self._folder.name, str(self._runs)),
                name="playground",
                progress=False,
                **wish.settings | self.settings,
            )
        except Exception:
            self.run = None
            raise
        self.label, self.stop.disabled = wish.label, False

    def _show(self, page: str) -> None:
        if self.place is not None:
            live.put(self.place, page)

    def page(self, rows: Rows) -> str:
        """The newest run, and in grey the one before it, as HTML: figure, table, and the error of one that failed."""
        error = "" if self.run is None else self.run.error()
        return live.stacked(
            lambda: self._progress(rows),
            lambda: self._figure(rows),
            lambda: markup(self._table(rows)),
            lambda: live.preformatted(error),
        )

    def _progress(self, rows: Rows) -> str:
        """How far the newest run is, in a line."""
        done = max((row["step"] + 1 for row in rows if row["kind"] == "step"), default=0)
        seconds = rows[-1].get("time_s", 0.0) if rows else 0.0
        text = live.progress(self.label, done, self.settings["steps"], _("step"), seconds)
        return html("<p>{{ text }}</p>", text=text)

    def _figure(self, rows: Rows) -> str:
        if not stepped(rows) and not self.before:
            return ""
        shown = Figure(figsize=(7, 3.4))
        plots.loss({self.label: rows}, shown.subplots(), ghosts=self.before)
        shown.subplots_adjust(left=0.1, right=0.99, bottom=0.15, top=0.92)
        return shown.picture()

    def _table(self, rows: Rows) -> Table:
        runs = {self.label: rows} | self.before
        shown = [{_("run"): name} | views.gang(rows) for name, rows in runs.items() if stepped(rows)]
        columns = dict.fromkeys(name for row in shown for name in row)  # a rank alone waits for a CPU, others talk
        last = {_("source"): columns.pop(_("source"), None)}
        return Table(columns | last | row for row in shown)

    def _ipython_display_(self) -> None:
        display(ipywidgets.VBox([*self.controls.values(), ipywidgets.HBox([self.stop, self.again])]))
        self.place = display(HTML(_("Training begins ...")), display_id=True)
        self.train()


def stepped(rows: Rows) -> bool:
    """Whether a run has taken a step."""
    return any(row["kind"] == "step" for row in rows)
