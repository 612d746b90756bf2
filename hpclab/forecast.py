"""Forecasts from first principles: the seconds of a training step on more ranks than were measured.

A step is what one rank computes, the wait for the slowest, the part of the communication that nothing hides, or the
input pipeline if that is slower. Needs numpy and scipy alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

from hpclab.network import Array, Hierarchy, Network

BUCKET_BYTES = (2**20, 25 * 2**20)
"""At which size DDP closes its first bucket, and the others."""


@dataclass(frozen=True)
class Workload:
    """What each rank does in a step.

    Parameters
    ----------
    compute_s : float
        Seconds that one rank alone computes: forward, backward, optimiser.
    gradient_bytes : float
        Bytes to average, 4 a parameter in single precision.
    samples : int, default 1
        Samples a rank and step.
    jitter_s : float, default 0
        Standard deviation of a rank's compute time; all wait for the slowest.
    overlap : float, default 2/3
        Share of the compute time behind which communication can hide: the backward pass takes about twice the forward.
    bucket_bytes : float, optional
        Of the last bucket of gradients, which can't be hidden, since it is full only when the backward pass ends.
        Default: DDP's size, 25 MiB, or all gradients if they are less.
    visible : float, optional
        Share of the communication that is not hidden, if it was measured; `overlap` and `bucket_bytes` are then unused.
    largest_bytes : float, default 0
        Of the largest tensor, which parameter servers can't share.
    data_s : float, default 0
        Seconds in which the input pipeline makes a rank's batch, beside the computing.
    memory_bytes : float, default 0
        What a rank needs; see `fits`.
    """

    compute_s: float
    gradient_bytes: float
    samples: int = 1
    jitter_s: float = 0.0
    overlap: float = 2 / 3
    bucket_bytes: float = BUCKET_BYTES[1]
    visible: float | None = None
    largest_bytes: float = 0.0
    data_s: float = 0.0
    memory_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("compute_s", "gradient_bytes", "samples", "bucket_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be above 0.")
        for name in ("jitter_s", "overlap", "largest_bytes", "data_s", "memory_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be at least 0.")

    @classmethod
    def of(cls, module: Any, compute_s: float, **fields: Any) -> "Workload":
        """The workload of a torch module: its gradients, in the buckets that DDP makes of them, and its memory.

        Parameters
        ----------
        module : torch.nn.Module
        compute_s, **fields
            As for the class. Default of ``memory_bytes``: weights, gradients, DDP's buckets of them, and one state of
            the optimiser for each (SGD's momentum; Adam has two). Activations, which grow with the batch, aren't in it.
        """
        sizes = [weight.nbytes for weight in module.parameters() if weight.requires_grad]
        frozen = sum(weight.nbytes for weight in module.parameters() if not weight.requires_grad)
        found = {"bucket_bytes": _buckets(sizes[::-1])[-1], "memory_bytes": 4 * sum(sizes) + frozen}
        return cls(compute_s, sum(sizes), **found | fields)

    def fits(self, memory_bytes: float) -> bool:
        """Whether a rank with so much memory can do it."""
        return self.memory_bytes <= memory_bytes


def _buckets(sizes: Sequence[int]) -> list[int]:
    """Bytes of each bucket that DDP makes of gradients, given in the order in which they become ready."""
    found = [0]
    for size in sizes:
        if found[-1] >= BUCKET_BYTES[len(found) > 1]:
            found.append(0)
        found[-1] += size
    return found


def slowest(ranks: ArrayLike) -> Array:
    """How many standard deviations the slowest of so many ranks is behind the mean, on average.

    Notes
    -----
    The expected maximum of normal variables, by Chen and Tyler, Accurate approximation to the extreme order statistics
    of Gaussian samples (1999).

    Examples
    --------
    >>> slowest([1, 2, 100]).round(2).tolist()
    [0.0, 0.6, 2.49]
    """
    ranks = np.asarray(ranks, dtype=float)
    return np.where(ranks > 1, special.ndtri(0.5264 ** (1 / ranks)), 0.0)


def step_s(workload: Workload, network: Network | Hierarchy, ranks: ArrayLike) -> Array:
    """Seconds of a step on so many ranks, shape (k,); see `parts`."""
    return parts(workload, network, ranks)["step_s"]


def parts(workload: Workload, network: Network | Hierarchy, ranks: ArrayLike) -> dict[str, Array]:
    """What a step is made of.

    Parameters
    ----------
    workload : Workload
    network : Network or Hierarchy
    ranks : array_like, shape (k,)

    Returns
    -------
    dict of str to ndarray, shape (k,)
        ``compute_s``; ``wait_s`` for the slowest rank; ``comm_s``, all communication, and of it ``exposed_s``, what
        isn't hidden behind computing; ``step_s``.

    Raises
    ------
    ValueError
        If a number of ranks is below 1.
    """
    ranks = np.asarray(ranks, dtype=float)
    if ranks.size and not ranks.min() >= 1:
        raise ValueError(f"ranks (={ranks.min():g}) must be >= 1.")
    wait = workload.jitter_s * slowest(ranks)
    comm = network.allreduce_s(workload.gradient_bytes, ranks, workload.largest_bytes)
    if workload.visible is not None:
        exposed = workload.visible * comm
    else:
        last = network.allreduce_s(min(workload.bucket_bytes, workload.gradient_bytes), ranks)
        last = np.where(workload.overlap < 1, last, 0.0)  # what hides behind the whole step hides to its end
        exposed = np.maximum(np.minimum(last, comm), comm - workload.overlap * workload.compute_s)
    step = np.maximum(workload.compute_s + wait + exposed, workload.data_s)
    compute = np.full_like(ranks, workload.compute_s)
    return {"compute_s": compute, "wait_s": wait, "comm_s": comm, "exposed_s": exposed, "step_s": step}


@dataclass(frozen=True)
class Forecast:
    """A workload and a network, calibrated on measured steps.

    Attributes
    ----------
    workload : Workload
    network : Network or Hierarchy
    ranks, measured_s : ndarray, shape (k,)
        What it was calibrated on.
    noise : float
        Relative standard deviation of one measurement.
    freedom : float
        Degrees of freedom behind the noise; infinite if it was stated.
    """

    workload: Workload
    network: Network | Hierarchy
    ranks: Array
    measured_s: Array
    noise: float
    freedom: float
    fitted: tuple[str, ...]
    covariance: Array = field(repr=False)

    def rows(self, ranks: Sequence[int], level: float = 0.95, network: Network | Hierarchy | None = None) -> list[dict]:
        """Forecast on so many ranks: rows of kind "forecast".

        Each has what `columns` has, ``kind`` and ``source``.
        """
        columns = self.columns(ranks, level, network)
        return [
            {"kind": "forecast"}
            | {name: float(values[place]) for name, values in columns.items()}
            | {"ranks": int(count), "source": "forecast"}
            for place, count in enumerate(columns["ranks"])
        ]

    def columns(
        self, ranks: ArrayLike, level: float = 0.95, network: Network | Hierarchy | None = None
    ) -> dict[str, Array]:
        """Forecast on so many ranks, shape (k,) each.

        Parameters
        ----------
        ranks : array_like, shape (k,)
        level : float, default 0.95
            Of the bands, in which a measurement would fall.
        network : Network or Hierarchy, optional
            Such as one with more servers. Default: that of the calibration.

        Returns
        -------
        dict of str to ndarray, shape (k,)
            ``ranks``, the `parts` of a step, ``step_low_s``, ``step_high_s``, ``samples_per_s``, ``efficiency`` (over
            one rank), ``efficiency_low``, ``efficiency_high``, ``core_h`` (core-hours of a million samples) and
            ``memory_bytes`` of a rank.
        """
        at = np.asarray(ranks, dtype=float)
        network = network or self.network
        found = parts(self.workload, network, at)
        slopes = _slopes(self.workload, self.fitted, lambda workload: np.log(step_s(workload, network, at)))
        spread = np.sqrt(np.einsum("ki,ij,kj->k", slopes, self.covariance, slopes) + self.noise**2)
        half = stats.t.ppf((1 + level) / 2, self.freedom) * spread
        rate = at * self.workload.samples / found["step_s"]
        alone = self.workload.samples / step_s(self.workload, network, [1.0])[0]
        share = rate / at / alone
        return (
            {"ranks": at}
            | found
            | {
                "step_low_s": found["step_s"] * np.exp(-half),
                "step_high_s": found["step_s"] * np.exp(half),
                "samples_per_s": rate,
                "efficiency": share,
                "efficiency_low": share * np.exp(-half),
                "efficiency_high": share * np.exp(half),
                "core_h": at / rate * 1e6 / 3600,
                "memory_bytes": np.full_like(at, self.workload.memory_bytes),
            }
        )

    def scaled(self, samples: int) -> "Forecast":
        """The same with another number of samples a rank and step: computing grows as they do, gradients don't."""
        share = samples / self.workload.samples
        work = self.workload
        grown = dataclasses.replace(
            work,
            samples=samples,
            compute_s=work.compute_s * share,
            jitter_s=work.jitter_s * share,
            data_s=work.data_s * share,
        )
        scale = np.array([1.0 if name == "visible" else share for name in self.fitted])
        return dataclasses.replace(self, workload=grown, covariance=self.covariance * np.outer(scale, scale))

    def score(self, ranks: ArrayLike, measured_s: ArrayLike, network: Network | Hierarchy | None = None) -> Array:
        """Relative error of the forecast throughput against steps that were measured later, shape (k,).

        Raises
        ------
        ValueError
            If a point is among those it was calibrated on.
        """
        ranks, measured_s = np.asarray(ranks, dtype=float), np.asarray(measured_s, dtype=float)
        if known := sorted(set(ranks) & set(self.ranks)):
            raise ValueError(f"ranks (={known[0]:g}) was calibrated on; score a forecast on other points.")
        return measured_s / step_s(self.workload, network or self.network, ranks) - 1


def calibrate(
    workload: Workload,
    network: Network | Hierarchy | Sequence[Network | Hierarchy],
    ranks: ArrayLike,
    measured_s: ArrayLike,
    fitted: Sequence[str] = ("compute_s", "jitter_s", "visible"),
    noise: float | None = None,
) -> Forecast:
    """Fit some fields of a workload to measured steps, by least squares of their logarithms.

    Parameters
    ----------
    workload : Workload
        Its other fields stay.
    network : Network, Hierarchy, or a sequence of one for each point
        The link, from a data sheet or `laws.fit_alpha_beta`. Where it differs between points (more servers for more
        ranks), the last is that of the forecast.
    ranks, measured_s : array_like, shape (k,)
    fitted : sequence of str
        Names of fields, at most k; without "visible" that comes from `overlap`.
    noise : float, optional
        Relative standard deviation of one measurement; needed if as many fields are fitted as there are points, else
        the residuals tell it.

    Raises
    ------
    ValueError
        If there are fewer points than fields, or as many and no noise, or a point can't be.
    """
    ranks, measured_s = np.asarray(ranks, dtype=float), np.asarray(measured_s, dtype=float)
    if ranks.shape != measured_s.shape or ranks.ndim != 1 or not (measured_s > 0).all() or not (ranks >= 1).all():
        raise ValueError(
            f"ranks (={ranks.tolist()}) and measured_s (={measured_s.tolist()}) must be pairs of >= 1 and > 0."
        )
    freedom = len(ranks) - len(fitted)
    if freedom < 0 or (freedom == 0 and noise is None):
        raise ValueError(
            f"{len(ranks)} points can't tell {len(fitted)} fields ({', '.join(fitted)}) and their own noise; measure at"
            " more numbers of ranks, fit fewer fields, or state the noise."
        )
    links = list(network) if isinstance(network, Sequence) else [network] * len(ranks)

    def logs(guess: Workload) -> Array:
        return np.log([step_s(guess, link, [count])[0] for link, count in zip(links, ranks, strict=True)])

    names = tuple(fitted)
    scale = np.array([{"visible": 1.0}.get(name, measured_s.min()) for name in names])
    start = np.array([{"compute_s": 0.95, "visible": 0.5}.get(name, 0.02) for name in names])

    def guess(at: Array) -> Workload:
        values: dict[str, Any] = dict(zip(names, map(float, at * scale), strict=True))
        return dataclasses.replace(workload, **values)

    found = optimize.least_squares(
        lambda at: logs(guess(at)) - np.log(measured_s), start, bounds=(1e-9, np.inf), xtol=1e-12, ftol=1e-12
    )
    best = guess(found.x)
    slopes = _slopes(best, names, logs)
    if noise is None:
        noise = math.sqrt(float(found.fun @ found.fun) / freedom)
        known = float(freedom)
    else:
        known = math.inf
    covariance = np.asarray(np.linalg.pinv(slopes.T @ slopes) * noise**2, dtype=np.float64)
    return Forecast(best, links[-1], ranks, measured_s, noise, known, names, covariance)


def _slopes(workload: Workload, names: tuple[str, ...], logs: Callable[[Workload], Array]) -> Array:
    """Derivatives of the logarithms of step times by fields of a workload, shape (points, fields)."""
    columns = []
    for name in names:
        value = getattr(workload, name)
        step = 1e-4 * max(value, 1e-2 if name == "visible" else 1e-2 * workload.compute_s)
        moved: dict[str, Any] = {name: value + step}
        ahead = logs(dataclasses.replace(workload, **moved))
        columns.append((ahead - logs(workload)) / step)
    return np.stack(columns, axis=1)
