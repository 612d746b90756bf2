"""Exercise checks: solutions pass, stubs aren't answered yet, each misconception has its message."""

import functools
import os
import random
import re

import pytest
import torch

import hpclab
from hpclab import exercises, laws, machine
from hpclab.exercises import check

FUNCTIONS = [
    *("cnn.order", "cnn.learning_rate", "scaling.curves", "faults.interval"),
    *("ddp-from-scratch.reduce_scatter", "ddp-from-scratch.step"),
]
EXERCISES = ["start.gang", "faults.state", *FUNCTIONS]


def test_every_exercise_is_known_here():
    """A new exercise is added to this list, and so to the tests of stubs below."""
    assert sorted(exercises._CHECKS) == sorted(EXERCISES)


def test_an_unknown_exercise_is_answered_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"exercise_id \(='start.gong'\).*cnn.order, .*scaling.curves, start.gang"):
        check("start.gong", 1)


@pytest.mark.parametrize("exercise_id", EXERCISES)
@pytest.mark.parametrize("stub", [..., None])
def test_a_stub_is_not_answered_yet(exercise_id, stub):
    result = check(exercise_id, stub)
    assert (result.status, result.message) == ("fail", "Not answered yet.")


@pytest.mark.parametrize("exercise_id", FUNCTIONS)
def test_a_function_that_is_a_stub_is_not_answered_yet(exercise_id):
    def stub(*arguments): ...

    assert check(exercise_id, stub).message == "Not answered yet."
    assert check(exercise_id, lambda *arguments: ...).message == "Not answered yet."


@pytest.mark.parametrize("exercise_id", FUNCTIONS)
def test_a_broken_function_is_a_fail_that_says_why(exercise_id):
    assert (
        check(exercise_id, lambda *arguments: 1 / 0).message
        == "Your function raised ZeroDivisionError: division by zero"
    )
    assert "takes 0 positional arguments" in check(exercise_id, lambda: 1).message
    assert check(exercise_id, 3).message == "The answer is a function, not 3."
    assert re.search("not ('a'|this str)", check(exercise_id, lambda *arguments: "a").message)


def test_under_nbgrader_only_a_pass_returns(monkeypatch):
    monkeypatch.setattr(machine, "fits", lambda: 2)
    monkeypatch.setenv("NBGRADER_EXECUTION", "validate")
    assert check("start.gang", 2)
    with pytest.raises(AssertionError, match="isn't the largest"):
        check("start.gang", 1)
    with pytest.raises(AssertionError, match="Not answered yet"):
        check("start.gang", ...)


def test_a_result_shows_its_status_to_eyes_screen_readers_and_machines():
    shown = exercises.failed("1 < 2")._repr_html_()
    assert 'data-status="fail"' in shown and "1 &lt; 2" in shown
    assert 'aria-hidden="true"' in shown and "<strong>fail</strong>" in shown
    assert repr(exercises.passed("Yes.")) == "✓ pass: Yes."
    assert [bool(make("")) for make in (exercises.passed, exercises.failed, exercises.inconclusive)] == [
        True,
        False,
        False,
    ]


def test_messages_are_in_the_readers_language(monkeypatch):
    monkeypatch.setenv("HPCLAB_LANG", "zh")
    assert check("start.gang", ...).message == "尚未作答。"


@pytest.fixture
def shared_host(monkeypatch):
    """16 CPUs in the host, 6 for us, memory for 4 ranks."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(machine, "cpus", lambda: 6)
    monkeypatch.setattr(machine, "fits", lambda: 4)


def test_gang_passes_with_the_number_that_fits_here():
    assert check("start.gang", machine.fits())
    assert hpclab.check("start.gang", machine.fits())


def test_gang_names_each_misconception(shared_host):
    messages = {answer: check("start.gang", answer).message for answer in (4, 16, 6, 5, 3, 0)}
    assert len(set(messages.values())) == 6
    assert "host's CPU count" in messages[16]
    assert "memory" in messages[6]
    assert "Too large" in messages[5]
    assert "isn't the largest" in messages[3]
    assert not any(str(number) in message for number, message in messages.items())  # no message gives a number away


@pytest.mark.parametrize("answer", [True, 4.0, "4", [4], len])
def test_gang_is_an_int(shared_host, answer):
    assert "whole number of ranks" in check("start.gang", answer).message


def order_solution(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def told_too_late(sampler, epoch):
    indices = list(sampler)
    sampler.set_epoch(epoch)
    return indices


def seed_by_rank(sampler, epoch):
    sampler.seed = 100 * sampler.rank
    return order_solution(sampler, epoch)


def own_dice(sampler, epoch):
    return random.sample(list(sampler), len(sampler))


def counter(sampler, epoch):
    return order_solution(sampler, sampler.epoch + 1)


def own_shard(sampler, epoch):
    return random.Random(epoch).sample(list(sampler), len(sampler))


def half(sampler, epoch):
    return order_solution(sampler, epoch)[::2]


def test_order_passes_with_the_solution():
    assert check("cnn.order", order_solution)
    assert check("cnn.order", lambda sampler, epoch: order_solution(sampler, epoch + 7))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda sampler, epoch: list(sampler), "same order"),
        (told_too_late, "same order"),
        (seed_by_rank, "visited twice"),
        (own_dice, "gave two orders"),
        (counter, "gave two orders"),
        (own_shard, "keeps its images"),
        (half, "don't visit every image"),
        (lambda sampler, epoch: [[1, 2]], "list of indices"),
        (lambda sampler, epoch: len(sampler), "list of indices"),
    ],
)
def test_order_names_each_misconception(answer, message):
    result = check("cnn.order", answer)
    assert result.status == "fail" and message in result.message


def lr_solution(base_lr, base_batch, batch_size, ranks):
    return base_lr * batch_size * ranks / base_batch


def test_learning_rate_passes_with_the_solution():
    assert check("cnn.learning_rate", lr_solution)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda lr, base, batch, ranks: lr, "Unscaled"),
        (lambda lr, base, batch, ranks: lr * (batch * ranks / base) ** 0.5, "square root"),
        (lambda lr, base, batch, ranks: lr * base / (batch * ranks), "Divided"),
        (lambda lr, base, batch, ranks: lr * ranks, "ranks alone"),
        (lambda lr, base, batch, ranks: lr * batch / base, "one rank's batch"),
        (lambda lr, base, batch, ranks: lr * batch * ranks, "by the global batch"),
        (lambda lr, base, batch, ranks: lr * (batch // base) * ranks, "times as far"),
        (lambda lr, base, batch, ranks: -lr_solution(lr, base, batch, ranks), "-1 times as far"),
        (lambda lr, base, batch, ranks: float("nan"), "nan times as far"),
        (lambda lr, base, batch, ranks: [lr], "a learning rate (a float)"),
    ],
)
def test_learning_rate_names_each_misconception(answer, message):
    result = check("cnn.learning_rate", answer)
    assert result.status == "fail" and message in result.message


def curves_solution(n, x):
    verdict = laws.choose(n, x)
    return (verdict.law, verdict.fit.intervals["sigma"]) if verdict.identifiable else (None, None)


def best_of_all(n, x):
    found = min((laws.fit(law, n, x, "relative") for law in ("amdahl", "usl")), key=lambda one: one.aicc)
    return found.law, found.intervals["sigma"]


def unless_few(n, x):
    return best_of_all(n, x) if max(n) > 4 else (None, None)


def with_interval(width):
    def answer(n, x):
        law, interval = curves_solution(n, x)
        return (law, width(*interval)) if law else (None, None)

    return answer


def test_curves_passes_with_the_solution():
    assert check("scaling.curves", curves_solution)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (best_of_all, "a law from up to 4 workers"),
        (unless_few, "from data so noisy"),
        (lambda n, x: (None, None), "You found no law"),
        (lambda n, x: ("usl", None), "A larger law always fits"),
        (lambda n, x: ("amdahl", laws.fit_amdahl(n, x).intervals["sigma"]), "A tight interval is no evidence"),
        (with_interval(lambda low, high: (high, high + 0.01)), "misses the planted one"),
        (with_interval(lambda low, high: (0, 1)), "so wide that it says nothing"),
        (lambda n, x: (curves_solution(n, x)[0], None), "A law without an interval"),
        (with_interval(lambda low, high: {"low": low, "high": high}), "returns a pair"),
        (lambda n, x: ("Amdahl", (0, 1)), "'amdahl' or 'usl', or None where no law is told; not 'Amdahl'"),
        (lambda n, x: ("linear", (0, 1)), "Linear would be as many times as fast"),
        (lambda n, x: "amdahl", "returns a pair"),
        (lambda n, x: ("amdahl", 0.1), "returns a pair"),
    ],
)
def test_curves_names_each_misconception(answer, message):
    result = check("scaling.curves", answer)
    assert result.status == "fail" and message in result.message


def ring(first=1, add=True, steps=None, own=0, passes_on=True, everything=False):
    """A reduce-scatter by the number of the part that is sent first, and so on; as given here it is right."""

    def reduce_scatter(parts, shift, rank, ranks):
        kept = [part.clone() for part in parts]
        for step in range(ranks - 1 if steps is None else steps(rank, ranks)):
            send, come = (rank - step - first) % ranks, (rank - step - first - 1) % ranks
            arrived = shift(torch.stack(parts))[come] if everything else shift((parts if passes_on else kept)[send])
            parts[come] = parts[come] + arrived if add else arrived
        return parts[(rank + own) % ranks]

    return reduce_scatter


def swapped(parts, shift, rank, ranks):
    return ring()(parts[::-1], lambda part: shift(part), rank, ranks) + parts[rank]


def test_reduce_scatter_passes_with_the_solution():
    assert check("ddp-from-scratch.reduce_scatter", ring())
    assert check("ddp-from-scratch.reduce_scatter", lambda *given: ring()(*given).reshape(1, -1))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ring(add=False), "what arrived took its place"),
        (ring(first=0), "nothing was added to it"),
        (ring(first=0, own=1), "The sum is whole, but of another part"),
        (ring(passes_on=False), "Numbers of some ranks are missing"),
        (ring(steps=lambda rank, ranks: ranks), "has sent more parts than it needs to"),
        (ring(steps=lambda rank, ranks: 2 * ranks), "in the sum twice"),
        (ring(everything=True), "has sent more parts than it needs to"),
        (ring(steps=lambda rank, ranks: rank), "waits for a message that nobody sends"),
        (swapped, "Numbers of different parts are added"),
        (lambda *given: ring()(*given) / given[-1], "A sum is wanted here, and no average"),
        (lambda parts, shift, rank, ranks: parts, "not this list"),
    ],
)
def test_reduce_scatter_names_each_misconception(answer, message, monkeypatch):
    monkeypatch.setattr(exercises, "PATIENCE_SECONDS", 1.0)
    result = check("ddp-from-scratch.reduce_scatter", answer)
    assert result.status == "fail" and message in result.message


def test_a_step_passes_with_the_solution_and_by_averaging_what_was_stepped():
    assert check("ddp-from-scratch.step", lambda w, g, all_reduce, ranks, lr: w - lr * all_reduce(g) / ranks)
    assert check("ddp-from-scratch.step", lambda w, g, all_reduce, ranks, lr: w - all_reduce(lr * g / ranks))
    assert check("ddp-from-scratch.step", lambda w, g, all_reduce, ranks, lr: all_reduce(w - lr * g) / ranks)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w, g, all_reduce, ranks, lr: w - lr * all_reduce(g), "The gradients are summed"),
        (lambda w, g, all_reduce, ranks, lr: w - lr * g, "Each rank goes its own way"),
        (lambda w, g, all_reduce, ranks, lr: w - lr * all_reduce(g / ranks) / ranks, "Divided by the ranks twice"),
        (lambda w, g, all_reduce, ranks, lr: w + lr * all_reduce(g) / ranks, "Uphill"),
        (lambda w, g, all_reduce, ranks, lr: w - lr * all_reduce(g * g), "neither the ranks' gradients nor"),
        (lambda w, g, all_reduce, ranks, lr: all_reduce(w), "isn't the step of the whole batch"),
        (lambda w, g, all_reduce, ranks, lr: 3.0, "not this float"),
    ],
)
def test_a_step_names_each_misconception(answer, message):
    result = check("ddp-from-scratch.step", answer)
    assert result.status == "fail" and message in result.message


def young(save_s, mtbf, restart_s):
    return (2 * save_s * mtbf) ** 0.5


@pytest.mark.parametrize(
    ("interval", "status", "says"),
    [
        (young, "pass", "No other interval costs much less"),
        (lambda save_s, mtbf, restart_s: young(save_s, mtbf, 0) - save_s, "pass", "No other"),
        (lambda save_s, mtbf, restart_s: 10 * save_s, "fail", "fails less often gets the same"),
        (lambda save_s, mtbf, restart_s: mtbf / 10, "fail", "takes longer to write gets the same"),
        (lambda save_s, mtbf, restart_s: 600.0, "fail", "gets the same interval"),
        (lambda save_s, mtbf, restart_s: young(save_s, mtbf, 0) / 3, "fail", "You write too often"),
        (lambda save_s, mtbf, restart_s: 3 * young(save_s, mtbf, 0), "fail", "You write too seldom"),
        (lambda save_s, mtbf, restart_s: save_s * mtbf, "fail", "You write too"),
        (lambda save_s, mtbf, restart_s: 10**400, "fail", "a number above 0"),
        (lambda save_s, mtbf, restart_s: -1, "fail", "a number above 0, not -1"),
        (lambda save_s, mtbf, restart_s: [1, 2], "fail", r"not \[1, 2\]"),
    ],
)
def test_checkpoint_intervals(interval, status, says):
    result = check("faults.interval", interval)
    assert result.status == status
    assert re.search(says, result.message), result.message


def pack(model, optimizer, schedule, step, leave_out=()):
    found = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "step": step,
        "random": torch.get_rng_state(),
    }
    return {name: value for name, value in found.items() if name not in leave_out}


def unpack(state, model, optimizer, schedule):
    for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
        if name in state:
            part.load_state_dict(state[name])
    if "random" in state:
        torch.set_rng_state(state["random"])
    return state.get("step", 0)


@pytest.mark.parametrize(
    ("left_out", "says"),
    [
        ("", "not a bit differs"),
        ("step", "goes on at step 0"),
        ("model", "weights aren't"),
        ("optimizer", "momentum"),
        ("schedule", "learning rate"),
        ("random", "Dropout draws"),
    ],
)
def test_what_a_checkpoint_holds(left_out, says):
    result = check("faults.state", (functools.partial(pack, leave_out=[left_out]), unpack))
    assert (result.status, says in result.message) == ("pass" if not left_out else "fail", True), result.message


def test_what_can_not_be_written_is_no_checkpoint():
    assert "can't be written and read again" in check("faults.state", (lambda *parts: {"m": parts[0]}, unpack)).message
    assert "pair of functions" in check("faults.state", pack).message
    assert check("faults.state", (lambda *parts: ..., unpack)).message == "Not answered yet."
    for step in (5.0, torch.tensor([5, 5]), "5"):
        assert "a whole number, not" in check("faults.state", (pack, lambda *parts, step=step: step)).message
    assert "raised KeyError" in check("faults.state", (pack, lambda state, *parts: state["none"])).message
