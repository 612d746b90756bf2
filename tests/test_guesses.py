"""Predictions: kept before the result and shown beside it, counted once, and never at a run's cost."""

import json

import pytest
import torch

import hpclab
from hpclab.course import MANIFEST, calibration, guesses, logbook


@pytest.fixture(autouse=True)
def session(monkeypatch):
    monkeypatch.setattr(guesses, "_session", [])
    monkeypatch.setattr(guesses, "_units", {})
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A folder that counts as a working copy of the course, in which this process is."""
    (tmp_path / MANIFEST).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log(copy) -> list[dict]:
    path = copy / logbook.LOG
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_prediction_is_kept_and_shown_beside_the_result(copy):
    assert hpclab.predict("scaling.step", 1.5, "times as long") == "Written down: 1.5 times as long."
    shown = hpclab.came("scaling.step", 2.0)
    assert shown == "You predicted 1.5 times as long. Result: 2 times as long. You were off by a factor of 1.33."
    predicted, result = log(copy)
    assert (predicted["prediction"], predicted["value"], predicted["unit"]) == ("scaling.step", 1.5, "times as long")
    assert (result["result"], result["value"]) == ("scaling.step", 2.0)
    assert predicted["written"] <= result["written"] and predicted["written"][:2] == "20"


def test_a_result_may_be_a_tensor_that_needs_a_gradient(copy):
    assert hpclab.came("a.b", torch.tensor(2.0, requires_grad=True)).startswith("Result: 2.")


@pytest.mark.parametrize(
    ("value", "result", "verdict"),
    [
        ((1, 1.5), 1.5, "Your interval contains it."),
        ([1, 1.5], 1.6, "Your interval doesn't contain it: why?"),
        (4, 1.0, "You were off by a factor of 4."),
        (0, 3, "Why?"),
        (0, 0, "You were right."),
        (1.5, 1.502, "You were right."),
    ],
)
def test_numbers_and_intervals_are_judged(value, result, verdict):
    hpclab.predict("a.b", value)
    assert hpclab.came("a.b", result).endswith(verdict)


def test_one_of_some_options(copy):
    hpclab.predict("a.part", "backward", among=["forward", "backward"])
    assert hpclab.came("a.part", "backward") == "You predicted backward. Result: backward. You were right."
    assert hpclab.came("a.part", "forward").endswith("Result: forward. Why?")
    with pytest.raises(ValueError, match=r"""value \(='sideways'\) must be one of "forward", "backward"."""):
        hpclab.predict("a.part", "sideways", among=["forward", "backward"])


@pytest.mark.parametrize("value", ["fast", None, (2, 1), (1, 2, 3), (), float("nan"), [[1, 2]], {1: 2}])
def test_what_is_no_prediction_is_refused(copy, value):
    with pytest.raises(ValueError, match=r"must be a number, or an interval: \(low, high\)"):
        hpclab.predict("a.b", value)
    assert log(copy) == []


def test_the_stub_writes_nothing_and_no_prediction_is_made_up(copy):
    assert hpclab.predict("a.b", ..., "steps").startswith("Your prediction: ___ steps. Replace the three dots")
    assert hpclab.predict("a.c", ..., among=["yes", "no"]).endswith('with one of "yes", "no".')
    assert log(copy) == []
    assert hpclab.came("a.b", 2) == "Result: 2 steps. (No prediction was written down.)"
    assert hpclab.came("a.d", float("nan")) == hpclab.came("a.d", None)
    assert hpclab.came("a.d", None) == "There is no result yet to compare with."
    assert [row for row in log(copy) if "prediction" in row or row["result"] != "a.b"] == []


def test_the_newest_before_the_first_result_counts_and_a_later_one_is_shown_as_such(copy):
    for value in (1, 2, 2):
        hpclab.predict("a.b", value)
    hpclab.came("a.b", 4)
    assert hpclab.predict("a.b", 4.0) == "Written down: 4. It doesn't count: you have seen a result."
    assert hpclab.came("a.b", 5) == (
        "You predicted 2. Result: 5. You were off by a factor of 2.5."
        " After seeing a result you wrote 4; that doesn't count."
    )
    assert [row["value"] for row in log(copy)] == [1.0, 2.0, 4.0, 4.0]
    (row,) = hpclab.progress().predictions
    assert (row["made"], row["how good"]) == (1, "off by a factor of 2 (median)")


def test_a_prediction_after_the_result_alone_counts_for_nothing(copy):
    hpclab.came("a.b", 4)
    hpclab.predict("a.b", 4)
    assert hpclab.came("a.b", 4) == "Result: 4. After seeing a result you wrote 4; that doesn't count."
    assert hpclab.progress().predictions == []


def test_the_index_shows_how_good_they_were(copy):
    assert "prediction" not in repr(hpclab.progress())
    for place, (value, result) in enumerate([(1, 2), (10, 10), (9, 1), ((1, 3), 2), ((1, 3), 4), (5, None)]):
        hpclab.predict(f"a.{place}", value)
        hpclab.came(f"a.{place}", result)
    hpclab.predict("a.choice", "yes", among=["yes", "no"])
    hpclab.came("a.choice", "yes")
    logbook.remember("start.gang")
    found = hpclab.progress()
    assert [(row["predictions"], row["made"], row["how good"]) for row in found.predictions] == [
        ("numbers", 3, "off by a factor of 2 (median)"),
        ("intervals", 2, "1 contained the result"),
        ("choices", 1, "1 right"),
    ]
    assert found.done == 1
    assert "1 contained the result" in found._repr_html_() and "1 contained the result" in repr(found)


def test_outside_of_a_working_copy_it_is_kept_as_long_as_the_kernel_lives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hpclab.predict("a.b", 1)
    assert hpclab.came("a.b", 2).startswith("You predicted 1.")
    assert list(tmp_path.rglob("*")) == []


def test_a_log_that_cannot_be_written_costs_only_the_memory(copy, monkeypatch):
    (copy / logbook.LOG).mkdir()
    monkeypatch.setattr(logbook, "_warned", set())
    with pytest.warns(UserWarning, match="can't be saved"):
        hpclab.predict("a.b", 1)
    assert hpclab.came("a.b", 2).startswith("You predicted 1.")


def test_who_grades_leaves_no_trace(copy, monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    hpclab.predict("a.b", 1)
    assert hpclab.came("a.b", 2).startswith("You predicted 1.")
    assert log(copy) == []


def test_notes_of_a_kind_that_is_unknown_are_left_out_of_the_stories():
    assert calibration.stories([{"exercise": "a.b", "day": "2026-01-01"}]) == {}
