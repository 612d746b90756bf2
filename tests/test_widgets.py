"""The explorer's curves against closed forms; what it shows follows its sliders."""

import threading
import types

import matplotlib
import numpy as np
import pytest
from conftest import no_rank_left, until
from hpclab.widgets import Explorer, Planner, RaceStage

from hpclab.forecast import Workload, calibrate
from hpclab.network import Network


class Place:
    """Where something is shown."""

    def __init__(self):
        self.shown = []

    def update(self, content):
        self.shown.append(content)


@pytest.fixture
def explorer():
    measured = [{"ranks": ranks, "efficiency": 1 / ranks**0.1, "source": "measured"} for ranks in (1, 2, 4096)]
    work = Workload(0.1, 100e6, samples=32, overlap=0.5, bucket_bytes=1.0, buckets=1)
    known = calibrate(work, Network(), [1, 1, 1], [0.099, 0.1, 0.101], ["compute_s"])
    found = Explorer(known, measured)
    found.figure, found.text = Place(), Place()
    return found


def test_curves_follow_the_sliders(explorer):
    """A ring at 1 Gb/s: 1.6 s of bytes at many ranks, of which half the computing hides 0.05 s."""
    explorer.sliders["latency"].value = 1e-6
    found = explorer.curves()["ring"]
    ranks, efficiency = found["ranks"], found["efficiency"]
    assert efficiency[0] == 1
    exposed = 2 * (ranks[-1] - 1) * (1e-6 + 100e6 * 8 / 1e9 / ranks[-1]) - 0.05
    assert efficiency[-1] == pytest.approx(0.1 / (0.1 + exposed), rel=1e-4)  # the mean of the logarithms is 0.1
    explorer.sliders["overlap"].value = 0.0
    assert explorer.curves()["ring"]["efficiency"][-1] < efficiency[-1]
    explorer.sliders["samples"].value = 1024
    assert explorer.curves()["ring"]["efficiency"][-1] > efficiency[-1]
    assert len(explorer.curves()) == 5
    for found in explorer.curves().values():
        assert np.isfinite(found["efficiency"]).all() and (found["efficiency"] <= 1).all()


def test_the_band_is_the_calibrations_noise(explorer):
    """Against draws: what one rank took thrice, and what the two measurements of an efficiency would.

    With t(.975, 2) = 4.303 standard errors either way. Of a step at many ranks only half the computing is left to see.
    """
    noise = np.log([0.099, 0.1, 0.101]).std(ddof=1)
    dice = np.random.default_rng(0)
    explorer.sliders["bandwidth"].value = 1e12
    found = explorer.curves()["tree"]
    comm = 20 * (explorer.sliders["latency"].value + 100e6 * 8 / 1e12)  # 2 x log2(1024) messages of all bytes
    error, one, many = noise * dice.standard_normal((3, 400_000))
    compute = 0.1 * np.exp(error / np.sqrt(3))
    drawn = np.log(compute / 0.1) + one - np.log((compute + np.maximum(0, comm - compute / 2)) / 0.1) - many
    half = 4.303 * drawn.std()
    assert np.log(found["efficiency_high"][-1] / found["efficiency"][-1]) == pytest.approx(half, rel=0.02)
    assert np.log(found["efficiency_low"][-1] / found["efficiency"][-1]) == pytest.approx(-half, rel=0.02)
    assert found["efficiency_low"][0] == found["efficiency_high"][0] == 1, "one rank over itself"


def test_each_move_draws_once_in_the_same_place(explorer):
    for bandwidth in (1e8, 1e8, 1e10):
        explorer.sliders["bandwidth"].value = bandwidth
    assert len(explorer.figure.shown) == len(explorer.text.shown) == 2  # it moved twice
    shown = explorer.figure.shown[-1].data
    assert 'src="data:image/png;base64,iVBOR' in shown
    assert "parameter-server: 1 at 1, " in shown
    assert "measured: 1 at 1, 0.933 at 2" in shown
    assert "<table" in explorer.text.shown[-1].data


def test_what_can_not_be_drawn_is_shown_in_its_place(explorer):
    with matplotlib.rc_context({"path.effects": [1]}):  # a slip in a reader's own settings
        explorer.sliders["bandwidth"].value = 1e8
    assert explorer.figure.shown[-1].data.startswith("<pre>AttributeError: ")
    assert "<table" in explorer.text.shown[-1].data
    explorer.sliders["bandwidth"].value = 1e10
    assert "data:image/png" in explorer.figure.shown[-1].data


def test_a_race_that_can_not_begin_is_told_where_it_would_be(client):
    stage = RaceStage(client, "CNN", "fashion_mnist", batch_size=3)
    stage.note = Place()
    stage.button.click()
    until(
        lambda: (
            stage.note.shown and stage.note.shown[-1].data.startswith("<pre>ValueError: batch_size (=3) must be even")
        )
    )
    until(lambda: not stage.button.disabled and stage.stop.disabled and stage.kill.disabled)
    with pytest.raises(ValueError, match="must be even"):
        stage.run()


def test_a_race_of_a_closed_cluster_says_so_and_how_to_go_on():
    closed = types.SimpleNamespace(status="closed")
    stage = RaceStage(closed, "CNN", "fashion_mnist")
    stage.note = Place()
    stage.button.click()
    until(lambda: stage.note.shown and "Run the cell with hpclab.connect again" in stage.note.shown[-1].data)
    with pytest.raises(RuntimeError, match="The cluster is closed"):
        stage.run()


def test_each_race_is_stopped_and_no_two_run_at_once(client):
    """A race that the button starts ends by Stop, again and again; what it has told stays as it was."""
    stage = RaceStage(client, "CNN", "fashion_mnist", epochs=1000)
    stage.note = Place()
    for _turn in range(2):
        stage.button.click()
        until(lambda: stage.racer is not None and stage.racer.left())
        before = stage.figure
        joined = threading.Thread(target=stage.run)
        joined.start()
        until(lambda before=before: stage.figure is not before)  # else the race might end before it is joined
        stage.stop.click()
        assert stage.stop.description == "Stopping"
        until(lambda: not stage.button.disabled)
        joined.join(60)
        assert not joined.is_alive(), "who joins a race waits until it has ended"
        assert stage.note.shown[-1].data.startswith("Stopped. Press the button")
        assert stage.racer.status == "stopped" and stage.result is None
    assert no_rank_left()


def test_what_was_measured_stays_if_it_is_in_the_picture(explorer):
    assert [row["ranks"] for row in explorer.measured] == [1, 2]


def test_a_star_that_no_curve_passes_is_explained(explorer):
    """One measured far below every curve, and one that lies on a curve."""
    curves = explorer.curves()
    explorer.measured = [{"ranks": 1, "efficiency": 1.0}, {"ranks": 2, "efficiency": 0.05}]
    remark = explorer.remark(curves)
    assert "No curve passes through the star at 2 ranks" in remark and "(0.05)" in remark
    place = list(explorer.ranks).index(2)
    explorer.measured[1]["efficiency"] = float(curves["tree"]["efficiency"][place])
    assert explorer.remark(curves) == ""
    explorer.measured = explorer.measured[:1]
    assert explorer.remark(curves) == ""


def test_sliders_and_columns_are_in_the_units_and_counts_that_people_use(explorer):
    labels = [label for label, _value in explorer.sliders["latency"].options]
    assert labels[:5] == ["1 µs", "2 µs", "5 µs", "10 µs", "20 µs"] and labels[-1] == "100 ms"
    assert dict(explorer.sliders["latency"].options)["50 µs"] == 50e-6 == explorer.sliders["latency"].value
    assert dict(explorer.sliders["bandwidth"].options)["1 Gb/s"] == 1e9 == explorer.sliders["bandwidth"].value
    [row, *_] = explorer.table(explorer.curves())
    assert [*row][1:] == ["1", "4", "16", "64", "256", "1024"]


def test_races_gather_in_one_table_with_an_interval():
    """Ratios 1.6, 1.4 and 1.5: Student's 4.30 of two degrees of freedom makes it wide; two races have none yet."""
    stage = RaceStage(None, "CNN", "fashion_mnist")
    assert not stage.table()
    stage.raced = {"2 ranks": [1.6, 1.4]}
    assert not stage.table()
    stage.raced = {"2 ranks": [1.6, 1.4, 1.5]}
    assert [*stage.table()[0].values()] == ["2 ranks", 3, "1.50 (1.27 to 1.77)"]
    stage.raced = {"2 ranks": [1.6, 1.4, 1.5, 1.5, 1.5]}
    assert stage.table()[0]["times as fast"].startswith("1.50 (1.4")


def test_a_planner_follows_its_sliders():
    planner = Planner()
    planner.figure, planner.text = Place(), Place()
    planner.sliders["model"].value = "8B"
    assert "data:image/png" in planner.figure.shown[-1].data and "<table" in planner.text.shown[-1].data
    row = planner.table(planner.worked_out())[0]
    assert row["dp"] * row["tp"] * row["pp"] == 64 and row["zero"] in (0, 1)
    planner.sliders["gpus"].value = 1
    assert planner.text.shown[-1].data == "<p>Nothing fits: take more GPUs or memory, or allow more.</p>"
    assert planner.figure.shown[-1].data == ""
    planner.sliders["gpus"].value = 16
    short = planner.worked_out()[0]
    planner.sliders["sequence"].value = 16384  # 4 times the activations for each sequence
    long = planner.worked_out()[0]
    assert long["tokens_per_s"] < short["tokens_per_s"]
    planner.sliders["tried"].index = 2
    assert planner.worked_out()[0]["step_s"] <= long["step_s"]  # allowing more is never slower
    assert all(row["memory_bytes"] <= 1.1 * planner.limit_bytes() for row in planner.worked_out())
