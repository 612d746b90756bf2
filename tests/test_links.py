"""How far training has come, against losses and seconds written down here."""

import pytest

from hpclab.course import links


def steps(losses, seconds):
    return [
        {"kind": "step", "step": step, "rank": rank, "loss": loss + rank, "step_s": seconds * (1 + rank)}
        | {"source": "emulated"}
        for step, loss in enumerate(losses)
        for rank in (0, 1)
    ]


def test_progress_counts_the_slower_rank_and_smooths_the_loss(monkeypatch):
    monkeypatch.setattr(links, "SMOOTH", 2)
    rows = links.progress(steps([4.0, 2.0, 1.0], 0.5), "ddp", "near", step_bytes=2e6)
    assert [(row["step"], row["sent_mb"], row["seconds"], row["loss"]) for row in rows] == [
        (2, 4, 2, 3.5),
        (3, 6, 3, 2),
    ]
    assert {row["source"] for row in rows} == {"emulated"}
    rows = links.progress(steps([4.0, 2.0, 1.0], 0.5), "powersgd", "near", 2e6, first_bytes=[5e6, 4e6])
    assert [row["sent_mb"] for row in rows] == [9, 11]


def test_the_common_loss_is_the_lowest_that_all_reach():
    runs = [[{"loss": loss} for loss in losses] for losses in ((3, 1), (4, 2, 2.5))]
    assert links.common_loss(runs) == 2
    assert links.reached(runs[1], 2) == {"loss": 2}
    assert links.reached(runs[1], 1.5) is None


def test_rows_without_steps_are_refused():
    with pytest.raises(ValueError, match="step"):
        links.progress([], "ddp", "near", 1.0)
