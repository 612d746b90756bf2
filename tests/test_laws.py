"""The laws against published fits, planted truths and closed forms."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hpclab import laws

SPECSDM91 = (1, 64.9), (18, 995.9), (36, 1652.4), (72, 1853.2), (108, 1828.9), (144, 1775.0), (216, 1702.2)
RAYTRACER = (
    *((1, 20), (4, 78), (8, 130), (12, 170), (16, 190), (20, 200)),
    *((24, 210), (28, 230), (32, 260), (48, 280), (64, 310)),
)
"""Data sets of the R package usl."""


@pytest.mark.parametrize(
    ("data", "values", "errors", "residual", "peak", "limit"),
    [
        (SPECSDM91, (89.9952384, 0.0277285, 0.0001044), (14.21, 0.0091217, 0.0000199), 82.85, 96.51956, 3245.589),
        (RAYTRACER, (21.848843, 0.057771, 0.0), (2.196, 0.013293, None), 9.34, np.inf, 378.0),
    ],
    ids=["specsdm91", "raytracer"],
)
def test_published_fits_of_the_usl(data, values, errors, residual, peak, limit):
    """As R's usl 2.0 prints them; its intervals are wrong, so ours are compared with Student's t."""
    n, x = zip(*data, strict=True)
    found = laws.fit_usl(n, x, noise="absolute")
    assert tuple(found.values.values()) == pytest.approx(values, rel=5e-4, abs=5e-9)
    for error, published in zip(found.errors.values(), errors, strict=True):
        assert published is None or error == pytest.approx(published, rel=5e-3)
    assert found.residual == pytest.approx(residual, rel=1e-3)
    assert found.peak == pytest.approx(peak, rel=1e-5)
    assert found.limit == pytest.approx(limit, rel=1e-3)
    half = stats.t.ppf(0.975, len(n) - 3)
    for name, (low, high) in found.intervals.items():
        value, error = found.values[name], found.errors[name]
        assert (low, high) == pytest.approx((max(0, value - half * error), value + half * error))


def planted(law, n, values, noise, dice):
    return getattr(laws, law)(n, *values[1:]) * values[0] * (1 + noise * dice.standard_normal(len(n)))


@pytest.mark.parametrize("noise", [0.01, 0.03])
@pytest.mark.parametrize(
    ("law", "values"),
    [
        *[("usl", (100, 0.05, 0.002)), ("usl", (100, 0.1, 0.005)), ("amdahl", (100, 0.1)), ("gustafson", (100, 0.1))],
        *[("usl", (100, 0.05, 0.0)), ("usl", (100, 0.0, 0.002))],  # at a boundary
    ],
)
def test_intervals_cover_the_truth(law, values, noise):
    """In 1,000 draws: 93 to 97 % for truths inside the bounds, at least 93 % at a boundary; in whatever unit x is."""
    dice = np.random.default_rng(0)
    n = np.repeat([1.0, 2, 4, 8, 16], 3)
    covered = np.zeros(len(values))
    for _, unit in zip(range(1000), itertools.cycle((1e-9, 1.0, 1e9, 1e12)), strict=False):
        found = laws.fit(law, n, unit * planted(law, n, values, noise, dice), noise="relative")
        truths = (unit * values[0], *values[1:])
        covered += [low <= truth <= high for truth, (low, high) in zip(truths, found.intervals.values(), strict=True)]
    assert (covered >= 930).all()
    assert 0.0 in values or (covered <= 970).all()


LAWS = {
    "linear": (lambda n, sigma, kappa: laws.usl(n, 0, 0)),
    "amdahl": (lambda n, sigma, kappa: laws.amdahl(n, sigma)),
    "usl": laws.usl,
    "gustafson": (lambda n, sigma, kappa: laws.gustafson(n, sigma)),
    "alpha-beta": (lambda n, sigma, kappa: laws.alpha_beta(n, 1.0, sigma)),
}


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    st.sampled_from(sorted(LAWS)),
    st.sampled_from(["relative", "absolute"]),
    st.floats(0.01, 0.5),
    st.floats(0.0, 0.02),
    st.floats(-9, 12),
    st.floats(-9, 9),
    st.integers(0, 99),
)
def test_fits_change_with_the_unit_alone_and_not_with_the_order(law, noise, sigma, kappa, unit, of_size, seed):
    dice = np.random.default_rng(seed)
    n = np.repeat([1.0, 2, 4, 8, 16], 3)
    x = LAWS[law](n, sigma, kappa) * (1 + 0.02 * dice.standard_normal(len(n)))
    unit, of_size = 10**unit, 10**of_size if law == "alpha-beta" else 1.0
    order = dice.permutation(len(n))
    found = laws.fit(law, n, x, noise)
    same = laws.fit(law, of_size * n[order], unit * x[order], noise)
    of = {"g": unit, "alpha": unit, "beta": unit / of_size}
    for name, value in found.values.items():
        scale = of.get(name, 1.0)
        assert same.values[name] / scale == pytest.approx(value, rel=1e-6, abs=1e-6 * found.errors[name])
        assert same.errors[name] / scale == pytest.approx(found.errors[name], rel=1e-6)
        fine = pytest.approx(found.intervals[name], rel=1e-6, abs=1e-6 * found.errors[name])
        assert np.array(same.intervals[name]) / scale == fine
    at = np.array([1.0, 5, 32])
    for new in (False, True):
        assert np.array(same.band(of_size * at, new=new)) / unit == pytest.approx(np.array(found.band(at, new=new)))
    assert same.aicc == pytest.approx(found.aicc, abs=1e-6)
    assert same.residual / (1.0 if noise == "relative" else unit) == pytest.approx(found.residual)
    assert laws.fit(law, n[order], x[order], noise).values == found.values, "to the last bit"
    verdict = laws.choose(n[order], unit * x[order], noise)
    assert (verdict.law, verdict.why, verdict.measure) == (
        (other := laws.choose(n, x, noise)).law,
        other.why,
        other.measure,
    )


def test_a_line_of_messages_is_ordinary_least_squares():
    """Sizes over eight decades, in bytes: the error of the latency is that of the textbook, of any size."""
    size = np.array([0, 1e2, 1e4, 1e6, 1e8] * 4)
    dice = np.random.default_rng(0)
    seconds = 1e-3 + 1e-9 * size + 1e-4 * dice.random(len(size))
    found = laws.fit_alpha_beta(size, seconds, noise="absolute")
    line = stats.linregress(size, seconds)
    assert tuple(found.values.values()) == pytest.approx((line.intercept, line.slope), rel=1e-6)
    assert tuple(found.errors.values()) == pytest.approx((line.intercept_stderr, line.stderr), rel=1e-6)


def test_what_the_points_cannot_tell_has_no_small_error():
    """Without a point at one worker, X that falls as 1 / (n - 1) fits any g, if sigma and kappa are large enough."""
    n = np.array([2.0, 4, 8, 16, 32, 64])
    found = laws.fit_usl(n, 1 / (n - 1))
    assert found.errors["g"] > found.values["g"]
    low, high = found.intervals["g"]
    assert low == 0 and high > 2 * found.values["g"]
    assert all(np.isfinite(found.band([4.0])))


def test_bands_cover_too():
    dice = np.random.default_rng(0)
    n = np.repeat([1.0, 2, 4, 8, 16], 3)
    truth = 100 * laws.usl([12], 0.05, 0.002)[0]
    own, new = [], []
    for _ in range(400):
        found = laws.fit_usl(n, planted("usl", n, (100, 0.05, 0.002), 0.03, dice), noise="relative")
        low, high = found.band([12])
        own.append(low[0] <= truth <= high[0])
        low, high = found.band([12], new=True)
        new.append(low[0] <= truth * (1 + 0.03 * dice.standard_normal()) <= high[0])
    assert np.mean(own) == pytest.approx(0.95, abs=0.03)
    assert np.mean(new) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("counts", [(1, 2), (1, 2, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("noise", [0.001, 0.01, 0.03])
def test_few_workers_identify_no_law(counts, noise):
    dice = np.random.default_rng(0)
    for values in ((100, 0.1, 0.0), (100, 0.05, 0.005)):
        n = np.repeat(np.array(counts, float), 5)
        verdict = laws.choose(n, planted("usl", n, values, noise, dice))
        assert not verdict.identifiable
        assert min(verdict.measure) > max(counts)
        with pytest.raises(ValueError, match="can't tell apart laws"):
            _ = verdict.fit


@pytest.mark.parametrize(("law", "values"), [("amdahl", (100, 0.1, 0.0)), ("usl", (100, 0.05, 0.005))])
@pytest.mark.parametrize("counts", [range(1, 17), [1, 2, 4, 8, 16] * 3], ids=["1 to 16", "powers of 2, thrice"])
def test_sixteen_workers_name_the_law_unless_it_is_noisy(law, values, counts):
    dice = np.random.default_rng(0)
    n = np.array(counts, float)
    named = {
        noise: [laws.choose(n, planted("usl", n, values, noise, dice)).law for _ in range(200)]
        for noise in (0.01, 0.03, 0.1)
    }
    assert named[0.01].count(law) >= 180
    assert named[0.03].count(law) >= 180
    assert named[0.1].count(None) >= 180


@pytest.mark.parametrize("counts", [[1, 2, 4, 8, 16], [1, 2, 4, 8, 12, 16], [1, 2, 4, 6, 8, 12, 16]], ids=len)
def test_counts_measured_once_name_no_law(counts):
    """The USL's AICc is infinite there, or nearly: without this, data of the USL were named linear."""
    dice = np.random.default_rng(0)
    n = np.array(counts, float)
    for noise in (0.0, 0.003, 0.01, 0.03):
        verdict = laws.choose(n, planted("usl", n, (100, 0.05, 0.005), noise, dice))
        assert not verdict.identifiable
        assert "Measure each count at least twice" in verdict.why
        assert verdict.measure == counts


@pytest.mark.parametrize("speed", [lambda n: n**1.2, lambda n: n**1.05, lambda n: np.where(n > 4, n / 2, n)])
@pytest.mark.parametrize("counts", [range(1, 17), [1, 2, 4, 8, 16] * 3], ids=["1 to 16", "powers of 2, thrice"])
def test_data_of_no_law_name_none(speed, counts):
    """Faster than linear, or a cliff at a node's edge: the best of the laws is named by none of 50 draws."""
    dice = np.random.default_rng(0)
    n = np.array(counts, float)
    named = [laws.choose(n, 100 * speed(n) * (1 + 0.01 * dice.standard_normal(len(n)))) for _ in range(50)]
    assert {verdict.law for verdict in named} == {None}
    falling = laws.choose(n, 100 / np.sqrt(n))
    assert falling.law is None and "bend away from usl" in falling.why


def test_exact_data_are_not_rejected():
    n = np.repeat([1.0, 2, 4, 8, 16], 2)
    for law, values in (("linear", (0, 0)), ("amdahl", (0.1, 0)), ("usl", (0.05, 0.005))):
        assert laws.choose(n, 93.1 * laws.usl(n, *values)).law == law


def test_advice_is_never_to_measure_for_ever():
    n = np.repeat([1.0, 2, 4, 8, 16], 2)
    noisy = laws.choose(n, planted("usl", n, (100, 0.05, 0.005), 0.9, np.random.default_rng(3)).clip(1))
    assert "Measure further out, at 32" in noisy.why


def test_a_tight_interval_is_no_evidence():
    """Amdahl's law, fitted to data of the USL, excludes the truth with confidence; the choice doesn't fall for it."""
    n = np.repeat([1.0, 2, 4, 8, 16], 3)
    x = planted("usl", n, (100, 0.05, 0.005), 0.01, np.random.default_rng(0))
    low, _high = laws.fit_amdahl(n, x).intervals["sigma"]
    assert low > 0.05
    assert laws.choose(n, x).law == "usl"


def test_alpha_beta_over_decades():
    size = np.array([0, 1e2, 1e4, 1e6, 1e8] * 4)
    seconds = laws.alpha_beta(size, 2e-5, 1e-9) * (1 + 0.02 * np.random.default_rng(0).standard_normal(len(size)))
    found = laws.fit_alpha_beta(size, seconds)
    assert found.values["alpha"] == pytest.approx(2e-5, rel=0.03)
    assert found.values["beta"] == pytest.approx(1e-9, rel=0.03)
    assert found([0])[0] == found.values["alpha"]


def test_closed_forms():
    assert laws.usl([1, 4], 0.0, 0.0).tolist() == [1, 4]
    assert laws.amdahl([1e9], 0.02)[0] == pytest.approx(50)
    assert laws.gustafson([10], 0.1)[0] == pytest.approx(9.1)
    exact = laws.fit_usl([1, 2, 4, 8, 16], 7 * laws.usl([1, 2, 4, 8, 16], 0.1, 0.01))
    assert tuple(exact.values.values()) == pytest.approx((7, 0.1, 0.01))
    assert exact.peak == pytest.approx(np.sqrt(0.9 / 0.01))
    assert laws.fit_usl([1, 2, 4, 8], laws.usl([1, 2, 4, 8], 2.0, 0.0)).peak == 1, "a second worker makes it slower"
    assert laws.fit_amdahl([1, 2, 4], laws.amdahl([1, 2, 4], 0.5)).peak == np.inf
    assert exact.band(4)[0] == exact.band([4])[0]


EXACT = laws.fit_usl([1, 2, 4, 8], [1, 2, 4, 8])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: laws.usl([0.5], 0, 0), r"n \(=0.5\) must be >= 1"),
        (lambda: laws.fit("moore", [1], [1]), r"law \(='moore'\) must be one of 'linear', 'amdahl'"),
        (lambda: laws.fit_usl([1, 2], [1, 2]), "usl has 3 parameters.*2 points at 2 different counts. Measure more"),
        (lambda: laws.fit_amdahl([1, 2], [1, 2]), "amdahl has 2 parameters, so it needs .* one more point"),
        (lambda: laws.fit_usl([1, 2, 3], [1, 2]), r"n \(of shape \(3,\)\) and x \(of shape \(2,\)\) must be lists"),
        (lambda: laws.fit_usl([1, 2, 3], [1, float("nan"), 2]), "must hold finite numbers, those of x above 0"),
        (lambda: laws.choose([1, 2, 0], [1, 2, 3]), r"n \(=0\) must be >= 1"),
        (lambda: laws.choose([], []), "must hold finite numbers"),
        (lambda: laws.fit_usl([1, 2, 3, 4], [1, 2, 3, 4], noise="pink"), r"noise \(='pink'\) must be 'absolute' or"),
        (lambda: laws.choose([1, 2, 3, 4], [1, 2, 3, 4], noise="absolut"), r"noise \(='absolut'\) must be 'absolute'"),
        (lambda: laws.choose([1, 2, 3, 4], [1, 2, 3, 4], level=95), r"level \(=95\) must be between 0 and 1"),
        (lambda: laws.fit_usl([1, 2, 3, 4], [1, 2, 3, 4], level=95), r"level \(=95\) must be between 0 and 1"),
        (lambda: EXACT.band([4], level=95), r"level \(=95\) must be between 0 and 1"),
        (lambda: EXACT.band([4], level=0), r"level \(=0\) must be between 0 and 1"),
    ],
)
def test_bad_points(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
