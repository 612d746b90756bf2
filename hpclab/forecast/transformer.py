"""The shape of a transformer: its parameters, its FLOPs, and the bytes of its activations."""

from dataclasses import dataclass

from hpclab._arguments import one_of

RECOMPUTE = (None, "selective", "full")
"""What the backward pass computes again: nothing, the attention's scores, or whole blocks."""


@dataclass(frozen=True)
class Transformer:
    """A decoder, as in GPT or LLaMA.

    Parameters
    ----------
    layers, hidden, heads : int
        Number of blocks, width of the residual stream, and attention heads of a block.
    ffn : int
        Width between the matrices of a block's MLP.
    vocabulary : int
    sequence : int
        Tokens of a sequence.
    tied : bool, default True
        Whether the output layer shares the embedding's weights.
    kv_heads : int, optional
        Heads of keys and values. Default: as many as `heads`.
    gated : bool, default True
        Whether the MLP has three matrices and nothing has a bias (LLaMA), or two, with biases and learned positions
        (GPT-2).

    Raises
    ------
    ValueError
        If a number is below 1, or `heads` doesn't divide `hidden`, or `kv_heads` not `heads`.

    Examples
    --------
    >>> Transformer(16, 2048, 32, 8192, 131072, 4096).parameters
    1342244864
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    sequence: int
    tied: bool = True
    kv_heads: int | None = None
    gated: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "ffn", "vocabulary", "sequence"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be at least 1.")
        if self.hidden % self.heads:
            raise ValueError(f"hidden (={self.hidden}) must be a multiple of heads (={self.heads}).")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads (={self.kv_heads}) must divide heads (={self.heads}).")

    @property
    def block_weights(self) -> int:
        """Entries of the matrices of one block."""
        narrow = self.hidden * (self.kv_heads or self.heads) // self.heads
        return self.hidden * (2 * self.hidden + 2 * narrow + (3 if self.gated else 2) * self.ffn)

    @property
    def block_parameters(self) -> int:
        """Parameters of one block: matrices, norms, biases."""
        small = 2 * self.hidden if self.gated else 9 * self.hidden + self.ffn
        return self.block_weights + small

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, which an untied output layer has once more."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        ends = self.embedding_parameters * (1 if self.tied else 2)
        last = self.hidden if self.gated else (2 + self.sequence) * self.hidden
        return ends + self.layers * self.block_parameters + last

    def block_flops(self, causal: bool = False) -> float:
        """FLOPs of one block's forward pass for one token.

        Parameters
        ----------
        causal : bool, default False
            Count only the half of the attention's scores that a causal kernel computes; published FLOPs count both.
        """
        return 2 * self.block_weights + (2 if causal else 4) * self.sequence * self.hidden

    def flops(self, sequences: float = 1, recompute: str | None = None) -> float:
        """FLOPs of a training step: 3 times a forward pass, and what is computed again.

        Parameters
        ----------
        sequences : float, default 1
            Sequences of the step's batch.
        recompute : {None, "selective", "full"}, default None
            With None these are the FLOPs of MFU; else those of HFU.

        Notes
        -----
        For GPT's shape the 72 B L s h^2 (1 + s/6h + V/12hL) of Korthikanti et al., Reducing activation recomputation
        in large transformer models (2022), and with full recomputation the 96 B L s h^2 (1 + s/6h + V/16hL) of
        Narayanan et al. (SC'21).
        """
        one_of("recompute", recompute, RECOMPUTE)
        head = 2 * self.embedding_parameters
        blocks = self.layers * self.block_flops()
        again = {None: 0.0, "selective": self.layers * 4 * self.sequence * self.hidden, "full": blocks}[recompute]
        return sequences * self.sequence * (3 * (blocks + head) + again)

    def activation_bytes(
        self, sequences: float = 1, tp: int = 1, sequence_parallel: bool = False, recompute: str | None = None
    ) -> float:
        """Bytes that one block of GPT's shape keeps for its backward pass, on each tensor-parallel rank.

        Parameters
        ----------
        sequences : float, default 1
            Sequences of a micro-batch.
        tp : int, default 1
            Ranks that share the block.
        sequence_parallel : bool, default False
            Whether they also share what tensor parallelism leaves whole: norms and dropouts.
        recompute : {None, "selective", "full"}, default None

        Notes
        -----
        Korthikanti et al. (2022), table 2: 16-bit numbers, dropout, an MLP of 4 times the hidden size, and an attention
        that stores its scores. `Memory` fits what a code with flash attention keeps.
        """
        one_of("recompute", recompute, RECOMPUTE)
        sbh = self.sequence * sequences * self.hidden
        if recompute == "full":
            return 2 * sbh
        scores = 5 * self.heads * self.sequence / self.hidden if recompute is None else 0.0
        return sbh * (10 / (tp if sequence_parallel else 1) + (24 + scores) / tp)
