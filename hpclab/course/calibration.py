"""How good predictions were, by the notes of a log: what was predicted, what came, and in which order."""

import math
import statistics
from dataclasses import dataclass

from hpclab.language import translate as _
from hpclab.tables import Table


@dataclass
class Story:
    """What was written down about one thing.

    Attributes
    ----------
    counts : dict or None
        The note of the prediction that counts: the newest from before the first result.
    newest : dict or None
        That of the newest prediction. One written after a result was seen isn't `counts`.
    result : dict or None
        The note of the first result.
    """

    counts: dict | None = None
    newest: dict | None = None
    result: dict | None = None


def stories(notes: list[dict]) -> dict[str, Story]:
    """The story of each thing that the notes are about, by its id; notes are in the order of their writing."""
    found: dict[str, Story] = {}
    for note in notes:
        if "prediction" in note:
            story = found.setdefault(note["prediction"], Story())
            story.newest = note
            if story.result is None:
                story.counts = note
        elif "result" in note:
            story = found.setdefault(note["result"], Story())
            story.result = story.result or note
    return found


def factor(predicted: float, came: float) -> float:
    """By how much a number was off: 2 for twice or half of what came; infinite if only one of them is above 0.

    Examples
    --------
    >>> factor(1.0, 2.0), factor(4.0, 2.0), factor(0.0, 0.0), factor(0.0, 2.0)
    (2.0, 2.0, 1.0, inf)
    """
    if predicted == came:
        return 1.0
    return max(predicted / came, came / predicted) if min(predicted, came) > 0 else math.inf


def table(notes: list[dict]) -> Table:
    """How good the predictions that count were, a row a kind; empty if none has its result."""
    pairs = [(s.counts["value"], s.result["value"]) for s in stories(notes).values() if s.counts and s.result]
    intervals = [low <= came <= high for (low, high), came in (pair for pair in pairs if isinstance(pair[0], list))]
    choices = [predicted == came for predicted, came in pairs if isinstance(predicted, str)]
    factors = [factor(predicted, came) for predicted, came in pairs if isinstance(predicted, float)]
    kinds = {
        _("numbers"): (factors, lambda: _("off by a factor of {off:.2g} (median)", off=statistics.median(factors))),
        _("intervals"): (intervals, lambda: _("{right} contained the result", right=sum(intervals))),
        _("choices"): (choices, lambda: _("{right} right", right=sum(choices))),
    }
    return Table(
        {_("predictions"): name, _("made"): len(judged), _("how good"): words()}
        for name, (judged, words) in kinds.items()
        if judged
    )
