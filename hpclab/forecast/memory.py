"""The memory of a rank: weights, gradients, the optimiser's state, activations and buffers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from hpclab.forecast.layout import Layout
from hpclab.forecast.transformer import Transformer

Array = NDArray[np.float64]
Case = tuple[Transformer, Layout]

WEIGHT, GRADIENT, OPTIMISER = 2, 4, 12
"""Bytes a parameter in mixed precision: 16-bit weights, gradients added up in 32 bits, and AdamW's two states and
32-bit weights."""
LOGIT = 4
"""Bytes that a logit takes more if there are several micro-batches: as if the last one's, in 32 bits, were still held
when the next one makes its own. Rows of one micro-batch show that, the code wasn't looked at."""
WHOLE = 10 / 34
"""Share of a block's activations that tensor parallelism alone leaves whole: Korthikanti et al. (2022)."""
SLACK = 1.1
"""How many times a GPU's memory a forecast may be and still be said to fit: where 70 GiB or more are forecast, the 15
runs of `ultrascale` peaked 17 % lower in the median, perhaps since PyTorch's allocator gives back cached blocks before
it fails."""
ROBUST = {"loss": "cauchy", "f_scale": 0.1}
"""How fits take residuals of logarithms: those beyond a tenth count less and less, since some runs were disturbed."""


def parameters(model: Transformer, layout: Layout) -> Array:
    """Parameters that a rank of each stage works with, shape (pp,), before ZeRO shares them.

    The first stage has the embedding, the last the output layer; tied ones are one if there is one stage.
    """
    ends = np.zeros(layout.pp)
    ends[0] += 1
    ends[-1] += not (model.tied and layout.pp == 1)
    return (layout.blocks(model) * model.block_parameters + ends * model.embedding_parameters) / layout.tp


@dataclass(frozen=True)
class Memory:
    """What a training code keeps beyond weights, gradients and the optimiser's state.

    Parameters
    ----------
    activation : float
        Bytes that a block keeps for each token and unit of hidden size, shared by tensor-parallel ranks; with an MLP of
        3 to 4 times the hidden size and flash attention, which stores no scores.
    whole : float
        The same for what they don't share.
    logit : float
        Bytes for each token of a micro-batch and word of the vocabulary, on the last stage; with accumulation, `LOGIT`
        more.
    fixed : float
        Bytes of each rank, whatever it does.
    """

    activation: float
    whole: float
    logit: float
    fixed: float

    def parts(self, model: Transformer, layout: Layout) -> dict[str, Array]:
        """Bytes of each part on a rank of each stage, each of shape (pp,).

        Returns
        -------
        dict of str to ndarray
            ``weights``, ``gradients``, ``optimiser``, ``activations``, and ``buffers``: logits, what is fixed, and
            with ZeRO 3 the two blocks that are whole at a time.
        """
        known, units = _known(model, layout), _units(model, layout)
        activations = known.pop("inputs") + units[:, :2] @ (self.activation, self.whole)
        buffers = known.pop("buffers") + units[:, 2:] @ (self.logit, self.fixed)
        return known | {"activations": activations, "buffers": buffers}

    def stage_bytes(self, model: Transformer, layout: Layout) -> Array:
        """Bytes of a rank of each stage, shape (pp,)."""
        return np.sum([*self.parts(model, layout).values()], axis=0)

    def rank_bytes(self, model: Transformer, layout: Layout) -> float:
        """Bytes of the rank that needs most."""
        return float(self.stage_bytes(model, layout).max())

    def fits(self, model: Transformer, layout: Layout, memory_bytes: float) -> bool:
        """Whether GPUs with so many bytes can probably run it.

        What stays from step to step must fit as it is: the runs that `SLACK` comes from were full of what doesn't.
        """
        parts = self.parts(model, layout)
        lasting = np.sum([parts[name] for name in ("weights", "gradients", "optimiser")], axis=0).max()
        return bool(lasting <= memory_bytes) and self.rank_bytes(model, layout) <= SLACK * memory_bytes

    @classmethod
    def fit(cls, cases: Sequence[Case], measured_bytes: ArrayLike) -> "Memory":
        """Fit to the peaks of ranks of the *first* stage, by robust least squares of logarithms.

        Parameters
        ----------
        cases : sequence of (Transformer, Layout)
        measured_bytes : array_like, shape (k,)

        Raises
        ------
        ValueError
            If there are fewer peaks than constants, or not one a case.
        """
        measured = np.asarray(measured_bytes, dtype=float)
        if measured.shape != (len(cases),) or len(cases) < 4:
            raise ValueError(f"measured_bytes (of shape {measured.shape}) must be one of each case, and at least 4.")
        known = np.array([sum(part[0] for part in _known(*case).values()) for case in cases])
        units = np.array([_units(*case)[0] for case in cases])
        scale = np.array([50.0, 1.0, 15.0, 2.0**29])

        def residuals(at: Array) -> Array:
            return np.log((known + units @ (at * scale)) / measured)

        best = scipy.optimize.least_squares(residuals, np.ones(4), bounds=(0, np.inf), **ROBUST).x * scale
        return cls(*best.tolist())


def _known(model: Transformer, layout: Layout) -> dict[str, Array]:
    """Bytes that need no calibration, each of shape (pp,)."""
    held = parameters(model, layout)
    inputs = np.zeros(layout.pp)
    if layout.recompute == "full":
        tokens = layout.micro_batch * model.sequence / (layout.tp if layout.sequence_parallel else 1)
        inputs = layout.in_flight() * layout.blocks(model) * 2 * tokens * model.hidden
    buffers = np.full(layout.pp, 2 * WEIGHT * model.block_parameters / layout.tp if layout.zero == 3 else 0.0)
    buffers[-1] += LOGIT * _logits(model, layout) * (layout.accumulation > 1)
    return {
        "weights": WEIGHT * held / (layout.dp if layout.zero > 2 else 1),
        "gradients": GRADIENT * held / (layout.dp if layout.zero > 1 else 1),
        "optimiser": OPTIMISER * held / (layout.dp if layout.zero > 0 else 1),
        "inputs": inputs,
        "buffers": buffers,
    }


def _logits(model: Transformer, layout: Layout) -> float:
    """Logits of a micro-batch on a rank of the last stage."""
    return layout.micro_batch * model.sequence * model.vocabulary / layout.tp


def _units(model: Transformer, layout: Layout) -> Array:
    """What each constant of `Memory` is multiplied with, shape (pp, 4)."""
    tokens = layout.micro_batch * model.sequence
    blocks = layout.in_flight() * layout.blocks(model)
    if layout.recompute == "full":
        blocks = np.minimum(blocks, 1.0)  # the one that is computed again
    units = blocks * tokens * model.hidden
    shared = (1 - WHOLE) / layout.tp + WHOLE / (layout.tp if layout.sequence_parallel else 1)
    logits = np.zeros(layout.pp)
    logits[-1] = _logits(model, layout)
    return np.stack([units * shared, units, logits, np.ones(layout.pp)], axis=1)
