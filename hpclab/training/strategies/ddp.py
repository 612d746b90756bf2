"""Rank's side of DDP and gradient accumulation: a replica of the model on every rank."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpclab.training.strategies.engine import Engine
from hpclab.training.strategies.kinds import DDP

if TYPE_CHECKING:
    from hpclab.network import Network


class Replicated(Engine):
    """DistributedDataParallel, which averages the gradients over the ranks as they become ready."""

    model: DistributedDataParallel

    def wrap(self, module: nn.Module) -> nn.Module:
        """Let DDP watch the gradients."""
        return DistributedDataParallel(self.cast(module), **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Of DDP."""
        names = ("find_unused_parameters", "bucket_cap_mb") if isinstance(self.strategy, DDP) else ()
        return {name: getattr(self.strategy, name) for name in names}

    def attach(self, network: "Network") -> None:
        """Emulate a network between the ranks."""
        network.attach(self.model)


class Accumulating(Replicated):
    """As above, for several micro-batches at once: only the last one's backward pass sends anything."""

    def backward(self, inputs: Any, labels: Tensor) -> Tensor:
        """Add up the gradients of the micro-batches, which are equally large."""
        parts, losses = self.strategy.parts(), []
        tensors = [*inputs, labels] if isinstance(inputs, list) else [inputs, labels]
        for number, (*some, theirs) in enumerate(zip(*(one.chunk(parts) for one in tensors), strict=True), start=1):
            with self.model.no_sync() if number < parts else nullcontext():
                loss = self.loss(self.model(*some), theirs)
                (loss * (self.weight / parts)).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()
