"""Plans: the fastest layouts that fit."""

import dataclasses

import pytest

from hpclab.forecast import H100, Transformer, mfu, plan, ultrascale
from hpclab.forecast.planner import candidates

SMALL = ultrascale.MODELS["1B"]
LARGE = Transformer(80, 8192, 64, 28672, 131_072, 4096, tied=False)
"""80 G parameters."""


def test_candidates_use_all_gpus_and_the_whole_batch_once():
    layouts = list(candidates(SMALL, 16, 64, (0, 1, 2, 3), (None, "full")))
    assert len(layouts) == len({*layouts}) > 100
    assert all(layout.gpus == 16 and layout.batch == 64 for layout in layouts)
    assert {layout.zero for layout in layouts if layout.pp > 1} == {0, 1}
    assert {layout.zero for layout in layouts if layout.dp == 1} == {0}
    assert {layout.dp for layout in candidates(SMALL, 64, 3)} == {1}  # no other divides 3 sequences


def test_a_plan_is_sorted_and_fits():
    rows = plan(LARGE, 256, 256)
    assert len(rows) == 5
    assert [row["step_s"] for row in rows] == sorted(row["step_s"] for row in rows)
    for row in rows:
        assert row["kind"] == "plan" and row["source"] == "forecast"
        assert row["dp"] * row["tp"] * row["pp"] == 256
        assert row["memory_bytes"] <= 1.1 * H100.memory_bytes
        assert row["memory_bytes_low"] < row["memory_bytes"] < row["memory_bytes_high"]
        assert row["tokens_per_s_low"] < row["tokens_per_s"] < row["tokens_per_s_high"]
        assert row["mfu"] == pytest.approx(mfu(LARGE, 256, 256 / row["step_s"])) and 0.1 < row["mfu"] < 0.5


def test_80_g_parameters_need_more_than_a_node_or_what_zero_and_recomputing_save():
    assert plan(LARGE, 8, 256) == []
    assert plan(LARGE, 8, 256, zero=range(4), recompute=[None, "full"]) == []  # 16 bytes a parameter are 1.3 TB
    saving = {"zero": range(4), "recompute": [None, "full"]}
    assert plan(LARGE, 16, 256, **saving) == []  # 18 bytes, as gradients have 4: 90 GB each, and all of them stay
    assert plan(LARGE, 16, 256, dataclasses.replace(H100, memory_bytes=91e9), **saving) != []
    assert plan(LARGE, 16, 256) == [] != plan(LARGE, 32, 256, **saving)


def test_more_memory_is_never_slower_and_wider_bands_hold_narrower_ones():
    roomy = dataclasses.replace(H100, memory_bytes=2 * H100.memory_bytes)
    narrow, wide = plan(LARGE, 64, 256)[0], plan(LARGE, 64, 256, level=0.95)[0]
    assert plan(LARGE, 64, 256, roomy)[0]["step_s"] <= narrow["step_s"]
    assert wide["step_s_low"] < narrow["step_s_low"] and narrow["step_s_high"] < wide["step_s_high"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: plan(SMALL, 0, 64), r"gpus \(=0\) must be at least 1"),
        (lambda: plan(SMALL, 8, 0), r"batch \(=0\) must be at least 1"),
        (lambda: plan(SMALL, 8, 64, level=0), r"level \(=0\) must be between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
