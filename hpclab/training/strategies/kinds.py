"""The strategies as settings, in a form that a notebook's kernel can make, check and send without importing torch.

Ranks are dealt to replicas in order: of 4 ranks in groups of 2, ranks 0 and 1 hold one replica of the model, 2 and 3
another. The ranks of a replica see the same samples.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hpclab._arguments import one_of, whole_number

if TYPE_CHECKING:
    from torch import Tensor as Values
    from torch import nn
    from torch.optim import Optimizer

SPLIT = ("GPT",)
"""Names of the models in `hpclab.models` that say how they are split."""
COMPRESSIONS = ("bf16", "fp16", "powersgd", "topk")
SCHEDULES = ("gpipe", "1f1b", "interleaved")


@dataclass(frozen=True, kw_only=True, repr=False)
class Strategy:
    """What all strategies have: two switches that change how each rank computes, not what it sends."""

    recompute: bool = False
    """Keep only the inputs of each block; the backward pass computes the rest again (activation checkpointing)."""
    autocast: bool = False
    """Multiply matrices in bfloat16; weights and gradients stay as they are."""

    engine: ClassVar[str]
    """Rank's side: its file in this folder and its class there."""
    needs: ClassVar[str] = ""
    """Attribute by which a model says how it is split; empty if any model will do."""
    keeps: ClassVar[str] = "whole"
    """Kind of checkpoint: strategies of the same kind read each other's."""
    weighs: ClassVar[bool] = False
    """Whether ranks may have unequal shares of a step's samples: each gradient is weighed by its rank's share."""

    def __repr__(self) -> str:
        """As Python would make it, without what it has by default."""
        values = ((one, getattr(self, one.name)) for one in fields(self))
        settings = (f"{one.name}={value!r}" for one, value in values if value != one.default)
        return f"{type(self).__name__}({', '.join(settings)})"

    def group(self, ranks: int) -> int:
        """How many of these ranks share a replica of the model."""
        return 1

    def parts(self) -> int:
        """Micro-batches that a replica's samples of a step are cut into."""
        return 1

    def replicas(self, ranks: int) -> tuple[int, list[int]]:
        """Number of replicas of the model, and which of them each rank belongs to."""
        size = self.group(ranks)
        return ranks // size, [rank // size for rank in range(ranks)]

    def check(self, model: object, ranks: int, batch: int, balance: bool = False) -> None:
        """Raise unless this strategy can train a model.

        Parameters
        ----------
        model : torch.nn.Module, class or function that makes one, or name
            What a function makes is only seen on the ranks, which check it again.
        ranks : int
        batch : int
            Samples a step, of all ranks together.
        balance : bool, default False
            Whether the ranks' shares of them are unequal.

        Raises
        ------
        ValueError
            If it can't; the message says why, and names the strategies that can.
        """
        if why := self.obstacle(model, ranks, batch, balance):
            able = [name for name, other in NAMES.items() if not other.obstacle(model, ranks, batch, balance)]
            raise ValueError(f"strategy (={self!r}) {why}; these can: {', '.join(able)}.")

    def obstacle(self, model: object, ranks: int, batch: int, balance: bool = False) -> str:
        """Why this strategy can't train a model; empty if it can."""
        size = self.group(ranks)
        if size > ranks or ranks % size:
            return f"splits each replica over {size} ranks, which ranks (={ranks}) is no multiple of"
        if batch % (ranks // size * self.parts()):
            return f"deals {batch} samples a step to {ranks // size} replicas in {self.parts()} parts each, unevenly"
        if self.needs and not _has(model, self.needs):
            return f"needs a model that says how it is split (its `{self.needs}`), as models.GPT does"
        return "needs equal shares, without balance" if balance and not self.weighs else ""

    def start(
        self,
        module: nn.Module,
        optimizer: Callable[[Iterable], Optimizer],
        loss: Callable[[Values, Values], Values],
    ) -> Any:
        """Begin on a rank, with all ranks: returns an `engine.Engine`, which says the rest."""
        file, name = self.engine.split(".")
        engine = getattr(importlib.import_module(f"hpclab.training.strategies.{file}"), name)
        return engine(self, module, optimizer, loss)


@dataclass(frozen=True, repr=False)
class DDP(Strategy):
    """Every rank holds the model; gradients are averaged as they become ready (DistributedDataParallel)."""

    find_unused_parameters: bool = field(default=False, kw_only=True)
    """Whether steps may leave parameters without a gradient."""
    bucket_cap_mb: float | None = field(default=None, kw_only=True)
    """MB (2**20 bytes) of gradients that are averaged at once; None as torch does by default."""

    engine: ClassVar[str] = "ddp.Replicated"
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bucket_cap_mb is not None and not 0 < self.bucket_cap_mb < math.inf:
            raise ValueError(f"bucket_cap_mb (={self.bucket_cap_mb!r}) must be above 0, such as 0.1.")


@dataclass(frozen=True, repr=False)
class Accumulate(DDP):
    """As DDP, but each rank adds up the gradients of several micro-batches before it sends their mean."""

    micro_batches: int = 4

    engine: ClassVar[str] = "ddp.Accumulating"
    weighs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("micro_batches", self.micro_batches)

    def parts(self) -> int:
        """Micro-batches of a rank."""
        return self.micro_batches


@dataclass(frozen=True, repr=False)
class Compress(DDP):
    """As DDP, but gradients are sent in fewer bytes, so their mean is no longer exact."""

    method: Literal["bf16", "fp16", "powersgd", "topk"]
    """16-bit numbers; low rank (Vogels et al. 2019, arXiv:1905.13727); or the largest, with error feedback (Stich et
    al. 2018, arXiv:1809.07599)."""
    rank: int = 1
    """Of PowerSGD's matrices."""
    density: float = 0.01
    """Share of the numbers that "topk" sends."""

    engine: ClassVar[str] = "compress.Compressing"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("method", self.method, COMPRESSIONS)
        if not 0 < self.density <= 1:
            raise ValueError(f"density (={self.density!r}) must be above 0 and at most 1, such as 0.01.")

    @property
    def keeps(self) -> str:  # type: ignore[override]
        """Both of the last two remember, on each rank, what they haven't sent."""
        return self.method if self.method in ("powersgd", "topk") else "whole"


@dataclass(frozen=True, repr=False)
class LocalSGD(Strategy):
    """Each rank trains by itself, and every so many steps the weights are averaged (Stich 2018, arXiv:1805.09767)."""

    every: int = 8
    """Steps between averages, >= 2."""

    engine: ClassVar[str] = "local.Local"
    keeps: ClassVar[str] = "local-sgd"

    def __post_init__(self) -> None:
        whole_number("every", self.every, least=2)  # DDP averages in every step


@dataclass(frozen=True, repr=False)
class DiLoCo(LocalSGD):
    """As LocalSGD, but an outer optimiser takes the mean change as a gradient (Douillard 2023, arXiv:2311.08105)."""

    every: int = 16
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    """Of Nesterov's kind."""

    engine: ClassVar[str] = "local.Outer"
    keeps: ClassVar[str] = "diloco"


@dataclass(frozen=True, repr=False)
class Zero(Strategy):
    """Each rank keeps a share of the optimiser's state (stage 1), of the gradients too (2), of the weights too (3).

    Rajbhandari et al. 2020, arXiv:1910.02054. Stage 1 is torch's ZeroRedundancyOptimizer; 2 and 3 are `fully_shard`:
    both keep weights in shards between steps, and 3 also between a block's forward and backward pass.
    """

    stage: Literal[1, 2, 3] = 3

    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("stage", self.stage, (1, 2, 3))

    @property
    def engine(self) -> str:  # type: ignore[override]
        """Rank's side."""
        return "zero.Optimizers" if self.stage == 1 else "zero.Shards"

    @property
    def keeps(self) -> str:  # type: ignore[override]
        """Stages 2 and 3 read each other's."""
        return "zero1" if self.stage == 1 else "shards"


@dataclass(frozen=True, repr=False)
class Tensor(Strategy):
    """The ranks of a replica split each block's matrices (Shoeybi et al. 2019, arXiv:1909.08053)."""

    ranks: int | None = None
    """Ranks of a replica; None takes all, fewer make several replicas."""
    sequence: bool = False
    """Split what lies between the matrices too, by position in the sequence (Korthikanti et al. 2022,
    arXiv:2205.05198)."""

    engine: ClassVar[str] = "tensor.Split"
    needs: ClassVar[str] = "columns"

    @property
    def keeps(self) -> str:  # type: ignore[override]
        """Which tensors have shards depends on the kind."""
        return "sequence" if self.sequence else "tensor"

    def group(self, ranks: int) -> int:
        """Ranks of a replica."""
        return self.ranks or ranks


@dataclass(frozen=True, repr=False)
class Pipeline(Strategy):
    """The ranks of a replica hold some blocks each, and pass micro-batches on (Huang et al. 2019, arXiv:1811.06965)."""

    stages: int | None = None
    """Ranks of a replica; None takes all, fewer make several replicas."""
    micro_batches: int = 4
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "gpipe"
    """All forward passes first; or one forward, one backward (Narayanan et al. 2019, arXiv:1806.03377); or this with
    several stages a rank (Narayanan et al. 2021, arXiv:2104.04473)."""
    chunks: int = 2
    """Stages a rank, if interleaved."""

    engine: ClassVar[str] = "pipeline.Pipelined"
    needs: ClassVar[str] = "stages"
    keeps: ClassVar[str] = "pipeline"

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, SCHEDULES)
        whole_number("micro_batches", self.micro_batches)
        whole_number("chunks", self.chunks)

    def group(self, ranks: int) -> int:
        """Ranks of a replica."""
        return self.stages or ranks

    def parts(self) -> int:
        """Micro-batches of a replica."""
        return self.micro_batches

    def obstacle(self, model: object, ranks: int, batch: int, balance: bool = False) -> str:
        """Also if there are too few stages, or micro-batches to fill them."""
        stages, parts = self.group(ranks), self.micro_batches
        if stages < 2:
            return "needs at least 2 ranks"
        if self.schedule != "gpipe" and parts < stages:
            return f"needs at least as many micro_batches (={parts}) as stages (={stages})"
        if self.schedule == "interleaved" and parts % stages:
            return f"needs micro_batches (={parts}) to be a multiple of stages (={stages})"
        return super().obstacle(model, ranks, batch, balance)


NAMES: dict[str, Strategy] = {
    "ddp": DDP(),
    "accumulate": Accumulate(),
    **{method: Compress(method) for method in COMPRESSIONS},  # type: ignore[arg-type]
    "local-sgd": LocalSGD(),
    "diloco": DiLoCo(),
    **{f"zero{stage}": Zero(stage) for stage in (1, 2, 3)},
    "tensor": Tensor(),
    "sequence": Tensor(sequence=True),
    **{schedule: Pipeline(schedule=schedule) for schedule in SCHEDULES},  # type: ignore[arg-type]
}
"""Strategies with their default settings, by name."""


def named(strategy: Strategy | str) -> Strategy:
    """The strategy of a name, or the one that it is.

    Raises
    ------
    ValueError
        If there is none of this name; the message lists all.
    """
    if isinstance(strategy, Strategy):
        return strategy
    one_of("strategy", strategy, NAMES)
    return NAMES[strategy]


def _has(model: object, attribute: str) -> bool:
    """Whether a model says how it is split, as far as can be told before it is made."""
    while isinstance(model, functools.partial):
        model = model.func
    if isinstance(model, str):
        return model in SPLIT
    made_later = callable(model) and not isinstance(model, type) and not hasattr(model, "parameters")
    return made_later or hasattr(model, attribute)
