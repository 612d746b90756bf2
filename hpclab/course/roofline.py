"""How near an operation comes to what this machine could do: its two ceilings, and operations and bytes counted.

The model is that of S. Williams, A. Waterman and D. Patterson, Roofline: an insightful visual performance model for
multicore architectures, Communications of the ACM 52(4), 2009: a rate is at most min(peak, bandwidth x intensity).
"""

import statistics
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from hpclab import machine

_VECTORS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: lambda matrix, *_others, **_named: 2 * matrix[0] * matrix[1],
    torch.ops.aten.dot: lambda vector, *_others, **_named: 2 * vector[0],
}
"""Operations of products with a vector, by their shapes: torch's counter knows those of matrices only."""


def ceilings(megabytes: int = 64, size: int = 256, repeats: int = 10) -> dict:
    """Measure what this process reaches at best, with the threads that torch has now.

    Parameters
    ----------
    megabytes : int, default 64
        Size of each of three arrays. They must not fit into the caches, or the bandwidth is that of a cache.
    size : int, default 256
        Rows and columns of the matrices that are multiplied.
    repeats : int, default 10
        Of each array's run, and 20 times as many products; the best counts, as it was disturbed the least.

    Returns
    -------
    dict
        A row of kind "ceiling": ``flops_per_s`` by a product of matrices in single precision; ``bytes_per_s`` by the
        better of a triad, a + s b -> c (its three arrays counted once each), and a read of two; ``ridge``, the
        intensity (flop a byte) at which both bind; ``threads``, ``source`` "measured", and the machine.
    """
    left, right = torch.rand(2, size, size)
    product = torch.empty(size, size)
    a, b, c = (torch.zeros(megabytes * 250_000) for _array in range(3))
    flops = 2 * size**3 / min(_seconds(lambda: torch.mm(left, right, out=product), 20 * repeats))
    triad = 3 * a.nbytes / min(_seconds(lambda: torch.add(a, b, alpha=3.0, out=c), repeats))
    read = 2 * a.nbytes / min(_seconds(lambda: torch.dot(a, b), repeats))
    bandwidth = max(triad, read)
    best = {"flops_per_s": flops, "bytes_per_s": bandwidth, "ridge": flops / bandwidth}
    return {"kind": "ceiling", **best, "threads": torch.get_num_threads(), **_here()}


def count(work: Callable, *arguments: Any) -> tuple[int, int]:
    """Count the floating-point operations of a call, and the bytes that its operations read and write.

    Returns
    -------
    flops : int
        As torch's `FlopCounterMode` counts products and convolutions, and so those with a vector; of any other
        operation, one for each element of its result (so a rough count for pooling or softmax).
    nbytes : int
        Each operation's inputs and results, once. Caches may save some of it; a kernel may move more.

    Examples
    --------
    >>> count(torch.mm, torch.zeros(8, 4), torch.zeros(4, 2))
    (128, 224)
    """
    with FlopCounterMode(display=False, custom_mapping=_VECTORS) as products, _Traffic() as traffic:
        work(*arguments)
    return products.get_total_flops() + traffic.flops, traffic.nbytes


def measure(name: str, work: Callable, *arguments: Any, repeats: int = 10) -> dict:
    """Measure a call's rate, and count what it does.

    Returns
    -------
    dict
        A row of kind "roofline": ``name``, ``flops``, ``nbytes``, ``intensity`` (flop a byte), ``duration_s`` and
        ``flops_per_s`` (of the median of `repeats` calls), ``threads``, ``source`` "measured", and the machine.
    """
    flops, nbytes = count(work, *arguments)
    seconds = statistics.median(_seconds(lambda: work(*arguments), repeats))
    counted = {"flops": flops, "nbytes": nbytes, "intensity": flops / max(1, nbytes)}
    timed = {"duration_s": seconds, "flops_per_s": flops / seconds, "threads": torch.get_num_threads()}
    return {"kind": "roofline", "name": name, **counted, **timed, **_here()}


def against(rows: list[dict], ceiling: dict) -> list[dict]:
    """Tell for each row of `measure` on which side of the ridge it is, and its rate as a share of the roof above it."""
    return [
        {
            "name": row["name"],
            "flop a byte": f"{row['intensity']:.2f}",
            "left of the ridge": "yes" if row["intensity"] < ceiling["ridge"] else "no",
            "share of its roof": f"{row['flops_per_s'] / roof(row['intensity'], ceiling):.0%}",
        }
        for row in rows
    ]


def roof(intensity: float, ceiling: dict) -> float:
    """The most operations a second that a ceiling allows at an intensity: a slope, and beyond the ridge flat.

    Examples
    --------
    >>> [roof(intensity, {"flops_per_s": 8e9, "bytes_per_s": 2e9}) for intensity in (1, 4, 100)]
    [2000000000.0, 8000000000.0, 8000000000.0]
    """
    return min(ceiling["flops_per_s"], ceiling["bytes_per_s"] * intensity)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of every operation's inputs and results, and the results of those that torch doesn't count."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if not func.is_view:
            read = _tensors([args, {name: value for name, value in (kwargs or {}).items() if name != "out"}])
            written = _tensors(returned) or _tensors(args[:1])  # operations on lists in place return nothing
            self.nbytes += sum(tensor.nbytes for tensor in [*read, *written])
            if func._overloadpacket not in {*flop_registry, *_VECTORS}:
                self.flops += sum(tensor.numel() for tensor in written if tensor.is_floating_point())
        return returned


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    work()  # the first call prepares
    seconds = []
    for _repeat in range(repeats):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return seconds


def _here() -> dict:
    described = machine.describe()
    started = datetime.now().isoformat(timespec="seconds")
    names = ("host", "cpu", "cpus", "torch")
    return {"source": "measured", "started": started, **{name: described[name] for name in names}}
