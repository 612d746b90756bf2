"""One rank's side of any strategy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as recomputed

from hpclab import checkpoint
from hpclab.checkpoint.file import read
from hpclab.gangs.rank import restore_folders
from hpclab.training.strategies.kinds import NAMES, Strategy


class Engine:
    """How a rank takes a step, here without any communication in it; strategies override what they do differently.

    Every rank makes one and calls the same methods, at the same time. All start from rank 0's weights.

    Parameters
    ----------
    strategy : Strategy
    module : torch.nn.Module
        The whole model. A strategy may change it, or keep only a part of it.
    optimizer : callable
        Given parameters, returns their optimiser.
    loss : callable
        Given scores and labels, returns the mean loss, shape ().

    Attributes
    ----------
    optimizer : torch.optim.Optimizer
        For schedules of the learning rate.
    weight : float
        What this rank's samples weigh in the mean over the ranks; see `shares.weights`.
    clip : float or None
        Largest norm of the whole gradient; a larger one is scaled down to it. None, the default, clips nothing.
    """

    clip: float | None = None

    def __init__(
        self,
        strategy: Strategy,
        module: nn.Module,
        optimizer: Callable[[Iterable], Optimizer],
        loss: Callable[[Tensor, Tensor], Tensor],
    ):
        self.strategy, self.module, self.loss, self.weight = strategy, module, loss, 1.0
        self.device = next(module.parameters()).device
        for value in module.state_dict().values():
            dist.broadcast(value, 0)
        if strategy.recompute:
            for block in blocks(module):
                block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
        if strategy.autocast:
            self.loss = torch.autocast(self.device.type, torch.bfloat16)(loss)
        self.model = self.wrap(module)
        self.optimizer = self.over(optimizer)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The model as this strategy calls it."""
        return self.cast(module)

    def cast(self, module: nn.Module) -> nn.Module:
        """The module, which computes in bfloat16 if that is asked for."""
        if self.strategy.autocast:
            module.forward = torch.autocast(self.device.type, torch.bfloat16)(module.forward)
        return module

    def over(self, optimizer: Callable[[Iterable], Optimizer]) -> Optimizer:
        """The optimiser over this rank's parameters."""
        return optimizer(self.model.parameters())

    def step(self, inputs: Any, labels: Tensor) -> Tensor:
        """Train on the samples of this rank's replica, shape (B, ...); returns their mean loss, shape ().

        Inputs may be a list of several tensors.
        """
        self.optimizer.zero_grad()
        loss = self.backward(inputs, labels)
        if self.clip is not None:
            scale = (self.clip / (self.norm() + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_ has it
            for weight in self.module.parameters():
                if weight.grad is not None:
                    local(weight.grad).mul_(scale)
        self.optimizer.step()
        return loss

    def backward(self, inputs: Any, labels: Tensor) -> Tensor:
        """Leave the mean gradient over all replicas in the parameters; returns the loss."""
        loss = self.loss(output(self.model, inputs), labels)
        (loss * self.weight).backward()
        return loss.detach()

    def norm(self) -> Tensor:
        """Of the whole gradient, shape (), the same on all ranks that share a replica."""
        return nn.utils.get_total_norm([w.grad for w in self.module.parameters() if w.grad is not None])

    def full_weights(self) -> dict[str, Tensor]:
        """The whole model's state_dict, on every rank."""
        return self.module.state_dict()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, for `checkpoint.save`."""
        state = {"strategy": self.strategy.keeps, "model": self.module.state_dict(), "optimizer": self.moments()}
        own = self.own()
        return state | {"own": gathered(own)} if own else state

    def shards(self) -> dict[str, Any]:
        """What `checkpoint.restore` shall fill: the state, if this strategy keeps it in shards."""
        return {}

    def restore(self) -> dict[str, Any] | None:
        """Go on from the newest checkpoint; returns its state, or None if there is none. See `checkpoint.restore`.

        Raises
        ------
        ValueError
            If it is of another kind of strategy.
        """
        try:
            saved = checkpoint.restore(self.shards())
        except ValueError:
            for folder in restore_folders():
                if newest := checkpoint.newest(folder / "checkpoints"):
                    self.check_kind(read(newest)["state"])
            raise
        if saved is not None:
            self.load(saved)
        return saved

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises
        ------
        ValueError
            If the checkpoint is of another kind of strategy, or holds what belongs to another number of ranks.
        """
        self.check_kind(state)
        own, ranks = state.get("own", []), dist.get_world_size()
        if own and len(own) != ranks:
            raise ValueError(
                f"this checkpoint holds what belongs to each of {len(own)} ranks; ranks (={ranks}) differ."
            )
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if own:
            self.take(own[dist.get_rank()])

    def check_kind(self, state: dict[str, Any]) -> None:
        """Raise unless a checkpoint's state is of this kind of strategy."""
        if (kind := state.get("strategy", "whole")) != self.strategy.keeps:
            able = [name for name, other in NAMES.items() if other.keeps == kind]
            raise ValueError(f"strategy (={self.strategy!r}) can't read this checkpoint; these can: {', '.join(able)}.")

    def moments(self) -> dict[str, Any]:
        """The optimiser's state."""
        return self.optimizer.state_dict()

    def own(self) -> dict[str, Any]:
        """What is this rank's alone; empty if nothing is."""
        return {}

    def take(self, own: dict[str, Any]) -> None:
        """Go on from what `own` returned."""


def output(model: nn.Module, inputs: Any) -> Tensor:
    """What a model makes of a batch; padded series come with their lengths."""
    return model(*inputs) if isinstance(inputs, list) else model(inputs)


def local(tensor: Any) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def blocks(module: nn.Module) -> list[nn.Module]:
    """Parts of a model that are computed again, or kept in shards, one at a time: `blocks`, or else its children."""
    parts = getattr(module, "blocks", None) or module.children()
    return [part for part in parts if any(True for _ in part.parameters())]


def average(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace tensors by their means over a group, or over all ranks, in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def mesh(device: torch.device, ranks: int) -> DeviceMesh:
    """Replicas of this many ranks each: which ranks share one, and which have the same place in each."""
    shape = (dist.get_world_size() // ranks, ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replica", "part"))


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank gives, by rank, on every rank."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, value, group)
    return every
