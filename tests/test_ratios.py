"""Ratios in turn: against known ones, under drift; and what they are called in words."""

import itertools

import numpy as np
import pytest
from scipy import stats

from hpclab import ratios


def test_paired_ratios_hold_the_true_one_and_turns_cancel_a_drift():
    dice = np.random.default_rng(3)
    hours = itertools.count()

    def drifting(true):
        return true * 1.1 ** next(hours) * np.exp(0.01 * dice.standard_normal())

    row, flat = ratios.paired({"drifting": drifting, "constant": lambda true: true}, 2.0, 3.0, rounds=12)
    assert row["low"] < 1.5 < row["high"] < 1.8
    assert flat["low"] == pytest.approx(1.5) == pytest.approx(flat["high"])
    logs = np.log([1.1, 1.3, 1.2])
    answers = iter([1.0, 1.1, 1.3, 1.0, 1.0, 1.2])  # in turn: the second comes first
    (row,) = ratios.paired({"known": lambda of: next(answers)}, "one", "other", rounds=3)
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert [row["low"], row["high"]] == pytest.approx([np.exp(low), np.exp(high)])
    with pytest.raises(ValueError, match=r"rounds \(=1\) must be >= 2"):
        ratios.paired({}, 1, 2, rounds=1)
    with pytest.raises(ValueError, match=r"level \(=95\) must be between 0 and 1, such as 0.95"):
        ratios.paired({"length": len}, "ab", "abcd", rounds=3, level=95)
    with pytest.raises(ValueError, match=r"measures\['length'\] gave 0; a ratio needs numbers above 0"):
        ratios.paired({"length": len}, "ab", "", rounds=3)


def test_times_as_fast_is_over_the_baseline_and_each_is_called_as_often():
    calls = []
    (row,) = ratios.sooner(
        {"half": lambda: calls.append("half")}, lambda: [calls.append("all"), sum(range(200_000))], rounds=3, calls=4
    )
    assert (calls.count("half"), calls.count("all"), row["measure"]) == (1 + 3 * 4, 1 + 3 * 4, "half")
    assert row["low"] > 1 and row["rounds"] == 3


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.9, 1.2, "no difference shown (0.90 to 1.20)"), (1.1, 1.2, "1.15 (1.10 to 1.20)"), (0.5, 0.9, "0.67 (0.50 to")],
)
def test_a_ratio_whose_interval_holds_1_shows_no_difference(low, high, words):
    assert ratios.told({"ratio": (low * high) ** 0.5, "low": low, "high": high}).startswith(words)
