"""Memory by strategy: the formula beside sums written out by hand, and beside what ranks held; and bubbles."""

import functools

import pytest
import torch

import hpclab
from hpclab import timeline
from hpclab.course import malloc, needs, pipelines
from hpclab.models import GPT
from hpclab.training import strategies
from hpclab.training.strategies.kinds import NAMES

WIDTH, LAYERS, WINDOWS = 256, 8, 4
P = 12 * LAYERS * WIDTH**2


@pytest.mark.parametrize(
    ("strategy", "ranks", "numbers"),
    [
        (strategies.DDP(), 2, 4 * P),
        (strategies.Zero(1), 4, 2.5 * P),
        (strategies.Zero(3), 4, (3 / 4 + 2 / LAYERS) * P),
        (strategies.Tensor(), 2, 1.5 * P),
        (strategies.Pipeline(), 2, 1.5 * P),
    ],
)
def test_without_activations_it_is_what_the_papers_count(strategy, ranks, numbers, monkeypatch):
    """Of 4 bytes each: weights, AdamW's state, and DDP's buckets, at the end of a forward pass."""
    monkeypatch.setattr(needs, "_activations", lambda *_: (1e12, 0.0))
    held = needs.parts(strategy, ranks, GPT(width=WIDTH, layers=LAYERS), WINDOWS)
    assert sum(held.values()) - 1e12 == pytest.approx(4 * numbers, rel=0.02)  # embeddings and norms


def test_activations_grow_with_the_batch_and_no_stage_of_zero_shards_them():
    model = GPT(width=WIDTH, layers=LAYERS)
    for name in ("ddp", "zero1", "zero2", "zero3"):
        for batch in (8, 16):
            kept = needs.parts(NAMES[name], 2, model, batch)["activations"]
            assert kept == pytest.approx(64 * LAYERS * WIDTH * 128 * batch / 2, rel=0.03)


def test_each_strategy_has_a_need_and_advice():
    model = GPT(width=WIDTH, layers=LAYERS)
    for name, strategy in NAMES.items():
        assert min(needs.parts(strategy, 2, model, WINDOWS).values()) >= 0
        assert needs.advice(name)


def gpt(width):
    malloc.keep(False)
    return GPT(width=width, layers=LAYERS)


def trained(client, strategy, width=WIDTH, **settings):
    return hpclab.train(
        client,
        functools.partial(gpt, width),
        "kjv",
        ranks=2,
        oversubscribe=True,
        progress=False,
        optimizer=torch.optim.AdamW,
        strategy=strategy,
        **{"steps": 3, "batch_size": WINDOWS // 2} | settings,
    ).result()


@pytest.mark.skipif(malloc.missing(), reason="another C library keeps what was freed")
def test_the_formula_is_what_ranks_hold(client, record_property):
    def peak_mb(*arguments):
        rows = [row for row in trained(client, *arguments).rows if row["kind"] == "step"]
        assert all(row["peak_mb"] >= 0 for row in rows)
        return max(row["peak_mb"] for row in rows)

    fixed = peak_mb("ddp", 16)
    for name in ("ddp", "zero3", "1f1b"):
        measured = peak_mb(name) - fixed
        expected = sum(needs.parts(NAMES[name], 2, GPT(width=WIDTH, layers=LAYERS), WINDOWS).values()) / 1e6
        record_property("measured", f"{name}: peak {measured:.0f} MB, by formula {expected:.0f} MB")
        assert measured == pytest.approx(expected, rel=0.25)


def test_spans_of_a_pipeline_are_its_micro_batches(client):
    """On the last stage, 1F1B goes back after each forward pass, GPipe after all."""
    orders = {}
    for schedule in ("gpipe", "1f1b"):
        strategy = strategies.Pipeline(micro_batches=4, schedule=schedule)
        rows = timeline.spans(trained(client, strategy, 32, steps=7, trace=2).folder)
        passes = [row for row in rows if row["name"] in ("forward", "backward")]
        assert len(passes) == 2 * 2 * 2 * 4  # ranks, traced steps, directions, micro-batches
        last = sorted((row for row in passes if row["rank"] == 1), key=lambda row: row["start_s"])
        orders[schedule] = "".join(row["name"][0] for row in last)
        assert 0 < pipelines.bubble(rows) < 1
    assert orders == {"gpipe": "ffffbbbb" * 2, "1f1b": "fb" * 8}


def test_a_bubble_is_what_its_schedule_leaves():
    """Three stages and four micro-batches of one length, forward and backward: 2 of 6 slots are empty each way."""
    rows = [
        {"kind": "span", "rank": rank, "name": name, "start_s": float(start), "duration_s": 1.0}
        for rank in range(3)
        for part in range(4)
        for name, start in (("forward", rank + part), ("backward", 6 + 2 - rank + part))
    ]
    later = [row | {"start_s": row["start_s"] + 20} for row in rows]
    ends = [
        {"kind": "span", "rank": rank, "name": "optimizer", "start_s": 13.0, "duration_s": 1.0} for rank in range(3)
    ]
    assert pipelines.bubble(rows) == pytest.approx(1 / 3)
    assert pipelines.bubble([*rows, *ends, *later]) == pytest.approx(1 / 3)
