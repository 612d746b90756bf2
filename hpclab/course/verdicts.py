"""What a check answers: a verdict with a reason; and how checks are named, and call what they check."""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from hpclab.course import fork
from hpclab.language import translate as _
from hpclab.pages import html

RESULT = (
    '<style>[data-jp-theme-light="false"] .hpclab-result > span { filter: brightness(2) }</style>'
    '<div class="hpclab-result" role="status" data-status="{{ result.status }}" '
    'style="border-left: 5px solid {{ colour }}; padding: 4px 10px">'
    '<span aria-hidden="true" style="color: {{ colour }}">{{ symbol }}</span> '
    "<strong>{{ label }}</strong>: {{ result.message }}</div>"
)


@dataclass(frozen=True)
class Result:
    """Verdict on an answer: `status` is "pass", "fail" or "inconclusive"; true only if it passed."""

    status: str
    message: str

    def __bool__(self) -> bool:
        return self.status == "pass"

    def __repr__(self) -> str:
        symbol, label, _colour = self._look()
        return f"{symbol} {label}: {self.message}"

    def _repr_html_(self) -> str:
        symbol, label, colour = self._look()
        return html(RESULT, result=self, symbol=symbol, label=label, colour=colour)

    def _look(self) -> tuple[str, str, str]:
        """Symbol, label and colour (Okabe and Ito's, told apart by colour-blind readers)."""
        return {
            "pass": ("✓", _("pass"), "#0072B2"),
            "fail": ("✗", _("fail"), "#D55E00"),
            "inconclusive": ("?", _("inconclusive"), "#CC79A7"),
        }[self.status]


class Decided(Exception):
    """Ends a check early, from any depth, with its result."""

    def __init__(self, result: Result):
        self.result = result


def passed(message: str) -> Result:
    return Result("pass", message)


def failed(message: str) -> Result:
    return Result("fail", message)


def inconclusive(message: str) -> Result:
    return Result("inconclusive", message)


def reject(message: str) -> NoReturn:
    """End the check from any depth: it has failed."""
    raise Decided(failed(message))


Check = Callable[[Any], Result]
CHECKS: dict[str, Check] = {}
"""Of the notebooks whose file of `course.checks` has been imported; `checks.find` imports one."""


def exercise(exercise_id: str, *, forked: bool = True, imports: tuple[str, ...] = ()) -> Callable[[Check], Check]:
    """Decorate the function `answer -> Result` that checks an exercise; ids are "slug.name".

    It runs in a fork, which ends with all that the reader's function does there. A check that can't (`forked=False`),
    because it starts a cluster, may still try parts of itself `apart`. What the check `imports` is imported before the
    fork, and so only once.
    """

    def register(check: Check) -> Check:
        def run(answer: Any) -> Result:
            for name in imports:
                import_module(name)
            return apart(lambda: check(answer)) if forked else check(answer)

        CHECKS[exercise_id] = run
        return check

    return register


def apart(work: Callable[[], Result]) -> Result:
    """The result of a check, or of a part of one, done in a fork: what never ends, or takes all memory, fails."""
    if not fork.possible():
        return concluded(work)

    def plain() -> list[str]:
        result = concluded(work)
        return [result.status, result.message]

    ending = fork.run(plain)
    if ending.printed:
        print(ending.printed, end="" if ending.printed.endswith("\n") else "\n")
    match ending.how:
        case "done":
            return Result(*ending.answer)
        case "patience":
            seconds = ending.seconds
            return failed(_("Your function didn't end: it was stopped after {seconds:.2g} s.", seconds=seconds))
        case "memory":
            return failed(_too_much())
    if ending.signal == signal.SIGKILL:
        return failed(_("Your function was killed; the usual reason is lack of memory."))
    if ending.signal:
        name = signal.Signals(ending.signal).name
        return failed(_("Your function crashed its own process: {signal}.", signal=name))
    return failed(_("Your function ended its own process; it should return instead."))


def concluded(work: Callable[[], Result]) -> Result:
    """The result of a check, also where it was decided early, or where the answer is too odd to be looked at."""
    try:
        return work()
    except Decided as decided:
        return decided.result
    except MemoryError:
        return failed(_too_much())
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return failed(_("The check couldn't make sense of what your function gave: {error}", error=text))


def dice(name: str) -> random.Random:
    """What draws the variants of a check: the same for all by default, others where `HPCLAB_SEED` is set to grade."""
    return random.Random(name + os.environ.get("HPCLAB_SEED", ""))


def numpy_dice(name: str) -> Any:
    """As `dice`, as a generator of numpy's."""
    import numpy as np

    return np.random.default_rng(dice(name).getrandbits(64))


def answered(answer: object) -> object:
    """The answer, if it is there."""
    if answer is None or answer is ...:
        reject(_("Not answered yet."))
    return answer


def call(answer: Any, *arguments: object) -> Any:
    """What the reader's function returns; if it raises, the check has failed."""
    if not callable(answer):
        reject(_("The answer must be a function, not {answer!r}.", answer=answer))
    try:
        returned = answer(*arguments)
    except Decided:  # by what the check handed to it
        raise
    except MemoryError:
        reject(_too_much())
    except (Exception, SystemExit) as error:
        if "can't allocate memory" in str(error):  # torch's words for it
            reject(_too_much())
        reject(_("Your function raised {error}", error=f"{type(error).__name__}: {error}"))
    return answered(returned)


def number(returned: Any) -> float | None:
    """What a reader's function returned, as a float; None if it is no number."""
    try:
        return float(returned)
    except (TypeError, ValueError, OverflowError):
        return None


def _too_much() -> str:
    return _("Your function used more memory than it may: what does it keep that it doesn't need?")
