"""Rank's side of compressed gradients: hooks of DDP that send each bucket in fewer bytes."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from hpclab.training.strategies.ddp import Replicated
from hpclab.training.strategies.kinds import DDP, Compress, Strategy
from hpclab.training.strategies.wire import Message, Sizes, messages

if TYPE_CHECKING:
    from hpclab.network import Network

PLAIN_STEPS = 2
"""Steps before PowerSGD begins; torch takes no fewer."""

ONE_BUCKET = 2.0**20
"""MB that no model here has."""


class Compressing(Replicated):
    """DDP with one of torch's hooks, or with top-k."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Register the hook."""
        model = cast(DistributedDataParallel, super().wrap(module))
        self.memory, self.hook = _hook(cast(Compress, self.strategy))
        model.register_comm_hook(self.memory, lambda memory, bucket: self.hook(memory, bucket))
        return model

    def attach(self, network: "Network") -> None:
        """Emulate a network for the messages of the hook."""
        ranks = network.ranks or dist.get_world_size()

        def sent(strategy: Strategy, weights: Iterable[Tensor]) -> list[Message]:
            return messages(strategy, ranks, Sizes(tuple(tuple(weight.shape) for weight in weights)))

        def seconds(bucket: dist.GradBucket) -> float:
            plain = getattr(self.memory, "iter", PLAIN_STEPS) < PLAIN_STEPS  # PowerSGD's first steps
            each = sent(DDP() if plain else self.strategy, bucket.parameters())
            return sum(message.seconds(network) for message in each)

        whole = sent(self.strategy, [weight for weight in self.module.parameters() if weight.requires_grad])
        whole_s = sum(message.seconds(network) for message in whole)
        self.hook = network.around(self.hook, [message.nbytes for message in whole], whole_s, seconds)

    def arguments(self) -> dict[str, Any]:
        """One bucket for PowerSGD: it sends again from gloo's thread, so the order of several differs by rank."""
        one = {"bucket_cap_mb": ONE_BUCKET} if cast(Compress, self.strategy).method == "powersgd" else {}
        return super().arguments() | one

    def own(self) -> dict[str, Any]:
        """What this rank hasn't sent so far, and PowerSGD's matrices."""
        return {name: getattr(self.memory, name) for name in getattr(self.memory, "kept", ())}

    def take(self, own: dict[str, Any]) -> None:
        """Remember it again."""
        for name, value in own.items():
            setattr(self.memory, name, value)


class PowerSGD(powerSGD_hook.PowerSGDState):
    """Torch's memory of PowerSGD."""

    kept = ("error_dict", "p_memory_dict", "q_memory_dict", "iter")


class TopK:
    """A rank's memory of the numbers that it hasn't sent."""

    kept = ("unsent",)

    def __init__(self, density: float):
        self.density = density
        self.unsent: dict[int, Tensor] = {}
        """By the number of the bucket."""


def topk(memory: TopK, bucket: dist.GradBucket) -> Future[Tensor]:
    """Send the numbers of a bucket that are furthest from 0, with their places, and add the others to the next one."""
    mean, ranks = bucket.buffer(), dist.get_world_size()
    unsent = memory.unsent.setdefault(bucket.index(), torch.zeros_like(mean)).add_(mean)
    places = unsent.abs().topk(math.ceil(memory.density * len(mean)), sorted=False).indices
    values = unsent[places].view(torch.int32)
    unsent[places] = 0
    mine = torch.cat([values, places.int()])
    every = [torch.empty_like(mine) for _ in range(ranks)]

    def add_up(_: Future) -> Tensor:
        mean.zero_()
        for sent in every:
            mean.index_add_(0, sent[len(values) :], sent[: len(values)].clone().view(mean.dtype))
        return mean.div_(ranks)

    return dist.all_gather(every, mine, async_op=True).get_future().then(add_up)


def _hook(settings: Compress) -> tuple[Any, Any]:
    """What a hook remembers, and the hook."""
    if settings.method == "powersgd":
        return PowerSGD(None, settings.rank, PLAIN_STEPS), powerSGD_hook.powerSGD_hook
    if settings.method == "topk":
        return TopK(settings.density), topk
    halve = getattr(default_hooks, f"{settings.method}_compress_hook")
    return None, lambda group, bucket: halve(group, bucket)  # by its own name DDP takes bf16's for NCCL alone
