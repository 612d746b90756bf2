"""Memory and throughput, calibrated on the Ultra-Scale Playbook's runs on H100s, and scored on rows left out.

The constants of a score haven't seen its rows. The *form* of the model has: its terms, the square root in
`Throughput.node_s` and `memory.SLACK` were chosen with the whole table in view. So expect larger misses elsewhere than
the scores and their bands say: on llm-foundry's FSDP (182 rows of bf16, which all ran), 68 % of the rows with full
recomputation and 20 % of those without are said to fit; steps on H100s are off by 13 % in the median, and on A100s
forecast 15 to 20 % too long.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpclab.data.tables import table
from hpclab.forecast.layout import Layout
from hpclab.forecast.memory import Case, Memory
from hpclab.forecast.throughput import H100, Throughput
from hpclab.forecast.transformer import Transformer
from hpclab.laws import confidence

Array = NDArray[np.float64]
Row = dict[str, Any]

MODELS = {
    "1B": Transformer(16, 2048, 32, 8192, 131_072, 4096),
    "3B": Transformer(28, 3072, 32, 8192, 131_072, 4096),
}
SPLITS: dict[str, tuple[str, list, Any]] = {
    "1B to 3B": ("model", ["1B"], "3B"),
    "3B to 1B": ("model", ["3B"], "1B"),
    "8 nodes": ("nodes", [1, 2, 4], 8),
}
"""Column, its values to fit, its value to score."""


def case(row: Row) -> Case:
    """Model and layout of a row of the table."""
    sizes = {name: row[name] for name in ("dp", "tp", "pp", "zero")}
    return MODELS[row["model"]], Layout(**sizes, micro_batch=row["mbs"], accumulation=row["grad_acc"])


def step_s(row: Row) -> float:
    """Seconds of a step of a row that ran."""
    return row["gbs"] * MODELS[row["model"]].sequence / row["tok_s"]


def fit(rows: list[Row]) -> tuple[Memory, Throughput]:
    """Fit to the rows that ran."""
    ran = [row for row in rows if row["ok"]]
    cases = [case(row) for row in ran]
    memory = Memory.fit(cases, [row["mem_gb"] * 2**30 for row in ran])
    return memory, Throughput.fit(cases, [step_s(row) for row in ran])


@cache
def fitted() -> tuple[Memory, Throughput]:
    """Fitted to the whole table; the first call takes a second or two."""
    return fit(table("ultrascale"))


@dataclass(frozen=True)
class Score:
    """Rows that a fit hasn't seen, and what it said of them; each array has shape (rows,)."""

    rows: list[Row]
    rank_bytes: Array
    """Of the rank that needs most."""
    first_bytes: Array
    """Of a rank of the first stage, whose peak the table gives."""
    step_s: Array
    fits: NDArray[np.bool_]
    """Whether the layout is possible, and is said to fit 80 GB."""

    def misses(self) -> dict[str, Array]:
        """Measured over forecast, of the rows that ran: memory without and with a pipeline, and seconds of a step."""
        ran = np.array([bool(row["ok"]) for row in self.rows])
        pipelined = np.array([row["pp"] > 1 for row in self.rows])
        peaks = np.array([row["mem_gb"] * 2**30 for row in self.rows if row["ok"]]) / self.first_bytes[ran]
        steps = np.array([step_s(row) for row in self.rows if row["ok"]]) / self.step_s[ran]
        return {"memory": peaks[~pipelined[ran]], "pipelined": peaks[pipelined[ran]], "step": steps}


def possible(model: Transformer, layout: Layout) -> bool:
    """Whether a model can be spread so; see `Layout.check`."""
    try:
        layout.check(model)
    except ValueError:
        return False
    return True


@cache
def scores() -> dict[str, Score]:
    """A score for each of `SPLITS`; the first call takes some seconds."""
    rows, scored = table("ultrascale"), {}
    for name, (column, known, new) in SPLITS.items():
        memory, throughput = fit([row for row in rows if row[column] in known])
        left = [row for row in rows if row[column] == new]
        stages = [memory.stage_bytes(*case(row)) for row in left]
        fits = [possible(*case(row)) and memory.fits(*case(row), H100.memory_bytes) for row in left]
        scored[name] = Score(
            left,
            rank_bytes=np.array([stage.max() for stage in stages]),
            first_bytes=np.array([stage[0] for stage in stages]),
            step_s=np.array([throughput.step_s(*case(row)) for row in left]),
            fits=np.array(fits),
        )
    return scored


def band(quantity: str, level: float = 0.8) -> tuple[float, float]:
    """By what factors a measurement would lie around its forecast: quantiles of all scores' `Score.misses`.

    Parameters
    ----------
    quantity : {"memory", "pipelined", "step"}
    level : float, default 0.8
    """
    beyond = (1 - confidence(level)) / 2
    low, high = np.quantile(
        np.concatenate([score.misses()[quantity] for score in scores().values()]), [beyond, 1 - beyond]
    )
    return float(low), float(high)
