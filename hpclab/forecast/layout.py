"""How a model is spread over GPUs: data, tensor and pipeline parallelism, ZeRO, and what is computed again."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpclab._arguments import one_of
from hpclab.forecast.transformer import RECOMPUTE, Transformer


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups, and what each rank does in a step.

    Parameters
    ----------
    dp, tp, pp : int, default 1
        Ranks that share the batch, each matrix, and the layers; their product is the number of GPUs. Tensor-parallel
        ranks are neighbours, then data-parallel ones, then the stages of the pipeline.
    zero : int, default 0
        ZeRO stage: data-parallel ranks share nothing (0), the optimiser's state (1), also gradients (2), also weights
        (3).
    micro_batch : int, default 1
        Sequences that a rank takes at once.
    accumulation : int, default 1
        Micro-batches a step.
    sequence_parallel : bool, default True
        Whether tensor-parallel ranks also share norms and dropouts; without effect if `tp` is 1.
    interleave : int, default 1
        Chunks of layers that each stage of the pipeline holds.
    recompute : {None, "selective", "full"}, default None

    Raises
    ------
    ValueError
        If a number is impossible, or ZeRO 2 or 3 goes with a pipeline: it would share each micro-batch's gradients
        anew.

    Examples
    --------
    >>> layout = Layout(dp=2, tp=4, pp=2, micro_batch=2, accumulation=8)
    >>> layout.gpus, layout.batch, layout.bubble
    (16, 32, 0.125)
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    micro_batch: int = 1
    accumulation: int = 1
    sequence_parallel: bool = True
    interleave: int = 1
    recompute: str | None = None

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "micro_batch", "accumulation", "interleave"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be at least 1.")
        one_of("zero", self.zero, (0, 1, 2, 3))
        one_of("recompute", self.recompute, RECOMPUTE)
        if self.zero > 1 and self.pp > 1:
            raise ValueError(f"zero (={self.zero}) doesn't go with a pipeline (pp={self.pp}); use zero=1 or pp=1.")
        if self.interleave > 1 and (self.pp == 1 or self.accumulation % self.pp):
            raise ValueError(
                f"interleave (={self.interleave}) needs a pipeline whose pp (={self.pp}) divides accumulation"
                f" (={self.accumulation}); use interleave=1."
            )

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.dp * self.tp * self.pp

    @property
    def batch(self) -> int:
        """Sequences of a step, on all ranks."""
        return self.dp * self.micro_batch * self.accumulation

    @property
    def bubble(self) -> float:
        """Time that a stage of the pipeline idles, as a share of the time that it works: (p - 1)/(m v).

        Narayanan et al., Efficient large-scale language model training on GPU clusters using Megatron-LM (SC'21).
        """
        return (self.pp - 1) / (self.accumulation * self.interleave)

    def check(self, model: Transformer) -> None:
        """Raise a ValueError if this model can't be spread so."""
        for name in ("heads", "ffn"):
            if getattr(model, name) % self.tp:
                raise ValueError(f"tp (={self.tp}) must divide {name} (={getattr(model, name)}).")
        empty = int((self.blocks(model) == 0).sum())
        if self.pp * self.interleave > model.layers or empty > 2:
            raise ValueError(
                f"pp (={self.pp}) times interleave (={self.interleave}) is too much for {model.layers} layers: {empty}"
                " stages would have none, and at most 2 can do with the output layer and the loss; use fewer."
            )

    def blocks(self, model: Transformer) -> NDArray[np.int64]:
        """Number of the model's blocks on each stage, shape (pp,); the last has the output layer too.

        Notes
        -----
        As nanotron splits: by the size of matrices, the output layer counting as much as its own, each stage full once
        it passes its share of the sum.
        """
        share = (model.layers * model.block_weights + model.embedding_parameters) / self.pp
        counts, stage = np.zeros(self.pp, dtype=np.int64), 0
        for block in range(1, model.layers + 1):
            counts[stage] += 1
            if block * model.block_weights > share * (stage + 1) and stage < self.pp - 1:
                stage += 1
        return counts

    def in_flight(self) -> NDArray[np.float64]:
        """Micro-batches whose activations each stage holds at most, shape (pp,).

        Notes
        -----
        In a schedule of one forward, one backward pass (1F1B). Interleaving holds 1 + (p - 1)/(p v) times as many:
        Korthikanti et al. (2022).
        """
        held = np.minimum(self.pp - np.arange(self.pp), self.accumulation)
        return held * (1 + (self.pp - 1) / (self.pp * self.interleave) if self.interleave > 1 else 1.0)
