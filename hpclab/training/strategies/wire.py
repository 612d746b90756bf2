"""Bytes that each strategy sends, by formula: on gloo, and on NCCL."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from hpclab.training.strategies.kinds import DDP, Compress, LocalSGD, Pipeline, Strategy, Tensor, Zero

if TYPE_CHECKING:
    from torch import nn

    from hpclab.network import Network

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast", "send"]


@dataclass(frozen=True)
class Sizes:
    """What the bytes of a step depend on. All are counts of numbers, such as weights, unless they say otherwise."""

    shapes: tuple[tuple[int, ...], ...]
    """Of all parameters."""
    stream: int = 0
    """What a block passes on, for all samples of a step: samples x positions x width."""
    blocks: int = 0
    split: int = 0
    """Weights that tensor parallelism splits."""
    norms: int = 0
    """Weights of the blocks' norms."""
    tied: int = 0
    """Weights that the first and the last stage of a pipeline share."""
    word: int = 4
    """Bytes a number."""

    @property
    def weights(self) -> int:
        """All weights."""
        return sum(map(math.prod, self.shapes))

    @classmethod
    def of(cls, module: nn.Module, samples: int = 0, positions: int = 0) -> Sizes:
        """Of a model; one that says how it is split takes this many samples a step, of this many positions."""
        shapes = tuple(tuple(weight.shape) for weight in module.parameters())
        sizes, model = cls(shapes, word=next(module.parameters()).element_size()), cast(Any, module)
        if not hasattr(model, "columns"):
            return sizes
        layers = [dict(block.named_parameters()) for block in model.blocks]

        def count(names: tuple[str, ...]) -> int:
            return sum(layer[f"{name}.weight"].numel() for layer in layers for name in names)

        first, last = (set(stage.parameters()) for stage in model.stages(2))
        return replace(
            sizes,
            stream=samples * positions * len(layers[0][f"{model.norms[0]}.weight"]),
            blocks=len(layers),
            split=count(model.columns + model.rows),
            norms=count(model.norms),
            tied=sum(weight.numel() for weight in first & last),
        )


@dataclass(frozen=True)
class Message:
    """What ranks send each other once, or in several pieces, in a step."""

    operation: Operation
    ranks: int
    """That take part."""
    nbytes: float
    """Of the whole tensor, which an all-gather ends with and a reduce-scatter begins with; a send's own."""

    def seconds(self, network: Network) -> float:
        """What it takes on a network, if it is an all-reduce or an all-gather."""
        takes = {"all-reduce": network.allreduce_s, "all-gather": network.allgather_s}[self.operation]
        return float(takes(self.nbytes, self.ranks))

    def sent(self, library: str) -> float:
        """Bytes that each rank sends, on average.

        An all-reduce of n bytes over p ranks takes 2 n (p-1)/p, as a reduce-scatter and an all-gather of n (p-1)/p each
        (Thakur et al. 2005, doi 10.1177/1094342005051521); a broadcast takes n (p-1)/p on average. Gloo's
        reduce-scatter is an all-reduce (pytorch#118911).
        """
        once = self.nbytes * (self.ranks - 1) / self.ranks
        twice = self.operation == "all-reduce" or (self.operation == "reduce-scatter" and library == "gloo")
        return self.nbytes if self.operation == "send" else once * (1 + twice)


def wire(strategy: Strategy, ranks: int, sizes: Sizes) -> dict[str, float]:
    """Bytes that a rank sends in a step, on average over ranks and steps.

    Not counted are headers, and messages of a few bytes. Recomputing blocks isn't either, which makes tensor
    parallelism repeat half of a forward pass's sums.

    Returns
    -------
    dict
        ``gloo`` and ``nccl``.

    Notes
    -----
    With n bytes of gradients on p ranks:

    ================== =================== =====================================
    strategy           gloo                NCCL
    ================== =================== =====================================
    ddp, accumulate    2 n (p-1)/p         the same
    bf16, fp16         n (p-1)/p           the same, if weights have 4 bytes
    topk               d n (1 + 4/w) (p-1) the same, for density d and w bytes
    local-sgd, diloco  2 n (p-1)/p / H     the same, if ranks meet every H steps
    zero1              3 n (p-1)/p         the same
    zero2              3 n (p-1)/p         2 n (p-1)/p
    zero3              4 n (p-1)/p         3 n (p-1)/p
    ================== =================== =====================================

    For the others see `messages`.
    """
    sent = messages(strategy, ranks, sizes)
    return {library: sum(message.sent(library) for message in sent) for library in ("gloo", "nccl")}


def messages(strategy: Strategy, ranks: int, sizes: Sizes) -> list[Message]:
    """What the ranks send each other in a step.

    Tensor parallelism sums the stream of a replica twice a block in the forward pass, and twice in the backward pass;
    by sequence, each of these sums is a reduce-scatter and an all-gather, and the ends of the stream are gathered too.
    A pipeline sends the stream on, and its gradient back, between each two stages.
    """
    group, gradients = strategy.group(ranks), sizes.weights * sizes.word
    replicas, stream = ranks // group, sizes.stream * sizes.word * group / ranks
    match strategy:
        case Compress(method="powersgd"):
            parts = zip(*(_low_rank(shape, strategy.rank) for shape in sizes.shapes), strict=True)
            return [Message("all-reduce", ranks, sum(part) * sizes.word) for part in parts]
        case Compress(method="topk"):
            return [Message("all-gather", ranks, ranks * strategy.density * sizes.weights * (sizes.word + 4))]
        case Compress():
            return [Message("all-reduce", ranks, 2 * sizes.weights)]
        case DDP():
            return [Message("all-reduce", ranks, gradients)]
        case LocalSGD():
            return [Message("all-reduce", ranks, gradients / strategy.every)]
        case Zero(stage=1):
            return [Message("all-reduce", ranks, gradients), Message("broadcast", ranks, gradients)]
        case Zero():
            gathers = [Message("all-gather", ranks, gradients)] * (strategy.stage - 1)
            return [*gathers, Message("reduce-scatter", ranks, gradients)]
        case Tensor():
            mine = (sizes.weights - sizes.split * (group - 1) / group) * sizes.word
            between = [Message("all-reduce", group, stream)] * 4 * sizes.blocks
            if strategy.sequence:
                between = [Message(kind, group, stream) for kind in ("reduce-scatter", "all-gather")] * 4 * sizes.blocks
                between += [Message("all-gather", group, stream)] * 2
                between += [Message("all-reduce", group, sizes.norms * sizes.word)]
            return [*between, Message("all-reduce", replicas, mine)]
        case Pipeline():
            cuts = group * (strategy.chunks if strategy.schedule == "interleaved" else 1) - 1
            mine = (sizes.weights + sizes.tied) * sizes.word / group
            copies = Message("all-reduce", 2, sizes.tied * sizes.word * 2 / group)  # two of the replica's ranks
            return [Message("send", 2, 2 * stream * cuts / group), copies, Message("all-reduce", replicas, mine)]
        case _:
            raise TypeError(f"strategy (={strategy!r}) has no formula for its bytes.")


def _low_rank(shape: tuple[int, ...], rank: int) -> tuple[int, int, int]:
    """Numbers that PowerSGD sends of a tensor, one message after the other: itself, or else two thin matrices.

    A tensor goes itself if the matrices aren't below half of it.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    if len(shape) > 1 and 2 * (rows + columns) * rank < rows * columns:
        rank = min(rank, rows, columns)
        return 0, rows * rank, columns * rank
    return rows * columns, 0, 0
