"""Forecasts from first principles: the seconds of a training step on more ranks than you measured.

A step takes the time of one rank's computing, the wait for the slowest rank, and the communication that nothing hides;
or the time of the input pipeline if that is longer. Needs only numpy and scipy.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from hpclab.laws import quantile
from hpclab.network import Array, Hierarchy, Network

BUCKET_BYTES = (2**20, 25 * 2**20)
"""At which size DDP closes its first bucket, and the others."""
FITTED = {
    "compute_s": (0.95, math.inf),
    "jitter_s": (0.02, math.inf),
    "data_s": (1.0, math.inf),
    "visible": (0.5, 1.0),
    "overlap": (0.05, 1.0),
}
"""Fields that `calibrate` can fit: where it starts (seconds in shares of the shortest step), and the largest value."""


@dataclass(frozen=True)
class Workload:
    """What each rank does in a step.

    Parameters
    ----------
    compute_s : float
        Seconds that one rank alone computes: forward, backward, optimiser.
    gradient_bytes : float
        Bytes to average, 4 per parameter in single precision.
    samples : int, default 1
        Samples per rank and step.
    jitter_s : float, default 0
        Standard deviation of a rank's compute time; all wait for the slowest.
    overlap : float, default 2/3
        Share of the compute time, 0 to 1, behind which communication can hide: the backward pass takes about twice as
        long as the forward pass.
    bucket_bytes : float, optional
        Bytes of the last bucket of gradients, which can't be hidden, because it is full only when the backward pass
        ends. Default: DDP's size, 25 MiB, or all gradients if they are less.
    buckets : int, optional
        Number of buckets in which the gradients are averaged, one after another; each pays the latency. Default: as
        many as DDP's sizes make of small tensors.
    visible : float, optional
        Share of the communication, 0 to 1, that is not hidden, if measured; `overlap` and `bucket_bytes` are then
        unused.
    largest_bytes : float, default 0
        Bytes of the largest tensor, which parameter servers can't split.
    data_s : float, default 0
        Seconds that the input pipeline takes for a rank's batch, in parallel with the computing.
    memory_bytes : float, default 0
        Memory that a rank needs; see `fits`.
    """

    compute_s: float
    gradient_bytes: float
    samples: int = 1
    jitter_s: float = 0.0
    overlap: float = 2 / 3
    bucket_bytes: float = BUCKET_BYTES[1]
    buckets: int | None = None
    visible: float | None = None
    largest_bytes: float = 0.0
    data_s: float = 0.0
    memory_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("compute_s", "gradient_bytes", "samples", "bucket_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be above 0.")
        for name in ("jitter_s", "largest_bytes", "data_s", "memory_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be at least 0.")
        for name in ("overlap", "visible"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be a share, 0 to 1.")
        if self.buckets is not None and not self.buckets >= 1:
            raise ValueError(f"buckets (={self.buckets!r}) must be at least 1.")

    @classmethod
    def of(cls, module: Any, compute_s: float, **fields: Any) -> "Workload":
        """The workload of a torch module: its gradients, in DDP's buckets, and its memory.

        Parameters
        ----------
        module : torch.nn.Module
        compute_s, **fields
            As for the class. Default of ``memory_bytes``: weights, gradients, DDP's buckets of them, and one optimiser
            state per weight (SGD's momentum; Adam has two), without activations, which grow with the batch.
        """
        sizes = [weight.nbytes for weight in module.parameters() if weight.requires_grad]
        frozen = sum(weight.nbytes for weight in module.parameters() if not weight.requires_grad)
        buckets = _buckets(sizes[::-1])
        defaults = {"bucket_bytes": buckets[-1], "buckets": len(buckets), "memory_bytes": 4 * sum(sizes) + frozen}
        return cls(compute_s, sum(sizes), **defaults | fields)

    def fits(self, memory_bytes: float) -> bool:
        """Whether a rank with this much memory has room for it."""
        return self.memory_bytes <= memory_bytes


def _buckets(sizes: Sequence[int]) -> list[int]:
    """Bytes of each bucket that DDP makes of gradients, given in the order in which they become ready."""
    buckets = [0]
    for size in sizes:
        if buckets[-1] >= BUCKET_BYTES[len(buckets) > 1]:
            buckets.append(0)
        buckets[-1] += size
    return buckets


def slowest(ranks: ArrayLike) -> Array:
    """How many standard deviations the slowest rank is behind the mean, on average.

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
    return np.where(ranks > 1, scipy.special.ndtri(0.5264 ** (1 / ranks)), 0.0)


def step_s(workload: Workload, network: Network | Hierarchy, ranks: ArrayLike) -> Array:
    """Seconds of a step on each number of ranks, shape (k,); see `parts`."""
    return parts(workload, network, ranks)["step_s"]


def parts(workload: Workload, network: Network | Hierarchy, ranks: ArrayLike) -> dict[str, Array]:
    """The parts of a step.

    Parameters
    ----------
    workload : Workload
    network : Network or Hierarchy
    ranks : array_like, shape (k,)

    Returns
    -------
    dict of str to ndarray, shape (k,)
        ``compute_s``; ``wait_s`` for the slowest rank; ``comm_s``, all communication; ``exposed_s``, the part of it
        that isn't hidden behind computing; ``step_s``.

    Raises
    ------
    ValueError
        If a number of ranks is below 1.
    """
    ranks = np.asarray(ranks, dtype=float)
    first, others = BUCKET_BYTES
    buckets = workload.buckets or 1 + math.ceil(max(0.0, workload.gradient_bytes - first) / others)
    comm = network.allreduce_s(workload.gradient_bytes, ranks, workload.largest_bytes)
    comm = comm + (buckets - 1) * network.allreduce_s(0, ranks)
    wait = workload.jitter_s * slowest(ranks)
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
        The points of the calibration.
    noise : float
        Relative standard deviation of one measurement.
    freedom : float
        Degrees of freedom behind the noise; infinite if it was stated.
    fitted : tuple of str
        Names of the fitted fields.
    link_error : float
        Relative standard deviation of the network's times, as stated.
    covariance : ndarray, shape (fields, fields)
        Covariance of the fitted values.
    shift : ndarray, shape (fields + 1,)
        Change of the fitted values, and of the logarithm of the network's times, if these are one `link_error` longer.
    """

    workload: Workload
    network: Network | Hierarchy
    ranks: Array
    measured_s: Array
    noise: float
    freedom: float
    fitted: tuple[str, ...]
    link_error: float
    covariance: Array = field(repr=False)
    shift: Array = field(repr=False)

    def rows(self, ranks: Sequence[int], level: float = 0.95, network: Network | Hierarchy | None = None) -> list[dict]:
        """Forecast for these numbers of ranks, as rows of kind "forecast".

        Each row has the columns of `columns`, ``kind`` and ``source``.
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
        """Forecast for these numbers of ranks; each column has shape (k,).

        Parameters
        ----------
        ranks : array_like, shape (k,), or one number
        level : float, default 0.95
            Level of the bands, where a measurement would fall; for the efficiency, one on each number of ranks.
        network : Network or Hierarchy, optional
            Another network, such as one with more servers. Default: the network of the calibration.

        Returns
        -------
        dict of str to ndarray, shape (k,)
            ``ranks``, the `parts` of a step, ``samples_per_s``, ``efficiency`` (over one rank), the ends of their bands
            (``step_low_s`` and ``step_high_s``, ``..._low`` and ``..._high``), ``core_h`` (core-hours of a million
            samples) and ``memory_bytes`` of a rank.
        """
        at = np.atleast_1d(np.asarray(ranks, dtype=float))
        network = network or self.network
        step = parts(self.workload, network, at)
        slopes = self._slopes(network, at)
        half = self._half(slopes, 1.0, level)
        over_one = self._half(slopes - self._slopes(network, np.ones(1)), 2.0 * (at > 1), level)
        rate = at * self.workload.samples / step["step_s"]
        alone = self.workload.samples / step_s(self.workload, network, [1.0])[0]
        share = rate / at / alone
        return {
            "ranks": at,
            **step,
            "step_low_s": step["step_s"] * np.exp(-half),
            "step_high_s": step["step_s"] * np.exp(half),
            "samples_per_s": rate,
            "samples_per_s_low": rate * np.exp(-half),
            "samples_per_s_high": rate * np.exp(half),
            "efficiency": share,
            "efficiency_low": share * np.exp(-over_one),
            "efficiency_high": share * np.exp(over_one),
            "core_h": at / rate * 1e6 / 3600,
            "memory_bytes": np.full_like(at, self.workload.memory_bytes),
        }

    def _slopes(self, network: Network | Hierarchy, at: Array) -> Array:
        def logs(workload: Workload, slower: float) -> Array:
            return np.log(step_s(workload, network.slower(slower), at))

        return _slopes(self.workload, self.fitted, logs, self.link_error)

    def _half(self, slopes: Array, measurements: ArrayLike, level: float) -> Array:
        """Half-width of the band of logarithms with these slopes, from that number of measurements."""
        variance = np.einsum("ki,ij,kj->k", slopes[:, :-1], self.covariance, slopes[:, :-1])
        variance = variance + np.asarray(measurements) * self.noise**2
        noise, link = quantile(level, self.freedom) * np.sqrt(variance), quantile(level, math.inf) * slopes @ self.shift
        return np.hypot(noise, link)

    def scaled(self, samples: int) -> "Forecast":
        """The same with another number of samples per rank and step: computing grows with it, gradients don't."""
        if not samples > 0:
            raise ValueError(f"samples (={samples!r}) must be above 0.")
        share, work = samples / self.workload.samples, self.workload
        seconds: dict[str, Any] = {name: getattr(work, name) * share for name in ("compute_s", "jitter_s", "data_s")}
        scale = np.array([share if name in seconds else 1.0 for name in (*self.fitted, "link")])
        covariance = self.covariance * np.outer(scale, scale)[:-1, :-1]
        grown = dataclasses.replace(work, samples=samples, **seconds)
        return dataclasses.replace(self, workload=grown, covariance=covariance, shift=self.shift * scale)

    def score(self, ranks: ArrayLike, measured_s: ArrayLike, network: Network | Hierarchy | None = None) -> Array:
        """Relative error of the forecast throughput against steps measured later, shape (k,).

        Raises
        ------
        ValueError
            If a point was used in the calibration, or is impossible.
        """
        ranks, measured_s = _pairs(ranks, measured_s)
        if known := sorted(set(ranks) & set(self.ranks)):
            raise ValueError(f"ranks (={known[0]:g}) was used to calibrate; score a forecast at other points.")
        return measured_s / step_s(self.workload, network or self.network, ranks) - 1


def calibrate(
    workload: Workload,
    network: Network | Hierarchy | Sequence[Network | Hierarchy],
    ranks: ArrayLike,
    measured_s: ArrayLike,
    fitted: Sequence[str] = ("compute_s", "jitter_s", "visible"),
    noise: float | None = None,
    link_error: float = 0.0,
) -> Forecast:
    """Fit some fields of a workload to measured steps, by least squares of their logarithms.

    Parameters
    ----------
    workload : Workload
        Its other fields are kept.
    network : Network, Hierarchy, or a sequence of one for each point
        The link, from a data sheet or `laws.fit_alpha_beta`. If it differs between points (more servers for more
        ranks), the forecast uses the last.
    ranks, measured_s : array_like, shape (k,)
    fitted : sequence of str
        Names of at most k fields, from `FITTED`; without "visible", that share comes from `overlap`.
    noise : float, optional
        Relative standard deviation of one measurement; needed if there are as many fitted fields as points, otherwise
        estimated from the residuals.
    link_error : float, default 0
        Relative standard deviation of the network's stated times, the same for all; a data sheet is rarely right to
        0.1. The bands include the effect of a link one standard deviation *slower*, so that a link that is just fast
        enough counts too.

    Raises
    ------
    ValueError
        If there are fewer points than fields, or as many and no noise; if the points can't tell the fields apart; or if
        a point, a field or a number is impossible.
    """
    ranks, measured_s = _pairs(ranks, measured_s)
    names = _fields(fitted, len(ranks), noise)
    if not 0 <= link_error < math.inf:
        raise ValueError(f"link_error (={link_error!r}) must be at least 0, such as 0.1 for 10 %.")
    links = list(network) if isinstance(network, Sequence) else [network] * len(ranks)
    if len(links) != len(ranks):
        raise ValueError(
            f"network holds {len(links)} links for {len(ranks)} points; give one for each, or one for all."
        )

    def logs(guess: Workload, slower: float = 1.0) -> Array:
        pairs = zip(links, ranks, strict=True)
        return np.log([step_s(guess, link.slower(slower), [count])[0] for link, count in pairs])

    start, upper = np.array([FITTED[name] for name in names]).T
    scale = np.array([measured_s.min() if name.endswith("_s") else 1.0 for name in names])

    def guess(at: Array) -> Workload:
        values: dict[str, Any] = dict(zip(names, map(float, at * scale), strict=True))
        return dataclasses.replace(workload, **values)

    solution = scipy.optimize.least_squares(
        lambda at: logs(guess(at)) - np.log(measured_s), start, bounds=(1e-9, upper), xtol=1e-12, ftol=1e-12
    )
    best = guess(solution.x)
    slopes = _slopes(best, names, logs, link_error)
    of_fields, of_link = slopes[:, :-1], slopes[:, -1]
    if np.linalg.matrix_rank(of_fields * scale, tol=1e-6) < len(names):
        counts = ", ".join(f"{count:g}" for count in sorted({*ranks}))
        raise ValueError(
            f"fitted (={', '.join(names)}) can't be told apart at ranks {counts}: measure at more rank counts, up"
            " to where the network and the slowest rank matter, or fit fewer fields."
        )
    freedom = math.inf
    if noise is None:
        freedom = float(len(ranks) - len(names))
        noise = math.sqrt(float(solution.fun @ solution.fun) / freedom)
    inverse = np.linalg.inv((of_fields * scale).T @ (of_fields * scale)) * np.outer(scale, scale)
    shift = np.append(inverse @ of_fields.T @ of_link, -1.0) * link_error
    covariance = np.asarray(inverse * noise**2, dtype=np.float64)
    return Forecast(best, links[-1], ranks, measured_s, noise, freedom, names, link_error, covariance, shift)


def _fields(fitted: Sequence[str], points: int, noise: float | None) -> tuple[str, ...]:
    """Names of the fields to fit, if there are enough points for them."""
    names = (fitted,) if isinstance(fitted, str) else tuple(fitted)
    if not names or len({*names}) < len(names) or {*names} - {*FITTED}:
        raise ValueError(f"fitted (={fitted!r}) must be different names out of {', '.join(FITTED)}.")
    if noise is not None and not 0 < noise < math.inf:
        raise ValueError(f"noise (={noise!r}) must be above 0, such as 0.01 for 1 %.")
    if points < len(names) + (noise is None):
        raise ValueError(
            f"{points} points can't determine {len(names)} fields ({', '.join(names)}) and the noise; measure at more"
            " rank counts, fit fewer fields, or state the noise."
        )
    return names


def _pairs(ranks: ArrayLike, measured_s: ArrayLike) -> tuple[Array, Array]:
    ranks, measured_s = (np.atleast_1d(np.asarray(values, dtype=float)) for values in (ranks, measured_s))
    fine = ranks.shape == measured_s.shape and ranks.ndim == 1 and ranks.size > 0
    if not (fine and np.isfinite([ranks, measured_s]).all() and (measured_s > 0).all() and (ranks >= 1).all()):
        raise ValueError(
            f"ranks (={ranks.tolist()}) and measured_s (={measured_s.tolist()}) must be pairs of >= 1 and > 0."
        )
    return ranks, measured_s


def _slopes(
    workload: Workload, names: tuple[str, ...], logs: Callable[[Workload, float], Array], link_error: float
) -> Array:
    """Derivatives of the logarithms of step times: by fields, then by that of the network's; (points, fields + 1)."""
    here, columns = logs(workload, 1.0), []
    for name in names:
        value = getattr(workload, name)
        step = 1e-4 * max(value, 1e-2 * (workload.compute_s if name.endswith("_s") else 1.0))
        if value + step > FITTED[name][1]:
            step = -step
        moved: dict[str, Any] = {name: value + step}
        columns.append((logs(dataclasses.replace(workload, **moved), 1.0) - here) / step)
    step = link_error or 1e-4
    columns.append((logs(workload, math.exp(step)) - here) / step)
    return np.stack(columns, axis=1)
