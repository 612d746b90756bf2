"""Checks of the notebook *autoencoder*: a compression is followed for some steps, and all that it is given is found."""

from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from hpclab.course import quizzes
from hpclab.course.questions import Numbers, Truths, numbers, statements
from hpclab.course.verdicts import Result, call, exercise, failed, numpy_dice, passed, reject
from hpclab.language import translate as _

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 6
"""Steps for which a rank's residual is followed."""


@dataclass
class _Round:
    """What the reader's function was given and returned, in double precision; the sum is of gradient and residual."""

    gradient: np.ndarray
    total: np.ndarray
    sent: np.ndarray
    """Zero in all places that weren't sent."""
    places: np.ndarray
    residual: np.ndarray


@exercise("autoencoder.top_k", imports=("torch",))
def _top_k(top_k: object) -> Result:
    import torch

    draws = numpy_dice("autoencoder.top_k")
    for size, k in ((60, 6), (97, 3)):
        residual = torch.zeros(size)
        for _step in range(ROUNDS):
            gradient = torch.from_numpy(draws.normal(size=size)).float()
            kept, residual = _round(top_k, gradient, residual, k)
            if message := _fault(kept, k):
                return failed(message)
    return passed(_("The k largest are sent, and all the rest waits in the residual: nothing is lost."))


def _round(top_k: object, gradient: "Tensor", residual: "Tensor", k: int) -> tuple[_Round, "Tensor"]:
    returned: Any = call(top_k, gradient.clone(), residual.clone(), k)
    try:
        values, places, left = returned
        where = np.array([index(place) for place in places], dtype=int)
        sent = np.zeros(len(gradient))
        np.add.at(sent, where, _plain(values))
        after = _plain(left)
        if after.shape != sent.shape:
            raise ValueError
    except (TypeError, ValueError, IndexError, RuntimeError):
        reject(
            _(
                "The function must return the k values, their k places, and the new residual, as long as the gradient;"
                " not this {kind}.",
                kind=type(returned).__name__,
            )
        )
    before, old = _plain(gradient), _plain(residual)
    return _Round(before, before + old, sent, where, after), left.detach().clone().float()


def _plain(values: Any) -> np.ndarray:
    return np.asarray([float(value) for value in values])


def _fault(kept: _Round, k: int) -> str | None:
    """What is wrong with a round, if anything."""
    if len(kept.places) != k or len(set(kept.places.tolist())) != k:
        return _("{count} different places were sent, not k (={k}).", count=len(set(kept.places.tolist())), k=k)
    old = kept.total - kept.gradient
    if not _same(kept.sent + kept.residual, kept.total):
        return _lost(kept, old)
    if _largest(kept.places, kept.total):
        return None
    if old.any() and _largest(kept.places, kept.gradient):
        return _("You chose the largest of the gradient alone: what has waited in the residual never gets its turn.")
    if set(kept.places.tolist()) == set(np.argsort(kept.total)[-k:].tolist()):
        return _("You sent the largest numbers, but those far below 0 matter as much: compare them without their sign.")
    return _("The numbers sent aren't the k that are furthest from 0.")


def _lost(kept: _Round, old: np.ndarray) -> str:
    """Why what was sent and the new residual aren't the gradient and the old residual."""
    cleared = kept.gradient.copy()
    cleared[kept.places] = 0
    if not kept.residual.any():
        return _("What isn't sent is lost: the residual must keep it for a later step.")
    if _same(kept.residual, kept.total) or _same(kept.residual, kept.gradient):
        return _("What was sent is still in the residual, so it will be sent again.")
    if old.any() and (_same(kept.residual, kept.gradient - kept.sent) or _same(kept.residual, cleared)):
        return _("The new residual has forgotten the old one: what has waited for two steps is lost.")
    gap = float(np.abs(kept.sent + kept.residual - kept.total).max())
    return _("Sent + new residual isn't gradient + old residual: they differ by up to {gap:.2g}.", gap=gap)


def _largest(places: np.ndarray, values: np.ndarray) -> bool:
    """Whether these are the places of the values furthest from 0."""
    return set(places.tolist()) == set(np.argsort(np.abs(values))[-len(places) :].tolist())


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.allclose(left, right, rtol=1e-5, atol=1e-6))


@statements("autoencoder.quiz_links")
def _links() -> Truths:
    links = {"near": (1e-3, 100e6), "far": (10e-3, 10e9)}
    seconds = {
        (name, row["strategy"]): row["steps to the loss"]
        * (quizzes.COMPUTING_S + row["latencies a step"] * latency + 8e6 * row["MB a step"] / bandwidth)
        for name, (latency, bandwidth) in links.items()
        for row in quizzes.MESSAGES_SENT
    }
    soonest = {name: min((s, way) for (link, way), s in seconds.items() if link == name)[1] for name in links}
    fewest = min(quizzes.MESSAGES_SENT, key=lambda row: row["MB a step"] * row["steps to the loss"])["strategy"]
    bytes_s = max(8e6 * row["MB a step"] / links["far"][1] for row in quizzes.MESSAGES_SENT)
    truths = {
        "a": seconds["near", "ddp"] > 10 * seconds["near", "low rank"],
        "b": seconds["far", "low rank"] < seconds["far", "ddp"],
        "c": soonest["far"] == "bf16",
        "d": fewest in soonest.values(),
        "e": bytes_s < quizzes.COMPUTING_S,
    }
    return truths, {
        "b": _("On this link the latencies take most of the time: count those of a step."),
        "d": _("Fewest bytes to the loss isn't soonest: add up what each step computes and waits."),
    }


@numbers("autoencoder.quiz_bytes")
def _bytes() -> Numbers:
    weights, density, few, many = 10e6, 0.01, 4, 64
    ddp = 2 * (few - 1) / few * 4 * weights / 1e6
    part = density * weights * (4 + 4) / 1e6
    few_mb, many_mb = (few - 1) * part, (many - 1) * part
    places = _("A number is no use without its place, which takes 4 bytes as well.")
    gathered = _("Top-k's numbers can't be added up on their way: each rank's part goes to all the others.")
    return (ddp, few_mb, many_mb), [
        ((ddp, few_mb / 2, many_mb / 2), places),
        ((ddp, part, part), gathered),
        ((ddp, few_mb, few_mb), gathered),
        ((ddp, part * 2 * (few - 1) / few, part * 2 * (many - 1) / many), gathered),
        ((4 * weights / 1e6, few_mb, many_mb), _("In a ring each rank sends 2 (p - 1) / p times the gradients.")),
    ]
