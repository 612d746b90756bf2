"""Rank's side of ZeRO: each rank keeps a share of the optimiser's state, of gradients and of weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hpclab.training.strategies.ddp import Replicated
from hpclab.training.strategies.engine import Engine, blocks, local
from hpclab.training.strategies.kinds import Zero

SHARDS_ON_CPUS = hasattr(torch.cpu.Stream, "record_event")
"""Whether `fully_shard` works there; in torch 2.6 it doesn't."""


class Optimizers(Replicated):
    """Stage 1: DDP, but each rank updates only some parameters, and sends them to the others."""

    def over(self, optimizer: Callable[[Iterable], Optimizer]) -> Optimizer:
        """Torch's optimiser, which makes ours over this rank's parameters."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch compiles others beside it, by torch.jit
            from torch.distributed.optim import ZeroRedundancyOptimizer

        kind = cast(type[Optimizer], lambda parameters, **_: optimizer(parameters))
        return ZeroRedundancyOptimizer(self.model.parameters(), kind)

    def moments(self) -> dict[str, Any]:
        """All ranks' state on rank 0, whose it is that a checkpoint has."""
        cast(Any, self.optimizer).consolidate_state_dict(0)
        return self.optimizer.state_dict() if dist.get_rank() == 0 else {}


class Sharded(Engine):
    """Any strategy of whose tensors each rank has a shard."""

    group: dist.ProcessGroup | None = None
    """Of the ranks that share tensors; None for all."""

    def norm(self) -> Tensor:
        """The squares of shards are added up over their ranks; what each rank has whole counts once."""
        shards: list[Tensor] = []
        whole: list[Tensor] = []
        for weight in self.module.parameters():
            if weight.grad is not None:
                kind = shards if isinstance(weight, DTensor) and weight.placements[0].is_shard() else whole
                kind.append(local(weight.grad))
        square = nn.utils.get_total_norm(shards) ** 2
        dist.all_reduce(square, group=self.group)
        return (square + nn.utils.get_total_norm(whole) ** 2).sqrt()

    def full_weights(self) -> dict[str, Tensor]:
        """Gathered from all ranks."""
        whole = get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True))
        return cast(dict[str, Tensor], whole)

    def state(self) -> dict[str, Any]:
        """By names, so that other numbers of ranks can read it."""
        new = not self.optimizer.state
        model, optimizer = get_state_dict(self.module, self.optimizer)
        if new:  # torch has taken a step without gradients to make it, which Adam would count
            self.optimizer.state.clear()
        return {"strategy": self.strategy.keeps, "model": model, "optimizer": optimizer}

    def shards(self) -> dict[str, Any]:
        """All of it."""
        return self.state()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        self.check_kind(state)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


class Shards(Sharded):
    """Stages 2 and 3: `fully_shard` gathers a block's weights when they are needed, and scatters its gradients."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Each block by itself, and the rest with the whole."""
        if self.device.type == "cpu" and not SHARDS_ON_CPUS:
            raise RuntimeError(
                f"strategy (={self.strategy!r}) needs a newer torch than {torch.__version__}, which shards weights on"
                " GPUs alone; Zero(1) has no such need."
            )
        ranks = init_device_mesh(self.device.type, (dist.get_world_size(),))
        for part in (*blocks(module), self.cast(module)):
            fully_shard(part, mesh=ranks, reshard_after_forward=cast(Zero, self.strategy).stage == 3)
        return module
