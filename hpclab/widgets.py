"""Controls of the notebooks. The kernel's state is the truth: with nobody clicking, Run All works and makes sense."""

from typing import Any

import ipywidgets
from distributed import Client
from IPython.display import HTML, DisplayHandle, display

from hpclab import racing
from hpclab.language import translate as _
from hpclab.tables import markup
from hpclab.training import Model


class RaceStage:
    """A prediction to make, and a race to start by `run` or by the button, as often as one likes.

    Shows a slider for the predicted speed-up and a button. What a race shows is an ordinary output, below the button or
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
        self.button.on_click(lambda button: self._race())
        self.figure = racing.LiveFigure()
        self.text: DisplayHandle | None = None

    def _ipython_display_(self) -> None:
        display(ipywidgets.HBox([self.guess, self.button]))
        hint = display(HTML(_("Press the button, or run the next cell.")), display_id=True)
        self.figure, self.text = racing.LiveFigure(hint), display(HTML(""), display_id=True)

    def run(self) -> None:
        """Race, and show it as an output of this cell."""
        self.figure = racing.LiveFigure()
        self.text = None
        self._race()

    def _race(self) -> None:
        self.button.disabled = True
        try:
            self.result = racing.race(*self.arguments, show=self.figure, **self.settings)
            self._tell(self.result)
        finally:
            self.button.disabled = False

    def _tell(self, result: racing.Race) -> None:
        trials = result.trials()
        measured = trials[0]["train_s"] / trials[-1]["train_s"]
        told = _("You predicted {guess:.1f}; this race says {measured:.2f}.", guess=self.guess.value, measured=measured)
        shown = HTML(f"{markup(result.table())}<p><strong>{told}</strong> {result.verdict()}</p>")
        if self.text is None:
            self.text = display(shown, display_id=True)
        else:
            self.text.update(shown)
