"""What a rank of each strategy holds at its peak, by formula: for a GPT in 32 bits, trained by AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpclab.forecast import Layout
from hpclab.language import translate as _
from hpclab.training.strategies import DDP, Accumulate, Compress, DiLoCo, LocalSGD, Pipeline, Strategy, Tensor, Zero
from hpclab.training.strategies.wire import Sizes, wire

if TYPE_CHECKING:
    from hpclab.models import GPT
    from hpclab.training import Fit

WORD = 4
PARTS = ("weights", "gradients", "optimiser", "activations", "buffers")
SORTED = 4
"""Copies of a bucket that torch's top-k sorts: each number with its place takes 16 bytes."""

SUMMED = 2
"""Numbers a block, position and unit of width that tensor parallelism keeps more: as if the parts that a block sums
twice stayed. Peaks show that, torch's code wasn't looked at."""


def parts(strategy: Strategy, ranks: int, model: GPT, batch: int) -> dict[str, float]:
    """Bytes of the rank that holds most, at the moment when it does.

    Parameters
    ----------
    strategy : Strategy
    ranks : int
    model : models.GPT
        The whole model.
    batch : int
        Windows of a step, of all ranks together.

    Returns
    -------
    dict of str to float
        ``weights``, ``gradients``, ``optimiser``, ``activations``, ``buffers``.

    Notes
    -----
    A rank holds most either when all its activations are there, and gradients only where they add up over
    micro-batches; or at the end of a backward pass, with all its gradients and what it takes to send them.
    """
    size = WORD * model.counts().parameters
    held = {name: size * share for name, share in _shares(strategy, ranks, model).items()}
    static, sent = (size * copies for copies in _copies(strategy, model))
    kept, last = _activations(strategy, ranks, model, batch)
    full = held | {"activations": kept, "buffers": static}
    moments = [full, held | {"activations": last, "buffers": static + sent}]
    if isinstance(strategy, Pipeline) and strategy.schedule == "gpipe":  # its backward passes begin with the first one
        moments.append(full | {"activations": kept * (1 - 1 / strategy.micro_batches)})
        full["gradients"] = 0.0
    elif strategy.parts() == 1:
        full["gradients"] = 0.0
    return max(moments, key=lambda moment: sum(moment.values()))


def _shares(strategy: Strategy, ranks: int, model: GPT) -> dict[str, float]:
    """Numbers that a rank holds for each weight of the model: the optimiser's state is two."""
    share, group = dict.fromkeys(("weights", "gradients", "optimiser"), 1.0), strategy.group(ranks)
    match strategy:
        case Zero(stage=1):
            share["optimiser"] = 1 / ranks
        case Zero():
            share = dict.fromkeys(share, 1 / ranks)
        case Tensor():
            block = 12 * model.head.in_features**2 * len(model.blocks) / model.counts().parameters
            share = dict.fromkeys(share, block / group + 1 - block)
        case Pipeline():
            share = dict.fromkeys(share, 1 / group)
    return share | {"optimiser": 2 * share["optimiser"]}


def _copies(strategy: Strategy, model: GPT) -> tuple[float, float]:
    """Further copies of the weights' numbers: those held all the time, and those held while they are sent."""
    match strategy:
        case Compress(method="topk"):
            return 2, 1 + SORTED  # DDP's buckets and what isn't sent; sizes without signs, and what is sorted
        case Compress(method="powersgd"):
            return 2, 2  # while it works out what isn't sent: what shall be, and the new difference
        case Compress():
            return 1, 0.5
        case Zero(stage=1) | DDP():
            return 1, 0  # DDP's buckets
        case DiLoCo():
            return 3, 1  # common weights, their gradients and momentum; a message
        case LocalSGD():
            return 0, 1
        case Zero(stage=2):
            return 1, 0  # all weights are whole from the first forward pass to the end of the backward pass
        case Zero():  # two blocks are whole at a time, and one's gradients twice
            return 2 / len(model.blocks), 2 / len(model.blocks)
        case _:
            return 0, 0


def _activations(strategy: Strategy, ranks: int, model: GPT, batch: int) -> tuple[float, float]:
    """Bytes kept for the backward pass, and those left at its end.

    They are 16 numbers a block, position and unit of width, and a little more.
    """
    group, width, layers = strategy.group(ranks), model.head.in_features, len(model.blocks)
    kept = float(model.counts(1).activation_bytes) * batch * group / ranks  # of a replica
    numbers = WORD * width * model.context * batch * group / ranks * layers
    match strategy:
        case Accumulate():
            kept /= strategy.micro_batches
        case Pipeline(schedule="gpipe"):
            kept /= group
        case Pipeline():
            interleave = strategy.chunks if strategy.schedule == "interleaved" else 1
            layout = Layout(pp=group, accumulation=strategy.micro_batches, interleave=interleave)
            kept *= float(layout.in_flight()[0]) / strategy.micro_batches / group
        case Tensor():  # of 16 numbers, norms' inputs and outputs are whole, or by sequence the outputs alone
            kept += numbers * (SUMMED - (14 if strategy.sequence else 12) * (1 - 1 / group))
    if strategy.recompute:  # the blocks' inputs, and one block
        return kept / 16 + kept / layers, kept / layers
    return kept, 0.0


def row(name: str, strategy: Strategy, run: Fit, tiny: Fit, model: GPT, batch: int) -> dict:
    """What a run's ranks held, sent and took, beside the formulas.

    Parameters
    ----------
    name : str
        What to call the strategy.
    strategy : Strategy
    run, tiny : Fit
        Of the model, and of one so small that it holds next to nothing: what libraries take by themselves.
    model : models.GPT
    batch : int
        Windows of a step, of all ranks together.

    Returns
    -------
    dict
        Of kind "need": ``strategy``; the mean ``loss`` of the last step; ``step_s``, the fastest; ``sent_gloo_mb`` and
        ``sent_nccl_mb`` a rank and step, by `strategies.wire`; ``peak_mb``; and the MB of each part by formula.
    """
    steps = [row for row in run.rows if row["kind"] == "step"]
    last = [row["loss"] for row in steps if row["step"] == steps[-1]["step"]]
    sent = wire(strategy, steps[0]["ranks"], Sizes.of(model, batch, model.context))
    held = parts(strategy, steps[0]["ranks"], model, batch)
    megabytes = {f"sent_{library}": count for library, count in sent.items()} | held
    return {
        "kind": "need",
        "strategy": name,
        "loss": sum(last) / len(last),
        "step_s": min(row["step_s"] for row in steps),
        "peak_mb": _peak_mb(run) - _peak_mb(tiny),
        **{f"{part}_mb": count / 1e6 for part, count in megabytes.items()},
        "source": steps[0]["source"],
    }


def _peak_mb(run: Fit) -> float:
    """Of the rank that held most."""
    return max(row["peak_mb"] for row in run.rows if row["kind"] == "step")


def advice(name: str) -> str:
    """When to use a strategy, in a few words."""
    return {
        "ddp": _("the model fits, and the network keeps up: begin here"),
        "accumulate": _("activations don't fit, or a larger batch is wanted without more messages"),
        "bf16": _("as ddp, on a slow network"),
        "fp16": _("as bf16, where hardware lacks it and gradients are neither tiny nor huge"),
        "powersgd": _("where bandwidth is scarce, not where latency is; with loss compared first"),
        "topk": _("on a very slow network, if memory is plentiful"),
        "local-sgd": _("far fewer messages, at some loss"),
        "diloco": _("between sites: hundreds of steps without a message"),
        "zero1": _("the optimiser's state doesn't fit"),
        "zero2": _("gradients don't fit either, weights just do"),
        "zero3": _("weights don't fit, but the activations of a batch do"),
        "zero3 + recompute": _("as zero3, and activations don't fit either"),
        "tensor": _("one layer doesn't fit; within a node, where messages are fast"),
        "sequence": _("as tensor, for long sequences"),
        "gpipe": _("many layers, a slow network, few micro-batches"),
        "1f1b": _("as gpipe, with many micro-batches"),
        "interleaved": _("as 1f1b, with a smaller bubble and more messages"),
    }[name]
