"""Check of the notebook *one-process*: what binds a program is planted, and measured before it judges."""

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hpclab.course import quizzes
from hpclab.course.questions import Numbers, Truths, numbers, statements
from hpclab.course.verdicts import Result, call, dice, exercise, failed, inconclusive, passed, reject
from hpclab.language import translate as _

MARGIN = 2.0
"""By how much this machine must tell a program's kind, before an answer is judged by it."""


@exercise("one-process.bottleneck", imports=("hpclab.bottlenecks", "hpclab.roofline"))
def _bottleneck(diagnose: object) -> Result:
    with _one_thread():
        ridge, named, planted, doubt = None, [], [], None
        for kinds, programs in _draws():
            names = _names(call(diagnose, list(programs)), len(programs))
            ridge = ridge or _ridge()
            for kind, program in zip(kinds, programs, strict=True):
                doubt = doubt or _doubt(kind, program, ridge)
            named += names
            planted += kinds
            same = {name for name, kind in zip(names, kinds, strict=True) if kinds.count(kind) > 1}
            if len(same) > 1 and doubt is None:
                return failed(
                    _(
                        "You gave one program two names, one for a short run and one for a long run: how long a run"
                        " takes doesn't say what it waits for."
                    )
                )
    if named == planted and doubt is None:
        return passed(
            _(
                "You named what binds each of the {count} programs; the measured shares and counts agree.",
                count=len(named),
            )
        )
    if doubt is not None:
        return inconclusive(
            _(
                "What was measured here can't tell the planted programs apart: {doubt}. Run the cell again when this"
                " machine is less busy.",
                doubt=doubt,
            )
        )
    return failed(_mistake(named, planted))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Whatever the notebook has set: a ceiling of one thread, and operations with one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _draws() -> Iterator[tuple[list[str], list]]:
    """Kinds and their programs, three at a time: each kind once, then one of them twice, of two lengths."""
    from hpclab.course.bottlenecks import KINDS, planted

    hidden = dice("one-process.bottleneck")
    kinds = hidden.sample(KINDS, 3)
    yield kinds, [planted(kind, hidden, product=True) for kind in kinds]  # so the operations' names don't tell
    twice, other = hidden.sample(KINDS, 2)
    seed = hidden.random()
    programs = [(twice, planted(twice, random.Random(seed), batches, product=False)) for batches in (1, 12)]
    programs.insert(hidden.randint(0, 2), (other, planted(other, hidden, batches=4, product=False)))
    yield [kind for kind, _program in programs], [program for _kind, program in programs]


def _names(returned: Any, count: int) -> list[str]:
    from hpclab.course.bottlenecks import KINDS

    if not isinstance(returned, list | tuple) or len(returned) != count:
        reject(
            _(
                "The function must return a list of {count} names, one for each program, not {returned!r}.",
                count=count,
                returned=returned,
            )
        )
    if strange := [name for name in returned if name not in KINDS]:
        reject(
            _("A name must be one of {kinds}, not {strange!r}.", strange=strange[0], kinds=", ".join(map(repr, KINDS)))
        )
    return list(returned)


def _ridge() -> float:
    from hpclab.course import roofline

    return roofline.ceilings(megabytes=32)["ridge"]


def _doubt(kind: str, program: Any, ridge: float) -> str | None:
    """Why this machine doesn't show what was planted, if so: too small a margin."""
    from hpclab.course import roofline

    loads, works = zip(*(_split(program) for _turn in range(3)), strict=True)
    loading = statistics.median(loads) / statistics.median(works)
    flops, nbytes = roofline.count(program.work, program.load())
    beyond = flops / nbytes / ridge
    if loading < MARGIN if kind == "data" else loading > 1 / MARGIN:
        return _("one loads for {ratio:.2g} times as long as it works", ratio=loading)
    if kind != "data" and (beyond < MARGIN if kind == "compute" else beyond > 1 / MARGIN):
        return _("one has an intensity of {ratio:.2g} times the ridge's", ratio=beyond)
    return None


def _split(program: Any) -> tuple[float, float]:
    """Seconds of a load, and of the work on it."""
    begun = time.perf_counter()
    batch = program.load()
    loaded = time.perf_counter()
    program.work(batch)
    return loaded - begun, time.perf_counter() - loaded


def _mistake(named: list[str], planted: list[str]) -> str:
    if len(set(named)) == 1:
        return _("You gave all programs the same name, but they aren't all bound by the same thing.")
    wrong = {pair for pair in zip(planted, named, strict=True) if pair[0] != pair[1]}
    if {("compute", "memory"), ("memory", "compute")} <= wrong:
        return _("Compute and memory are swapped: on which side of the ridge does a program wait for bytes?")
    if any(kind == "data" for kind, _name in wrong):
        return _(
            "You named a program by what its operations need, but most of its step isn't spent on them: time the two"
            " parts of a step separately."
        )
    if any(name == "data" for _kind, name in wrong):
        return _("You named a program 'data', but it gets its batch at once: loading is a small share of its step.")
    if ("memory", "compute") in wrong:
        return _(
            "You named a program 'compute', but it does few operations with each byte. A busy CPU may be waiting for"
            " memory, even in a matrix product."
        )
    return _(
        "You named a program 'memory', but it does many operations with each byte: moving a lot isn't the same as"
        " waiting for it."
    )


@statements("one-process.quiz_roofline")
def _roofline() -> Truths:
    ceiling, rows = quizzes.CEILING, {row["name"]: row for row in quizzes.PROGRAMS}

    def roof(name: str, memory: float = 1.0) -> float:
        return min(ceiling["flops_per_s"], memory * ceiling["bytes_per_s"] * rows[name]["intensity"])

    gains = {name: roof(name, memory=2.0) / roof(name) for name in rows}
    shares = {name: row["flops_per_s"] / roof(name) for name, row in rows.items()}
    truths = {
        "a": rows["A"]["intensity"] < ceiling["ridge"] and shares["A"] > 0.8,
        "b": gains["A"] == 2,
        "c": gains["B"] > 1,
        "d": rows["C"]["intensity"] < ceiling["ridge"],
        "e": shares["A"] < shares["C"],
        "f": min(shares, key=lambda name: shares[name]) == "C",
    }
    return truths, {
        "c": _("To the right of the ridge the roof is flat: more bytes a second don't raise it."),
        "d": _("Bandwidth limits what lies left of the ridge; a point far below both ceilings is limited by neither."),
        "e": _("Compare each with its own roof: a low rate can be all that memory allows."),
    }


@numbers("one-process.quiz_split")
def _parts() -> Numbers:
    parts = {row["part"]: row["milliseconds"] for row in quizzes.STEP}
    before = sum(parts.values())
    after = parts | {"data": 0.0, "backward": parts["backward"] / 2}
    return (before / sum(after.values()),), [
        ((2.0,), _("Making one part twice as fast doesn't make the whole step twice as fast.")),
        (
            (before / (before - parts["backward"] / 2),),
            _("What about the data, which are loaded while the step computes?"),
        ),
        ((before / (before - parts["data"]),), _("What about the backward pass?")),
        (
            (sum(after.values()) / before,),
            _("That is the share of the time that is left; how many times as fast is the step?"),
        ),
    ]
