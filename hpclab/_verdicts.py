"""What a check answers: a verdict with a reason; and how checks are named, and call what they check."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpclab.language import translate as _


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
        return (
            f'<div class="hpclab-result" role="status" data-status="{self.status}" '
            f'style="border-left: 5px solid {colour}; padding: 4px 10px">'
            f'<span aria-hidden="true" style="color: {colour}">{symbol}</span> '
            f"<strong>{label}</strong>: {html.escape(self.message)}</div>"
        )

    def _look(self) -> tuple[str, str, str]:
        """Symbol, label and colour (Okabe and Ito's, told apart by colour-blind readers)."""
        return {
            "pass": ("✓", _("pass"), "#0072B2"),
            "fail": ("✗", _("fail"), "#D55E00"),
            "inconclusive": ("?", _("inconclusive"), "#CC79A7"),
        }[self.status]


class Verdict(Exception):
    """Ends a check early, from any depth, with its result."""

    def __init__(self, result: Result):
        self.result = result


def passed(message: str) -> Result:
    return Result("pass", message)


def failed(message: str) -> Result:
    return Result("fail", message)


def inconclusive(message: str) -> Result:
    return Result("inconclusive", message)


CHECKS: dict[str, Callable[[Any], Result]] = {}


def exercise(exercise_id: str) -> Callable:
    """Decorate the function `answer -> Result` that checks an exercise; ids are "slug.name"."""

    def register(function: Callable[[Any], Result]) -> Callable[[Any], Result]:
        CHECKS[exercise_id] = function
        return function

    return register


def answered(answer: object) -> object:
    if answer is None or answer is ...:
        raise Verdict(failed(_("Not answered yet.")))
    return answer


def call(answer: Any, *arguments: object) -> Any:
    """What the reader's function returns; what it raises is a verdict."""
    if not callable(answer):
        raise Verdict(failed(_("The answer is a function, not {answer!r}.", answer=answer)))
    try:
        returned = answer(*arguments)
    except Verdict:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise Verdict(failed(_("Your function raised {error}", error=text))) from error
    return answered(returned)
