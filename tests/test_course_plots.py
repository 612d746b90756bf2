"""Figures and tables of single notebooks, against numbers worked out here."""

import matplotlib.pyplot as plt
import numpy as np

from hpclab.course import plots, security, waiting


def test_pictures_have_their_titles():
    plots.pictures(np.zeros((3, 1, 4, 4)), ["shirt", "bag", "boot"])
    assert plt.gcf().words() == "shirt; bag; boot"
    assert [ax.images[0].get_array().shape for ax in plt.gcf().axes] == [(4, 4)] * 3


def test_how_numbers_spread_is_counted():
    flat = np.arange(0, 2**64, 2**54, dtype=np.uint64)
    near_zero = np.arange(100, dtype=np.uint64)
    counts = plots.spread({"flat": flat, "near 0": near_zero})
    assert (counts[0] == len(flat) / 32).all()
    assert counts[1].tolist() == [100] + [0] * 31
    assert "near 0: 0 to 100 in each part" in plt.gcf().words()


def test_the_time_that_failures_cost_is_drawn_with_its_median():
    simulated = np.array([[0.5, 0.6, 0.7], [0.1, 0.2, 0.3]])
    words = plots.intervals([1, 10], simulated, {1: 0.65, 5: 0.2}, young=7.4).figure.words()
    for said in ("simulated: 0.6 at 1, 0.2 at 10", "measured: 0.65 at 1, 0.2 at 5", "Young: 7"):
        assert said in words


def test_float_masks_cancel_but_for_rounding():
    gradients = np.random.default_rng(1).normal(0, 1e-2, (4, 1000)).astype(np.float32)
    small, large = (security.float_masks(gradients, size) for size in (1e-2, 1e4))
    assert small[1] < 1e-5 < 1e-2 < large[1]
    assert abs(np.corrcoef(small[0], gradients[1])[0, 1]) > 0.3 > abs(np.corrcoef(large[0], gradients[1])[0, 1])


def test_bars_of_memory_say_what_fills_it():
    parts = {"weights": 2, "gradients": 4, "optimiser": 12, "activations": 30, "buffers": 1.5}
    row = {"kind": "plan", "dp": 2, "tp": 4, "pp": 1, "source": "forecast"}
    ax = plots.memory([row | {f"{name}_bytes": 1e9 * size for name, size in parts.items()}], 80e9)
    assert "1. dp 2, tp 4, pp 1: weights 2, gradients 4, optimiser 12, activations 30" in ax.figure.words()
    assert max(bar.get_x() + bar.get_width() for bar in ax.patches) == 49.5
    assert list(ax.lines[0].get_xdata()) == [80, 80]
    plt.close(ax.figure)


def test_waits_are_drawn_by_case_and_rank():
    times = [("random", 0, 0.02, 0.0), ("random", 1, 0.015, 0.005)]
    rows = [
        {"kind": "wait", "case": case, "rank": rank, "compute_s": compute, "wait_s": wait, "source": "measured"}
        for case, rank, compute, wait in times
    ]
    ax = plots.waits(rows)
    assert "random, rank 1: computing 15, waiting for others 5" in ax.figure.words()
    assert [text.get_text() for text in ax.texts] == ["0%", "25%"]
    plt.close(ax.figure)


def test_progress_is_drawn_against_bytes_and_the_seconds_of_each_link():
    row = {"kind": "progress", "way": "ddp", "step": 10, "source": "emulated"}
    runs = [
        [row | {"link": link, "sent_mb": at, "seconds": slow * at, "loss": 1 / at} for at in (1.0, 2.0)]
        for link, slow in (("near", 3), ("far", 5))
    ]
    plots.progress(runs)
    bytes_, near, far = plt.gcf().words().split("\n")
    assert "MB that a rank has sent (by formula)" in bytes_ and "ddp: 1 at 1, 0.5 at 2" in bytes_
    assert "near (emulated)" in near and "0.5 at 6" in near
    assert "far (emulated)" in far and "0.5 at 10" in far


def test_orders_of_a_queue_are_compared():
    jobs = [
        {"submitted_s": 10, "started_s": 10, "ended_s": 18, "cpus": 2},
        {"submitted_s": 10, "started_s": 20, "ended_s": 22, "cpus": 4},
    ]
    (row,) = waiting.compare({"backfill": jobs}, cpus=4)
    assert [*row.values()] == ["backfill", "5.0", 10, 12, "50%"]


def test_bars_of_a_strategys_memory_stand_beside_the_measured_peak():
    parts = {"weights": 25, "gradients": 0, "optimiser": 51, "activations": 34, "buffers": 25}
    row = {"kind": "need", "strategy": "ddp", "peak_mb": 140, "source": "measured"}
    words = plots.needs([row | {f"{name}_mb": size for name, size in parts.items()}]).figure.words()
    assert "ddp: weights 25, gradients 0, optimiser 51, activations 34, buffers 25, measured peak 140" in words
