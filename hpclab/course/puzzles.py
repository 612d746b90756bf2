"""The puzzles of the notebook *puzzles*: what each is tried with, its right results, and its limits.

Sizes are drawn where a `random.Random` is given; without one they are those of the notebook's text.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpclab.course import simulated
from hpclab.language import translate as _

NUMBER = 8
"""Bytes of a number (float64)."""


@dataclass(frozen=True)
class Case:
    """A puzzle with all its numbers.

    Attributes
    ----------
    title : str
        Its sizes, in words.
    ranks : int
    start : callable
        Given the reader's function and a `simulated.Device`, calls the one on the other.
    expected : ndarray, shape (ranks, ...)
        What each rank must return.
    limits : dict of str to int
        The most "steps", bytes "sent" by a rank, or bytes "kept" by a rank.
    least : int
        Bytes that all ranks together must send, whatever they do.
    given : dict
        What the numbers were made from.
    network : dict
        Arguments of `simulated.run`.
    """

    title: str
    ranks: int
    start: Callable[[Callable, simulated.Device], Any]
    expected: np.ndarray
    limits: dict[str, int]
    least: int
    given: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)

    def run(self, program: Callable, around: Callable[[Callable], Any] = lambda call: call()) -> simulated.Schedule:
        """The schedule of the reader's function; each rank's call of it is made by `around`."""
        return simulated.run(lambda device: around(lambda: self.start(program, device)), self.ranks, **self.network)

    def used(self, schedule: simulated.Schedule) -> dict[str, list[int]]:
        """What a schedule took of each limit; bytes of each rank."""
        return {
            name: {"steps": [schedule.steps], "sent": schedule.sent, "kept": schedule.kept}[name]
            for name in self.limits
        }


def draw(name: str, program: Callable) -> None:
    """Run the reader's function on the puzzle, with the sizes of the text; print what it took, and draw its schedule.

    Parameters
    ----------
    name : str
        For example "ring".
    program : callable
        The answer. Where it does nothing yet, nothing is drawn.
    """
    case = MAKERS[name](None)
    schedule = case.run(program)
    if not schedule.rows:
        print(schedule.fault or _("Nothing to draw yet: no rank has computed, sent or received anything."))
        return
    words = {
        "steps": _("steps"),
        "sent": _("bytes sent by the busiest rank"),
        "kept": _("bytes kept by the fullest rank"),
    }
    print(case.title)
    for limited, used in case.used(schedule).items():
        values = {"what": words[limited], "used": max(used), "limit": case.limits[limited]}
        print(_("{what}: {used} (limit {limit})", **values))
    if schedule.fault:
        print(schedule.fault)
    from hpclab.course import plots  # here, since a check doesn't need it

    plots.schedule(schedule.rows)


def ring(drawn: random.Random | None) -> Case:
    """All-reduce where each rank has a cable to its left neighbour only."""
    ranks, numbers = (4, 8) if drawn is None else (drawn.choice((3, 5, 6)), drawn.randint(7, 16))
    vectors = np.full((ranks, numbers), 10.0 ** np.arange(ranks)[:, None])
    if drawn is not None:
        vectors = _normal(drawn, ranks, numbers)
    messages, part = 2 * (ranks - 1), math.ceil(numbers / ranks)
    return Case(
        title=_("{ranks} ranks, {numbers} numbers", ranks=ranks, numbers=numbers),
        ranks=ranks,
        start=lambda program, device: program(device, vectors[device.rank].copy()),
        expected=np.tile(vectors.sum(0), (ranks, 1)),
        limits={"steps": messages * (1 + part), "sent": messages * part * NUMBER},
        least=messages * numbers * NUMBER,
        given={"vectors": vectors},
        network={"cables": [(rank, (rank - 1) % ranks) for rank in range(ranks)]},
    )


def broadcast(drawn: random.Random | None, ranks: int = 8) -> Case:
    """One rank's array to all."""
    root, numbers = (0, 3) if drawn is None else (drawn.randrange(1, ranks), drawn.randint(2, 6))
    value = np.arange(1.0, numbers + 1) if drawn is None else _normal(drawn, numbers)
    rounds = (ranks - 1).bit_length()
    return Case(
        title=_("{ranks} ranks, {numbers} numbers, from rank {root}", ranks=ranks, numbers=numbers, root=root),
        ranks=ranks,
        start=lambda program, device: program(device, value.copy() if device.rank == root else None, root),
        expected=np.tile(value, (ranks, 1)),
        limits={"steps": rounds * (1 + numbers), "sent": rounds * numbers * NUMBER},
        least=(ranks - 1) * numbers * NUMBER,
        given={"root": root},
    )


def overlap(drawn: random.Random | None) -> Case:
    """Backward pass, exchange of gradients and update, layer by layer, on two ranks."""
    layers, backward_steps, update_steps, numbers = 6, 2, 1, 3
    if drawn is not None:
        layers, backward_steps, update_steps = drawn.randint(4, 9), drawn.randint(1, 3), drawn.randint(1, 2)
        numbers = backward_steps + update_steps + drawn.randint(0, 2)
    gradients = _normal(drawn or random.Random(0), 2, layers, numbers)
    weights = _normal(drawn or random.Random(1), layers, numbers)

    def start(program: Callable, device: simulated.Device) -> Any:
        below = layers  # the layers from here on have been gone through

        def backward(layer: int) -> np.ndarray:
            nonlocal below
            if layer != below - 1:
                raise ValueError(
                    _("backward({layer}) is out of turn: the pass goes from the last layer to the first.", layer=layer)
                )
            below = layer
            device.compute(backward_steps, f"B{layer}")
            return gradients[device.rank, layer].copy()

        def update(layer: int, gradient: np.ndarray) -> np.ndarray:
            device.compute(update_steps, f"U{layer}")
            return weights[layer] - 0.1 * gradient

        return program(device, layers, backward, update)

    return Case(
        title=_("2 ranks, {layers} layers of {numbers} numbers", layers=layers, numbers=numbers),
        ranks=2,
        start=start,
        expected=np.tile(weights - 0.1 * gradients.mean(0), (2, 1, 1)),
        limits={
            "steps": backward_steps + layers * (1 + numbers) + update_steps,
            "sent": layers * numbers * NUMBER,
        },
        least=2 * layers * numbers * NUMBER,
        given={"gradients": gradients, "weights": weights},
    )


class Stage:
    """A rank's layer, ``tanh(x @ weights)``. A row costs a step on its way forward and two on its way back."""

    def __init__(self, device: simulated.Device, weights: np.ndarray, rows: int):
        self._device, self._weights, self._rows = device, weights, rows
        self._kept: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def forward(self, part: int, x: np.ndarray) -> np.ndarray:
        """What the layer makes of x, shape (rows, width); kept for ``backward`` under the number of the part."""
        self._device.compute(len(x), f"F{part}")
        self._kept[part] = x, np.tanh(x @ self._weights)
        return self._kept[part][1]

    def loss(self, y: np.ndarray) -> np.ndarray:
        """Derivative by y of the loss, half the sum of squares over the rows of the whole batch. Costs nothing."""
        return y / self._rows

    def backward(self, part: int, derivative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives by what came in, and by the layer's weights, from the one by what went out."""
        if part not in self._kept:
            raise ValueError(_("backward of part {part}, but forward hasn't seen that part.", part=part))
        x, y = self._kept.pop(part)
        self._device.compute(2 * len(x), f"B{part}")
        inner = derivative * (1 - y**2)
        return inner @ self._weights.T, x.T @ inner


def pipeline(drawn: random.Random | None) -> Case:
    """A layer a rank, a batch in parts."""
    ranks, parts, rows = (4, 4, 1) if drawn is None else (drawn.randint(3, 5), drawn.randint(3, 6), drawn.randint(1, 3))
    width = 2
    weights = _normal(drawn or random.Random(2), ranks, width, width)
    batch = _normal(drawn or random.Random(3), parts * rows, width)

    def start(program: Callable, device: simulated.Device) -> Any:
        stage = Stage(device, weights[device.rank], len(batch))
        return program(device, stage, batch.copy() if device.rank == 0 else None, parts)

    of_parts = np.stack([gradients(weights, part, len(batch)) for part in np.split(batch, parts)])
    return Case(
        title=_("{ranks} ranks, {parts} parts, rows in each: {rows}", ranks=ranks, parts=parts, rows=rows),
        ranks=ranks,
        start=start,
        expected=gradients(weights, batch, len(batch)),
        limits={"steps": (parts + ranks - 1) * 3 * rows + 2 * (ranks - 1)},
        least=2 * (ranks - 1) * batch.nbytes,
        given={"of_parts": of_parts},  # (part, rank, width, width)
        network={"bandwidth": math.inf},
    )


def gradients(weights: np.ndarray, batch: np.ndarray, rows: int) -> np.ndarray:
    """Derivative of the loss by each layer's weights, by one process."""
    passed = [batch]
    for layer in weights:
        passed.append(np.tanh(passed[-1] @ layer))
    derivative, gradients = passed[-1] / rows, []
    for layer, x, y in zip(weights[::-1], passed[-2::-1], passed[:0:-1], strict=True):
        inner = derivative * (1 - y**2)
        gradients.append(x.T @ inner)
        derivative = inner @ layer.T
    return np.stack(gradients[::-1])


def optimizer(drawn: random.Random | None) -> Case:
    """Two steps of gradient descent with momentum, each rank with gradients of its own."""
    ranks, part = (4, 2) if drawn is None else (drawn.choice((3, 5, 6)), drawn.randint(2, 4))
    turns, numbers, rate, momentum = 2, ranks * part, 0.1, 0.9 if drawn is None else round(drawn.uniform(0.5, 0.8), 2)
    gradients = _normal(drawn or random.Random(4), turns, ranks, numbers)
    first = _normal(drawn or random.Random(5), numbers)

    def start(program: Callable, device: simulated.Device) -> Any:
        weights, state = first.copy(), None
        for turn in range(turns):
            returned = program(device, weights, gradients[turn, device.rank].copy(), state, rate, momentum)
            if returned is None or returned is ...:
                return None
            if not isinstance(returned, tuple) or len(returned) != 2:
                kind = type(returned).__name__
                raise TypeError(
                    _("optimizer must return a pair, the weights and the state, not this {kind}.", kind=kind)
                )
            weights, state = returned
        return weights, state

    return Case(
        title=_(
            "{ranks} ranks, {numbers} weights, {turns} steps of training", ranks=ranks, numbers=numbers, turns=turns
        ),
        ranks=ranks,
        start=start,
        expected=np.tile(descended(first, gradients.mean(1), rate, momentum), (ranks, 1)),
        limits={"sent": turns * 2 * (ranks - 1) * part * NUMBER, "kept": (numbers + part) * NUMBER},
        least=turns * 2 * (ranks - 1) * numbers * NUMBER,
        given={"first": first, "gradients": gradients, "rate": rate, "momentum": momentum},
    )


def descended(weights: np.ndarray, gradients: np.ndarray, rate: float, momentum: float) -> np.ndarray:
    """Weights after a step of gradient descent with momentum for each of the gradients, by one process."""
    velocity = np.zeros_like(weights)
    for gradient in gradients:
        velocity = momentum * velocity + gradient
        weights = weights - rate * velocity
    return weights


def all_to_all(drawn: random.Random | None) -> Case:
    """A block from each rank to each other one."""
    ranks, numbers = (4, 2) if drawn is None else (drawn.randint(5, 7), drawn.randint(2, 4))
    blocks = _normal(drawn or random.Random(6), ranks, ranks, numbers)  # (from, to, number)
    return Case(
        title=_("{ranks} ranks, blocks of {numbers} numbers", ranks=ranks, numbers=numbers),
        ranks=ranks,
        start=lambda program, device: program(device, list(blocks[device.rank].copy())),
        expected=blocks.swapaxes(0, 1),
        limits={"steps": (ranks - 1) * (1 + numbers), "sent": (ranks - 1) * numbers * NUMBER},
        least=ranks * (ranks - 1) * numbers * NUMBER,
        given={"blocks": blocks},
    )


def _normal(drawn: random.Random, *shape: int) -> np.ndarray:
    return np.random.default_rng(drawn.getrandbits(64)).normal(size=shape)


MAKERS: dict[str, Callable[..., Case]] = {
    "ring": ring,
    "broadcast": broadcast,
    "overlap": overlap,
    "pipeline": pipeline,
    "optimizer": optimizer,
    "all_to_all": all_to_all,
}
