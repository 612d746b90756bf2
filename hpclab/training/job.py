"""What a gang shall train, in a form that a notebook's kernel can make and send without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hpclab.network import Network
from hpclab.training.strategies.kinds import Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

Model: TypeAlias = "nn.Module | Callable[[], nn.Module] | str"
DEVICES = ("cpu", "cuda")
MODELS = {"CNN": "images", "ResNet": "images", "RNN": "series", "Autoencoder": "images", "GPT": "text"}
"""Names of the models in `hpclab.models`, each with the kind of data that it takes."""


@dataclass
class Job:
    """All that a rank needs to know to train."""

    model: Model
    data: str
    """Folder of the data set."""
    epochs: int
    batch: int
    """Samples a step, of all ranks together."""
    lr: float
    seed: int
    steps: int | None
    """Steps after which to end; None trains all epochs, and tests after each."""
    optimizer: Callable[[Iterable], Optimizer] | None
    loss: Callable[[Tensor, Tensor], Tensor] | None
    network: Network | None
    trace: int
    """Steps to trace."""
    checkpoint_every: int | None
    """Steps between checkpoints, besides those of each epoch."""
    strategy: Strategy
    """How the ranks share the work."""
    device: str = "cpu"
    """Where they compute: "cpu" or "cuda"."""
    balance: bool = False
    """Whether each rank's share of a step's samples is in proportion to its measured speed."""

    def module(self) -> nn.Module:
        """The model, made if it isn't yet."""
        from torch import nn

        from hpclab import models

        model = getattr(models, self.model) if isinstance(self.model, str) else self.model
        module = model if isinstance(model, nn.Module) else model()
        if not isinstance(module, nn.Module):
            raise TypeError(not_a_module(module))
        return module


def not_a_module(model: object) -> str:
    """What to say of a model that is none."""
    names = ", ".join(map(repr, MODELS))
    return f"model (={model!r}) must be a torch.nn.Module, a class or function that makes one, or a name: {names}."
