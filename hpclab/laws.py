"""Scaling laws: formulas, fits, intervals, the choice between laws, and what the data can't tell.

Needs only numpy and scipy. The fits are to throughputs (X, work per second), not speed-ups: a speed-up divides by one
noisy measurement as if it were certain. The scale g (X of one worker) is a parameter of each law.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy  # whose parts are loaded when they are first used: fits need more memory than the rest
from numpy.typing import ArrayLike, NDArray

from hpclab._arguments import one_of
from hpclab.pages import Said

LEVEL = 0.95
"""Confidence of intervals and bands, unless another is asked for."""
COUNTS = 5
"""Different worker counts that a choice between laws needs: the three parameters of the largest, and two to object."""
POINTS = 8
"""Measurements that it needs, repeats among them: two more than the USL's AICc. Of simulated ones with 3 % noise, seven
name the wrong law in one draw of four, eight in one of a hundred."""
REACH = 2.0
"""How far beyond the largest measured count the laws must agree before one is named."""
TOLERANCE = 0.25
"""Half-width there, relative, of the band of the largest law, up to which the data is said to tell."""
MARGIN = 2.0
"""By how much the AICc of a larger law must be lower before it is preferred (Burnham and Anderson 2002, 2.6)."""
MISFIT = 1e-3
"""Chance of measurements so far off a law that is true, below which they reject it."""
MOST_REPEATS = 10
"""By what factor to repeat the measurements of a count before it is better to measure further out."""
POLISH = 4
"""Steps that end a fit; each leaves of its distance to the best one about the share that the noise is of x."""
EXACT = 1e-8
"""Relative error up to which a law fits exactly: what is left over is then the solver's, and no noise."""

Array = NDArray[np.float64]


def amdahl(n: ArrayLike, sigma: float) -> Array:
    """Speed-up on n workers of a job of fixed size, if a share sigma of it can't be divided.

    Parameters
    ----------
    n : array_like, shape (k,)
        Number of workers, each >= 1.
    sigma : float
        Serial share, 0 to 1.

    Returns
    -------
    ndarray, shape (k,)
        Speed-up over one worker (no unit); its limit is 1 / sigma.

    Raises
    ------
    ValueError
        If an n is below 1.

    Notes
    -----
    Amdahl, Validity of the single processor approach to achieving large scale computing capabilities (1967).

    Examples
    --------
    >>> amdahl([1, 4], sigma=0.1)
    array([1.        , 3.07692308])
    """
    return usl(n, sigma, 0.0)


def usl(n: ArrayLike, sigma: float, kappa: float) -> Array:
    """Speed-up on n workers by the universal scalability law.

    Parameters
    ----------
    n : array_like, shape (k,)
        Number of workers, each >= 1.
    sigma, kappa : float
        Contention and coherency, >= 0. With kappa 0 this is Amdahl's law.

    Returns
    -------
    ndarray, shape (k,)
        Speed-up over one worker (no unit).

    Raises
    ------
    ValueError
        If an n is below 1.

    Notes
    -----
    Gunther, Guerrilla Capacity Planning (2007).

    Examples
    --------
    >>> usl([1, 4], sigma=0.1, kappa=0.0)
    array([1.        , 3.07692308])
    """
    n = _counts(n)
    return n / (1 + sigma * (n - 1) + kappa * n * (n - 1))


def gustafson(n: ArrayLike, sigma: float) -> Array:
    """Scaled speed-up on n workers of a job that grows with them, if a share sigma of the time can't be divided.

    Parameters
    ----------
    n : array_like, shape (k,)
        Number of workers, each >= 1.
    sigma : float
        Serial share of the time on n workers, 0 to 1.

    Returns
    -------
    ndarray, shape (k,)
        Speed-up over one worker (no unit).

    Raises
    ------
    ValueError
        If an n is below 1.

    Notes
    -----
    Gustafson, Reevaluating Amdahl's law (1988). Only for weak scaling.

    Examples
    --------
    >>> gustafson([1, 4], sigma=0.1)
    array([1. , 3.7])
    """
    n = _counts(n)
    return n - sigma * (n - 1)


def alpha_beta(size: ArrayLike, alpha: float, beta: float) -> Array:
    """Seconds that a message of `size` bytes takes: the latency alpha, plus beta seconds per byte.

    Notes
    -----
    Hockney, The communication challenge for MPP (1994).

    Examples
    --------
    >>> alpha_beta([0, 1e6], alpha=1e-5, beta=1e-9)
    array([1.00e-05, 1.01e-03])
    """
    return alpha + beta * np.asarray(size, dtype=float)


@dataclass(frozen=True)
class LawFit(Said):
    """A law fitted to measurements.

    Attributes
    ----------
    law : str
    values : dict of str to float
        The parameters: ``g`` (the throughput of one worker, in the unit of x) and those of the law's formula.
    errors : dict of str to float
        Standard error of each, from the Jacobian.
    intervals : dict of str to (float, float)
        Values plus and minus Student's t times the errors, clipped at the bounds.
    residual : float
        Standard error of the residuals: in the unit of x, or of ln x if the noise is relative.
    freedom : int
        Degrees of freedom: points minus parameters.
    aicc : float
        Akaike's criterion, corrected for few points, for ln x, or for x over its largest value; comparable between fits
        to the same points.
    n, x : ndarray, shape (k,)
        The points, in ascending order.
    """

    law: str
    values: dict[str, float]
    errors: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    residual: float
    freedom: int
    aicc: float
    n: Array = field(repr=False)
    x: Array = field(repr=False)
    noise: str
    level: float
    spread: Array = field(repr=False)
    """A root of the parameters' covariance, which is ``spread.T @ spread``."""

    def __call__(self, n: ArrayLike) -> Array:
        """The law's value on n workers, in units of x, shape (k,)."""
        return _LAWS[self.law].value(_counts(n, self.law), *self.values.values())

    def band(self, n: ArrayLike, level: float | None = None, new: bool = False) -> tuple[Array, Array]:
        """Lower and upper ends of the law's confidence band, each of shape (k,).

        Parameters
        ----------
        n : array_like, shape (k,), or one number
        level : float, optional
            Default: the fit's level.
        new : bool, default False
            Return the band for one new measurement, instead of the law's own.

        Notes
        -----
        By the delta method. Beyond the measured counts, the band holds only if the law does.
        """
        n = np.atleast_1d(_counts(n, self.law))
        value = self(n)
        slopes = _jacobian(_LAWS[self.law], n, list(self.values.values()), self.noise == "relative")
        error = np.hypot(np.linalg.norm(slopes @ self.spread.T, axis=1), new * self.residual)
        half = quantile(self.level if level is None else level, self.freedom) * error
        if self.noise == "relative":
            with np.errstate(over="ignore"):  # where nothing is known, it has no upper end
                return value * np.exp(-half), value * np.exp(half)
        return np.maximum(value - half, 0.0), value + half

    @property
    def peak(self) -> float:
        """Number of workers beyond which more are slower; infinite for all laws but the USL."""
        kappa, sigma = self.values.get("kappa", 0.0), self.values.get("sigma", 0.0)
        if kappa == 0 and sigma <= 1:
            return math.inf
        return max(1.0, math.sqrt((1 - sigma) / kappa)) if sigma < 1 else 1.0

    @property
    def limit(self) -> float:
        """The most throughput that contention alone allows, g / sigma, in the unit of x."""
        if self.law not in ("amdahl", "usl") or self.values["sigma"] == 0:
            return math.inf
        return self.values["g"] / self.values["sigma"]

    def __str__(self) -> str:
        parts = [
            f"{name} = {value:.4g} ({self.intervals[name][0]:.4g} to {self.intervals[name][1]:.4g})"
            for name, value in self.values.items()
        ]
        return f"{self.law}: {', '.join(parts)}; {self.level:.0%} intervals, {self.freedom} degrees of freedom"


def fit(law: str, n: ArrayLike, x: ArrayLike, noise: str = "relative", level: float = LEVEL) -> LawFit:
    """Fit a law by bounded least squares.

    Neither the order of the points nor the unit of x (for "alpha-beta" also of n) matters: only the parameters and
    their errors change with the unit.

    Parameters
    ----------
    law : str
        "linear", "amdahl", "usl", "gustafson" (only weak scaling) or "alpha-beta".
    n : array_like, shape (k,)
        Number of workers of each measurement, >= 1; each repeat is a point. For "alpha-beta", bytes, >= 0.
    x : array_like, shape (k,)
        Throughput (work per second, any unit), above 0. For "alpha-beta", seconds.
    noise : {"relative", "absolute"}
        What is the same at all points: the noise as a share of x (least squares of ln x, which suits repeated timings),
        or the noise itself (ordinary least squares, usual in the literature). The wrong choice gives intervals that are
        too narrow.
    level : float, default 0.95
        Confidence of the intervals.

    Returns
    -------
    LawFit

    Raises
    ------
    ValueError
        If the law or the noise is unknown, a point is impossible, or there are too few points or different counts for
        the law's parameters.

    Examples
    --------
    >>> print(fit("amdahl", [1, 2, 4, 8], [10.0, 18.0, 31.0, 47.0]).law)
    amdahl
    """
    one_of("law", law, _LAWS)
    _known(noise)
    confidence(level)
    form = _LAWS[law]
    n, x = _points(n, x, law)
    relative, size, parameters = noise == "relative", len(n), len(form.names)
    if not _enough(law, n):
        raise ValueError(
            f"{law} has {parameters} parameters, so it needs as many different counts and one more point; there are"
            f" {size} points at {len(set(n))} different counts. Measure more counts, or each count more often."
        )
    best = _solve(form, n, x, relative)
    unit = 1.0 if relative else float(x.max())
    residuals = _residuals(x, form.value(n, *best), relative) / unit
    squares = float(residuals @ residuals)
    freedom = size - parameters
    spread = _root(_jacobian(form, n, best, relative) / unit) * math.sqrt(squares / freedom)
    errors = np.linalg.norm(spread, axis=0)
    half = quantile(level, freedom) * errors
    ends = zip(np.maximum(best - half, 0.0), np.minimum(best + half, form.upper), strict=True)
    return LawFit(
        law=law,
        values=dict(zip(form.names, map(float, best), strict=True)),
        errors=dict(zip(form.names, map(float, errors), strict=True)),
        intervals={name: (float(low), float(high)) for name, (low, high) in zip(form.names, ends, strict=True)},
        residual=unit * math.sqrt(squares / freedom),
        freedom=freedom,
        aicc=_aicc(squares, size, parameters),
        n=n,
        x=x,
        noise=noise,
        level=level,
        spread=spread,
    )


def confidence(level: float) -> float:
    """Return a level of confidence, if it is between 0 and 1; else raise a ValueError."""
    if not (isinstance(level, int | float | np.floating) and 0 < level < 1):
        raise ValueError(f"level (={level!r}) must be between 0 and 1, such as 0.95.")
    return float(level)


def quantile(level: float, freedom: float) -> float:
    """How many standard errors, by Student's t, an interval of this level reaches to either side."""
    return float(scipy.special.stdtrit(freedom, (1 + confidence(level)) / 2))


def fit_amdahl(n: ArrayLike, x: ArrayLike, noise: str = "relative", level: float = LEVEL) -> LawFit:
    """Fit Amdahl's law; see `fit`."""
    return fit("amdahl", n, x, noise, level)


def fit_usl(n: ArrayLike, x: ArrayLike, noise: str = "relative", level: float = LEVEL) -> LawFit:
    """Fit the universal scalability law; see `fit`.

    Examples
    --------
    >>> n, x = [1, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64], [20, 78, 130, 170, 190, 200, 210, 230, 260, 280, 310]
    >>> round(fit_usl(n, x, noise="absolute").values["sigma"], 6)
    0.057771
    """
    return fit("usl", n, x, noise, level)


def fit_alpha_beta(size: ArrayLike, seconds: ArrayLike, noise: str = "relative", level: float = LEVEL) -> LawFit:
    """Fit latency and seconds per byte to message times; see `fit`."""
    return fit("alpha-beta", size, seconds, noise, level)


@dataclass(frozen=True)
class LawVerdict(Said):
    """Which law the measurements identify, if any.

    Attributes
    ----------
    law : str or None
        None if they identify no law.
    why : str
        The reason, a sentence for the reader.
    measure : list of int
        Counts of workers to measure next; empty if a law is identified.
    fits : list of LawFit
        All fits that were possible, the smallest law first.
    """

    law: str | None
    why: str
    measure: list[int]
    fits: list[LawFit] = field(repr=False)

    @property
    def identifiable(self) -> bool:
        """Whether a law is identified."""
        return self.law is not None

    @property
    def fit(self) -> LawFit:
        """The fit of the identified law.

        Raises
        ------
        ValueError
            If no law is; the message says why.
        """
        if self.law is None:
            raise ValueError(self.why)
        return next(fit for fit in self.fits if fit.law == self.law)

    def __str__(self) -> str:
        return f"{self.law or 'not identifiable'}: {self.why}"


Fit, Verdict = LawFit, LawVerdict
"""Their names of 0.1.0."""


def choose(n: ArrayLike, x: ArrayLike, noise: str = "relative", level: float = LEVEL) -> LawVerdict:
    """Say which of "linear", "amdahl" and "usl" strong-scaling measurements identify, or that they can't tell.

    They identify a law only if there are at least `COUNTS` different counts of workers in at least `POINTS`
    measurements, and if the band of the USL, which contains the other laws, is narrower than `TOLERANCE` at `REACH`
    times the largest count: if even that is open, a law that fits says nothing about the next machine. The answer is
    then the smallest law that no larger law beats by an AICc of `MARGIN`, unless the measurements reject it (`MISFIT`).
    A tight interval is no evidence for a law: Amdahl's is tight and wrong on data that follows the USL.

    Parameters
    ----------
    n, x, noise, level
        As for `fit`.

    Returns
    -------
    LawVerdict

    Raises
    ------
    ValueError
        If the noise is unknown, or the level or a point is impossible.
    """
    _known(noise)
    confidence(level)
    n, x = _points(n, x, "usl")
    counts, most = sorted(set(n)), int(max(n))
    fits = [fit(law, n, x, noise, level) for law in ("linear", "amdahl", "usl") if _enough(law, n)]
    if len(counts) < COUNTS:
        start = 2 * most
        further = [start * 2**step for step in range(max(COUNTS - len(counts), 3 if most < 8 else 1))]
        why = (
            f"{len(counts)} different counts up to {most} can't tell apart laws that only diverge further out."
            f" Measure also at {', '.join(map(str, further))}, and each count at least twice."
        )
        return LawVerdict(None, why, further, fits)
    if len(n) < POINTS:
        why = f"{len(n)} measurements can't tell a law from its noise; {POINTS} can. Measure each count at least twice."
        return LawVerdict(None, why, [int(count) for count in counts], fits)
    best = fits[0]
    for larger in fits[1:]:
        if larger.aicc < best.aicc - MARGIN:
            best = larger
    if _misfit(best) < MISFIT:
        why = (
            f"the measurements bend away from {best.law}, the best of these laws, by more than their noise. Look for"
            " what else differs between counts: caches, memory, placement."
        )
        return LawVerdict(None, why, [int(count) for count in counts], fits)
    largest, reach = fits[-1], REACH * most
    width = _width(largest, reach)
    if not width <= TOLERANCE:
        repeats = math.ceil(min(width / TOLERANCE, MOST_REPEATS) ** 2)
        share = f"{width:.0%}" if width < 10 else "more than 1000%"  # beyond that it no longer matters how wide
        often = f"each count {repeats} times as often, or also" if repeats <= MOST_REPEATS else "further out,"
        why = (
            f"the measurements leave {share} either way at {reach:g} workers, more than {TOLERANCE:.0%}."
            f" Measure {often} at {2 * most}."
        )
        return LawVerdict(None, why, [2 * most], fits)
    others = ", ".join(f"{other.law} {other.aicc - best.aicc:+.1f}" for other in fits if other is not best)
    why = (
        f"the smallest law that no larger one beats (AICc over its own: {others});"
        f" at {reach:g} workers the measurements leave {width:.0%} either way."
    )
    return LawVerdict(best.law, why, [], fits)


def _misfit(fit: LawFit) -> float:
    """Chance, if the law is true, that ln n and its square explain this much of what it leaves; an F test."""
    relative = fit.noise == "relative"
    residuals = _residuals(fit.x, fit(fit.n), relative)
    slopes = _jacobian(_LAWS[fit.law], fit.n, list(fit.values.values()), relative)
    unit = 1.0 if relative else fit(fit.n)
    bends = np.stack([np.log(fit.n) * unit, np.log(fit.n) ** 2 * unit], axis=1)
    columns = _alike(np.hstack([slopes, bends]))[0]
    unexplained = residuals - columns @ np.linalg.lstsq(columns, residuals, rcond=None)[0]
    extra, freedom = bends.shape[1], len(residuals) - columns.shape[1]
    floor = len(residuals) * EXACT**2 * float(np.square(unit).mean())
    gain = (residuals @ residuals - unexplained @ unexplained) / extra
    return float(scipy.special.fdtrc(extra, freedom, gain / ((unexplained @ unexplained + floor) / freedom)))


def _width(largest: LawFit, n: float) -> float:
    """Half-width of a fit's band at n, as a share of its value."""
    low, high = largest.band([n])
    return float((high - low)[0] / 2 / largest([n])[0])


@dataclass(frozen=True)
class _Law:
    """A law as the fit needs it; all parameters are at least 0."""

    names: tuple[str, ...]
    upper: tuple[float, ...]
    """Largest value of each parameter."""
    value: Callable[..., Array]
    """``value(n, *parameters)``, shape (k,)."""
    slopes: Callable[..., list[Array]]
    """Derivatives of the value by each parameter, each of shape (k,)."""
    start: Callable[[Array, Array], Array]
    """Parameters to start from, given n and x; from a linear problem close to the law's own."""
    units: Callable[[float, float], tuple[float, ...]]
    """At which size each parameter is felt, given the largest n and x."""


def _of_usl(*upper: float) -> _Law:
    """The USL with its first parameters alone, given the largest value of each; the others are 0."""
    count = len(upper)

    def start(n: Array, x: Array) -> Array:  # n / x is linear in 1 / g, sigma / g and kappa / g
        columns = np.stack([np.ones_like(n), n - 1, n * (n - 1)], axis=1)[:, :count] * (x / n)[:, None]
        shares = _nonnegative(columns)
        first = max(shares[0], 1e-6 * (n / x).min())
        return np.concatenate([[1 / first], shares[1:] / first])

    def slopes(n: Array, g: float, sigma: float = 0.0, kappa: float = 0.0) -> list[Array]:
        below = 1 + sigma * (n - 1) + kappa * n * (n - 1)
        by_sigma = -g * n * (n - 1) / below**2
        return [n / below, by_sigma, by_sigma * n][:count]

    return _Law(
        ("g", "sigma", "kappa")[:count],
        upper,
        lambda n, g, sigma=0.0, kappa=0.0: g * usl(n, sigma, kappa),
        slopes,
        start,
        lambda n, x: (x, 1 / n, 1 / n**2)[:count],
    )


def _gustafson_start(n: Array, x: Array) -> Array:
    shares = _nonnegative(np.stack([n, np.ones_like(n)], axis=1) / x[:, None])
    return np.array([shares.sum(), shares[1] / shares.sum()])


def _alpha_beta_start(size: Array, seconds: Array) -> Array:
    return _nonnegative(np.stack([np.ones_like(size), size], axis=1) / seconds[:, None])


def _nonnegative(columns: Array) -> Array:
    """Coefficients, at least 0, with which the columns come closest to a column of ones."""
    columns, norms = _alike(columns)
    return scipy.optimize.nnls(columns, np.ones(len(columns)))[0] / norms


def _alike(columns: Array) -> tuple[Array, Array]:
    """Columns of length 1, and what they were divided by: else rounding, and what counts as 0, depend on units."""
    norms = np.linalg.norm(columns, axis=0)
    return columns / norms, norms


def _root(jacobian: Array) -> Array:
    """A root of the inverse of J'J; where the points can't tell parameters apart, it is huge, as their errors are."""
    columns, norms = _alike(jacobian)
    _left, strengths, right = np.linalg.svd(columns, full_matrices=False)
    return right / np.maximum(strengths, np.finfo(float).eps)[:, None] / norms


_LAWS = {
    "linear": _of_usl(np.inf),
    "amdahl": _of_usl(np.inf, 1.0),
    "usl": _of_usl(np.inf, np.inf, np.inf),
    "gustafson": _Law(
        ("g", "sigma"),
        (np.inf, 1.0),
        lambda n, g, sigma: g * gustafson(n, sigma),
        lambda n, g, sigma: [n - sigma * (n - 1), -g * (n - 1)],
        _gustafson_start,
        lambda n, x: (x / n, 1.0),
    ),
    "alpha-beta": _Law(
        ("alpha", "beta"),
        (np.inf, np.inf),
        alpha_beta,
        lambda size, alpha, beta: [np.ones_like(size), size],
        _alpha_beta_start,
        lambda size, x: (x, x / size),
    ),
}


def _solve(law: _Law, n: Array, x: Array, relative: bool) -> Array:
    """Parameters of the least squares within the bounds; the solver has them in units of their own.

    Its tolerances, and the least value to start from, are numbers without a unit.
    """
    unit = 1.0 if relative else x.max()
    units = np.array(law.units(n.max(), x.max()))
    upper = np.array(law.upper) / units

    def residuals(at: Array) -> Array:
        with np.errstate(divide="ignore"):  # a message of no bytes and no latency takes no time at all
            return -_residuals(x, law.value(n, *at * units), relative) / unit

    def jacobian(at: Array) -> Array:
        return _jacobian(law, n, at * units, relative) * units / unit

    start = np.clip(law.start(n, x) / units, 1e-12, upper * (1 - 1e-9))
    tight = {"xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12}
    best = scipy.optimize.least_squares(residuals, start, jacobian, (0.0, upper), x_scale="jac", **tight).x
    for place in range(1 if law.names[0] == "g" else 0, len(best)):  # the solver stops short of a bound
        at_bound = best.copy()
        at_bound[place] = 0.0
        if _as_close(residuals(at_bound), residuals(best)):
            best = at_bound
    # The solver goes by the sum of squares, whose rounding hides the last half of a parameter's digits, and what lies
    # at a bound now has moved the others: steps of Gauss and Newton, which go by the slopes, find them. They don't go
    # along what the points can't tell (`rcond`), where there is nothing to find.
    free, polished = best > 0, best.copy()
    for _ in range(POLISH):
        columns, norms = _alike(jacobian(polished)[:, free])
        polished[free] -= np.linalg.lstsq(columns, residuals(polished), rcond=1e-8)[0] / norms
        if not ((polished >= 0) & (polished <= upper)).all():
            return best * units
    return (polished if _as_close(residuals(polished), residuals(best)) else best) * units


def _as_close(residuals: Array, others: Array) -> bool:
    """Whether a fit that leaves these residuals is as good as another, but for rounding."""
    return bool(residuals @ residuals <= others @ others * (1 + 1e-9))


def _residuals(x: Array, value: Array, relative: bool) -> Array:
    """What a law leaves over, shape (k,): of x, or of ln x."""
    return np.log(x / value) if relative else x - value


def _jacobian(law: _Law, n: Array, at: ArrayLike, relative: bool) -> Array:
    """Derivatives of a law's value, or of its logarithm, by each parameter, shape (k, parameters)."""
    slopes = np.stack(law.slopes(n, *np.asarray(at)), axis=1)
    return slopes / law.value(n, *np.asarray(at))[:, None] if relative else slopes


def _aicc(squares: float, size: int, parameters: int) -> float:
    """Hurvich and Tsai, Regression and time series model selection in small samples (1989); the noise counts as one."""
    k = parameters + 1
    if size <= k + 1:
        return math.inf
    return size * math.log(max(squares / size, EXACT**2)) + 2 * k + 2 * k * (k + 1) / (size - k - 1)


def _points(n: ArrayLike, x: ArrayLike, law: str) -> tuple[Array, Array]:
    n, x = _counts(n, law), np.asarray(x, dtype=float)
    if n.ndim != 1 or n.shape != x.shape:
        raise ValueError(f"n (of shape {n.shape}) and x (of shape {x.shape}) must be lists of the same length.")
    if len(n) == 0 or not np.isfinite(n).all() or not (np.isfinite(x) & (x > 0)).all():
        raise ValueError(f"n and x must hold finite numbers, those of x above 0; got n={n.tolist()}, x={x.tolist()}.")
    order = np.lexsort((x, n))  # sums of the same points, in whatever order, are the same to the last bit
    return n[order], x[order]


def _enough(law: str, n: Array) -> bool:
    """Whether there are as many different counts as a law has parameters, and one more point."""
    parameters = len(_LAWS[law].names)
    return len(set(n)) >= parameters and len(n) > parameters


def _known(noise: str) -> None:
    if noise not in ("absolute", "relative"):
        raise ValueError(f"noise (={noise!r}) must be 'absolute' or 'relative'.")


def _counts(n: ArrayLike, law: str = "usl") -> Array:
    n = np.asarray(n, dtype=float)
    least = 0 if law == "alpha-beta" else 1
    if n.size and not n.min() >= least:
        raise ValueError(f"n (={n.min():g}) must be >= {least}.")
    return n
