"""How models are spread over GPUs."""

import pytest

from hpclab.forecast import Layout, Transformer

MODEL = Transformer(16, 2048, 32, 8192, 131_072, 4096)


def test_bubble_by_drawing_it():
    """Forward passes alone, each a tick: what a stage idles while the others fill and drain."""
    for stages, micro_batches in ((2, 1), (4, 8), (8, 3)):
        begins = {(s, m): s + m for s in range(stages) for m in range(micro_batches)}
        ticks = max(begins.values()) + 1
        layout = Layout(pp=stages, accumulation=micro_batches)
        assert layout.bubble == pytest.approx((ticks - micro_batches) / micro_batches)
    assert Layout(pp=4, accumulation=8, interleave=3).bubble == pytest.approx(3 / 24)
    assert Layout(accumulation=8).bubble == 0


def test_in_flight_by_running_the_schedule():
    """1F1B: a stage goes forward as often as there are stages behind it, then alternates."""
    for stages, micro_batches in ((2, 1), (4, 8), (4, 2)):
        for stage, expected in enumerate(Layout(pp=stages, accumulation=micro_batches).in_flight()):
            forward, backward, most = 0, 0, 0
            while backward < micro_batches:
                warm = forward - backward < stages - stage and forward < micro_batches
                forward, backward = forward + warm, backward + (not warm)
                most = max(most, forward - backward)
            assert most == expected
    assert Layout(pp=4, accumulation=8, interleave=2).in_flight()[0] == pytest.approx(4 * (1 + 3 / 8))


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
def test_the_split_keeps_all_blocks_and_is_even(pp):
    """The heaviest stage has at most a block more than its share, the output layer weighing four blocks here."""
    blocks = Layout(pp=pp).blocks(MODEL)
    assert blocks.sum() == 16 and len(blocks) == pp
    assert blocks.max() <= (16 + 4) / pp + 1
    assert MODEL.embedding_parameters == 4 * MODEL.block_weights


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Layout(dp=0), r"dp \(=0\) must be at least 1"),
        (lambda: Layout(zero=4), r"zero \(=4\) must be one of 0, 1, 2, 3"),
        (lambda: Layout(recompute="some"), r"recompute \(='some'\) must be one of None, 'selective', 'full'"),
        (lambda: Layout(zero=2, pp=2), r"zero \(=2\) doesn't go with a pipeline \(pp=2\); use zero=1 or pp=1"),
        (lambda: Layout(interleave=2), r"interleave \(=2\) needs a pipeline whose pp \(=1\)"),
        (lambda: Layout(pp=4, interleave=2, accumulation=6), r"divides accumulation \(=6\); use interleave=1"),
        (lambda: Layout(tp=3).check(MODEL), r"tp \(=3\) must divide heads \(=32\)"),
        (lambda: Layout(pp=32).check(MODEL), r"pp \(=32\) times interleave \(=1\) is too much for 16 layers"),
        (lambda: Layout(pp=16).check(MODEL), "4 stages would have none"),
        (lambda: Layout(pp=8, interleave=4, accumulation=8).check(MODEL), r"interleave \(=4\) is too much"),
    ],
)
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
