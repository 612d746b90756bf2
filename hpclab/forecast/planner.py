"""Which layout trains a model fastest on so many GPUs, of those that fit their memory."""

from collections.abc import Iterator, Sequence

from hpclab.forecast import ultrascale
from hpclab.forecast.layout import Layout
from hpclab.forecast.memory import Memory
from hpclab.forecast.throughput import H100, Accelerator, Throughput, mfu
from hpclab.forecast.transformer import Transformer


def plan(
    model: Transformer,
    gpus: int,
    batch: int,
    gpu: Accelerator = H100,
    most: int = 5,
    level: float = 0.8,
    zero: Sequence[int] = (0, 1),
    recompute: Sequence[str | None] = (None,),
    fitted: tuple[Memory, Throughput] | None = None,
) -> list[dict]:
    """The layouts that fit, the fastest first, as rows of kind "plan".

    Parameters
    ----------
    model : Transformer
    gpus : int
    batch : int
        Sequences of a step, on all GPUs.
    gpu : Accelerator, default H100
    most : int, default 5
        How many layouts to return.
    level : float, default 0.8
        Level of the bands.
    zero, recompute : sequence
        What to try. By default what the forecasts are calibrated on; ``zero=range(4), recompute=[None, "full"]`` tries
        what other codes can do too.
    fitted : (Memory, Throughput), optional
        Default: `ultrascale.fitted`.

    Returns
    -------
    list of dict
        The fields of a `Layout`; of the rank that needs most ``memory_bytes`` and its parts, as `Memory.parts` names
        them; ``step_s`` and ``tokens_per_s``; ends of bands (``memory_bytes_low``, ...); and ``mfu``. Empty if nothing
        fits.

    Raises
    ------
    ValueError
        If `gpus` or `batch` is below 1, or the level isn't between 0 and 1.

    Notes
    -----
    The bands are quantiles of what `ultrascale.scores` missed rows by, all of 1 and 3 G parameters on at most 8 nodes;
    larger models, other codes and other clusters miss by more. ZeRO 2 and 3, full recomputation and other GPUs are
    forecast by their FLOPs and bytes alone, as if messages hid behind the computing wherever it takes longer.

    Examples
    --------
    >>> best = plan(ultrascale.MODELS["1B"], gpus=8, batch=256)[0]
    >>> best["dp"] * best["tp"] * best["pp"], best["source"]
    (8, 'forecast')
    """
    memory, throughput = fitted or ultrascale.fitted()
    rows = []
    for layout in candidates(model, gpus, batch, zero, recompute):
        if memory.fits(model, layout, gpu.memory_bytes):
            fullest = int(memory.stage_bytes(model, layout).argmax())
            parts = {f"{name}_bytes": float(part[fullest]) for name, part in memory.parts(model, layout).items()}
            seconds = throughput.step_s(model, layout, gpu)
            rows.append(
                {"kind": "plan", **vars(layout), **parts, "memory_bytes": sum(parts.values()), "step_s": seconds}
            )
    fastest = sorted(rows, key=lambda row: (row["step_s"], row["memory_bytes"]))[:most]
    return [row | _bands(row, model, gpus, batch, gpu, level) for row in fastest]


def candidates(
    model: Transformer,
    gpus: int,
    batch: int,
    zero: Sequence[int] = (0, 1),
    recompute: Sequence[str | None] = (None,),
) -> Iterator[Layout]:
    """All layouts that this model, number of GPUs and batch allow, with micro-batches of powers of two.

    Raises
    ------
    ValueError
        If `gpus` or `batch` is below 1.
    """
    for name, value in (("gpus", gpus), ("batch", batch)):
        if not value >= 1:
            raise ValueError(f"{name} (={value!r}) must be at least 1.")
    for dp, tp, pp in _products(gpus):
        for size in _powers(batch // dp if batch % dp == 0 else 0):
            for stage in [stage for stage in zero if dp > 1 or stage == min(zero)]:
                for again in recompute if stage < 2 or pp == 1 else ():
                    layout = Layout(dp, tp, pp, stage, size, batch // dp // size, recompute=again)
                    if ultrascale.possible(model, layout):
                        yield layout


def _products(number: int) -> Iterator[tuple[int, int, int]]:
    """All three factors of a number."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    for first in divisors:
        for second in divisors:
            if number // first % second == 0:
                yield first, second, number // first // second


def _powers(number: int) -> list[int]:
    """Powers of two that divide a number; none divides 0."""
    return [2**power for power in range(number.bit_length()) if number % 2**power == 0]


def _bands(row: dict, model: Transformer, gpus: int, batch: int, gpu: Accelerator, level: float) -> dict:
    """What a row of a plan has beside its forecast."""
    low, high = ultrascale.band("pipelined" if row["pp"] > 1 else "memory", level)
    fast, slow = ultrascale.band("step", level)
    seconds, tokens = row["step_s"], batch * model.sequence
    return {
        "memory_bytes_low": row["memory_bytes"] * low,
        "memory_bytes_high": row["memory_bytes"] * high,
        "step_s_low": seconds * fast,
        "step_s_high": seconds * slow,
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_low": tokens / seconds / slow,
        "tokens_per_s_high": tokens / seconds / fast,
        "mfu": mfu(model, gpus, batch / seconds, gpu.flops),
        "source": "forecast",
    }
