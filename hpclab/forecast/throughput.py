"""The seconds of a training step of a large model: computing, messages, launches, the pipeline's bubble."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from hpclab.forecast.layout import Layout
from hpclab.forecast.memory import GRADIENT, ROBUST, WEIGHT, Case, parameters
from hpclab.forecast.transformer import Transformer

Array = NDArray[np.float64]

OPTIMISER_TRAFFIC = 28
"""Bytes a parameter that AdamW reads and writes: gradient, two states and weights in 32 bits, and 16-bit weights."""


@dataclass(frozen=True)
class Accelerator:
    """A GPU, and how many a node has.

    Parameters
    ----------
    flops : float
        Dense 16-bit FLOPs a second, from the data sheet.
    memory_bytes : float
        As its driver reports.
    bandwidth : float
        Bytes a second of its memory.
    per_node : int, default 8
    """

    flops: float
    memory_bytes: float
    bandwidth: float
    per_node: int = 8


H100 = Accelerator(989e12, 81559 * 2**20, 3.35e12)
A100 = Accelerator(312e12, 81920 * 2**20, 2.04e12)
"""Both of 80 GB, on SXM boards."""


def mfu(model: Transformer, gpus: int, sequences_per_s: float, peak: float = H100.flops) -> float:
    """Model FLOPs utilisation, 0 to 1: FLOPs that the model needs over those that the GPUs could do.

    Notes
    -----
    Chowdhery et al., PaLM (2022); attention counted in full, as most publish it.
    """
    return hfu(model, gpus, sequences_per_s, None, peak)


def hfu(
    model: Transformer, gpus: int, sequences_per_s: float, recompute: str | None = "full", peak: float = H100.flops
) -> float:
    """Hardware FLOPs utilisation, 0 to 1: also counts what is computed again."""
    return model.flops(sequences_per_s, recompute) / (gpus * peak)


def training_s(model: Transformer, tokens: float, gpus: int, flops: float) -> float:
    """Seconds to train on so many tokens with full recomputation: 8 T P/(n X).

    Parameters
    ----------
    flops : float
        FLOPs a second that each GPU achieves (X).

    Notes
    -----
    Narayanan et al. (SC'21), equation 4.
    """
    return 8 * tokens * model.parameters / (gpus * flops)


@dataclass(frozen=True)
class Throughput:
    """What a training code and a cluster make of the FLOPs and bytes of a step.

    Parameters
    ----------
    efficiency : float
        Share of the GPU's FLOPs that matrix products reach.
    block_s : float
        Seconds that each block takes for a micro-batch, whatever its size.
    launch_s : float
        Seconds in which the host issues a block's kernels and messages with tensor parallelism; a micro-batch takes at
        least that.
    crossing : float
        Power of `tp` with which that grows if a pipeline crosses nodes. The rows show it; why, isn't known.
    spanning : float
        Power of the nodes of a tensor-parallel group with which that grows.
    logit_bytes : float
        Bytes of memory traffic a logit.
    inside, between : float
        Bytes a second of collectives within a node, and of each node between nodes.
    node_s : float
        Seconds that each step waits for all nodes, times the square root of their number: rings grow with it, trees
        with its logarithm, and the rows lie between.
    """

    efficiency: float
    block_s: float
    launch_s: float
    crossing: float
    spanning: float
    logit_bytes: float
    inside: float
    between: float
    node_s: float

    def step_s(self, model: Transformer, layout: Layout, gpu: Accelerator = H100) -> float:
        """Seconds of a step."""
        return float(sum(self.parts(model, layout, gpu).values()))

    def parts(self, model: Transformer, layout: Layout, gpu: Accelerator = H100) -> dict[str, float]:
        """Seconds of the parts of a step.

        Returns
        -------
        dict of str to float
            Of the slowest stage ``compute_s``, ``tensor_s`` (messages of tensor parallelism) and ``launch_s`` (waiting
            for the host, or for weights that ZeRO 3 shares); ``bubble_s``; then ``gradients_s`` (summed), ``update_s``
            (the optimiser) and ``nodes_s``.
        """
        return {name: float(seconds.item()) for name, seconds in self._parts(_units(model, layout, gpu)).items()}

    def _parts(self, units: dict[str, Array]) -> dict[str, Array]:
        """Parts of the steps whose units these are; the last axis is the stage, of size 1 in the result."""
        compute = units["compute_s"] / self.efficiency + units["blocks"] * self.block_s
        compute = compute + units["logits_s"] * self.logit_bytes
        tensor = units["tensor_bytes"] / np.where(units["spans"] > 1, self.between, self.inside)
        issue = self.launch_s * units["issued"] * units["spans"] ** self.spanning * units["cross"] ** self.crossing
        link = np.where(units["share"] > 0, self.between * units["share"], self.inside)
        stage = np.maximum(compute + tensor, np.maximum(issue, units["micro_bytes"] / link))
        slowest = np.argmax(stage, axis=-1, keepdims=True)

        def of_slowest(seconds: Array) -> Array:
            return units["accumulation"] * np.take_along_axis(seconds, slowest, axis=-1)

        bubble = stage.sum(-1, keepdims=True) - stage.max(-1, keepdims=True)
        return {
            "compute_s": of_slowest(compute),
            "tensor_s": of_slowest(tensor),
            "launch_s": of_slowest(stage - compute - tensor),
            "bubble_s": bubble / units["interleave"],
            "gradients_s": units["step_bytes"] / link,
            "update_s": units["update_s"],
            "nodes_s": self.node_s * np.sqrt(units["nodes"]),
        }

    @classmethod
    def fit(cls, cases: Sequence[Case], measured_s: ArrayLike, gpu: Accelerator = H100) -> "Throughput":
        """Fit to measured steps, by robust least squares of logarithms.

        Parameters
        ----------
        cases : sequence of (Transformer, Layout)
        measured_s : array_like, shape (k,)
            Seconds of a step.
        gpu : Accelerator, default H100

        Raises
        ------
        ValueError
            If there are fewer steps than constants, or not one a case.
        """
        measured = np.asarray(measured_s, dtype=float)
        start = np.log([0.4, 1e-3, 5e-3, 0.7, 0.7, 20.0, 3e11, 1.5e11, 1e-2])
        if measured.shape != (len(cases),) or len(cases) < len(start):
            raise ValueError(
                f"measured_s (of shape {measured.shape}) must be one of each case, and at least {len(start)}."
            )
        units = _stacked([_units(*case, gpu) for case in cases])

        def residuals(at: Array) -> Array:
            parts = cls(*np.exp(at).tolist())._parts(units)
            return np.log(np.sum([*parts.values()], axis=0)[:, 0] / measured)

        best = scipy.optimize.least_squares(residuals, start, bounds=(start - 6, start + 6), **ROBUST).x
        return cls(*np.exp(best).tolist())


def _units(model: Transformer, layout: Layout, gpu: Accelerator) -> dict[str, Array]:
    """What the constants of `Throughput` are multiplied with: of each stage, shape (pp,), or of a step, shape (1,)."""
    blocks, held = layout.blocks(model), parameters(model, layout)
    tokens = layout.micro_batch * model.sequence
    head = np.arange(layout.pp) == layout.pp - 1
    passes = 4 if layout.recompute == "full" else 3
    flops = passes * blocks * model.block_flops(causal=True) + 3 * head * 2 * model.embedding_parameters
    summed = 2 * (passes - 1) * 2 * (layout.tp - 1) / layout.tp  # by two all-reduces, forward, backward and again
    nodes = -(-layout.gpus // gpu.per_node)
    spans = -(-layout.tp // gpu.per_node)
    here = min(layout.dp, max(1, gpu.per_node // layout.tp))  # ranks of a data-parallel group in a node
    traffic = held * (layout.dp - 1) / layout.dp
    at_end, each = _sharing(layout.zero)
    step = {
        "spans": spans,
        "cross": layout.tp if layout.pp > 1 and nodes > 1 else 1,
        "share": here / gpu.per_node if here < layout.dp else 0.0,
        "accumulation": layout.accumulation,
        "interleave": layout.interleave,
        "step_bytes": at_end * traffic.max(),
        "update_s": OPTIMISER_TRAFFIC * held.max() / (layout.dp if layout.zero else 1) / gpu.bandwidth,
        "nodes": nodes,
    }
    return {
        "compute_s": tokens * flops / layout.tp / gpu.flops,
        "blocks": blocks.astype(float),
        "issued": blocks * float(layout.tp > 1),
        "logits_s": head * tokens * model.vocabulary / layout.tp / gpu.bandwidth,
        "tensor_bytes": summed * blocks * tokens * model.hidden * WEIGHT,
        "micro_bytes": each * traffic,
    } | {name: np.array([float(value)]) for name, value in step.items()}


def _sharing(zero: int) -> tuple[int, int]:
    """Bytes a parameter that data-parallel ranks exchange: at the end of a step, and for each micro-batch."""
    return ((2 * GRADIENT, 0), (GRADIENT + WEIGHT, 0), (WEIGHT, GRADIENT), (0, 2 * WEIGHT + GRADIENT))[zero]


def _stacked(units: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Units of many steps, each of shape (steps, stages); missing stages have none."""
    widths = {name: max(len(one[name]) for one in units) for name in units[0]}
    return {
        name: np.stack([np.pad(one[name], (0, width - len(one[name]))) for one in units])
        for name, width in widths.items()
    }
