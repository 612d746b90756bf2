"""Operations and bytes against counts by hand; ceilings and rates by what they must be."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from hpclab import machine, roofline, timeline


def test_counts_are_those_by_hand():
    a, b = torch.zeros(8, 4), torch.zeros(4, 2)
    convolution, images = nn.Conv2d(1, 2, 3, padding=1), torch.zeros(5, 1, 6, 6)
    weights, results = 2 * 9 + 2, 5 * 2 * 36
    for work, flops, numbers in [
        (lambda: a @ b, 2 * 8 * 4 * 2, 32 + 8 + 16),
        (lambda: a @ b[:, 0], 2 * 8 * 4, 32 + 4 + 8),
        (lambda: torch.dot(a[:, 0], a[:, 1]), 2 * 8, 8 + 8 + 1),
        (lambda: a + a, 32, 3 * 32),
        (lambda: a.mul_(2), 32, 2 * 32),
        (lambda: torch.add(a, a, out=a), 32, 3 * 32),
        (lambda: torch._foreach_add_([a, a], [a, a]), 64, 6 * 32),
        (lambda: a.view(4, 8).T[1:], 0, 0),
        (lambda: convolution(images), 2 * 9 * results, 180 + weights + results),
    ]:
        assert roofline.count(work) == (flops, 4 * numbers)


def test_a_backward_pass_is_counted_too():
    layer, batch = nn.Linear(30, 20, bias=False), torch.zeros(10, 30)
    flops, _nbytes = roofline.count(lambda: layer(batch).sum().backward())
    assert flops == pytest.approx(2 * 2 * 10 * 30 * 20, rel=0.02)  # the input needs no gradient; then sum's result


def test_a_ceiling_and_a_rate_say_what_they_are():
    found = roofline.ceilings(megabytes=4, size=64, repeats=2)
    row = roofline.measure("product", torch.mm, torch.zeros(64, 64), torch.zeros(64, 64), repeats=2)
    assert found["ridge"] == found["flops_per_s"] / found["bytes_per_s"] > 0
    assert found["threads"] == row["threads"] == torch.get_num_threads()
    assert (row["flops"], row["nbytes"]) == (2 * 64**3, 3 * 4 * 64**2)
    assert row["intensity"] == row["flops"] / row["nbytes"]
    assert row["flops_per_s"] * row["duration_s"] == pytest.approx(row["flops"])
    for each in (found, row):
        assert (each["source"], each["cpus"]) == ("measured", machine.cpus())


def test_each_row_is_told_by_its_side_of_the_ridge_and_its_share_of_the_roof():
    ceiling = {"flops_per_s": 8e9, "bytes_per_s": 2e9, "ridge": 4.0}
    rows = [{"name": str(at), "intensity": at, "flops_per_s": 1e9} for at in (0.5, 1.0, 4.0, 100.0)]
    found = [(row["left of the ridge"], row["share of its roof"]) for row in roofline.against(rows, ceiling)]
    assert found == [("yes", "100%"), ("yes", "50%"), ("no", "12%"), ("no", "12%")]


def test_a_process_that_names_its_parts_shows_them_in_order():
    with profile(activities=[ProfilerActivity.CPU]) as traced:
        for name in ("forward", "backward", "something", "optimizer"):
            with record_function(name):
                torch.zeros(1000).add_(1)
    rows = timeline.named(traced)
    assert [row["name"] for row in rows] == ["forward", "backward", "optimizer"]
    starts, ends = zip(*((row["start_s"], row["start_s"] + row["duration_s"]) for row in rows), strict=True)
    assert starts[0] == 0 < ends[0] <= starts[1] < ends[1] <= starts[2] < ends[2]
    assert {(row["kind"], row["rank"], row["source"]) for row in rows} == {("span", 0, "measured")}
