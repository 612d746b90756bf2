"""Figures of ideas say what they draw, and what they draw is right."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from hpclab.course import diagrams


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_a_tree_sums_up_on_one_rank_and_hands_the_sum_to_all(ranks):
    held = {rank: {rank} for rank in range(ranks)}
    steps = diagrams.tree(ranks)
    for number, step in enumerate(steps):
        assert len({rank for message in step for rank in message}) == 2 * len(step), "a rank takes part in one message"
        for source, to in step:
            held[to] = held[source] if number >= len(steps) / 2 else held[to] | held[source]
    assert all(numbers == {*range(ranks)} for numbers in held.values())
    assert len(steps) == 2 * np.log2(ranks)


def test_the_picture_says_how_many_messages_there_are():
    diagrams.collectives(8)
    words = plt.gcf().words()
    assert words == "ring: 14 messages in turn, each 1/8 of the bytes; tree: 6 messages in turn, each all of the bytes"


def test_curves_are_told_in_words():
    ax = diagrams.speedups([1, 2, 4], {"no losses": [1, 2, 4], "USL": [1, 1.5, 1.2]})
    words = ax.figure.words()
    assert "no losses: 1 at 1, 4 at 4" in words and "USL: 1 at 1, 1.5 at 2, 1.2 at 4" in words
    assert "(by formula)" in words
