"""A small GPT over characters."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from hpclab.models.counts import Counts, word


class GPT(nn.Module):
    """A decoder-only transformer, after GPT-2 (Radford et al. 2019) and nanoGPT: predicts each next character.

    Each Linear layer is one that tensor parallelism can split: q, k, v and up by columns, proj and down by rows. Blocks
    are a list, which a pipeline can cut anywhere.

    Parameters
    ----------
    vocabulary : int, default 63
        Number of different characters; the default is that of "kjv".
    context : int, default 128
        Longest sequence that it takes.
    width : int, default 128
        Size of a character's vector; a multiple of `heads`.
    heads, layers : int, default 4
    tied : bool, default True
        Whether the embedding is also the last layer's weight (Press and Wolf 2017, arXiv:1608.05859).

    Raises
    ------
    ValueError
        If heads don't divide the width, or a sequence is longer than the context.
    """

    columns = ("attention.q", "attention.k", "attention.v", "mlp.up")
    """Layers of a block whose outputs ranks can share, each pair of them with one of `rows`."""
    rows = ("attention.proj", "mlp.down")
    """Those whose inputs they can share."""
    norms = ("norm1", "norm2")

    def __init__(
        self,
        vocabulary: int = 63,
        context: int = 128,
        width: int = 128,
        heads: int = 4,
        layers: int = 4,
        tied: bool = True,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width (={width}) must be a multiple of heads (={heads}).")
        self.vocabulary, self.context, self.heads = vocabulary, context, heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_start)
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):  # they add to the stream: keep its size at any depth
                nn.init.normal_(weight, std=0.02 / (2 * layers) ** 0.5)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of each next character, shape (B, T, vocabulary), for characters' numbers, shape (B, T)."""
        stream = _embed(tokens, self.tokens, self.positions)
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream))

    def counts(self, samples: int = 1, length: int | None = None) -> Counts:
        """Parameters, operations and kept bytes of a forward pass over sequences of a length, by formula.

        The kept bytes are those of a CPU's fused attention, which keeps a number a head and position instead of the
        (T, T) scores.

        Parameters
        ----------
        samples : int, default 1
        length : int, optional
            Default: the context.
        """
        vocabulary, width = self.vocabulary, self.head.in_features
        layers, length = len(self.blocks), length or self.context
        rows = samples * length
        parameters = (vocabulary * (1 + (not self.tied)) + self.context) * width
        parameters += layers * (12 * width**2 + 2 * width) + width
        flops = rows * (24 * layers * width**2 + 4 * layers * length * width + 2 * vocabulary * width)
        kept = rows * (layers * (16 * width + self.heads + 4) + 2 * width + 2) * word(self) + 8 * (rows + length)
        return Counts(parameters, flops, kept)

    def stages(self, count: int) -> list[nn.Module]:
        """The model cut for a pipeline: modules with the same weights, which in a row compute what the whole does.

        Raises
        ------
        ValueError
            If there are fewer blocks than stages.
        """
        layers = len(self.blocks)
        if count > layers:
            raise ValueError(f"count (={count}) of stages exceeds the {layers} layers.")
        parts = [list(self.blocks[layers * n // count : layers * (n + 1) // count]) for n in range(count)]
        parts[0].insert(0, _Embeddings(self.tokens, self.positions))
        parts[-1] += [self.norm, self.head]
        return [nn.Sequential(*part) for part in parts]

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one."""
        return self.head.weight is self.tokens.weight


class _Embeddings(nn.Module):
    """How a pipeline begins."""

    def __init__(self, tokens: nn.Embedding, positions: nn.Embedding):
        super().__init__()
        self.tokens, self.positions = tokens, positions

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape (B, T) to (B, T, width)."""
        return _embed(tokens, self.tokens, self.positions)


def _embed(tokens: Tensor, characters: nn.Embedding, positions: nn.Embedding) -> Tensor:
    """The sum of a vector for each character and one for its position, shape (B, T, width)."""
    length, context = tokens.shape[1], positions.num_embeddings
    if length > context:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} are longer than context (={context}).")
    return characters(tokens) + positions(torch.arange(length, device=tokens.device))


class Block(nn.Module):
    """Attention, then a perceptron for each position; each reads a normed copy of the stream, and adds to it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, stream: Tensor) -> Tensor:
        """Shape (B, T, width) to the same."""
        stream = stream + self.attention(self.norm1(stream))
        return stream + self.mlp(self.norm2(stream))


class Attention(nn.Module):
    """Causal self-attention: each position looks at itself and those before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.size = width // heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, normed: Tensor) -> Tensor:
        """Shape (B, T, width) to the same."""
        q, k, v = (  # (B, heads, T, size); a rank of tensor parallelism has only its share of the heads
            part(normed).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers, four times as wide between them."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, normed: Tensor) -> Tensor:
        """Shape (B, T, width) to the same."""
        return self.down(gelu(self.up(normed)))


def _start(module: nn.Module) -> None:
    """GPT-2's first weights."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
