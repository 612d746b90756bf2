"""The explorer's curves against closed forms; what it shows follows its sliders."""

import numpy as np
import pytest

from hpclab.forecast import Workload
from hpclab.widgets import Explorer


class Place:
    """Where something is shown."""

    def __init__(self):
        self.shown = []

    def update(self, content):
        self.shown.append(content)


@pytest.fixture
def explorer():
    measured = [{"ranks": ranks, "efficiency": 1 / ranks**0.1, "source": "measured"} for ranks in (1, 2, 4096)]
    found = Explorer(Workload(0.1, 100e6, samples=32, overlap=0.5, bucket_bytes=1.0), measured)
    found.figure, found.text = Place(), Place()
    return found


def test_curves_follow_the_sliders(explorer):
    """A ring at 1 Gb/s: 1.6 s of bytes at many ranks, of which half the computing hides 0.05 s."""
    explorer.sliders["latency"].value = 1e-6
    ranks, efficiency = explorer.curves()["ring"]
    assert efficiency[0] == 1
    exposed = 2 * (ranks[-1] - 1) * (1e-6 + 100e6 * 8 / 1e9 / ranks[-1]) - 0.05
    assert efficiency[-1] == pytest.approx(0.1 / (0.1 + exposed))
    explorer.sliders["overlap"].value = 0.0
    assert explorer.curves()["ring"][1][-1] < efficiency[-1]
    explorer.sliders["samples"].value = 1024
    assert explorer.curves()["ring"][1][-1] > efficiency[-1]
    assert all(np.isfinite(curve).all() and (curve <= 1).all() for _, curve in explorer.curves().values())
    assert len(explorer.curves()) == 5


def test_each_move_draws_once_in_the_same_place(explorer):
    for bandwidth in (1e8, 1e8, 1e10):
        explorer.sliders["bandwidth"].value = bandwidth
    assert len(explorer.figure.shown) == len(explorer.text.shown) == 2  # it moved twice
    image = explorer.figure.shown[-1]
    assert image.data.startswith(b"\x89PNG")
    assert "parameter-server" in image.alt
    assert "<table" in explorer.text.shown[-1].data


def test_what_was_measured_stays_if_it_is_in_the_picture(explorer):
    assert [row["ranks"] for row in explorer.measured] == [1, 2]
