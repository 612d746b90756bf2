"""Controls of the notebooks. The kernel's state is the truth: with nobody clicking, Run All works and makes sense."""

import dataclasses
from functools import cache
from typing import Any

import ipywidgets
import numpy as np
from distributed import Client
from IPython.display import HTML, DisplayHandle, display

from hpclab import plots, racing
from hpclab.figures import Figure
from hpclab.forecast import Forecast
from hpclab.gangs.run import Run
from hpclab.language import translate as _
from hpclab.live import answer_in_subshell, drawn, put, sendable, trouble
from hpclab.network import Hierarchy, Network
from hpclab.pages import html
from hpclab.tables import Table, markup
from hpclab.training.start import Model


class RaceStage:
    """A prediction to make, and a race to start by `run` or by the button, as often as one likes.

    Shows a slider for the predicted speed-up, a button, and another that kills a rank of the racer on its way, which
    goes on from its newest checkpoint. What a race shows is an ordinary output, below the button or
    of the cell that called `run`; a later press of the button replaces it there.

    Parameters
    ----------
    client, model, data, **settings
        As for `racing.race`.
    """

    def __init__(self, client: Client, model: Model, data: str, **settings: Any) -> None:
        self.arguments = (client, model, data)
        self.settings = settings
        self.result: racing.Race | None = None
        self.guess = ipywidgets.FloatSlider(
            value=1.0,
            min=0.2,
            max=3.0,
            step=0.1,
            description=_("times as fast"),
            style={"description_width": "initial"},
        )
        self.button = ipywidgets.Button(description=_("Race"), icon="flag-checkered", button_style="primary")
        self.button.on_click(lambda button: self._press())
        self.kill = ipywidgets.Button(description=_("Kill a rank"), icon="bolt", button_style="danger", disabled=True)
        self.kill.on_click(lambda button: self._kill())
        answer_in_subshell(self.kill)
        self.racer: Run | None = None
        self.figure = racing.LiveFigure()
        self.text: DisplayHandle | None = None

    def _ipython_display_(self) -> None:
        display(ipywidgets.HBox([self.guess, self.button, self.kill]))
        hint = display(HTML(_("Press the button, or run the next cell.")), display_id=True)
        self.figure, self.text = racing.LiveFigure(hint), display(HTML(""), display_id=True)

    def run(self) -> None:
        """Race, and show it as an output of this cell."""
        self.figure = racing.LiveFigure()
        self.text = None
        self._race()

    def _press(self) -> None:
        try:
            self._race()
        except Exception as error:  # what a callback raises goes to a log where nobody looks
            if self.text is None:
                raise
            put(self.text, trouble(error))

    def _race(self) -> None:
        self.button.disabled, self.kill.disabled = True, False
        try:
            self.result = racing.race(*self.arguments, show=self.figure, begin=self._follow, **self.settings)
            self._tell(self.result)
        finally:
            self.button.disabled, self.kill.disabled = False, True

    def _follow(self, racer: Run) -> None:
        self.racer = racer

    def _kill(self) -> None:
        if self.racer is not None and (left := self.racer.left()):
            self.racer.kill(left[-1])

    def _tell(self, result: racing.Race) -> None:
        trials = result.trials()
        measured = trials[0]["train_s"] / trials[-1]["train_s"]
        page = html(
            "{{ table }}<p><strong>{{ prediction }}</strong> {{ verdict }}</p>",
            table=markup(result.table()),
            prediction=_(
                "You predicted {guess:.1f}; this race says {measured:.2f}.", guess=self.guess.value, measured=measured
            ),
            verdict=result.verdict(),
        )
        if self.text is None:
            self.text = display(sendable(page), display_id=True)
        else:
            put(self.text, page)


class Explorer:
    """Sliders for what decides the speed on many ranks, and the efficiency that follows, a line a topology.

    The figure and a table of it are ordinary output, drawn anew as a slider moves; what was measured stays on it.

    Parameters
    ----------
    known : forecast.Forecast
        From `forecast.calibrate`; its noise makes the bands.
    measured : list of dict, optional
        Rows with ``ranks`` and ``efficiency``, as from `scaling.summary`.
    most : int, default 1024
        Ranks to draw to.
    """

    TOPOLOGIES = ("ring", "tree", "halving-doubling", "parameter-server")

    def __init__(self, known: Forecast, measured: list[dict] | None = None, most: int = 1024) -> None:
        self.known = known
        self.measured = [row for row in measured or [] if row["ranks"] <= most]
        self.ranks = np.unique(np.geomspace(1, most, 1000).round())
        work = known.workload
        sizes = sorted({work.samples, *(2**power for power in range(11))})
        sliders = {
            "latency": ipywidgets.FloatLogSlider(50e-6, min=-6, max=-1, description=_("latency (s)")),
            "bandwidth": ipywidgets.FloatLogSlider(1e9, min=7, max=12, description=_("bandwidth (bit/s)")),
            "samples": ipywidgets.SelectionSlider(options=sizes, value=work.samples, description=_("samples a rank")),
            "overlap": ipywidgets.FloatSlider(work.overlap, min=0, max=1, step=0.05, description=_("overlap")),
            "per_node": ipywidgets.IntSlider(4, min=1, max=16, description=_("ranks a node")),
        }
        sliders["overlap"].disabled = work.visible is not None  # then it was measured what is hidden
        for slider in sliders.values():
            slider.style.description_width = "9em"
            slider.layout.width = "28em"
            slider.observe(lambda change: self.draw(), "value")
        self.sliders = sliders
        self.figure: DisplayHandle | None = None
        self.text: DisplayHandle | None = None

    def curves(self) -> dict[str, dict[str, np.ndarray]]:
        """Columns of the forecast by topology, at the sliders' values."""
        latency, bandwidth, samples, overlap, per_node = (slider.value for slider in self.sliders.values())
        known = self.known.scaled(samples)
        known = dataclasses.replace(known, workload=dataclasses.replace(known.workload, overlap=overlap))
        links: dict[str, Network | Hierarchy] = {name: Network(latency, bandwidth, name) for name in self.TOPOLOGIES}
        inside, between = Network(min(latency, 2e-6), max(bandwidth, 1e11)), Network(latency, bandwidth)
        links[_("ring of nodes")] = Hierarchy(inside, between, per_node)
        return {name: known.columns(self.ranks, network=link) for name, link in links.items()}

    def draw(self) -> None:
        """Draw anew, in the place where it was first shown."""
        if self.figure is None or self.text is None:
            return
        curves = cache(self.curves)
        put(self.figure, drawn(lambda: self._picture(curves())))
        put(self.text, drawn(lambda: markup(self.table(curves()))))

    def _picture(self, curves: dict[str, dict[str, np.ndarray]]) -> str:
        shown = Figure(figsize=(7, 4), layout="constrained")
        plots.forecasts(curves, self.measured, shown.subplots())
        return shown.picture()

    def table(self, curves: dict[str, dict[str, np.ndarray]]) -> Table:
        """The figure in numbers: the efficiency at a few counts of ranks."""
        places = np.unique(np.linspace(0, len(self.ranks) - 1, 5).round().astype(int))
        return Table(
            {_("topology"): name}
            | {f"{columns['ranks'][place]:g}": f"{columns['efficiency'][place]:.2f}" for place in places}
            for name, columns in curves.items()
        )

    def _ipython_display_(self) -> None:
        display(ipywidgets.VBox(list(self.sliders.values())))
        self.figure = display(HTML(""), display_id=True)
        self.text = display(HTML(""), display_id=True)
        self.draw()
