"""Talks of different lengths: counted by hand, and followed by two ranks."""

import numpy as np
import pytest
import torch

import hpclab
from hpclab import data
from hpclab.course import ragged


def test_a_talk_is_its_speakers_recordings_joined():
    recordings, talks = data.load("japanese_vowels"), ragged.Talks(count=40)
    known = {recordings[number][0][0].tobytes(): recordings[number] for number in range(len(recordings))}
    for frames, label in zip(talks.frames, talks.labels, strict=True):
        rest, joined = frames, 0
        while len(rest):
            recording, speaker = known[rest[0].tobytes()]
            assert speaker == label
            assert np.array_equal(rest[: len(recording)], recording)
            rest, joined = rest[len(recording) :], joined + 1
        assert 1 <= joined <= ragged.MOST_JOINED
    assert all(map(np.array_equal, talks.frames, ragged.Talks(count=40).frames))


def test_a_batch_is_padded_with_zeros():
    talks = ragged.Talks(count=5)
    frames, lengths, labels = talks.batch([3, 1])
    assert lengths.tolist() == talks.lengths[[3, 1]].tolist() and labels.tolist() == talks.labels[[3, 1]].tolist()
    assert frames.shape == (2, max(lengths), 12)
    for row, number in enumerate((3, 1)):
        assert torch.equal(frames[row, : lengths[row]], torch.from_numpy(talks.frames[number]))
        assert not frames[row, lengths[row] :].any()


def test_padding_and_waiting_are_counted():
    lengths = np.array([4, 2, 3, 1, 6])
    plan = [[[0, 1], [2]], [[3], [4]]]  # frames: 6 and 1, then 3 and 6; padded to 8, 1, 3 and 6
    assert ragged.padding(lengths, plan) == pytest.approx(2 / 18)
    assert ragged.idle(lengths, plan) == pytest.approx(1 - 8 / 12)


def test_waits_are_for_the_longest_of_the_same_step():
    times = {(0, 0): 9.0, (0, 1): 9.0, (1, 0): 1.0, (1, 1): 3.0, (2, 0): 4.0, (2, 1): 2.0}
    rows = [
        {"kind": "step", "case": "a", "step": step, "epoch": int(step > 0), "rank": rank, "source": "measured"}
        | {"compute_s": seconds, "barrier_s": 0.5}
        for (step, rank), seconds in times.items()
    ]
    assert [(row["rank"], row["compute_s"], row["wait_s"]) for row in ragged.waits(rows)] == [(0, 2.5, 1), (1, 2.5, 1)]


def test_ranks_that_follow_a_plan_take_the_steps_of_one_process(client):
    """They have 3 talks and 1, in turns: the losses are one process's only if each talk weighs the same."""
    shared, alone = [[[0, 1, 2], [4]], [[3], [5, 6, 7]]], [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    losses = []
    for plan in (shared, alone):
        run = hpclab.launch(client, ragged.follow, {"one": [plan] * 3}, ranks=len(plan), oversubscribe=True)
        run.result(120)
        means = np.zeros(6)
        for row in run.rows:
            if row["kind"] == "step":
                means[row["step"]] += row["loss"] * row["samples"] / 4
        losses.append(means)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [row["case"] for row in run.rows if row["kind"] == "epoch"] == ["one"]
