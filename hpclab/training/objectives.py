"""What a network is trained for: its loss, and what a test says besides. Ranks import it.

Each loss is a mean over a rank's samples. All ranks have equally many, or their shares weigh the means, so the mean of
the losses is that of the whole batch: a series counts once, however many frames it has, and all windows of a text have
equally many characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

Measure = Callable[[Tensor, Tensor], Tensor]
"""Given a model's output and its target, returns a mean over the samples, shape ()."""


@dataclass(frozen=True)
class Objective:
    """What a network is trained for."""

    loss: Measure
    figures: Mapping[str, Measure] = field(default_factory=dict)
    """What a test reports besides the loss, by its name in the row."""
    target: Callable[[Any, Any], Any] = lambda inputs, labels: labels
    """Given a batch, returns what the output should be."""


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """Share of the samples, shape (B, classes), whose label, shape (B,), has the highest score."""
    return (scores.argmax(1) == labels).float().mean()


def of_characters(scores: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy, in nats a character, of scores (B, T, vocabulary) and the characters that follow, (B, T)."""
    return cross_entropy(scores.flatten(0, 1), following.flatten())


def bits(scores: Tensor, following: Tensor) -> Tensor:
    """The same in bits: how long a file would be in which a perfect coder uses this model's predictions."""
    return of_characters(scores, following) / math.log(2)


def error(made: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of what a network made, of any shape, in its precision: torch 2.6 takes no other for both."""
    return mse_loss(made, target.to(made.dtype))


OBJECTIVES = {
    "classify": Objective(cross_entropy, {"test_accuracy": accuracy}),
    "predict": Objective(of_characters, {"test_bits": bits}),
    "rebuild": Objective(error, target=lambda inputs, labels: inputs),
}
_OF_DATA = {"images": "classify", "series": "classify", "text": "predict"}


def of(module: nn.Module, data: Any) -> Objective:
    """The objective that a model names in its attribute `objective`, else that of its kind of data."""
    known, characters = getattr(module, "vocabulary", math.inf), len(data.classes)
    if data.kind == "text" and known < characters:
        raise ValueError(
            f"vocabulary (={known}) of the model is below the {characters} characters of {data.name}; use"
            f" vocabulary={characters}."
        )
    return OBJECTIVES[getattr(module, "objective", _OF_DATA[data.kind])]
