"""The race: the same training by one rank, by one process with all threads, and by two ranks, watched as it goes."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed import Client
from IPython.display import display
from tqdm import tqdm

from hpclab import live, machine, plots, scaling
from hpclab.figures import Figure, source_word
from hpclab.gangs.launch import gang_size
from hpclab.gangs.run import Run
from hpclab.language import translate as _
from hpclab.pages import Prose
from hpclab.rows import attempts, source
from hpclab.tables import Table
from hpclab.training.start import Model, train

Rows = list[dict]
Show = Callable[[dict[str, Rows]], None]

EPOCHS = 3
BATCH = 192
"""Samples a step, over all ranks. Smaller ones spend a larger part of each step on talking, larger ones learn less
from an epoch."""

BUSY = 0.1
"""Which share of its steps a lone rank must wait for a CPU until we say that others use this machine."""
CHECKPOINT_EVERY, RESTARTS = 20, 100
"""Steps between a racer's checkpoints, and how often it may go on after somebody has killed one of its ranks."""


@dataclass
class Race:
    """How a race went."""

    runs: dict[str, Rows] = field(default_factory=dict)
    """Rows of each racer by its label, in the order of the start."""

    def trials(self) -> Rows:
        """One row a racer; see `scaling.trial`.

        ``train_s`` leaves out what failures cost; ``lost_s`` has it: the seconds from the last step that counts to the
        first one of the next attempt.
        """
        return [_undisturbed(rows) for rows in self.runs.values()]

    def table(self) -> Table:
        """One row a racer, worded for showing."""
        trials = self.trials()
        failed = any(trial["lost_s"] for trial in trials)
        return Table(
            {
                _("racer"): trial["label"],
                _("training (s)"): f"{trial['train_s']:.1f}",
                **({_("lost to failures (s)"): f"{trial['lost_s']:.1f}"} if failed else {}),
                _("times as fast"): f"{trials[0]['train_s'] / trial['train_s']:.2f}",
                _("samples a second"): f"{trial['samples_per_s']:,.0f}",
                _("start-up (s)"): f"{trial['start_s']:.2f}",
                _("last loss"): f"{trial['loss']:.3f}",
                _("test accuracy"): "" if trial["accuracy"] is None else f"{trial['accuracy']:.3f}",
                _("source"): source_word(trial["source"]),
            }
            for trial in trials
        )

    def verdict(self) -> Prose:
        """What this race shows, and what this machine can't show, in a few sentences."""
        trials = self.trials()
        first, last = trials[0], trials[-1]
        words = _(
            "{last} trained {ratio:.2f} times as fast as {first}; the last losses are {loss:.3f} and {other:.3f}.",
            last=last["label"],
            first=first["label"],
            ratio=first["train_s"] / last["train_s"],
            loss=last["loss"],
            other=first["loss"],
        )
        for trial in trials:
            if trial["lost_s"]:
                words += " " + _(
                    "{label} lost {seconds:.1f} s to failures; these don't count, as the others had none.",
                    label=trial["label"],
                    seconds=trial["lost_s"],
                )
        if last["source"] == "emulated":
            words += " " + _(
                "This machine gives you {cpus} CPU, so the ranks took turns on it, and no program could make them"
                " faster. The line marked 'a CPU each' counts the CPU seconds of one rank alone: what you would see"
                " with a CPU for each rank, if communication cost nothing.",
                cpus=first["cpus"],
            )
        if (waited := (first["straggle_s"] or 0.0) / first["step_s"]) > BUSY:
            words += " " + _(
                "Other programs used this machine: {label} spent {share:.0%} of its time waiting for a CPU, so expect"
                " a different ratio next time.",
                label=first["label"],
                share=waited,
            )
        return Prose(words + " " + _("One race is one measurement: repeat it before you believe the ratio."))


def race(
    client: Client,
    model: Model,
    data: str,
    *,
    epochs: int = EPOCHS,
    batch_size: int = BATCH,
    lr: float = 0.1,
    folder: str | os.PathLike | None = None,
    show: Show | None = None,
    begin: Callable[[Run], None] | None = None,
) -> Race:
    """Race the same training: one rank with one thread, one with a thread for each CPU, and two ranks.

    The racers run one after the other, because together they would compete for the CPUs. All take the same steps, on
    the same batches, from the same weights. On one CPU there is no racer with more threads, and the two ranks are
    emulated.

    Parameters
    ----------
    client : distributed.Client
        From `connect`.
    model, data
        As for `train`.
    epochs : int, default 3
        Epochs of each racer.
    batch_size : int, default 192
        Samples a step over all ranks; even. A smaller batch spends a larger part of each step on communication.
    lr : float, default 0.1
        As for `train`.
    folder : path, optional
        Gets a folder for each racer. Default: one in ``results/`` for each.
    show : callable, optional
        Called about once a second with the rows so far, by label. Default: a `LiveFigure` in a notebook, else
        `LiveText`.
    begin : callable, optional
        Called with each racer's run when it starts.

    Returns
    -------
    Race

    Raises
    ------
    ValueError
        If the batch size is odd, or an argument is wrong; see `train`.
    """
    if batch_size % 2:
        raise ValueError(f"batch_size (={batch_size}) must be even, as 2 ranks share it.")
    gang_size(client, 2, oversubscribe=True)
    result = Race()
    line = show is None and live.in_notebook()  # who shows the race otherwise says how it gets on, too
    show = show or (LiveFigure() if live.in_notebook() else LiveText(epochs))

    def job(client: Client, ranks: int, threads: int, oversubscribe: bool = False) -> Run:
        run = train(
            client,
            model,
            data,
            ranks=ranks,
            threads=threads,
            checkpoint_every=CHECKPOINT_EVERY,
            max_restarts=RESTARTS,
            oversubscribe=oversubscribe,
            batch_size=batch_size // ranks,
            epochs=epochs,
            lr=lr,
            folder=None if folder is None else Path(folder, f"{ranks}-ranks-{threads}-threads"),
            name="race",
            progress=False,
        )
        if begin is not None:
            begin(run)
        return run

    def watch(label: str, rows: Rows) -> None:
        result.runs[label] = rows
        show(result.runs)

    scaling.sweep(client, job, cases=racers(), repeats=1, seed=None, progress=line, title=_("race"), watch=watch)
    return result


def _undisturbed(rows: Rows) -> dict:
    """A racer's trial, in whose time failures aren't counted."""
    trial = scaling.trial(rows)
    lost_s = sum(row["lost_s"] + row["restart_s"] for row in attempts(rows))
    return trial | {"train_s": trial["train_s"] - lost_s, "lost_s": lost_s}


def racers() -> list[dict]:
    """The racers on this machine: one rank, one rank with a thread for each CPU if there are several, two ranks."""
    cpus = machine.cpus()
    threaded = [{"ranks": 1, "threads": cpus}] if cpus > 1 else []
    return [{"ranks": 1, "threads": 1}, *threaded, {"ranks": 2, "threads": 1, "oversubscribe": cpus < 2}]


def own_cpu(rows: Rows) -> Rows:
    """The rows of a run on a clock that counts only each rank's own CPU seconds: as if each had a CPU for itself."""
    clock: dict[int, float] = {}
    moved = []
    for row in sorted(rows, key=lambda row: row.get("time_s", 0.0)):
        if row["kind"] in ("restart", "checkpoint"):  # their seconds are those of another clock
            continue
        if row["kind"] == "step":
            clock[row["rank"]] = clock.get(row["rank"], 0.0) + row["cpu_s"]
            row = row | {"time_s": clock[row["rank"]], "step_s": row["cpu_s"]}
        moved.append(row)
    return moved


class LiveFigure:
    """Loss against seconds, in a notebook, redrawn in the place where it was first shown.

    A call draws if the one before has left time enough (see `live.pause`), and always when a racer has ended.

    Parameters
    ----------
    handle : IPython.display.DisplayHandle, optional
        That place. Default: the output of the cell at the first call.
    """

    def __init__(self, handle: Any = None) -> None:
        self.handle = handle
        self.due = 0.0

    def __call__(self, runs: dict[str, Rows]) -> None:
        newest = next(reversed(runs.values()))
        if time.monotonic() < self.due and newest[-1]["kind"] != "end":  # how a racer ends is always drawn
            return
        started = time.monotonic()
        page = live.drawn(lambda: figure(runs).picture())  # a figure that can't be drawn ends no race
        if self.handle is None:
            self.handle = display(live.sendable(page), display_id=True)
        else:
            live.put(self.handle, page)
        self.due = time.monotonic() + live.pause(started)


class LiveText:
    """A progress bar a racer, with its loss, in the terminal."""

    def __init__(self, epochs: int):
        self.epochs = epochs
        self.bars: dict[str, tqdm] = {}

    def __call__(self, runs: dict[str, Rows]) -> None:
        label, rows = next(reversed(runs.items()))
        if label not in self.bars:
            self.bars[label] = tqdm(
                total=self.epochs, desc=f"{label:18}", unit="epoch", bar_format="{desc} {bar:30} {postfix}"
            )
        bar = self.bars[label]
        seconds, losses = plots.loss_curve(rows)
        bar.n = len({row["epoch"] for row in rows if row["kind"] == "epoch"})
        bar.set_postfix_str(
            f"epoch {bar.n}/{self.epochs}, loss {losses[-1]:.3f} after {seconds[-1]:.1f} s" if losses else "starting"
        )
        if bar.n == self.epochs:
            bar.close()


def figure(runs: dict[str, Rows]) -> Figure:
    """The race as a figure: loss against seconds of training, a line a racer."""
    shown = Figure(figsize=(7, 4), layout="constrained")
    plots.loss(lines(runs), shown.subplots())
    return shown


def lines(runs: dict[str, Rows]) -> dict[str, Rows]:
    """The lines of the race's figure; where ranks took turns on a CPU, also what a CPU for each would show."""
    shown = {}
    for label, rows in runs.items():
        shown[label] = rows
        if source(rows) == "emulated":
            shown[_("{label}, a CPU each", label=label)] = own_cpu(rows)
    return shown
