"""Rank's side of local SGD and DiLoCo: ranks that train by themselves, and meet every so many steps."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from hpclab.training.strategies.engine import Engine, average
from hpclab.training.strategies.kinds import DiLoCo, LocalSGD


class Local(Engine):
    """Local SGD: the weights are averaged, each rank's optimiser stays its own."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Torch's averager would first average after the first step."""
        every = cast(LocalSGD, self.strategy).every
        self.averager = PeriodicModelAverager(every, warmup_steps=every - 1)
        return super().wrap(module)

    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Train, and average the weights if it is time."""
        loss = super().step(inputs, labels)
        self.averager.average_parameters(self.module.parameters())
        return loss

    def full_weights(self) -> dict[str, Tensor]:
        """The mean of the ranks' weights."""
        weights = {name: value.clone() for name, value in self.module.state_dict().items()}
        average([value for value in weights.values() if value.is_floating_point()])
        return weights

    def own(self) -> dict[str, Any]:
        """This rank's weights and optimiser, and the steps done."""
        model = {name: value.clone() for name, value in self.module.state_dict().items()}  # not all in one storage
        return {"model": model, "optimizer": self.optimizer.state_dict(), "step": self.averager.step}

    def take(self, own: dict[str, Any]) -> None:
        """Go on as this rank."""
        self.module.load_state_dict(own["model"])
        self.optimizer.load_state_dict(own["optimizer"])
        self.averager.step = own["step"]


class Outer(Local):
    """DiLoCo: what the ranks' weights have changed by in the mean is the gradient of an outer optimiser."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Keep a copy of the weights, which the outer optimiser changes."""
        settings, model = cast(DiLoCo, self.strategy), super().wrap(module)
        self.common = [nn.Parameter(weight.detach().clone()) for weight in module.parameters()]
        self.outer = torch.optim.SGD(self.common, settings.outer_lr, settings.outer_momentum, nesterov=True)
        return model

    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Train, and take an outer step if it is time."""
        loss = super().step(inputs, labels)
        if self.averager.step % self.averager.period == 0:
            self._meet()
        return loss

    @torch.no_grad()
    def _meet(self) -> None:
        pairs = list(zip(self.common, self.module.parameters(), strict=True))
        for common, mean in pairs:
            common.grad = common - mean
        self.outer.step()
        for common, weight in pairs:
            weight.copy_(common)

    def own(self) -> dict[str, Any]:
        """Also the common weights, and the outer optimiser."""
        common = [weight.detach() for weight in self.common]
        return super().own() | {"common": common, "outer": self.outer.state_dict()}

    def take(self, own: dict[str, Any]) -> None:
        """Go on as this rank."""
        super().take(own)
        for weight, value in zip(self.common, own["common"], strict=True):
            weight.data.copy_(value)
        self.outer.load_state_dict(own["outer"])
