"""Rank's side of pipeline parallelism: each rank of a replica has some of the blocks, and passes micro-batches on."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.profiler import record_function

from hpclab.training.strategies.engine import Engine, average, gathered, mesh
from hpclab.training.strategies.kinds import Pipeline


class Pipelined(Engine):
    """Torch's schedules. The model's method `stages` cuts it, into modules that share its parameters.

    A parameter that several stages use, such as an embedding that is also the last layer's weight, has a copy on each
    of their ranks; the copies add up their gradients, so they stay equal.
    """

    def wrap(self, module: Any) -> nn.Module:
        """Keep this rank's stages, which are every so many: with 2 ranks and 4 stages, rank 0 has 0 and 2."""
        settings, ranks = cast(Pipeline, self.strategy), dist.get_world_size()
        size = settings.group(ranks)
        groups = mesh(self.device, size)
        self.replicas, self.ring = groups.get_group("replica"), groups.get_group("part")
        self.place, count = self.ring.rank(), size * (settings.chunks if settings.schedule == "interleaved" else 1)
        stages = module.stages(count)
        self.copies = _copies(stages, size, ranks)
        mine = nn.ModuleList(self.cast(stage) for stage in stages[self.place :: size])
        self.names = _names(module, mine)
        self.schedule = self._schedule(mine, count)
        self.module = mine
        return mine

    def _schedule(self, mine: nn.ModuleList, count: int) -> Any:
        settings, numbers = cast(Pipeline, self.strategy), range(self.place, count, self.ring.size())
        stages: list[Any] = [
            _Stage(*pair, count, self.device, group=self.ring) for pair in zip(mine, numbers, strict=True)
        ]
        if settings.schedule == "interleaved":
            return ScheduleInterleaved1F1B(stages, settings.micro_batches, loss_fn=self.loss)
        kind = ScheduleGPipe if settings.schedule == "gpipe" else Schedule1F1B
        return kind(stages[0], settings.micro_batches, loss_fn=self.loss)

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Run the schedule; add up the gradients of copies, and average over the replicas."""
        last = self.place == self.ring.size() - 1
        losses: list[Tensor] = []
        of_last = {"target": labels, "losses": losses} if last else {}
        self.schedule.step(*[inputs][: self.place == 0], **of_last)
        for copy, group in self.copies:
            dist.all_reduce(copy.grad, group=group)
        if self.replicas.size() > 1:
            average([cast(Tensor, weight.grad) for weight in self.module.parameters()], self.replicas)
        loss = torch.stack(losses).mean().detach().double() if last else labels.new_zeros((), dtype=torch.float64)
        dist.broadcast(loss, group=self.ring, group_src=self.ring.size() - 1)
        return loss

    def norm(self) -> Tensor:
        """The squares of all stages' gradients; of copies, one counts."""
        again = {id(copy) for copy, group in self.copies if group.rank()}
        gradients = [cast(Tensor, weight.grad) for weight in self.module.parameters() if id(weight) not in again]
        square = nn.utils.get_total_norm(gradients) ** 2
        dist.all_reduce(square, group=self.ring)
        return square.sqrt()

    def full_weights(self) -> dict[str, Tensor]:
        """Gathered from all ranks."""
        parts = gathered({name: value.detach() for name, value in self.names.items()}, self.ring)
        return {name: value for part in parts for name, value in part.items()}

    def state(self) -> dict[str, Any]:
        """By names, so that other numbers of stages can read it."""
        moments = {name: self.optimizer.state.get(value, {}) for name, value in self.names.items()}
        parts = gathered(moments, self.ring)
        groups = [{**group, "params": []} for group in self.optimizer.param_groups]
        state = {name: value for part in parts for name, value in part.items()}
        whole = {"strategy": self.strategy.keeps, "model": self.full_weights()}
        return whole | {"optimizer": {"state": state, "param_groups": groups}}

    def load(self, state: dict[str, Any]) -> None:
        """Take what belongs to this rank's stages."""
        self.check_kind(state)
        names = {id(value): name for name, value in self.names.items()}
        mine = [state["optimizer"]["state"][names[id(weight)]] for weight in self.module.parameters()]
        pairs = zip(state["optimizer"]["param_groups"], self.optimizer.state_dict()["param_groups"], strict=True)
        groups = [{**saved, "params": now["params"]} for saved, now in pairs]
        kept = {number: moments for number, moments in enumerate(mine) if moments}
        self.optimizer.load_state_dict({"state": kept, "param_groups": groups})
        with torch.no_grad():
            for name, value in self.names.items():
                value.copy_(state["model"][name])


class _Stage(PipelineStage):
    """Torch's, with names for `timeline.spans`: not all of torch's schedules name their passes."""

    def forward_one_chunk(self, *arguments: Any, **settings: Any) -> Any:
        with record_function("hpclab:forward"):
            return super().forward_one_chunk(*arguments, **settings)

    def backward_one_chunk(self, *arguments: Any, **settings: Any) -> Any:
        with record_function("hpclab:backward"):
            return super().backward_one_chunk(*arguments, **settings)


def _copies(stages: list[nn.Module], size: int, ranks: int) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
    """This rank's parameters that stages of other ranks use too, each with the group of these ranks."""
    holders: dict[nn.Parameter, set[int]] = {}
    for number, stage in enumerate(stages):
        for weight in stage.parameters():
            holders.setdefault(weight, set()).add(number % size)
    copies = []
    for weight, places in holders.items():
        for first in range(0, ranks, size) if len(places) > 1 else ():
            group = dist.new_group([first + place for place in sorted(places)])  # all ranks make all groups
            if dist.get_rank() - first in places:
                copies.append((weight, group))
    return copies


def _names(module: nn.Module, mine: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of this rank's stages, by their names in the whole model."""
    own = {id(value) for value in mine.state_dict(keep_vars=True).values()}
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if id(value) in own}
