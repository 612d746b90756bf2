"""A learner's predictions: taken before a run, kept in the working copy, shown beside what came."""

import math
import time
from collections.abc import Sequence
from types import EllipsisType

from hpclab.course import logbook
from hpclab.course.calibration import Story, factor, stories
from hpclab.language import translate as _
from hpclab.pages import Prose

Value = float | list[float] | str
"""A number, the two ends of an interval, or one of some options."""
SAME = 1.005
"""Factor below which a number was right: no difference is shown in three digits."""
_session: list[dict] = []
"""Notes of this process: all that there are outside of a working copy, or where its log can't be written."""
_units: dict[str, str] = {}
"""What each number counts."""


def predict(
    prediction_id: str,
    value: float | Sequence[float] | str | EllipsisType,
    unit: str = "",
    among: Sequence[str] = (),
) -> Prose:
    """Write down a prediction, before you look; `came` then shows it beside the result.

    It is kept in this working copy of the course and sent nowhere. You may change it until the result was shown: a
    later one is kept too, but doesn't count. `progress` shows how good your predictions are.

    Parameters
    ----------
    prediction_id : str
        For example "scaling.weak_step": the notebook's slug and a name.
    value : number, pair of numbers, or str
        A number; or an interval, (low, high); or one of the options. With ``...`` nothing is written down.
    unit : str, optional
        What the number counts, as one says it after the number: "times as long".
    among : sequence of str, optional
        The options, where the answer is one of them.

    Raises
    ------
    ValueError
        If the value is none of these.
    """
    _units[prediction_id] = unit
    if value is ...:
        if among:
            return Prose(_("Your prediction: replace the three dots with one of {options}.", options=_quoted(among)))
        blank = f"___ {unit}".strip()
        how = _("Replace the three dots with a number, or with two for an interval: (low, high).")
        return Prose(_("Your prediction: {blank}.", blank=blank) + " " + how)
    kept = _checked(value, among)
    story = stories(_notes()).get(prediction_id, Story())
    if story.newest is None or story.newest["value"] != kept:
        _note({"prediction": prediction_id, "value": kept, "unit": unit})
        if story.result is not None:
            return Prose(_("Written down: {value}. It doesn't count: you have seen a result.", value=_told(kept, unit)))
    return Prose(_("Written down: {value}.", value=_told(kept, unit)))


def came(prediction_id: str, value: float | str | None) -> Prose:
    """Show a result beside what was predicted, and note the first result, for `progress`.

    Parameters
    ----------
    prediction_id : str
        As given to `predict`.
    value : number or str, or None
        The result; None if there is none, as while an exercise isn't solved.
    """
    detach = getattr(value, "detach", None)  # float() warns of a tensor that needs a gradient
    value = value if detach is None else detach()
    result = value if value is None or isinstance(value, str) else float(value)
    if result is None or result != result:  # NaN, of a measurement that failed
        return Prose(_("There is no result yet to compare with."))
    story = stories(_notes()).get(prediction_id, Story())
    if story.result is None:
        _note({"result": prediction_id, "value": result})
    came_out = _told(result, _units.get(prediction_id, ""))
    if story.newest is None:
        return Prose(_("Result: {value}. (No prediction was written down.)", value=came_out))
    sentences = [_("Result: {value}.", value=came_out)]
    if story.counts is not None:
        predicted = story.counts["value"]
        verdict = _verdict(predicted, result)
        sentences.insert(0, _("You predicted {value}.", value=_told(predicted, story.counts["unit"])))
        sentences.append(verdict)
    if story.newest is not story.counts:
        later = _told(story.newest["value"], story.newest["unit"])
        sentences.append(_("After seeing a result you wrote {value}; that doesn't count.", value=later))
    return Prose(" ".join(sentences))


def _verdict(predicted: Value, result: float | str) -> str:
    if isinstance(predicted, str):
        return _("You were right.") if predicted == result else _("Why?")
    assert isinstance(result, float)
    if isinstance(predicted, list):
        low, high = predicted
        return _("Your interval contains it.") if low <= result <= high else _("Your interval doesn't contain it: why?")
    off = factor(predicted, result)
    if off < SAME:
        return _("You were right.")
    return _("Why?") if off == math.inf else _("You were off by a factor of {off:.3g}.", off=off)


def _checked(value: object, among: Sequence[str]) -> Value:
    if among:
        if value not in among:
            raise ValueError(f"value (={value!r}) must be one of {_quoted(among)}.")
        return str(value)
    try:
        ends = [float(end) for end in (value if isinstance(value, list | tuple) else [value])]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        ends = []
    if not 1 <= len(ends) <= 2 or not all(map(math.isfinite, ends)) or ends != sorted(ends):
        raise ValueError(f"value (={value!r}) must be a number, or an interval: (low, high).")
    return ends if isinstance(value, list | tuple) and len(ends) == 2 else ends[0]


def _told(value: Value, unit: str = "") -> str:
    if isinstance(value, str):
        return value
    ends = value if isinstance(value, list) else [value]
    words = [f"{end:,.0f}" if end == round(end) and abs(end) < 1e12 else f"{end:.3g}" for end in ends]
    return " ".join([_("{low} to {high}", low=words[0], high=words[1]) if len(words) > 1 else words[0], *unit.split()])


def _quoted(options: Sequence[str]) -> str:
    return ", ".join(f'"{option}"' for option in options)


def _notes() -> list[dict]:
    known = logbook.notes()
    return known + [note for note in _session if note not in known]


def _note(note: dict) -> None:
    note |= {"written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    _session.append(note)
    logbook.note(note)
