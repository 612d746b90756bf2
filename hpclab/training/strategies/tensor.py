"""Rank's side of tensor and sequence parallelism: the ranks of a replica compute parts of each layer."""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from hpclab.training.strategies import kinds
from hpclab.training.strategies.engine import average, local, mesh
from hpclab.training.strategies.zero import Sharded


class Split(Sharded):
    """Matrices by columns, then by rows, so that a pair of them needs one sum; replicas average their gradients.

    The model has `blocks`, and says of each which layers are split by `columns` and by `rows`, which are `norms`, and
    into how many parts it can be split: the divisors of `heads`.
    """

    def wrap(self, module: Any) -> nn.Module:
        """Split each block."""
        size, self.by_sequence = self.strategy.group(dist.get_world_size()), cast(kinds.Tensor, self.strategy).sequence
        if module.heads % size:
            raise ValueError(f"ranks (={size}) of a replica can't share heads (={module.heads}) evenly.")
        ranks = mesh(self.device, size)
        self.replicas, self.parts, self.group = ranks.get_group("replica"), ranks["part"], ranks.get_group("part")
        for block in module.blocks:
            parallelize_module(block, self.parts, _plan(module, self.by_sequence))
        if self.by_sequence:
            ends = {"blocks.0": _HAND_OUT, f"blocks.{len(module.blocks) - 1}": _COLLECT}
            parallelize_module(module, self.parts, ends)
        return self.cast(module)

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Also add up what each rank knows of the norms' gradients, and average over the replicas."""
        positions, size = inputs.shape[1], self.parts.size()
        if self.by_sequence and positions % size:
            raise ValueError(f"ranks (={size}) of a replica can't share {positions} positions evenly.")
        loss = super().backward(inputs, labels)
        gradients = []
        for weight in self.module.parameters():
            if isinstance(weight, DTensor):
                weight.grad = cast(DTensor, weight.grad).redistribute(placements=weight.placements)
            gradients.append(local(weight.grad))
        if self.replicas.size() > 1:
            average(gradients, self.replicas)
        return loss


_HAND_OUT = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)
_COLLECT = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate(), use_local_output=True)


def _plan(module: Any, by_sequence: bool) -> dict[str, ParallelStyle]:
    """How each layer of a block is split; what lies between them is whole, or split by position, dimension 1."""
    between = Shard(1) if by_sequence else Replicate()
    entry = PrepareModuleInput(input_layouts=between, desired_input_layouts=Replicate())
    plan: dict[str, ParallelStyle] = {name.rpartition(".")[0]: entry for name in module.columns}
    plan |= {name: ColwiseParallel() for name in module.columns}
    plan |= {name: RowwiseParallel(output_layouts=between) for name in module.rows}
    return plan | ({name: SequenceParallel() for name in module.norms} if by_sequence else {})
