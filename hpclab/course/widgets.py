"""Controls of the notebooks. The kernel's state is the truth: with nobody clicking, Run All works and makes sense."""

import dataclasses
import threading
from functools import cache
from typing import Any

import ipywidgets
import numpy as np
from distributed import Client
from IPython.display import HTML, DisplayHandle, display

from hpclab import plots, racing, ratios
from hpclab.course import guesses
from hpclab.course import plots as course_plots
from hpclab.figures import Figure
from hpclab.forecast import H100, Forecast, Transformer, plan, ultrascale
from hpclab.gangs.attempt import RankError
from hpclab.gangs.run import Run
from hpclab.language import translate as _
from hpclab.live import answer_in_subshell, drawn, progress, put, trouble
from hpclab.network import Hierarchy, Network
from hpclab.pages import html
from hpclab.tables import Table, markup
from hpclab.training.start import Model

FEWEST = 3
"""Races of which the mean is shown, with its interval."""


class RaceStage:
    """A prediction to make, and a race to start by `run` or by the button, as often as one likes.

    Shows a slider for the predicted speed-up, and three buttons: one starts a race, one stops it, and one kills a rank
    of the racer on its way, which goes on from its newest checkpoint. What a race shows is an ordinary output, below
    the buttons or of the cell that called `run`; a later press of the button replaces it there. A race that a button
    starts runs in a thread of its own, so the kernel is free meanwhile and Stop always answers. A slider
    that nobody has moved predicts nothing.

    Parameters
    ----------
    client, model, data, epochs, **settings
        As for `racing.race`.
    """

    PREDICTION = "start.race"

    def __init__(
        self, client: Client, model: Model, data: str, *, epochs: int = racing.EPOCHS, **settings: Any
    ) -> None:
        self.arguments = (client, model, data)
        self.settings = settings | {"epochs": epochs}
        self.result: racing.Race | None = None
        self.raced: dict[str, list[float]] = {}
        """How many times as fast as the first each other racer was, a race at a time."""
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
        self.stop = ipywidgets.Button(description=_("Stop"), icon="stop", button_style="warning", disabled=True)
        self.stop.on_click(lambda button: self._stop())
        self.kill = ipywidgets.Button(description=_("Kill a rank"), icon="bolt", button_style="danger", disabled=True)
        self.kill.on_click(lambda button: self._kill())
        for control in (self.guess, self.button, self.stop, self.kill):
            answer_in_subshell(control)
        self.moved = False
        """Whether anybody has predicted."""
        self.guess.observe(lambda change: setattr(self, "moved", True), "value")
        self.racer: Run | None = None
        self.stopping = False
        self.figure = racing.LiveFigure()
        self.note: DisplayHandle | None = None
        """Below the buttons."""
        self.text: DisplayHandle | None = None
        self._racing = threading.Lock()

    def _ipython_display_(self) -> None:
        controls = [self.guess, self.button, self.stop, self.kill]
        display(ipywidgets.HBox(controls, layout={"flex_flow": "row wrap"}))  # a narrow page cuts none off
        self.note = display(HTML(_("Press the button, or run the next cell.")), display_id=True)
        self._show_here()

    def run(self) -> None:
        """Race, and show it as an output of this cell; a race that is under way goes on here.

        Raises
        ------
        RuntimeError
            If the cluster is closed.
        """
        self._show_here()
        if self._racing.acquire(blocking=False):
            self._race()
        else:
            with self._racing:  # until it has ended
                pass

    def _show_here(self) -> None:
        """Make places for the figure and the text in the output of this cell."""
        figure, self.text = (display(HTML(""), display_id=True) for _place in range(2))
        self.figure = racing.LiveFigure(figure)

    def _press(self) -> None:
        """Race in a thread, and show there what it raises, since what a callback raises goes to a log."""

        def race() -> None:
            try:
                self._race()
            except Exception as error:
                self._put(self.note, trouble(error))

        if self._racing.acquire(blocking=False):  # a second press meanwhile starts no second race
            threading.Thread(target=race, name="hpclab-race", daemon=True).start()

    def _race(self) -> None:
        """Race with the lock held, and free it."""
        self.stopping, self.racer = False, None
        self.button.disabled, self.stop.disabled, self.kill.disabled = True, False, False
        try:
            guesses.predict(self.PREDICTION, self.guess.value if self.moved else ..., _("times as fast"))
            if self.arguments[0].status in ("closing", "closed"):
                raise RuntimeError(
                    _("The cluster is closed. Run the cell with hpclab.connect again, then the one with this button.")
                )
            self._put(self.note, _("The race is on; the picture grows below, or below the next cell."))
            self._put(self.text, "")  # of the race before
            self.result = racing.race(*self.arguments, show=self._show, begin=self._follow, **self.settings)
            self._tell(self.result)
            self._put(self.note, _("Press the button to race again."))
        except RankError:
            if not self.stopping:
                raise
            self._put(self.note, _("Stopped. Press the button to race again."))
        finally:
            self.button.disabled, self.stop.disabled, self.kill.disabled = False, True, True
            self.button.description, self.stop.description = _("Race again"), _("Stop")
            self._racing.release()

    def _show(self, runs: dict[str, list[dict]]) -> None:
        """Show the picture, and in a line how the race gets on."""
        self.figure(runs)
        label, rows = next(reversed(runs.items()))
        steps = [row for row in rows if row["kind"] == "step"]
        failures = sum(row["kind"] == "restart" for of_run in runs.values() for row in of_run)
        note = ""
        if steps and rows[-1]["kind"] != "end":
            epoch, epochs = steps[-1]["epoch"] + 1, self.settings["epochs"]
            note = _("{label}, epoch {epoch} of {epochs}", label=label, epoch=epoch, epochs=epochs)
        done = sum(of_run[-1]["kind"] == "end" for of_run in runs.values())
        count, seconds = len(racing.racers()), rows[-1].get("time_s", 0.0)
        text = progress(_("race"), done, count, _("racer"), seconds, note=note, failures=failures)
        self._put(self.note, html("<p>{{ text }}</p>", text=text))

    def _follow(self, racer: Run) -> None:
        self.racer = racer
        if self.stopping:
            self._end()

    def _stop(self) -> None:
        self.stopping, self.stop.disabled, self.stop.description = True, True, _("Stopping")
        self._end()

    def _end(self) -> None:
        if self.racer is not None:
            threading.Thread(target=self.racer.stop, args=(True,), name="hpclab-stop", daemon=True).start()

    def _kill(self) -> None:
        if self.racer is not None and (left := self.racer.left()):
            self.racer.kill(left[-1])

    def _tell(self, result: racing.Race) -> None:
        first, *others = result.trials()
        for trial in others:
            self.raced.setdefault(trial["label"], []).append(first["train_s"] / trial["train_s"])
        page = html(
            "{{ table }}<p><strong>{{ predicted }}</strong> {{ verdict }}</p>{{ all }}",
            table=markup(result.table()),
            predicted=guesses.came(self.PREDICTION, first["train_s"] / others[-1]["train_s"]),
            verdict=result.verdict(),
            all=markup(self.table()),
        )
        self._put(self.text, page)

    def table(self) -> Table:
        """All races of this stage together, a row a racer; empty until there are three: two tell next to nothing."""
        return Table(
            {_("all races"): label, _("races"): len(gains), _("times as fast"): ratios.told(ratios.interval(gains))}
            for label, gains in self.raced.items()
            if len(gains) >= FEWEST
        )

    def _put(self, place: DisplayHandle | None, page: str) -> None:
        if place is not None:
            put(place, page)


class Drawn:
    """Sliders, and below them a figure and a text, ordinary output that is redrawn as a slider moves."""

    def __init__(self, sliders: dict[str, Any]) -> None:
        for slider in sliders.values():
            slider.style.description_width = "12em"
            slider.layout.width = "31em"
            slider.observe(lambda change: self.draw(), "value")
        self.sliders = sliders
        self.figure: DisplayHandle | None = None
        self.text: DisplayHandle | None = None

    def worked_out(self) -> Any:
        """What figure and text show, at the sliders' values."""
        raise NotImplementedError

    def picture(self, shown: Any) -> str:
        """The figure, as HTML."""
        raise NotImplementedError

    def words(self, shown: Any) -> str:
        """The text, as HTML."""
        raise NotImplementedError

    def draw(self) -> None:
        """Redraw, in the place where it was first shown."""
        if self.figure is None or self.text is None:
            return
        worked_out = cache(self.worked_out)
        put(self.figure, drawn(lambda: self.picture(worked_out())))
        put(self.text, drawn(lambda: self.words(worked_out())))

    def _ipython_display_(self) -> None:
        display(ipywidgets.VBox(list(self.sliders.values())))
        self.figure = display(HTML(""), display_id=True)
        self.text = display(HTML(""), display_id=True)
        self.draw()


class Explorer(Drawn):
    """Sliders for what decides the speed on many ranks, and the efficiency that follows, a line a topology.

    The figure and a table of it are ordinary output, redrawn as a slider moves; what was measured stays on it.

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
            "latency": _steps(range(-6, -1), {-6: "µs", -3: "ms"}, 50e-6, _("latency")),
            "bandwidth": _steps(range(7, 12), {6: "Mb/s", 9: "Gb/s"}, 1e9, _("bandwidth")),
            "samples": ipywidgets.SelectionSlider(options=sizes, value=work.samples, description=_("samples a rank")),
            "overlap": ipywidgets.FloatSlider(work.overlap, min=0, max=1, step=0.05, description=_("overlap")),
            "per_node": ipywidgets.IntSlider(4, min=1, max=16, description=_("ranks a node")),
        }
        sliders["overlap"].disabled = work.visible is not None  # then it was measured what is hidden
        super().__init__(sliders)

    def curves(self) -> dict[str, dict[str, np.ndarray]]:
        """Columns of the forecast by topology, at the sliders' values."""
        latency, bandwidth, samples, overlap, per_node = (slider.value for slider in self.sliders.values())
        known = self.known.scaled(samples)
        known = dataclasses.replace(known, workload=dataclasses.replace(known.workload, overlap=overlap))
        links: dict[str, Network | Hierarchy] = {name: Network(latency, bandwidth, name) for name in self.TOPOLOGIES}
        inside, between = Network(min(latency, 2e-6), max(bandwidth, 1e11)), Network(latency, bandwidth)
        links[_("ring of nodes")] = Hierarchy(inside, between, per_node)
        return {name: known.columns(self.ranks, network=link) for name, link in links.items()}

    def worked_out(self) -> dict[str, dict[str, np.ndarray]]:
        return self.curves()

    def picture(self, curves: dict[str, dict[str, np.ndarray]]) -> str:
        shown = Figure(figsize=(7, 4), layout="constrained")
        plots.forecasts(curves, self.measured, shown.subplots())
        return shown.picture()

    def table(self, curves: dict[str, dict[str, np.ndarray]]) -> Table:
        """The figure in numbers: the efficiency at powers of two, and at the most ranks."""
        powers = [2**power for power in range(0, 20, 2)]
        places = np.flatnonzero(np.isin(self.ranks, [*powers, self.ranks[-1]]))
        return Table(
            {_("topology"): name}
            | {f"{columns['ranks'][place]:g}": f"{columns['efficiency'][place]:.2f}" for place in places}
            for name, columns in curves.items()
        )

    def words(self, curves: dict[str, dict[str, np.ndarray]]) -> str:
        return html(
            "{{ table }}{% if remark %}<p>{{ remark }}</p>{% endif %}",
            table=markup(self.table(curves)),
            remark=self.remark(curves),
        )

    def remark(self, curves: dict[str, dict[str, np.ndarray]]) -> str:
        """Why no curve passes what was measured on the most ranks; "" if one does, or nothing was."""
        row = max(self.measured, key=lambda row: row["ranks"], default={"ranks": 1})
        if row["ranks"] == 1:
            return ""
        place, value = np.searchsorted(self.ranks, row["ranks"]), row["efficiency"]
        ends = [[columns[f"efficiency{end}"][place] for end in ("_low", "", "_high")] for columns in curves.values()]
        if any(low <= value <= high for low, _middle, high in ends):
            return ""
        nearest = min((middle for _low, middle, _high in ends), key=lambda other: abs(other - value))
        return _(
            "No curve passes through the star at {ranks} ranks: it was measured with this machine's own network and"
            " batch ({value:.2f}), but the curves use those of the sliders (the nearest: {nearest:.2f}).",
            ranks=row["ranks"],
            value=value,
            nearest=nearest,
        )


class Planner(Drawn):
    """Sliders for a large model and the GPUs there are, and the layouts that train it fastest, with their memory.

    Parameters
    ----------
    models : dict of str to forecast.Transformer, optional
        By the name to show. Default: four from 1 to 80 G parameters.
    """

    MODELS = ultrascale.MODELS | {
        "8B": Transformer(32, 4096, 32, 14336, 131_072, 4096, tied=False, kv_heads=8),
        "80B": Transformer(80, 8192, 64, 28672, 131_072, 4096, tied=False),
    }

    def __init__(self, models: dict[str, Transformer] | None = None) -> None:
        self.models = models or self.MODELS
        powers = [2**power for power in range(17)]
        everything = [((0, 1), (None,)), ((0, 1, 2, 3), (None,)), ((0, 1, 2, 3), (None, "full"))]
        names = ("ZeRO 0-1", "ZeRO 0-3", _("ZeRO 0-3, computing again"))
        slider = ipywidgets.SelectionSlider
        sliders = {
            "model": slider(options=[*self.models], description=_("model")),
            "sequence": slider(options=powers[9:], value=4096, description=_("tokens a sequence")),
            "batch": slider(options=powers[3:13], value=256, description=_("sequences a batch")),
            "gpus": slider(options=powers[:11], value=64, description=_("GPUs")),
            "memory": slider(options=[24, 40, 80, 141, 192], value=80, description=_("GB of a GPU")),
            "tried": slider(options=[*zip(names, everything, strict=True)], description=_("allowed")),
        }
        super().__init__(sliders)

    def worked_out(self) -> list[dict]:
        """The five fastest layouts, at the sliders' values; see `forecast.plan`."""
        name, sequence, batch, gpus, _memory, (zero, recompute) = (slider.value for slider in self.sliders.values())
        model = dataclasses.replace(self.models[name], sequence=sequence)
        gpu = dataclasses.replace(H100, memory_bytes=self.limit_bytes())
        return plan(model, gpus, batch, gpu, zero=zero, recompute=recompute)

    def limit_bytes(self) -> float:
        """Memory of a GPU, which has more than its name says, as an H100 of 80 GB does."""
        return self.sliders["memory"].value / 80 * H100.memory_bytes

    def picture(self, rows: list[dict]) -> str:
        if not rows:
            return ""
        shown = Figure(figsize=(7, 3.2), layout="constrained")
        course_plots.memory(rows, self.limit_bytes(), shown.subplots())
        return shown.picture()

    def table(self, rows: list[dict]) -> Table:
        """A row a layout: its groups, and forecasts with the ends of their bands."""
        ends = ("", "_low", "_high")
        return Table(
            {name: row[name] for name in ("dp", "tp", "pp", "zero")}
            | {_("micro-batches"): f"{row['accumulation']} x {row['micro_batch']}"}
            | {_("computing again"): _("yes") if row["recompute"] else ""}
            | {"GB": "{:.0f} ({:.0f}-{:.0f})".format(*(row[f"memory_bytes{end}"] / 1e9 for end in ends))}
            | {_("tokens a second"): "{:,.0f} ({:,.0f}-{:,.0f})".format(*(row[f"tokens_per_s{end}"] for end in ends))}
            | {"MFU": f"{row['mfu']:.0%}"}
            for row in rows
        )

    def words(self, rows: list[dict]) -> str:
        if not rows:
            return html("<p>{{ text }}</p>", text=_("Nothing fits: take more GPUs or memory, or allow more."))
        above = any(row["memory_bytes"] > self.limit_bytes() for row in rows)
        remark = _(
            "Up to a tenth above a GPU's memory counts as fitting, if weights, gradients and the optimiser's state fit:"
            " near the limit, runs needed less than forecast."
        )
        return html(
            "{{ table }}{% if above %}<p>{{ remark }}</p>{% endif %}",
            table=markup(self.table(rows)),
            above=above,
            remark=remark,
        )


def _steps(powers: range, units: dict[int, str], value: float, name: str) -> ipywidgets.SelectionSlider:
    """A slider over 1, 2 and 5 times each power of ten and ten times the last, in the units that start at a power."""
    options = []
    for power, times in [*((power, times) for power in powers for times in (1, 2, 5)), (powers[-1] + 1, 1)]:
        unit = max(start for start in units if start <= power)
        options.append((f"{times * 10 ** (power - unit)} {units[unit]}", float(f"{times}e{power}")))
    return ipywidgets.SelectionSlider(options=options, value=value, description=name)
