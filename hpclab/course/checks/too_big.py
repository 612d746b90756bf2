"""Checks of the notebook *too-big*: choices for planted models and budgets, beside those of each misconception."""

import random
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from hpclab.course import quizzes
from hpclab.course.questions import Numbers, Truths, numbers, statements
from hpclab.course.verdicts import Result, call, dice, exercise, failed, passed, reject
from hpclab.language import translate as _

OPTIONS = ("ddp", "zero1", "zero3", "zero3+recompute")
"""The cheapest first."""
NONE = "none"
CASES = 60


@dataclass(frozen=True)
class _Case:
    """What the function is given."""

    budget: float
    ranks: int
    parameters: int
    layers: int
    width: int
    batch: int
    sequence: int


Parts = dict[str, float]
"""Bytes of weights, gradients, optimiser and activations."""
Count = Callable[[str, _Case], Parts]


@exercise("too-big.cheapest")
def _cheapest(choose: object) -> Result:
    cases = _cases()
    right = [_choice(_need, case) for case in cases]
    chosen = [_name(call(choose, *astuple(case))) for case in cases]
    if chosen == right:
        return passed(_("The cheapest that fits, for every model and budget; and none where none fits."))
    for message, choices in _misconceptions(cases).items():
        if chosen == choices:
            return failed(message)
    case, name, best = next(three for three in zip(cases, chosen, right, strict=True) if three[1] != three[2])
    values = {"right": sum(map(str.__eq__, chosen, right)), "of": CASES, "name": name, "budget": case.budget / 1e9}
    if name != NONE and (need := sum(_need(name, case).values())) > case.budget:
        return failed(
            _(
                "{right} of {of} choices are right. Another, {name}, needs {need:.3g} GB of a budget of {budget:.3g}.",
                need=need / 1e9,
                **values,
            )
        )
    return failed(
        _(
            "{right} of {of} choices are right. In place of {name}, {best} would fit and be cheaper.",
            best=best,
            **values,
        )
    )


def _need(option: str, case: _Case) -> Parts:
    """Bytes of a rank, as the notebook counts them."""
    weights, ranks = 4.0 * case.parameters, case.ranks
    tokens = case.batch * case.sequence / ranks
    kept = 64.0 * case.layers * case.width * tokens
    return {
        "weights": weights / (ranks if option.startswith("zero3") else 1),
        "gradients": weights / (ranks if option.startswith("zero3") else 1),
        "optimiser": 2 * weights / (1 if option == "ddp" else ranks),
        "activations": kept / 16 + kept / case.layers if option == "zero3+recompute" else kept,
    }


def _choice(count: Count, case: _Case) -> str:
    """The cheapest option that fits, if needs are counted so."""
    return next((option for option in OPTIONS if sum(count(option, case).values()) <= case.budget), NONE)


def _misconceptions(cases: list[_Case]) -> dict[str, list[str]]:
    """The message to each misconception, and the choices that it leads to."""

    def by(change: Callable[[str, _Case, Parts], Parts]) -> list[str]:
        return [_choice(lambda option, case: (parts := _need(option, case)) | change(option, case, parts), case)
                for case in cases]  # fmt: skip

    def activations(factor: Callable[[str, _Case], float]) -> list[str]:
        return by(lambda option, case, parts: {"activations": parts["activations"] * factor(option, case)})

    right = [_choice(_need, case) for case in cases]
    fitting = [[option for option in OPTIONS if sum(_need(option, case).values()) <= case.budget] for case in cases]
    return {
        _("Activations hardly count in your choices: they grow with batch and sequence, up to most of the memory."): by(
            lambda option, case, parts: {"activations": 0}
        ),
        _("ZeRO shards no activations: each rank keeps those of its own sequences, whole."): activations(
            lambda option, case: 1 if option == "ddp" else 1 / case.ranks
        ),
        _("You gave every rank the whole batch: each has its share of the sequences."): activations(
            lambda option, case: case.ranks
        ),
        _("Computing again isn't free of activations: each block's input stays, and one block is whole at a time."): by(
            lambda option, case, parts: {"activations": 0} if option.endswith("recompute") else {}
        ),
        _("You counted weights alone: gradients and the optimiser's state take three times as much again."): by(
            lambda option, case, parts: {"gradients": 0, "optimiser": 0, "activations": 0}
        ),
        _("Stage 1 of ZeRO shards the optimiser's state only: its gradients are whole."): by(
            lambda option, case, parts: {"gradients": parts["gradients"] / (case.ranks if option == "zero1" else 1)}
        ),
        _("Your choices fit, but they are the dearest that do: a cheaper one is enough."): [
            options[-1] if options else NONE for options in fitting
        ],
        _("Where nothing fits you still chose something; the answer is 'none'."): [
            OPTIONS[-1] if choice == NONE else choice for choice in right
        ],
    }


def _cases() -> list[_Case]:
    """Models and budgets, for each option about as many as for no option at all."""
    hidden = dice("too-big.cheapest")
    return [_case(hidden, place % (len(OPTIONS) + 1)) for place in range(CASES)]


def _case(hidden: random.Random, place: int) -> _Case:
    """One whose right choice is the option at a place, or none."""
    layers, width, ranks = hidden.randint(6, 48), 128 * hidden.randint(4, 48), hidden.choice((2, 4, 8, 16))
    batch, sequence = ranks * hidden.randint(1, 8), 512 * hidden.randint(1, 8)
    model = _Case(0, ranks, 12 * layers * width**2, layers, width, batch, sequence)
    needs = [sum(_need(option, model).values()) for option in OPTIONS]
    ends = [1.5 * needs[0], *needs, 0.5 * needs[-1]]
    share = hidden.uniform(0.1, 0.9)
    budget = share * ends[place] + (1 - share) * ends[place + 1]
    return _Case(budget, *astuple(model)[1:])


def _name(returned: Any) -> str:
    if not isinstance(returned, str) or returned not in (*OPTIONS, NONE):
        names = ", ".join(map(repr, (*OPTIONS, NONE)))
        reject(_("The function must return one of {names}, not {returned!r}.", names=names, returned=returned))
    return returned


@statements("too-big.quiz_bubble")
def _bubble() -> Truths:
    rows = quizzes.PIPELINE
    ranks, count = (
        len({row["rank"] for row in rows}),
        sum(row["rank"] == 0 and row["name"] == "forward" for row in rows),
    )
    busy = sum(row["duration_s"] for row in rows)
    end = max(row["start_s"] + row["duration_s"] for row in rows)
    backward = min(row["start_s"] for row in rows if row["rank"] == 0 and row["name"] == "backward")
    before = sum(row["rank"] == 0 and row["name"] == "forward" and row["start_s"] < backward for row in rows)
    truths = {
        "a": bool(np.isclose(1 - busy / (ranks * end), 1 / 3)),
        "b": bool(np.isclose((ranks - 1) / (3 * count + ranks - 1), 1 / 7)),
        "c": before == count,
        "d": False,
        "e": False,
        "f": False,
    }
    return truths, {
        "d": _("One forward, one backward has the same bubble as this schedule: what it saves is memory."),
        "e": _("More stages take longer to fill and to drain: with as many micro-batches the bubble grows."),
        "f": _("The bubble lasts as long as it takes to fill and drain the pipeline; its share falls with more parts."),
    }


@numbers("too-big.quiz_memory")
def _memory() -> Numbers:
    states, activations, gpus = 16 * 12, 20, 8
    weights = 2 * 12
    return (states + activations, states / gpus + activations), [
        (
            (states + activations, (states + activations) / gpus),
            _("ZeRO shards no activations: each rank keeps those of its own sequences, whole."),
        ),
        (
            (states, states / gpus),
            _("You counted no activations: batch and sequence fill memory too."),
        ),
        (
            (weights + activations, weights / gpus + activations),
            _("You counted weights alone: they are 2 of the 16 bytes."),
        ),
        (
            (states / gpus + activations, states / gpus + activations),
            _("Data parallelism shards nothing: each GPU holds all 16 bytes a parameter."),
        ),
    ]
