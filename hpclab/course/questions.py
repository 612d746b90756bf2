"""Questions of a quiz: which statements are true, or which numbers; the checks work out the truth from `quizzes`."""

import math
from collections.abc import Callable
from typing import Any

from hpclab.course.verdicts import Result, exercise, failed, number, passed, reject
from hpclab.language import translate as _

Truths = tuple[dict[str, bool], dict[str, str]]
"""Of each statement's letter, whether it is true; and for each false one, a hint for those who believe it."""
Numbers = tuple[tuple[float, ...], list[tuple[tuple[float, ...], str]]]
"""The right numbers; and wrong ones, each with a hint."""


def statements(exercise_id: str) -> Callable[[Callable[[], Truths]], Callable[[], Truths]]:
    """Decorate what gives the truths of a question whose answer is the set of the true statements' letters."""

    def register(question: Callable[[], Truths]) -> Callable[[], Truths]:
        @exercise(exercise_id, forked=False)
        def judge(answer: Any) -> Result:
            truths, messages = question()
            chosen = _letters(answer, truths)
            if believed := [letter for letter in sorted(chosen) if not truths[letter]]:
                return failed(messages[believed[0]])
            if missing := sum(truths.values()) - len(chosen):
                return failed(_("Everything you chose is right, but you missed {missing} more.", missing=missing))
            return passed(_("These, and no others."))

        return question

    return register


def numbers(exercise_id: str, tolerance: float = 0.01) -> Callable[[Callable[[], Numbers]], Callable[[], Numbers]]:
    """Decorate what gives the right numbers of a question; answers may be off by a share of them."""

    def register(question: Callable[[], Numbers]) -> Callable[[], Numbers]:
        @exercise(exercise_id, forked=False)
        def judge(answer: Any) -> Result:
            right, mistakes = question()
            values = _values(answer, len(right))
            near = [math.isclose(*pair, rel_tol=tolerance) for pair in zip(values, right, strict=True)]
            if all(near):
                return passed(_("Right."))
            for wrong, message in mistakes:
                if all(math.isclose(*pair, rel_tol=tolerance) for pair in zip(values, wrong, strict=True)):
                    return failed(message)
            return failed(_("You have {right} of {of} numbers right.", right=sum(near), of=len(near)))

        return question

    return register


def _letters(answer: Any, truths: dict[str, bool]) -> set[str]:
    if not isinstance(answer, set | frozenset | list | tuple | str) or not set(answer) <= truths.keys():
        reject(
            _(
                'The answer must be a set of letters from "a" to "{last}", such as {example}, not {answer!r}.',
                last=max(truths),
                example={"a"},
                answer=answer,
            )
        )
    return set(answer)


def _values(answer: Any, count: int) -> list[float]:
    given = answer if isinstance(answer, list | tuple) else [answer]
    values = [value for one in given if (value := number(one)) is not None]
    if len(values) != count or len(given) != count:
        reject(
            _(
                "The answer must have as many numbers as the question asks for ({count}), not {answer!r}.",
                count=count,
                answer=answer,
            )
        )
    return values
