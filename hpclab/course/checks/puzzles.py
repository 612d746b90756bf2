"""Checks of the notebook *puzzles*: the results must be right first, on several clusters; then the limits count."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hpclab.course import puzzles
from hpclab.course.puzzles import Case
from hpclab.course.simulated import Schedule
from hpclab.course.verdicts import Result, call, dice, exercise, failed, passed, reject
from hpclab.language import translate as _

Why = Callable[[Case, Any], str | None]


def _judge(name: str, answer: Any, wrong: Why, over: Why, cases: Iterable[Case] | None = None) -> Result:
    """Run an answer on a puzzle's cases; `wrong` is given the results (ranks, ...), `over` the schedule."""
    if not callable(answer):
        reject(_("The answer must be a function, not {answer!r}.", answer=answer))
    if cases is None:
        drawn = dice(f"puzzles.{name}")
        cases = [puzzles.MAKERS[name](None), *(puzzles.MAKERS[name](drawn) for _again in range(3))]
    for case in cases:
        schedule = case.run(answer, lambda start: call(lambda: (start(),))[0])
        results = schedule.results
        if not schedule.rows and not schedule.fault and all(result is None or result is ... for result in results):
            reject(_("Not answered yet."))
        message = schedule.fault
        if message is None:
            shown = [_numbers(result, rank, case) for rank, result in enumerate(results)]
            message = None if np.allclose(shown, case.expected, rtol=1e-9, atol=1e-12) else wrong(case, np.array(shown))
            message = message or _shared(case, schedule) or _limits(case, schedule, over)
        if message:
            return failed(f"{case.title}: {message}")
    return passed(_("Right on every cluster, and within the limits."))


def _numbers(result: Any, rank: int, case: Case) -> np.ndarray:
    """What a rank returned, as an array of the shape that it must have; of a pair with a state, the first."""
    if case.expected.ndim == 2 and isinstance(result, tuple) and "kept" in case.limits:
        result = result[0]
    try:
        numbers = np.asarray(result, dtype=float)
    except (TypeError, ValueError):
        numbers = np.array(np.nan)
    wanted = case.expected.shape[1:]
    if numbers.shape != wanted:
        kind = type(result).__name__ + (f" {numbers.shape}" if numbers.ndim else "")
        message = _(
            "Rank {rank} must return numbers of shape {wanted}, not this {kind}.", rank=rank, wanted=wanted, kind=kind
        )
        reject(f"{case.title}: {message}")
    return numbers


def _shared(case: Case, schedule: Schedule) -> str | None:
    """What to say of right results that took fewer bytes than they can."""
    if (sent := sum(schedule.sent)) < case.least:
        values = {"sent": sent, "least": case.least}
        return _(
            "Right, but all ranks together sent {sent} bytes, and {least} are needed: ranks share no variables.",
            **values,
        )
    return None


def _limits(case: Case, schedule: Schedule, over: Why) -> str | None:
    """By how much a right answer is over a limit, and where; None if it keeps them."""
    for name, used in case.used(schedule).items():
        limit, most = case.limits[name], max(used)
        if most <= limit:
            continue
        values = {"most": most, "limit": limit, "over": most - limit, "rank": used.index(most)}
        values["step"] = _crossed(schedule, values["rank"], limit)
        text = {
            "steps": _("Right, but it takes {most} steps, {over} more than the {limit} allowed.", **values),
            "sent": _(
                "Right, but rank {rank} sends {most} bytes, {over} more than the {limit} allowed (over the limit from"
                " step {step} on).",
                **values,
            ),
            "kept": _(
                "Right, but rank {rank} keeps {most} bytes after its last step, {over} more than the {limit} allowed.",
                **values,
            ),
        }[name]
        return " ".join(filter(None, [text, over(case, schedule)]))
    return None


def _crossed(schedule: Schedule, rank: int, limit: int) -> int:
    """At which step a rank begins the message that takes it over the limit of bytes."""
    sent = 0
    for row in schedule.rows:
        if row["rank"] == rank and row["action"] == "send":
            sent += row["nbytes"]
            if sent > limit:
                return row["start"]
    return schedule.steps


def _same(results: np.ndarray, wrong: np.ndarray) -> bool:
    return np.allclose(results, np.broadcast_to(wrong, results.shape), rtol=1e-9, atol=1e-12)


def _first_of(candidates: dict[str, np.ndarray], results: np.ndarray) -> str | None:
    """The message whose wrong numbers are those that came."""
    return next((message for message, wrong in candidates.items() if _same(results, wrong)), None)


@exercise("puzzles.ring")
def _ring(ring: object) -> Result:
    return _judge("ring", ring, _ring_wrong, _ring_over)


def _ring_wrong(case: Case, sums: np.ndarray) -> str:
    vectors = case.given["vectors"]
    known = {
        _("Each rank has its own numbers only: nothing that arrived was added."): vectors,
        _("This needs a sum, not an average."): vectors.mean(0),
    }
    if message := _first_of(known, sums):
        return message
    if not (vectors == vectors[:, :1]).all():
        return _("Numbers from different places were added or swapped: what arrives belongs where it was cut from.")
    times = (
        sums[..., None] // vectors[:, 0] % 10
    )  # (rank, number, origin): vectors are of powers of ten, so digits count
    if (times > 1).any():
        rank, _number, origin = np.argwhere(times > 1)[0]
        return _("Rank {rank} counts rank {origin}'s numbers more than once.", rank=rank, origin=origin)
    if ((times == 1).all(2).sum(0) == 1).all():
        return _("Each part's sum is on one rank only. That's halfway: all ranks need all sums.")
    rank, _number, origin = np.argwhere(times != 1)[0]
    return _("In a sum on rank {rank}, the number from rank {origin} is missing.", rank=rank, origin=origin)


def _ring_over(case: Case, schedule: Schedule) -> str | None:
    largest = max(row["nbytes"] for row in schedule.rows if row["action"] == "send")
    if largest >= case.given["vectors"][0].nbytes:
        return _("Whole vectors travel: the next rank doesn't need most of their numbers yet.")
    return None


@exercise("puzzles.broadcast")
def _broadcast(broadcast: object) -> Result:
    drawn = dice("puzzles.broadcast")
    moved = puzzles.broadcast(drawn)
    uneven = [puzzles.broadcast(drawn, ranks) for ranks in (drawn.choice((5, 6, 7)), drawn.choice((9, 11, 13)))]
    result = _judge("broadcast", broadcast, _broadcast_wrong, _broadcast_over, [puzzles.broadcast(None)])
    if result and not (result := _judge("broadcast", broadcast, _broadcast_wrong, _broadcast_over, [moved])):
        return failed(_("It works from rank 0, but not from other ranks. {why}", why=result.message))
    if result and not (result := _judge("broadcast", broadcast, _broadcast_wrong, _broadcast_over, uneven)):
        return failed(_("It works on 8 ranks, but not on every number of ranks. {why}", why=result.message))
    return result


def _broadcast_wrong(case: Case, values: np.ndarray) -> str:
    rank = int(np.argmin(np.isclose(values, case.expected).all(1)))
    return _("Rank {rank} has different numbers from those that the root sent.", rank=rank)


def _broadcast_over(case: Case, schedule: Schedule) -> str:
    messages = [
        sum(row["rank"] == rank and row["action"] == "send" for row in schedule.rows) for rank in range(case.ranks)
    ]
    if max(messages) == case.ranks - 1:
        return _("One rank sends every message, and those that already have the numbers do nothing.")
    if max(messages) == 1:
        return _("The numbers go from hand to hand: in each step one rank sends, and the others do nothing.")
    return _("There are steps in which a rank that has the numbers sends nothing, while others still wait.")


@exercise("puzzles.overlap")
def _overlap(overlap: object) -> Result:
    return _judge("overlap", overlap, _overlap_wrong, _overlap_over)


def _overlap_wrong(case: Case, weights: np.ndarray) -> str:
    gradients, before = case.given["gradients"], case.given["weights"]
    known = {
        _("Each rank goes its own way: from the first step on their weights differ."): gradients,
        _("What arrived replaced the rank's own gradient, but you need the mean."): gradients[::-1],
        _("The gradients are summed, so with n ranks the step is n times too long."): 2 * gradients.mean(0),
        _("A gradient is averaged with another layer's: messages arrive in the order in which they were sent."): (
            (gradients + gradients[::-1, ::-1]) / 2
        ),
        _("Nothing was updated."): 0 * gradients,
    }
    stepped = {message: before - 0.1 * gradient for message, gradient in known.items()}
    return _first_of(stepped, weights) or _("These aren't the weights after a step with the mean of both gradients.")


def _overlap_over(case: Case, schedule: Schedule) -> str | None:
    own = [row for row in schedule.rows if row["rank"] == 0]
    last_backward = max(row["start"] for row in own if row.get("label", "").startswith("B"))
    sends = [row["start"] for row in own if row["action"] == "send"]
    if min(sends) > last_backward:
        return _("The network is idle until step {step}, when all gradients have been computed.", step=min(sends))
    waits = [row["start"] for row in own if row["action"] == "wait" and row["start"] <= last_backward]
    if waits:
        return _("At step {step} rank 0 waits for a message, with gradients left to compute.", step=waits[0])
    return _("Updates wait for messages that they don't need.")


@exercise("puzzles.pipeline")
def _pipeline(pipeline: object) -> Result:
    return _judge("pipeline", pipeline, _pipeline_wrong, _pipeline_over)


def _pipeline_wrong(case: Case, gradients: np.ndarray) -> str:
    of_parts = case.given["of_parts"]
    known = {
        _("This is the gradient of the last part only: what happened to the parts before it?"): of_parts[-1],
        _("You divided by the number of parts, but the loss has already been divided by all rows."): of_parts.mean(0),
    }
    return _first_of(known, gradients) or _("These aren't the gradients of the whole batch.")


def _pipeline_over(case: Case, schedule: Schedule) -> str | None:
    computing = np.zeros((case.ranks, schedule.steps), dtype=int)
    for row in schedule.rows:
        if row["action"] == "compute":
            computing[row["rank"], row["start"] : row["start"] + row["steps"]] = 1
    if (computing.sum(0) > 1).any():
        return None
    if sum(row["rank"] == 0 and row["action"] == "compute" for row in schedule.rows) == 2:
        return _("The batch travels as one piece, so in each step one rank computes and the others wait.")
    return _("The batch is cut up, yet no two ranks ever compute in the same step: what does each one wait for?")


@exercise("puzzles.optimizer")
def _optimizer(optimizer: object) -> Result:
    return _judge("optimizer", optimizer, _optimizer_wrong, _optimizer_over)


def _optimizer_wrong(case: Case, weights: np.ndarray) -> str:
    given = case.given
    first, rate, momentum, mean = given["first"], given["rate"], given["momentum"], given["gradients"].mean(1)
    own = np.stack(
        [puzzles.descended(first, given["gradients"][:, rank], rate, momentum) for rank in range(case.ranks)]
    )
    parts = np.eye(case.ranks, dtype=bool).repeat(len(first) // case.ranks, 1)  # (rank, number): whether it is its own
    known = {
        _("Each rank goes its own way: from the first step on their weights differ."): own,
        _("The gradients are summed, so with n ranks the step is n times too long."): puzzles.descended(
            first, case.ranks * mean, rate, momentum
        ),
        _("The momentum is lost: the second step doesn't know of the first."): puzzles.descended(first, mean, rate, 0),
        _("Each rank has new weights in its own part only; elsewhere it still has the old ones."): np.where(
            parts, case.expected, first
        ),
    }
    if message := _first_of(known, weights):
        return message
    if not np.allclose(weights, weights[0]):
        return _("After the steps, not all ranks have the same weights.")
    return _("These aren't the weights that one process has after these steps.")


def _optimizer_over(case: Case, schedule: Schedule) -> str:
    if max(schedule.sent) > case.limits["sent"]:
        return _("A rank receives gradients of weights that it doesn't need to update itself.")
    return _("A rank keeps more state than one number for each weight of its own part.")


@exercise("puzzles.all_to_all")
def _all_to_all(all_to_all: object) -> Result:
    return _judge("all_to_all", all_to_all, _blocks_wrong, _blocks_over)


def _blocks_wrong(case: Case, blocks: np.ndarray) -> str:
    if _same(blocks, case.given["blocks"]):
        return _("Each rank still has the blocks that it began with.")
    right = np.isclose(blocks, case.expected).all(2)
    if (right | np.eye(case.ranks, dtype=bool)).all():
        return _("The block that a rank keeps for itself is missing, or was changed.")
    if _same(np.sort(blocks, 1), np.sort(case.expected, 1)):
        return _("All blocks are there, but not in the order of the ranks that they come from.")
    rank, source = np.argwhere(~right)[0]
    return _("Rank {rank} has a different block where the one from rank {source} should be.", rank=rank, source=source)


def _blocks_over(case: Case, schedule: Schedule) -> str | None:
    if max(schedule.sent) > case.limits["sent"]:
        return _("Blocks travel through ranks that they aren't meant for.")
    first = sum(row["action"] == "send" and row["start"] == 0 for row in schedule.rows)
    if first < case.ranks:
        values = {"first": first, "ranks": case.ranks}
        return _("At step 0 only {first} of {ranks} ranks send: the others wait.", **values)
    return None
