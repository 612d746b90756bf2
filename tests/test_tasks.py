"""What tasks cost and what workers did, on a real cluster."""

import time

import numpy as np
import pytest
from distributed import get_task_stream

from hpclab import tasks


def nap(number):
    time.sleep(0.05)
    return number


def test_spans_tell_what_each_worker_did(client):
    with get_task_stream(client) as stream:
        assert client.gather(client.map(nap, range(6), pure=False)) == list(range(6))
    rows = [row for row in tasks.spans(stream.data) if row["action"] == "compute"]
    assert len(rows) == 6
    assert {row["worker"] for row in rows} == {0, 1}
    assert {(row["kind"], row["name"], row["source"]) for row in rows} == {("task", "nap", "measured")}
    assert all(row["duration_s"] >= 0.05 for row in rows)
    starts = [row["start_s"] for row in rows]
    assert starts == sorted(starts) and starts[0] >= 0


def test_no_tasks_give_no_rows():
    assert tasks.spans([]) == []


def test_a_clock_counts_until_all_results_are_here(client):
    assert tasks.clock(client, nap, range(6)) >= 3 * 0.05


def test_the_arguments_of_a_sweep_take_turns():
    given = []
    rows = tasks.sweep(lambda count: given.append(count) or 0.5, iter([1, 10]), items=100, repeats=2)
    assert given == [1, 10, 1, 10] == [row["tasks"] for row in rows]
    assert {(row["kind"], row["items"], row["duration_s"], row["source"]) for row in rows} == {
        ("grain", 100, 0.5, "measured")
    }
    assert rows[0]["cpus"] >= 1


def test_overhead_finds_the_cost_of_a_task(monkeypatch):
    """On a clock of which the truth is known: the second cluster's tasks cost twice as much."""
    cost = {"one": 1e-3, "two": 2e-3}
    dice = np.random.default_rng(0)

    def clock(client, function, pieces):
        return (0.05 + cost[client] * len(pieces)) * (1 + 0.02 * dice.standard_normal())

    monkeypatch.setattr(tasks, "clock", clock)
    for row in tasks.overhead({"one": "one", "two": "two"}):
        assert row["low_ms"] <= 1e3 * cost[row["cluster"]] <= row["high_ms"]
        assert row["task_ms"] == pytest.approx(1e3 * cost[row["cluster"]], rel=0.1)


def test_a_race_compares_within_a_turn(client):
    """Naps need no CPU, so two workers are faster than this process by itself whatever else the machine does."""
    (row,) = tasks.race([nap], {"workers": client}, pieces=6, repeats=3)
    assert (row["function"], row["cluster"]) == ("nap", "workers")
    assert row["low"] <= row["speedup"] <= row["high"] < 2.1
    assert row["speedup"] > 1
