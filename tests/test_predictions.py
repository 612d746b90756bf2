"""Predictions: the score by hand and by simulation, the book that can't be changed unseen, and the report."""

import json
import math
import re

import numpy as np
import pytest
from test_study import rows

from hpclab import study
from hpclab.course import predictions


@pytest.mark.parametrize(
    ("low", "high", "value", "level", "by_hand"),
    [
        (1.0, 3.0, 2.0, 0.9, 2.0),  # it held: its width
        (1.0, 3.0, 1.0, 0.9, 2.0),  # an end holds
        (1.0, 3.0, 0.5, 0.9, 2.0 + 20 * 0.5),
        (1.0, 3.0, 3.25, 0.9, 2.0 + 20 * 0.25),
        (1.0, 3.0, 4.0, 0.5, 2.0 + 4 * 1.0),
        (2.0, 2.0, 1.0, 0.8, 10.0),
    ],
)
def test_the_score_by_hand(low, high, value, level, by_hand):
    """Winkler's, as Gneiting and Raftery (2007) have it in equation 43."""
    assert predictions.interval_score(low, high, value, level) == pytest.approx(by_hand)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("draw", ["normal", "skewed"])
def test_no_interval_scores_less_than_the_true_quantiles(level, draw):
    """In the mean over values of a known distribution, whose quantiles are found without the score."""
    dice = np.random.default_rng(0)
    values = dice.standard_normal(4000) if draw == "normal" else dice.exponential(size=4000)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])

    def mean(low, high):
        return np.mean([predictions.interval_score(low, high, value, level) for value in values])

    least = mean(low, high)
    for below in (-2.0, -0.2, 0.0, 0.2):
        for above in (-0.2, 0.0, 0.2, 2.0, 50.0):
            if (below, above) != (0.0, 0.0) and low + below <= high + above:
                assert mean(low + below, high + above) > least


def test_scores_of_logarithms_do_not_depend_on_the_unit():
    assert predictions.log_score(1.0, 2.0, 3.0) == pytest.approx(math.log(2) + 20 * math.log(1.5))
    assert predictions.log_score(1e3, 2e3, 3e3) == pytest.approx(predictions.log_score(1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: predictions.interval_score(2, 1, 1), r"low \(=2\) must be at most high \(=1\)"),
        (lambda: predictions.interval_score(1, math.inf, 1), "must be finite"),
        (lambda: predictions.interval_score(1, 2, 1, level=90), r"level \(=90\) must be between 0 and 1"),
        (lambda: predictions.log_score(0, 2, 1), "must be above 0"),
        (lambda: predictions.write("b", {"a": (2, 1)}), r"predicted\['a'\] \(=\(2, 1\)\) must be \(low, high\)"),
        (lambda: predictions.write("b", {"a": 3}), "must be .low, high., two numbers"),
        (lambda: predictions.write("b", {}), "predicted is empty"),
        (lambda: predictions.write("b", {"a": (1, 2)}, level=2), "level"),
        (lambda: predictions.score({"predicted": {"a": [1, 2]}, "level": 0.9}, {"b": 1}), "measured lacks 'a'"),
    ],
)
def test_what_is_no_prediction_is_refused(call, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        call()
    assert list(tmp_path.iterdir()) == []


def test_the_book_keeps_all_that_was_written():
    first = predictions.write("book", {"a": (1, 2)})
    assert predictions.write("book", {"a": (1, 2)}) == first, "the same again adds nothing"
    second = predictions.write("book", {"a": (1, 3)})
    assert predictions.read("book") == [first, second]
    assert second["before"] == first["sha256"] != second["sha256"]


@pytest.mark.parametrize("change", ["number", "time", "leave out", "tear", "other"])
def test_a_book_that_was_changed_is_found_out(change, tmp_path):
    for high in (2, 3, 4):
        predictions.write("book", {"a": (1, high)})
    lines = (tmp_path / "book").read_text().splitlines()
    entry = json.loads(lines[1])
    changed = {
        "number": [lines[0], json.dumps(entry | {"predicted": {"a": [1.0, 9.0]}}), lines[2]],
        "time": [lines[0], json.dumps(entry | {"written": "2020-01-01T00:00:00+0000"}), lines[2]],
        "leave out": [lines[0], lines[2]],
        "tear": [lines[0], lines[1][:30], lines[2]],
        "other": [lines[0], "[]", lines[2]],
    }[change]
    (tmp_path / "book").write_text("\n".join(changed) + "\n")
    with pytest.raises(ValueError, match="was changed after it was written, in line 2"):
        predictions.read("book")
    with pytest.raises(ValueError, match="was changed"):
        predictions.write("book", {"a": (1, 5)})


def test_only_what_was_written_before_the_run_counts():
    """And whoever has seen an earlier run is told so: run, look, rewrite and rerun can't be hidden."""
    what = (
        {"predicted": 0},
        {"predicted": 1},
        {"measures": "a"},
        {"predicted": 3},
        {"measures": "b"},
        {"predicted": 5},
    )
    entries = [entry | {"written": f"2026-01-01T12:0{minute}:00+0000"} for minute, entry in enumerate(what)]
    first = [{"started": "2026-01-01T14:03:30+0200"}, {"started": "2026-01-01T14:02:30+0200"}]
    second = [{"started": "2026-01-01T14:04:00+0200"}]
    entry = predictions.before(entries, first)
    assert (entry["predicted"], entry["seen"]) == (1, 0)
    entry = predictions.before(entries, second)
    assert (entry["predicted"], entry["seen"]) == (3, 1)
    for lacks in (entries[:2], entries[3:4] + entries[5:]):  # measured without having said so
        with pytest.raises(ValueError, match=r"record no measurement that began before .*predictions.begin"):
            predictions.before(lacks, second)


def test_a_run_begins_after_a_prediction_and_stands_in_the_chain(tmp_path):
    with pytest.raises(FileNotFoundError):
        predictions.begin("book", "results")
    first = predictions.write("book", {"a": (1, 2)})
    run = predictions.begin("book", tmp_path / "results")
    assert predictions.write("book", {"a": (1, 2)}) == first, "the same again adds nothing, after a run either"
    second = predictions.write("book", {"a": (1, 3)})
    assert predictions.read("book") == [first, run, second]
    assert (run["before"], second["before"]) == (first["sha256"], run["sha256"])
    assert [row["content"] for row in predictions.history([first, run, second])] == [
        "a: 1 - 2",
        str(tmp_path / "results"),
        "a: 1 - 3",
    ]
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="holds no predictions; write them before you measure"):
        predictions.begin("empty", "results")


def test_a_huge_interval_and_a_bold_one_lose():
    measured = {"strong": 1.6, "weak": 0.8}

    def total(predicted):
        return predictions.total(predictions.score({"predicted": predicted, "level": 0.9}, measured))

    fair = total({"strong": (1.4, 1.8), "weak": (0.7, 0.9)})
    assert fair == pytest.approx((math.log(1.8 / 1.4) + math.log(0.9 / 0.7)) / 2)
    assert fair < total({"strong": (0.01, 100), "weak": (0.01, 100)})
    assert fair < total({"strong": (1.99, 2.0), "weak": (0.99, 1.0)})


def test_what_held_has_missed_by_nothing():
    """The sum of rounded logarithms may be below the width."""
    ends = [(low / 7, low / 3) for low in range(1, 50)]
    entry = {"predicted": {str(place): pair for place, pair in enumerate(ends)}, "level": 0.9}
    scores = predictions.score(entry, {str(place): high for place, (_low, high) in enumerate(ends)})
    assert {row["for the miss"] for row in predictions.table(scores)} == {"0.00"}


def test_the_report_is_one_file_with_all_in_it(tmp_path):
    entry = predictions.write("book", {"strong": (1.5, 2.5), "weak <b>": (0.1, 0.2)})
    scores = predictions.score(entry, {"strong": 1.9, "weak <b>": 0.9})
    found = rows((1, 2))
    found += [
        row | {"regime": "setting", "label": "far", "source": "emulated"} for row in found if row.get("ranks") == 2
    ][:1]
    run = predictions.begin("book", "later")
    meaning = {"strong": "two over one"}
    text = predictions.report(tmp_path / "r.html", entry, scores, found, meaning, [entry, run]).read_text("utf-8")
    assert run["sha256"][:12] in text and "later" in text
    assert not re.search(r'(src|href)="(?!data:)', text), "it needs no other file"
    assert entry["sha256"] in text and entry["written"] in text and "two over one" in text
    assert text.count("<figcaption") == 5  # predictions, strong, weak, network, forecast
    assert "weak &lt;b&gt;" in text and ">weak <b>" not in text
    assert ">far</td>" in text and "Mean score: " in text
    assert study.read(tmp_path / "r.html") == found
