"""Check of the notebook *start*: gangs that just fit planted machines."""

from collections.abc import Iterator
from operator import index
from typing import Any

from hpclab import machine
from hpclab.course import quizzes
from hpclab.course.questions import Numbers, Truths, numbers, statements
from hpclab.course.verdicts import Result, call, dice, exercise, failed, passed, reject
from hpclab.language import translate as _


@exercise("start.gang")
def _gang(largest_gang: object) -> Result:
    machines = list(_machines())
    answers = [_ranks(call(largest_gang, *one)) for one in machines]
    if answers == [_largest(*one) for one in machines]:
        return passed(_("On each of these machines your gang fits, and one rank more wouldn't."))
    if len(set(answers)) == 1:
        return failed(_("Your function gives the same answer for every machine: use its arguments."))
    for message, misconceived in _misconceptions(machines[:-1]).items():
        if answers[:-1] == misconceived:
            return failed(message)
    if min(answers) < 0:
        return failed(_("Where not even the notebook and the scheduler fit, the answer is 0, and not below."))
    for one, answer in zip(machines, answers, strict=True):
        values = {"answer": answer, "cpus": one[0], "gib": one[1] / 2**30}
        if answer < _largest(*one):
            return failed(
                _(
                    "{cpus} CPUs and {gib:.1f} GiB: {answer} isn't the largest; part of the machine stays idle.",
                    **values,
                )
            )
        if answer > _largest(*one):
            return failed(
                _(
                    "{cpus} CPUs and {gib:.1f} GiB: {answer} is too large; ranks wait, or memory runs out.",
                    **values,
                )
            )
    raise AssertionError("an answer to each machine is the largest, too small or too large")


def _machines() -> Iterator[tuple[int, int]]:
    """CPUs and bytes: few CPUs, little memory (twice), room for one rank, room for none, and last for no notebook."""
    hidden = dice("start.gang")
    for cpus, ranks in ((4, 30), (48, 9), (16, 5), (8, 1), (2, 0)):
        beyond = hidden.uniform(
            0.82, 0.95
        )  # the part of a rank that makes it a whole one if rounded, or without the base
        yield cpus + hidden.randint(0, 2), machine.BASE_MEMORY + int((ranks + beyond) * machine.RANK_MEMORY)
    yield 4, machine.BASE_MEMORY // 2


def _largest(cpus: int, memory: int) -> int:
    """By counting up, as long as one more fits."""
    ranks = 0
    while ranks < cpus and machine.BASE_MEMORY + (ranks + 1) * machine.RANK_MEMORY <= memory:
        ranks += 1
    return ranks


def _misconceptions(machines: list[tuple[int, int]]) -> dict[str, list[int]]:
    """The message to each misconception, and the ranks that it gives for the machines."""
    by_memory = [(memory - machine.BASE_MEMORY) / machine.RANK_MEMORY for _cpus, memory in machines]
    cpus = [cpus for cpus, _memory in machines]
    both = list(zip(cpus, by_memory, strict=True))
    return {
        _("There are enough CPUs but not enough memory: each rank needs its own share of it."): cpus,
        _("There is enough memory, but some ranks have no CPU of their own."): [int(ranks) for ranks in by_memory],
        _("Both limits hold at once, and you took the looser one."): [max(cpus, int(ranks)) for cpus, ranks in both],
        _("The notebook and the scheduler need memory too, even before the first rank."): [
            min(cpus, memory // machine.RANK_MEMORY) for cpus, memory in machines
        ],
        _("Rounded up: the last rank has only part of the memory that it needs."): [
            min(cpus, -int(-ranks // 1)) for cpus, ranks in both
        ],
        _("You answered one rank where there isn't memory for even one."): [
            max(1, min(cpus, int(ranks))) for cpus, ranks in both
        ],
    }


def _ranks(returned: Any) -> int:
    try:
        if isinstance(returned, bool):
            raise TypeError
        return index(returned)
    except TypeError:
        reject(_("The function must return a whole number of ranks (an int), not {returned!r}.", returned=returned))


@statements("start.quiz_race")
def _race() -> Truths:
    one, threads, ranks = quizzes.RACE
    fold = one["seconds to loss 0.4"] / ranks["seconds to loss 0.4"]
    threads_fold = one["seconds to loss 0.4"] / threads["seconds to loss 0.4"]
    truths = {
        "a": fold == 3,
        "b": fold / ranks["CPUs"] == 0.75,
        "c": threads["seconds to loss 0.4"] / ranks["seconds to loss 0.4"] == 3,
        "d": threads_fold / threads["CPUs"] > fold / ranks["CPUs"],
        "e": False,
        "f": False,
    }
    return truths, {
        "c": _("Compare with one process that may use the same CPUs, not with one that uses a single CPU."),
        "d": _("Efficiency is the speed-up over 1 rank, divided by the CPUs in use."),
        "e": _("The table ends at 4 CPUs; what lies beyond was neither measured nor explained by a cause."),
        "f": _("One race is one measurement: nothing shows how different the next one would be."),
    }


@numbers("start.quiz_allreduce")
def _allreduce() -> Numbers:
    held = [1.0, 2.0, 3.0, 4.0]
    for _call in range(2):
        held = [sum(held)] * len(held)
    return (held[0],), [
        ((10.0,), _("There are two calls, and the second one adds up what the first one left.")),
        ((20.0,), _("Four ranks take part in the second call, not two.")),
        ((100.0,), _("Adding four equal numbers isn't squaring one of them.")),
        ((2.5,), _("all_reduce adds; to average, divide by the number of ranks.")),
    ]
