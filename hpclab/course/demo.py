"""The main job, in a minute: look at the machine, race 1 rank against 2, measure, and leave a page of it."""

import itertools
import time
from pathlib import Path

from distributed import Client

from hpclab import doctor, machine, models, plots, racing, scaling, study
from hpclab._arguments import whole_number
from hpclab.cluster import connect
from hpclab.figures import Figure, source_word
from hpclab.gangs.record import occupy
from hpclab.gangs.run import Run
from hpclab.language import translate as _
from hpclab.pages import HEADING, html
from hpclab.rows import line
from hpclab.tables import Table, markup
from hpclab.training.start import train

STEPS = 15
"""Steps of a run of the sweep."""


def demo(folder: str | None = None, epochs: int = 3, repeats: int = 2) -> Path:
    """Run the demo, tell its story in the terminal, and return the folder of results.

    Parameters
    ----------
    folder : path, optional
        Takes ``rows.jsonl``, ``figure.png``, ``index.html`` and the runs; new or empty. Default:
        ``results/<time>-demo``.
    epochs : int, default 3
        Epochs of each racer.
    repeats : int, default 2
        Rounds of the sweep.
    """
    epochs, repeats = whole_number("epochs", epochs), whole_number("repeats", repeats)
    place = occupy(folder or Path("results", time.strftime("%Y%m%d-%H%M%S") + "-demo"))
    findings = doctor.examine()
    print(f"{_('This machine')}\n\n{findings}\n\n{doctor.advice()}\n")
    with connect(workers=max(2, machine.fits())) as client:
        print(_("The race: {epochs} epochs of Fashion-MNIST, the same batches for all", epochs=epochs) + "\n")
        race = racing.race(client, models.CNN, "fashion_mnist", epochs=epochs, folder=place / "race")
        print(f"\n{race.table()}\n\n{race.verdict()}\n")
        print(_("The measurement: {repeats} repeats of {steps} steps, in turn", repeats=repeats, steps=STEPS) + "\n")
        rows = _sweep(client, place, repeats)
    measured = scaling.summary(rows)
    table, headline = _compare(measured, race), _headline(measured[-1], race)
    print(f"\n{table}\n")
    shown = _figure(race, measured)
    shown.savefig(place / "figure.png", dpi=120)
    raced = [row | {"kind": "race"} for row in race.trials()]  # not rounds of the sweep, which are of kind "trial"
    with open(place / "rows.jsonl", "w", encoding="utf-8") as file:
        file.writelines(line(row) for row in [*raced, *rows])
    _page(place, findings, race, (headline, table), shown)
    print(f"{headline}\n")
    print(_("Results: {folder}", folder=place / "index.html"))
    print(_("Next: hpclab lab opens the course; its first notebook lets you predict, and then race."))
    return place


def _sweep(client: Client, place: Path, repeats: int) -> list[dict]:
    number = itertools.count()

    def job(client: Client, ranks: int, threads: int, oversubscribe: bool = False) -> Run:
        return train(
            client,
            models.CNN,
            "fashion_mnist",
            ranks=ranks,
            threads=threads,
            oversubscribe=oversubscribe,
            batch_size=racing.BATCH // ranks,
            steps=STEPS,
            folder=place / "sweep" / str(next(number)),
            progress=False,
        )

    return scaling.sweep(client, job, cases=racing.racers(), repeats=repeats)


def _compare(measured: list[dict], race: racing.Race) -> Table:
    accuracy = {trial["label"]: trial["accuracy"] for trial in race.trials()}
    return Table(
        {
            _("ranks"): row["ranks"],
            _("threads a rank"): row["threads"],
            _("samples a second"): f"{row['samples_per_s']:,.0f}",
            _("speed-up"): f"{row['speedup']:.2f} ({row['speedup_low']:.2f}-{row['speedup_high']:.2f})",
            _("efficiency"): f"{row['efficiency']:.2f}",
            _("test accuracy"): f"{accuracy[row['label']]:.3f}",
            _("source"): source_word(row["source"]),
        }
        for row in measured
    )


def _headline(most: dict, race: racing.Race) -> str:
    """The result in a sentence, and why the race says another number."""
    first, *_others, last = race.trials()
    return _(
        "{label}: {speedup:.2f} times as fast as {baseline}, the median of {repeats} rounds in turn"
        " ({speedup_low:.2f} to {speedup_high:.2f}; {source}). The race says {raced:.2f}: it ran each once, one after"
        " the other, so it includes whatever else the machine did, and the tests between epochs.",
        baseline=first["label"],
        raced=first["train_s"] / last["train_s"],
        source=source_word(most["source"]),
        **{name: most[name] for name in ("label", "repeats", "speedup", "speedup_low", "speedup_high")},
    )


def _figure(race: racing.Race, measured: list[dict]) -> Figure:
    shown = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = shown.subplots(1, 2, width_ratios=(1.3, 1))
    plots.loss(racing.lines(race.runs), left)
    plots.speedup(measured, right)
    return shown


def _page(place: Path, findings: Table, race: racing.Race, measured: tuple[str, Table], shown: Figure) -> None:
    headline, table = measured
    parts = [
        html("<p><strong>{{ headline }}</strong></p>", headline=headline),
        shown.picture(),
        html(HEADING, text=_("The measurement")),
        markup(table),
        html(HEADING, text=_("The race")),
        markup(race.table()),
        html("<p>{{ verdict }}</p>", verdict=race.verdict()),
        html(HEADING, text=_("This machine")),
        markup(findings),
        html("<p>{{ text }} <a href='rows.jsonl'>rows.jsonl</a></p>", text=_("All rows:")),
    ]
    (place / "index.html").write_text(study.page("hpclab: " + _("1 rank against 2"), parts), encoding="utf-8")
