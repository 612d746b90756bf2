"""Exercise checks: solutions pass, stubs aren't answered yet, each misconception has its message."""

import functools
import importlib
import itertools
import os
import random
import re
import shutil
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import dask
import numpy as np
import pytest
import torch
from distributed import Security

import hpclab
from hpclab import data, laws, machine, roofline, scaling, slurm
from hpclab.course import bottlenecks, checks, verdicts
from hpclab.course.check import check
from hpclab.course.checks import dask as dask_checks
from hpclab.course.checks import ddp_from_scratch, one_process

FUNCTIONS = [
    *("cnn.order", "cnn.learning_rate", "scaling.curves", "faults.interval", "rnn.plan", "autoencoder.top_k"),
    *("ddp-from-scratch.reduce_scatter", "ddp-from-scratch.step", "dask.chunk", "dask.bytes", "security.masks"),
    "start.gang",
    "too-big.cheapest",
    "one-process.bottleneck",
    "capstone.score",
    *(f"puzzles.{name}" for name in ("ring", "broadcast", "overlap", "pipeline", "optimizer", "all_to_all")),
    *("debugging.division", "debugging.collective", "debugging.last_batch"),
    *("debugging.batchnorm", "debugging.seed", "debugging.checkpoint"),
]
QUIZZES = {
    "start.quiz_race": {"a", "b"},
    "start.quiz_allreduce": 40,
    "one-process.quiz_roofline": "abf",
    "one-process.quiz_split": 100 / 65,
    "ddp-from-scratch.quiz_deadlock": [3, 7, 10, 12],
    "ddp-from-scratch.quiz_line": (180, 550),
    "cnn.quiz_interval": ["a", "c", "f"],
    "cnn.quiz_batch": (400, 0.5),
    "scaling.quiz_timeline": {"a", "c", "d"},
    "scaling.quiz_regime": {"a", "b", "c"},
    "dask.quiz_tasks": (73, 80),
    "dask.quiz_lazy": 9,
    "queues.quiz_gantt": {"a", "c", "d"},
    "queues.quiz_array": (5, 30),
    "rnn.quiz_waits": {"a", "c", "d"},
    "rnn.quiz_mean": (2, 1.5, 1.5),
    "autoencoder.quiz_links": {"a", "c", "e"},
    "autoencoder.quiz_bytes": (60, 2.4, 50.4),
    "too-big.quiz_bubble": {"a", "b", "c"},
    "too-big.quiz_memory": (212, 44),
    "faults.quiz_recovery": (15, 3),
    "faults.quiz_mtbf": 13.5,
    "security.quiz_modes": {"a", "d"},
    "security.quiz_mask": (34, 100),
    "capstone.quiz_score": {"a", "c", "f"},
    "capstone.quiz_ranks": (8, 15),
}
EXERCISES = ["faults.state", "security.harden", "queues.array", "queues.backfill", *QUIZZES, *FUNCTIONS]


def test_every_exercise_is_known_here():
    """A new exercise is added to this list, and so to the tests of stubs below."""
    assert checks.ids() == sorted(EXERCISES)


def test_an_unknown_exercise_is_answered_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"exercise_id \(='start.gong'\).*cnn.order, .*scaling.curves, .*, start.gang"):
        check("start.gong", 1)


@pytest.mark.parametrize("slug", ["start", "ddp-from-scratch", "security"])
def test_a_check_imports_its_notebooks_file_and_no_other(slug):
    code = f"""
import sys, hpclab.exercises
files = lambda: sorted(name.rpartition(".")[2] for name in sys.modules if name.startswith("hpclab.course.checks."))
assert files() == []
exercise = next(name for name in {EXERCISES!r} if name.startswith({slug!r}))
assert hpclab.exercises.check(exercise, ...).message == "Not answered yet."
from hpclab.course.verdicts import CHECKS
print(*files(), *{{name.partition(".")[0] for name in CHECKS}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [slug.replace("-", "_"), slug]


@pytest.mark.parametrize("slug", ["os", "..os", "../planted", "planted", "__init__", "ddp_from_scratch", "", "start/"])
def test_an_exercise_id_imports_nothing_that_is_no_notebooks_file(slug, tmp_path, monkeypatch):
    """Neither what lies beside a notebook, nor what its id leads to."""
    (tmp_path / "planted.py").write_text("open('imported', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"isn't an exercise; use one of autoencoder.quiz_bytes, autoencoder.quiz_links, "
    ):
        check(f"{slug}.step", 1)
    assert not (tmp_path / "imported").exists()
    assert not {"hpclab.course.checks.planted", "hpclab.course.checks.os"} & sys.modules.keys()


def test_each_file_of_checks_has_the_exercises_of_its_own_notebook():
    notebooks = {path.stem.partition("_")[2] for path in (data.share() / "notebooks").glob("*.ipynb")}
    files = {path.stem for path in Path(checks.__file__).parent.glob("[a-z]*.py")}
    assert files and files <= notebooks
    for exercise_id in EXERCISES:
        assert checks.find(exercise_id)
        module = importlib.import_module(f"hpclab.course.checks.{exercise_id.partition('.')[0].replace('-', '_')}")
        assert f'("{exercise_id}"' in Path(module.__file__).read_text("utf-8")


def concluded(exercise_id, answer, times=8):
    """The verdict of a check that measures: where the machine has other things to do it may take another try."""
    for _ in range(times):
        result = check(exercise_id, answer)
        if result.status != "inconclusive":
            break
    return result


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
    assert check(exercise_id, 3).message == "The answer must be a function, not 3."
    assert re.search("not ('a'|this str)", check(exercise_id, lambda *arguments: "a").message)


def test_under_nbgrader_only_a_pass_returns(monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "validate")
    assert check("start.gang", largest_gang)
    with pytest.raises(AssertionError, match="isn't the largest"):
        check("start.gang", lambda cpus, memory: max(0, largest_gang(cpus, memory) - 1))
    with pytest.raises(AssertionError, match="Not answered yet"):
        check("start.gang", ...)


def test_a_result_shows_its_status_to_eyes_screen_readers_and_machines():
    shown = verdicts.failed("1 < 2")._repr_html_()
    assert 'data-status="fail"' in shown and "1 &lt; 2" in shown
    assert 'aria-hidden="true"' in shown and "<strong>fail</strong>" in shown
    assert repr(verdicts.passed("Yes.")) == "✓ pass: Yes."
    assert [bool(make("")) for make in (verdicts.passed, verdicts.failed, verdicts.inconclusive)] == [
        True,
        False,
        False,
    ]


def test_messages_are_in_the_readers_language(monkeypatch):
    monkeypatch.setenv("HPCLAB_LANG", "zh")
    assert check("start.gang", ...).message == "尚未作答。"


def largest_gang(cpus, memory):
    return max(0, min(cpus, by_memory(memory)))


def by_memory(memory, base=machine.BASE_MEMORY):
    return (memory - base) // machine.RANK_MEMORY


def test_gang_passes_with_the_solution():
    assert check("start.gang", largest_gang)
    assert hpclab.check("start.gang", lambda cpus, memory: np.int64(largest_gang(cpus, memory)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda cpus, memory: machine.fits(), "the same answer for every machine"),
        (lambda cpus, memory: machine.cpus(), "the same answer for every machine"),
        (lambda cpus, memory: os.cpu_count(), "the same answer for every machine"),
        (lambda cpus, memory: max(2, machine.fits()), "the same answer for every machine"),
        (lambda cpus, memory: cpus, "but not enough memory"),
        (lambda cpus, memory: by_memory(memory), "no CPU of their own"),
        (lambda cpus, memory: max(cpus, by_memory(memory)), "the looser one"),
        (lambda cpus, memory: min(cpus, by_memory(memory, 0)), "the notebook and the scheduler"),
        (lambda cpus, memory: min(cpus, by_memory(memory) + 1), "Rounded up"),
        (lambda cpus, memory: max(1, min(cpus, by_memory(memory))), "for even one"),
        (lambda cpus, memory: min(cpus, by_memory(memory)), "the answer is 0, and not below"),
        (lambda cpus, memory: max(0, largest_gang(cpus, memory) - 1), "isn't the largest"),
        (lambda cpus, memory: largest_gang(cpus, memory) + cpus, "is too large"),
        (lambda cpus, memory: True, "whole number of ranks"),
        (lambda cpus, memory: float(largest_gang(cpus, memory)), "whole number of ranks"),
        (lambda cpus, memory: [4], "whole number of ranks"),
    ],
)
def test_gang_names_each_misconception(answer, message):
    result = check("start.gang", answer)
    assert result.status == "fail" and message.lower() in result.message.lower(), result


def order_solution(length, rank, ranks, seed, epoch, pad=True, shuffle=None):
    order = (shuffle or random.Random(f"{seed} {epoch}")).sample(range(length), length)
    order += order[: -length % ranks] if pad else []
    return order[rank::ranks]


def sampled(length, rank, ranks, seed, epoch, told=True):
    sampler = torch.utils.data.DistributedSampler(range(length), ranks, rank, seed=seed)
    if told:
        sampler.set_epoch(epoch)
    return list(sampler)


def own_dice(length, rank, ranks, seed, epoch):
    return order_solution(length, rank, ranks, seed, epoch, shuffle=random.Random(f"{seed} {epoch} {rank}"))


def own_shard(length, rank, ranks, seed, epoch):
    own = (list(range(length)) * 2)[rank : length + -length % ranks : ranks]
    return random.Random(f"{seed} {epoch}").sample(own, len(own))


def rolled(length, rank, ranks, seed, epoch):
    order = [(place + 7 * epoch + seed) % length for place in range(length + -length % ranks)]
    return order[rank::ranks]


def dropped(length, rank, ranks, seed, epoch):
    return order_solution(length, rank, ranks, seed, epoch, pad=False)[: length // ranks]


def test_order_passes_with_the_solution_and_with_torchs_own_sampler():
    assert check("cnn.order", order_solution)
    assert check("cnn.order", sampled)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda length, rank, ranks, seed, epoch: torch.randperm(length).tolist(), "gave two orders"),
        (lambda length, rank, ranks, seed, epoch: sampled(length, rank, ranks, seed, epoch, False), "same order"),
        (lambda length, rank, ranks, seed, epoch: list(range(length))[rank::ranks], "same order"),
        (lambda length, rank, ranks, seed, epoch: order_solution(length, rank, ranks, 0, epoch), "Two seeds"),
        (lambda length, rank, ranks, seed, epoch: order_solution(length, 0, 1, seed, epoch), "visited twice"),
        (own_dice, "visited twice"),
        (own_shard, "keeps the same images"),
        (rolled, "Nothing is shuffled"),
        (dropped, "don't visit every image"),
        (lambda *given: order_solution(*given)[::2], "don't visit every image"),
        (lambda *given: order_solution(*given, pad=False), "and wait in vain"),
        (lambda *given: [[1, 2]], "list of indices"),
        (lambda *given: len(given), "list of indices"),
    ],
)
def test_order_names_each_misconception(answer, message):
    result = check("cnn.order", answer)
    assert result.status == "fail" and message in result.message, result


def lr_solution(base_lr, base_batch, batch_size, ranks):
    return base_lr * batch_size * ranks / base_batch


def test_learning_rate_passes_with_the_solution():
    assert check("cnn.learning_rate", lr_solution)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda lr, base, batch, ranks: lr, "Unscaled"),
        (lambda lr, base, batch, ranks: lr * (batch * ranks / base) ** 0.5, "square root"),
        (lambda lr, base, batch, ranks: lr * base / (batch * ranks), "divided where you should multiply"),
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


def points(rows, emulated=False, pooled=False):
    """Counts and throughputs of the runs that count; or of all rows."""
    runs = {}
    for row in rows:
        if emulated or row["source"] == "measured":
            runs.setdefault((row["ranks"], row["run"], row["epoch"] if pooled else 0), []).append(row["samples_per_s"])
    return [key[0] for key in runs], [np.mean(rates) for rates in runs.values()]


def curves_solution(rows, weak=False, **which):
    if not weak and scaling.regime(rows) == "weak":
        return None, None
    verdict = laws.choose(*points(rows, **which))
    return (verdict.law, verdict.fit.intervals["sigma"]) if verdict.identifiable else (None, None)


def best_of_all(rows):
    if scaling.regime(rows) == "weak":
        return None, None
    found = min((laws.fit(law, *points(rows), "relative") for law in ("amdahl", "usl")), key=lambda one: one.aicc)
    return found.law, found.intervals["sigma"]


def unless_few(rows):
    return best_of_all(rows) if len(set(points(rows)[0])) > 3 else (None, None)


def copied(rows):
    """The line of the notebook."""
    n, x = [row["ranks"] for row in rows], [row["samples_per_s"] for row in rows]
    verdict = laws.choose(n, x)
    return verdict.law, verdict.fit.intervals["sigma"] if verdict.identifiable else None


def with_interval(width):
    def answer(rows):
        law, interval = curves_solution(rows)
        return (law, width(*interval)) if law else (None, None)

    return answer


def with_law(rename):
    def answer(rows):
        law, interval = curves_solution(rows)
        return rename(law), interval

    return answer


def test_curves_passes_with_the_solution_and_shows_those_that_miss():
    result = check("scaling.curves", curves_solution)
    assert result and re.search("3[3-9] of (39|40) intervals contain the true value", result.message), result


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (copied, "a law from weak scaling"),
        (lambda rows: (scaling.verdict(rows).law, None) if scaling.regime(rows) == "strong" else (None, None), "emul"),
        (functools.partial(curves_solution, weak=True), "a law from weak scaling"),
        (functools.partial(curves_solution, emulated=True), "a law from emulated rows"),
        (functools.partial(curves_solution, pooled=True), "fast or slow together"),
        (best_of_all, "a law from at most 4 workers"),
        (unless_few, "from data so noisy"),
        (lambda rows: (None, None), "You named no law"),
        (with_law(lambda law: law and "usl"), "A law with more parameters always fits"),
        (with_law(lambda law: law and "amdahl"), "A tight interval is no evidence"),
        (with_interval(lambda low, high: (high, high + 0.01)), "fast or slow together"),
        (with_interval(lambda low, high: (0, 1)), "so wide that they say nothing"),
        (with_interval(lambda low, high: None), "without an interval for its sigma"),
        (with_interval(lambda low, high: {"low": low, "high": high}), "must return a pair"),
        (lambda rows: ("Amdahl", (0, 1)), "'amdahl' or 'usl', or None where no law can be identified; not 'Amdahl'"),
        (lambda rows: ("linear", (0, 1)), "Linear would mean a speed-up"),
        (lambda rows: "amdahl", "must return a pair"),
        (lambda rows: ("amdahl", 0.1), "must return a pair"),
    ],
)
def test_curves_names_each_misconception(answer, message):
    result = check("scaling.curves", answer)
    assert result.status == "fail" and message in result.message, result


def winkler(low, high, value, level):
    return high - low + 2 / (1 - level) * max(low - value, 0, value - high)


def test_a_score_passes_with_the_solution():
    assert check("capstone.score", winkler)
    assert check("capstone.score", lambda low, high, value, level: np.float32(winkler(low, high, value, level)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda low, high, value, level: high - low, "A miss costs nothing"),
        (lambda low, high, value, level: winkler(low, high, value, level) - (high - low), "Width costs nothing"),
        (lambda low, high, value, level: float(not low <= value <= high), "Width costs nothing"),
        (lambda low, high, value, level: high - low + 20 * (not low <= value <= high), "A far miss costs no more"),
        (lambda low, high, value, level: high - low + 2 / (1 - level) * max(low - value, 0), "a miss on one side only"),
        (
            lambda low, high, value, level: high - low + 2 / (1 - level) * max(value - high, 0),
            "a miss on one side only",
        ),
        (
            lambda low, high, value, level: high - low + 20 * max(low - value, 0, value - high),
            "costs the same whether you claim 50 %",
        ),
        (lambda low, high, value, level: winkler(low, high, value, 1 - level), "The more you claim, the less"),
        (lambda low, high, value, level: winkler(low, high, value, (1 + level) / 2), "Too expensive"),
        (lambda low, high, value, level: winkler(low, high, value, 2 * level - 1), "Too cheap"),
        (lambda low, high, value, level: -winkler(low, high, value, level), "Lower is better"),
        (lambda low, high, value, level: high - low + abs(value - (low + high) / 2), "that contains the value"),
        (
            lambda low, high, value, level: (high - low) / 2 + winkler(low, high, value, level),
            "that contains the value",
        ),
        (lambda low, high, value, level: [1.0], "a number"),
        (lambda low, high, value, level: float("nan"), "a number"),
    ],
)
def test_a_score_names_each_misconception(answer, message):
    result = check("capstone.score", answer)
    assert result.status == "fail" and message in result.message, result


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
        (ring(first=0, own=1), "The sum is complete, but it isn't that of the rank's own part"),
        (ring(passes_on=False), "Some ranks' numbers are missing"),
        (ring(steps=lambda rank, ranks: ranks), "has sent more parts than it needs to"),
        (ring(steps=lambda rank, ranks: 2 * ranks), "in the sum twice"),
        (ring(everything=True), "has sent more parts than it needs to"),
        (ring(steps=lambda rank, ranks: rank), "waits for a message that nobody sends"),
        (swapped, "Numbers from different parts were added"),
        (lambda *given: ring()(*given) / given[-1], "This needs a sum, not an average"),
        (lambda parts, shift, rank, ranks: parts, "not this list"),
    ],
)
def test_reduce_scatter_names_each_misconception(answer, message, monkeypatch):
    monkeypatch.setattr(ddp_from_scratch, "PATIENCE_SECONDS", 1.0)
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
        (
            lambda w, g, all_reduce, ranks, lr: w - lr * all_reduce(g / ranks) / ranks,
            "Divided by the number of ranks twice",
        ),
        (lambda w, g, all_reduce, ranks, lr: w + lr * all_reduce(g) / ranks, "Uphill"),
        (lambda w, g, all_reduce, ranks, lr: w - lr * all_reduce(g * g), "neither the ranks' gradients nor"),
        (lambda w, g, all_reduce, ranks, lr: all_reduce(w), "isn't the step of the whole batch"),
        (lambda w, g, all_reduce, ranks, lr: 3.0, "not this float"),
    ],
)
def test_a_step_names_each_misconception(answer, message):
    result = check("ddp-from-scratch.step", answer)
    assert result.status == "fail" and message in result.message


def stacked(lengths, order, ranks, batch_size, dice):
    """Steps of neighbours in an order, each dealt longest first to the rank with the fewest frames; then shuffled."""
    steps = []
    for chosen in np.array_split(order, -(-len(order) // (ranks * batch_size))):
        batches = [[] for _ in range(ranks)]
        for talk in sorted(chosen, key=lambda talk: -lengths[talk]):
            least = min((sum(lengths[batch]), rank) for rank, batch in enumerate(batches) if len(batch) < batch_size)
            batches[least[1]].append(int(talk))
        steps.append(batches)
    if dice is not None:
        dice.shuffle(steps)
    return [list(batches) for batches in zip(*steps, strict=True)]


def about_sorted(lengths, dice):
    return np.argsort(lengths * np.exp(dice.normal(0, 0.1, len(lengths))))


def by_tokens(lengths, ranks, batch_size, seed, epoch, shuffled=True, order=about_sorted):
    dice = np.random.default_rng([seed, epoch])
    return stacked(lengths, order(lengths, dice), ranks, batch_size, dice if shuffled else None)


def in_pools(lengths, dice):
    """Sorted within pools of some steps, as many loaders do."""
    order = dice.permutation(len(lengths))
    pools = np.array_split(order, max(1, len(order) // 96))
    return np.concatenate([pool[np.argsort(lengths[pool])] for pool in pools])


def at_random(lengths, ranks, batch_size, seed, epoch, by_length=False):
    """Equal numbers of talks, as the sampler of torch deals them; or then in buckets of each rank's own."""
    dice = np.random.default_rng([seed, epoch])
    order = dice.permutation(len(lengths))
    shares = [order[rank::ranks] for rank in range(ranks)]
    steps = -(-len(lengths) // (ranks * batch_size))
    if by_length:
        shares = [share[np.argsort(lengths[share])] for share in shares]
    plan = [np.array_split(share, steps) for share in shares]
    return [[batches[place] for place in dice.permutation(steps)] for batches in plan] if by_length else plan


def changed(change):
    """The solution's plan with something changed in it."""
    return lambda *given: change(by_tokens(*given))


def test_a_plan_passes_with_the_solution_and_with_pools():
    assert check("rnn.plan", by_tokens)
    assert check("rnn.plan", functools.partial(by_tokens, order=in_pools))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (at_random, "Equal numbers of talks aren't equal work"),
        (functools.partial(at_random, by_length=True), "in one step the ranks have different numbers of frames"),
        (
            functools.partial(by_tokens, order=lambda lengths, dice: dice.permutation(len(lengths))),
            "short talks are beside long ones",
        ),
        (functools.partial(by_tokens, shuffled=False), "in order of length"),
        (functools.partial(by_tokens, order=lambda lengths, dice: np.argsort(lengths)), "the same talks"),
        (
            lambda lengths, ranks, size, seed, epoch: by_tokens(lengths, ranks, size, seed, 0),
            "Two epochs have the same",
        ),
        (lambda lengths, ranks, size, seed, epoch: by_tokens(lengths, ranks, size, 0, epoch), "Two seeds"),
        (lambda *given: by_tokens(*given[:3], random.randrange(2**30), given[4]), "gave two plans"),
        (lambda lengths, ranks, size, *rest: by_tokens(lengths, ranks, 1, *rest), "fill the batches"),
        (lambda lengths, ranks, size, *rest: by_tokens(lengths, ranks, 2 * size, *rest), "more than `batch_size`"),
        (lambda lengths, ranks, size, *rest: by_tokens(lengths, 1, ranks * size, *rest), "for 1 ranks"),
        (lambda lengths, *rest: by_tokens(lengths[:-5], *rest), "don't see every talk"),
        (
            changed(lambda plan: [batches[:-1] if rank else batches for rank, batches in enumerate(plan)]),
            "waits in vain",
        ),
        (changed(lambda plan: [plan[0]] * len(plan)), "seen twice"),
        (changed(lambda plan: [[[], batches[0] + batches[1], *batches[2:]] for batches in plan]), "A batch is empty"),
        (changed(lambda plan: plan[0]), "a list of batches for each rank"),
        (lambda *given: len(given), "a list of batches for each rank"),
    ],
)
def test_a_plan_names_each_misconception(answer, message):
    result = check("rnn.plan", answer)
    assert result.status == "fail" and message in result.message, result


def compressed(gradient, residual, k, chosen_by=torch.abs, before=True, left=None):
    """The k numbers with the highest score, of the gradient and the old residual; `left` says what the new one is."""
    total = gradient + residual
    places = chosen_by(total if before else gradient).topk(k).indices
    rest = total.clone().index_fill(0, places, 0)
    return total[places], places, rest if left is None else left(gradient, residual, total, places)


def cleared(values, places):
    return values.index_fill(0, places, 0)


def twice(gradient, residual, k):
    values, places, rest = compressed(gradient, residual, k)
    return values, places[:1].expand(k), rest


def test_top_k_passes_with_the_solution_and_with_numpy():
    def by_numpy(gradient, residual, k):
        total = (gradient + residual).numpy()
        places = np.argsort(-abs(total))[:k]
        values = total[places]
        total[places] = 0
        return values, places, total

    def by_subtraction(gradient, residual, k):
        values, places, _ = compressed(gradient, residual, k)
        return values, places, gradient + residual - torch.zeros_like(gradient).index_add(0, places, values)

    assert check("autoencoder.top_k", compressed)
    assert check("autoencoder.top_k", by_subtraction)
    result = check("autoencoder.top_k", lambda *given: [torch.as_tensor(part) for part in by_numpy(*given)])
    assert result, result


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (functools.partial(compressed, chosen_by=lambda values: values), "without their sign"),
        (functools.partial(compressed, before=False), "of the gradient alone"),
        (functools.partial(compressed, chosen_by=lambda values: -values.abs()), "furthest from 0"),
        (functools.partial(compressed, left=lambda g, r, total, places: torch.zeros_like(g)), "isn't sent is lost"),
        (functools.partial(compressed, left=lambda g, r, total, places: total), "sent again"),
        (functools.partial(compressed, left=lambda g, r, total, places: cleared(g, places)), "forgotten the old one"),
        (functools.partial(compressed, left=lambda g, r, total, places: 2 * cleared(total, places)), "they differ by"),
        (lambda gradient, residual, k: compressed(gradient, residual, len(gradient)), "places were sent, not k"),
        (lambda gradient, residual, k: compressed(gradient, residual, k - 1), "places were sent, not k"),
        (lambda gradient, residual, k: (torch.zeros(0), [], gradient + residual), "0 different places"),
        (twice, "1 different places"),
        (lambda *given: compressed(*given)[:2], "the k values, their k places"),
        (lambda gradient, residual, k: (gradient, residual, k), "the k values, their k places"),
    ],
)
def test_top_k_names_each_misconception(answer, message):
    result = check("autoencoder.top_k", answer)
    assert result.status == "fail" and message in result.message, result


def next_interval(log, machines, failed=("node failure",), since="started_s", only=False, power=1, save=max):
    """The interval for the next job; as given here the log is read right."""
    attempts = [row for row in log if row["kind"] == "attempt"]
    failures = [row for row in attempts if row["cause"] in failed]
    uptime = sum(row["ended_s"] - row[since] for row in (failures if only else attempts))
    saves = {}
    for row in log:
        if row["kind"] == "checkpoint":
            saves.setdefault(row["attempt"], []).append(row["save_s"])
    mtbf = uptime / len(failures) * (attempts[0]["machines"] / machines) ** power
    return (2 * np.median([save(own) for own in saves.values()]) * mtbf) ** 0.5


def reading(**wrong):
    return lambda log, machines: next_interval(log, machines, **wrong)


ENDS = ("node failure", "time limit", "preempted")


@pytest.mark.parametrize(
    ("interval", "status", "says"),
    [
        (next_interval, "pass", "No other interval costs much less"),
        (lambda *given: 0.75 * next_interval(*given), "pass", "No other"),
        (reading(failed=ENDS), "fail", "look at the causes"),
        (reading(since="submitted_s"), "fail", "A job that waits in a queue can't fail"),
        (reading(only=True), "fail", "Attempts that didn't fail"),
        (lambda log, m: next_interval(log, m, failed=ENDS, since="submitted_s"), "fail", "You save too"),
        (lambda log, m: next_interval(log, m, since="submitted_s", save=np.mean), "fail", "You save too"),
        (reading(power=0), "fail", "your job uses more, or fewer"),
        (reading(power=-1), "fail", "fail more often, not less"),
        (reading(save=np.median), "fail", "its slowest rank"),
        (reading(save=np.mean), "fail", "its slowest rank"),
        (lambda log, machines: next_interval(log, 1), "fail", "the MTBF of one machine"),
        (lambda log, machines: next_interval(log, machines) / 3, "fail", "You save too often"),
        (lambda log, machines: 3 * next_interval(log, machines), "fail", "You save too rarely"),
        (lambda log, machines: (2 * 0.01 * 5.0) ** 0.5, "fail", "the same interval for every log"),
        (lambda log, machines: (2 * 0.01 * 5.0 / machines) ** 0.5, "fail", "You save too often"),
        (
            lambda log, machines: np.median([row["save_s"] for row in log if row["kind"] == "checkpoint"]),
            "fail",
            "You save too often",
        ),
        (lambda log, machines: 10**400, "fail", "a number above 0"),
        (lambda log, machines: -1, "fail", "a number above 0, not -1"),
        (lambda log, machines: [1, 2], "fail", r"not \[1, 2\]"),
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
        ("", "not a single bit differs"),
        ("step", "resumes at step 0"),
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
    assert "can't be written and read back" in check("faults.state", (lambda *parts: {"m": parts[0]}, unpack)).message
    assert "pair of functions" in check("faults.state", pack).message
    assert check("faults.state", (lambda *parts: ..., unpack)).message == "Not answered yet."
    for step in (5.0, torch.tensor([5, 5]), "5"):
        assert "a whole number, not" in check("faults.state", (pack, lambda *parts, step=step: step)).message
    assert "raised KeyError" in check("faults.state", (pack, lambda state, *parts: state["none"])).message


def pieces(size):
    """An answer that cuts items into pieces of a size, which may depend on all that it is given."""

    def chunks(items, workers, item_s, task_s):
        step = max(1, round(size(len(items), workers, item_s, task_s)))
        return [items[start : start + step] for start in range(0, len(items), step)]

    return chunks


def root(count, workers, item_s, task_s):
    return (count * task_s / item_s) ** 0.5


def losing_the_rest(items, workers, item_s, task_s):
    size = 7
    return [items[start : start + size] for start in range(0, len(items) - size, size)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (pieces(lambda count, workers, item_s, task_s: 1), "Too fine: 2000 items for 2 workers, cut into 2000 tasks"),
        (pieces(lambda count, workers, item_s, task_s: count / workers), "Too coarse: 2000 items for 2 workers"),
        (pieces(lambda count, workers, item_s, task_s: 50), "Too fine: 20000 items for 16 workers"),
        (pieces(lambda *given: 4 * root(*given)), "Too coarse"),
        (pieces(lambda *given: root(*given) / 4), "Too fine"),
        (losing_the_rest, "Not the serial result: 5 of 2000 items are in no chunk"),
        (lambda items, *given: [items, items[:1]], "out of order, in two chunks"),
        (lambda items, *given: [items[1000:], items[:1000]], "out of order"),
        (lambda items, *given: items, "a list of lists of items"),
        (lambda items, *given: [[[1]]], "a list of lists of items"),
        (lambda items, *given: [[], items], "Too coarse"),
    ],
)
def test_chunks_name_each_misconception(answer, message):
    result = check("dask.chunk", answer)
    assert result.status == "fail" and message in result.message, result


@pytest.mark.alone
def test_chunks_that_are_good_by_the_model_race_their_baselines():
    result = concluded("dask.chunk", pieces(root))
    assert result.status == "pass" and "times as long" in result.message, result


@pytest.mark.parametrize(
    ("seconds", "status", "message"),
    [
        ({}, "pass", "a task for each item took 3.0 (2.9-3.2) times as long"),
        ({4: [3.0, 0.2, 2.9, 0.3, 1.5]}, "inconclusive", "but in this run a task for each worker took"),
        ({300: [0.5, 0.4, 0.5, 0.6, 0.5]}, "fail", "In this run a task for each item took 0.50 times as long"),
    ],
)
def test_a_race_of_chunks_is_judged_by_its_turns_and_their_noise(monkeypatch, seconds, status, message):
    """On a clock that goes on by what the test says that so many tasks take."""
    taken = {4: [2.0, 2.1, 2.2, 1.9, 2.0], 300: [3.0, 3.1, 3.2, 2.9, 3.0]} | seconds
    left = {tasks: itertools.cycle(values) for tasks, values in taken.items()}
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, sleep=lambda seconds: None)

    class Client:
        def map(self, function, pieces, waits, pure):
            clock.now += next(left.get(len(pieces), iter([1.0])))
            return [function(piece, wait) for piece, wait in zip(pieces, waits, strict=True)]

        def gather(self, found):
            return found

    monkeypatch.setattr(dask_checks, "time", clock)
    result = dask_checks._race_chunks(Client(), pieces(lambda *given: 20), workers=4)
    assert result.status == status and message in result.message, result


def gathered(submit):
    """An answer that makes futures in some way, and gathers them."""
    return lambda client, table, queries, look_up: client.gather(submit(client, table, queries, look_up))


def scattered(client, table, queries, look_up, again=1, **settings):
    held = client.scatter(table, **settings)
    for _ in range(again):
        futures = [client.submit(look_up, held, query, pure=False) for query in queries]
    return client.gather(futures)


def delayed_once(client, table, queries, look_up):
    held = dask.delayed(table)
    return list(dask.compute(*[dask.delayed(look_up)(held, query) for query in queries]))


def in_a_closure(client, table, queries, look_up):
    return client.map(lambda query: look_up(table, query), queries)


def one_task(client, table, queries, look_up):
    held = client.scatter(table)
    return client.submit(lambda table: [look_up(table, query) for query in queries], held).result()


@pytest.mark.parametrize("answer", [functools.partial(scattered, broadcast=True), scattered, delayed_once])
def test_what_is_sent_once_passes(answer):
    assert check("dask.bytes", answer), check("dask.bytes", answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (gathered(lambda client, table, queries, f: [client.submit(f, table, query) for query in queries]), "160 MB"),
        (gathered(lambda client, table, queries, f: client.map(functools.partial(f, table), queries)), "was packed 4"),
        (gathered(in_a_closure), "was packed 4"),
        (lambda client, table, queries, f: [f(table, query) for query in queries], "in the notebook's own process"),
        (functools.partial(scattered, again=2, broadcast=True), "some work is done twice"),
        (one_task, "One worker did all of it"),
        (
            lambda client, table, queries, f: [client.submit(f, table, queries[0])],
            "a list of numbers, one for each query",
        ),
        (lambda client, table, queries, f: [0.0] * len(queries), "aren't the numbers"),
        (lambda client, table, queries, f: client.submit(f, None, queries[0]).result(), "raised AttributeError"),
    ],
)
def test_what_is_sent_too_often_is_counted(answer, message):
    result = check("dask.bytes", answer)
    assert result.status == "fail" and message in result.message, result


def job(line="train --token-file {file}", mode=0o600, text=str):
    """A job that keeps its token in a file; as given here nobody else sees it."""

    def write(token, folder):
        file = Path(folder, "token")
        with open(os.open(file, os.O_WRONLY | os.O_CREAT, mode), "w") as opened:
            opened.write(text(token))
        return "#!/bin/bash\n" + line.format(file=file, token=token)

    return write


ONE = Security.temporary()


def in_files(made=Security.temporary, mode=0o600, kind=Security, **more):
    """Certificates that are made and written to files; as given here nobody else sees them."""

    def certificates(folder):
        source, files = made(), {"tls_ca_file": str(Path(folder, "ca"))}
        for role, kinds in itertools.product(("client", "scheduler", "worker"), ("key", "cert")):
            files[f"tls_{role}_{kinds}"] = str(Path(folder, f"{role}-{kinds}"))
        for name, path in files.items():
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, mode), "w") as opened:
                opened.write(getattr(source, name))
        return kind(**{"require_encryption": True} | files | more)

    return certificates


class Lax(Security):
    """Encrypts, and asks nobody for a certificate."""

    def get_listen_args(self, role):
        found = super().get_listen_args(role)
        found["ssl_context"].verify_mode = ssl.CERT_NONE
        return found


def keyless(folder):
    return Security(require_encryption=True, tls_ca_file=ONE.tls_ca_file)


def mixed():
    """Its client has certificates of another authority than its scheduler."""
    found, other = Security.temporary(), Security.temporary()
    found.tls_client_key, found.tls_client_cert = other.tls_client_key, other.tls_client_cert
    return found


@pytest.mark.parametrize(
    "answer", [job(), job("TRAIN_TOKEN=$(cat {file}) train"), job("train --token-file $(ls {file})")]
)
def test_harden_passes_where_nobody_sees_the_token(answer):
    result = check("security.harden", (in_files(), answer))
    assert (result.status, "Strangers are refused" in result.message) == ("pass", True), result


@pytest.mark.parametrize(
    ("security", "message"),
    [
        (lambda folder: False, "was let in, and ran code"),
        (lambda folder: Security(), "was let in, and ran code"),
        (in_files(require_encryption=False), "was let in, and ran code"),
        (lambda folder: Security.temporary(), "in this process only"),
        (in_files(kind=Lax), "A connection without a certificate was answered at tls://"),
        (in_files(lambda: ONE), "One certificate for all"),
        (in_files(mixed), "not even your own client"),
        (keyless, "something is missing: tls_client_cert"),
        (lambda folder: Security(require_encryption=True, tls_ca_file="gone"), "something is missing"),
        (in_files(mode=0o644), "Others can read a private key's file: client-key"),
        (lambda folder: True, "a distributed.Security, not True"),
        (lambda folder: ..., "Not answered yet"),
        (lambda folder: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_harden_names_each_way_in(security, message):
    result = check("security.harden", (security, job()))
    assert result.status == "fail" and message in result.message, result


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (job("train --token {token}"), "token is in the job script"),
        (job("export TRAIN_TOKEN='{token}'\ntrain"), "token is in the job script"),
        (lambda token, folder: f"TRAIN_TOKEN=$(echo {token[::-1]} | rev) train", "token is in the job script"),
        (lambda token, folder: ONE.tls_client_key, "A private key is in the job script"),
        (job(mode=0o644), "that others can read (mode 0644)"),
        (job("train --token $(cat {file})"), "ps shows it to everybody"),
        (job("cat {file}; train --token-file {file}"), "the token is in its log"),
        (job("set -x; TRAIN_TOKEN=$(cat {file}) train"), "the token is in its log"),
        (job("train --token-file {file}", text=lambda token: token[:-1]), "itself has no token"),
        (job("train"), "itself has no token"),
        (job("python train.py"), "never ran its program"),
        (lambda token, folder: ["train"], "text of a job script, not ['train']"),
        (lambda token, folder: None, "Not answered yet"),
    ],
)
def test_harden_names_each_leak(answer, message):
    result = check("security.harden", (in_files(), answer))
    assert result.status == "fail" and message in result.message, result


def test_harden_is_inconclusive_where_nothing_can_be_tried(monkeypatch):
    assert "a pair of functions, (certificates, job)" in check("security.harden", job()).message
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "which", lambda name: None)
        result = check("security.harden", (in_files(), job()))
    assert (result.status, "needs bash" in result.message) == ("inconclusive", True)


def masking(
    sign=lambda rank, other: 1 if rank < other else -1, peers=lambda rank, other: True, span=2**64 - 1, step=None
):
    """Masks each share with what is shared with some peers; as given here it is right."""

    def mask(numbers, rank, seeds, at, prg):
        for other, seed in seeds.items():
            if peers(rank, other):
                drawn = prg(seed, at if step is None else step, len(numbers)) & np.uint64(span)
                numbers = numbers + drawn if sign(rank, other) > 0 else numbers - drawn
        return numbers

    return mask


def in_floats(numbers, rank, seeds, step, prg):
    return masking()(numbers, rank, seeds, step, prg).astype(float)


def own_mask(numbers, rank, seeds, step, prg):
    return numbers + np.random.default_rng(rank).integers(0, 2**64, len(numbers), dtype=np.uint64)


def test_masks_pass_with_the_solution():
    assert check("security.masks", masking())
    assert check("security.masks", masking(sign=lambda rank, other: rank - other))
    assert check(
        "security.masks", masking(peers=lambda rank, other: abs(rank - other) in (1, 3))
    )  # a ring: two, not one


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda numbers, *others: numbers, "sends its gradient just as it is"),
        (masking(span=2**20 - 1), "isn't uniform"),
        (masking(span=2**64 - 2**20), "isn't uniform"),
        (masking(sign=lambda rank, other: 1), "The masks don't cancel"),
        (own_mask, "The masks don't cancel"),
        (masking(peers=lambda rank, other: rank ^ 1 == other), "can remove a mask"),
        (masking(step=0), "Two steps have the same masks"),
        (in_floats, r"not this float64 (4096,)"),
        (lambda numbers, *others: masking()(numbers, *others)[:-1], "not this uint64 (4095,)"),
        (lambda numbers, *others: numbers.tolist(), "not this list"),
    ],
)
def test_masks_name_each_misconception(answer, message):
    result = check("security.masks", answer)
    assert result.status == "fail" and message in result.message, result


QUEUED = {
    "test_what_slips_through_a_queue": ("queues.backfill", "options"),
    "test_an_array_is_handed_in_and_counted": ("queues.array", "script"),
}


@pytest.fixture(scope="module")
def queued(request, tmp_path_factory):
    """Verdicts by exercise and answer, for all tests below that are to run: each waits for jobs, four at a time."""
    cases = []
    for item in request.session.items:
        if known := QUEUED.get(getattr(item, "originalname", None)):
            cases.append((known[0], item.callspec.params[known[1]]))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.chdir(tmp_path_factory.mktemp("queued"))
        return dict(zip(cases, pool.map(lambda case: check(*case), cases), strict=True))


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("--ntasks=3 --time=4", "pass", "delayed nobody"),
        ("-c3 -t 4", "pass", "delayed nobody"),
        ("--time=1", "fail", "takes 10 minutes, but you asked for 1"),
        ("--ntasks=1 --time=2", "fail", "takes 10 minutes, but you asked for 2"),
        ("--nodes=1 --ntasks=2 --time=4", "fail", "takes 5.5 minutes, but you asked for 4"),
        ("--nodes=2 --ntasks=4 --time=00:04:00", "fail", "CPUs are on two nodes"),
        ("--ntasks=3", "fail", "might have run too long"),
        ("--ntasks=3 --time=5", "fail", "might have run too long"),
        ("--nodes=1 --ntasks=4 --time=4", "fail", "the hole isn't that wide"),
        ("--time=2 --nice=-5", "fail", "--nice=-5 would change whose turn it is"),
        ("--time=2 --nodes=7", "fail", "Slurm rejects these options"),
        (4, "fail", "must be text, not 4"),
    ],
)
def test_what_slips_through_a_queue(queued, options, status, message):
    result = queued["queues.backfill", options]
    assert result.status == status and message in result.message, result


def array(numbers="3-8%2", line="./square $SLURM_ARRAY_TASK_ID"):
    return f"#!/bin/bash\n#SBATCH --array={numbers}\n#SBATCH --ntasks=1 --time=1\n{line}\n"


LOOP = "#!/bin/bash\n#SBATCH --time=1\nfor n in 3 4 5 6 7 8; do ./square $n; done\n"


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        (array(), "pass", "Six squares"),
        (array("3,4,5,6,7,8%1"), "pass", "Six squares"),
        (LOOP, "fail", "isn't an array"),
        (array("3-8"), "fail", "ran at the same time"),
        (array("3-7%2"), "fail", "square of 8 is missing"),
        (array("0-5%2"), "fail", "square of 6 is missing"),
        (array("3-9%2"), "fail", "more than was asked"),
        (array("3-8%2", "./square $SLURM_ARRAY_JOB_ID"), "fail", "square of 3 is missing"),
        ("./square 3", "fail", "Slurm rejects this script"),
    ],
)
def test_an_array_is_handed_in_and_counted(queued, script, status, message):
    result = queued["queues.array", script]
    assert result.status == status and message in result.message, result


def test_without_slurm_its_exercises_tell_what_is_missing(monkeypatch):
    monkeypatch.setattr(slurm, "missing", lambda: ["slurmctld"])
    result = check("queues.backfill", "--time=1")
    assert result.status == "inconclusive" and "slurmctld" in result.message


def cheapest(kept=1, shared=1, states=1, own=True, length=True, inputs=True, zero1=False, last=False, none="none"):
    """The notebook's solution, or one with a misconception."""

    def choose(budget, ranks, parameters, layers, width, batch, sequence):
        windows = batch / (ranks if own else 1) * (sequence if length else 1)
        activations = 64 * layers * width * windows * kept
        shards = activations / (ranks if shared == 0 else 1)
        weights, others = 4 * parameters, 12 * parameters * states
        first = 4 * parameters / (ranks if zero1 else 1) + 8 * parameters / ranks
        needed = {
            "ddp": weights + others + activations,
            "zero1": weights + first * states + shards,
            "zero3": (weights + others) / ranks + shards,
            "zero3+recompute": (weights + others) / ranks + inputs * shards * (1 / 16 + 1 / layers),
        }
        fitting = [name for name, count in needed.items() if count <= budget] or [none]
        return fitting[-1 if last else 0]

    return choose


def test_the_cheapest_passes_with_the_solution():
    assert check("too-big.cheapest", cheapest())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (cheapest(kept=0), "Activations hardly count"),
        (cheapest(shared=0), "ZeRO shards no activations"),
        (cheapest(own=False), "You gave every rank the whole batch"),
        (cheapest(length=False), "Activations hardly count"),
        (cheapest(inputs=0), "Computing again isn't free of activations"),
        (cheapest(kept=0, states=0), "You counted weights alone"),
        (cheapest(zero1=True), "Stage 1 of ZeRO shards the optimiser's state only"),
        (cheapest(last=True), "the dearest that do"),
        (cheapest(none="zero3+recompute"), "the answer is 'none'"),
        (lambda *arguments: "zero3", "12 of 60 choices are right"),
        (lambda *arguments: "ddp", "needs"),
        (lambda *arguments: "none", "In place of none, ddp would fit"),
        (
            lambda *arguments: "fsdp",
            "must return one of 'ddp', 'zero1', 'zero3', 'zero3+recompute', 'none', not 'fsdp'",
        ),
    ],
)
def test_the_cheapest_names_each_misconception(answer, message):
    result = check("too-big.cheapest", answer)
    assert result.status == "fail" and message in result.message, result


@pytest.mark.parametrize("seed", ["1", "2", "teacher"])
def test_verdicts_are_the_same_whatever_the_seed_draws(seed, monkeypatch):
    monkeypatch.setenv("HPCLAB_SEED", seed)
    right_and_wrong = {
        "cnn.order": (order_solution, (dropped, "don't visit every image")),
        "cnn.learning_rate": (lr_solution, (lambda lr, base, batch, ranks: lr * ranks, "ranks alone")),
        "scaling.curves": (curves_solution, (unless_few, "from data so noisy")),
        "ddp-from-scratch.reduce_scatter": (ring(), (ring(first=0), "nothing was added to it")),
        "ddp-from-scratch.step": (
            lambda w, g, all_reduce, ranks, lr: w - lr * all_reduce(g) / ranks,
            (lambda w, g, all_reduce, ranks, lr: w - lr * all_reduce(g), "The gradients are summed"),
        ),
        "faults.interval": (next_interval, (reading(power=0), "your job uses more, or fewer")),
        "faults.state": ((pack, unpack), ((functools.partial(pack, leave_out=["random"]), unpack), "Dropout draws")),
        "too-big.cheapest": (cheapest(), (cheapest(shared=0), "ZeRO shards no activations")),
        "security.masks": (masking(), (masking(step=0), "Two steps have the same masks")),
    }
    for exercise_id, (right, (wrong, message)) in right_and_wrong.items():
        assert check(exercise_id, right), exercise_id
        result = check(exercise_id, wrong)
        assert result.status == "fail" and message in result.message, result
    assert dask_checks._plan_chunks(pieces(root))


def diagnose(programs):
    """As the notebook's solution."""
    ridge = roofline.ceilings(megabytes=32)["ridge"]
    names = []
    for program in programs:
        loads, works = zip(*(one_process._split(program) for _turn in range(5)), strict=True)
        flops, nbytes = roofline.count(program.work, program.load())
        if np.median(loads) > np.median(works):
            names.append("data")
        else:
            names.append("compute" if flops / nbytes > ridge else "memory")
    return names


def misnamed(**names):
    """Answers with the truth but for the kinds given."""
    draws = [kinds for kinds, _programs in one_process._draws()]
    turns = itertools.cycle(draws)
    return lambda programs: [names.get(kind, kind) for kind in next(turns)]


def by_total(programs):
    def seconds(program):
        start = time.perf_counter()
        program.run()
        return time.perf_counter() - start

    order = np.argsort([seconds(program) for program in programs])
    return [["memory", "compute", "data"][list(order).index(place)] for place in range(len(programs))]


def by_operations(programs):
    """A product is computing, whatever feeds it; what is none moves bytes."""
    products = [roofline.count(program.work, program.load())[0] > 1e6 for program in programs]
    return ["compute" if product else "memory" for product in products]


@pytest.mark.alone
def test_bottleneck_passes_with_the_solution_whatever_the_threads_outside():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = concluded("one-process.bottleneck", diagnose)
        assert result, result
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda programs: ["compute"] * 3, "the same name"),
        (misnamed(compute="memory", memory="compute"), "Compute and memory are swapped"),
        (misnamed(memory="data", data="memory"), "time the two parts"),
        (misnamed(compute="data"), "gets its batch at once"),
        (misnamed(memory="compute"), "few operations with each byte"),
        (misnamed(compute="memory"), "many operations with each byte"),
        (by_total, "how long a run takes"),
        (by_operations, "(few operations with each byte|time the two parts)"),
        (lambda programs: ["compute"], r"a list of 3 names, one for each program, not \['compute'\]"),
        (lambda programs: "compute", "a list of 3 names, one for each program, not 'compute'"),
        (lambda programs: ["cpu"] * 3, "one of 'compute', 'memory', 'data', not 'cpu'"),
        (lambda programs: [{}] * 3, "not {}"),
    ],
)
def test_bottleneck_names_each_misconception(answer, message):
    result = concluded("one-process.bottleneck", answer)
    assert result.status == "fail" and re.search(message, result.message), result


@pytest.mark.alone
def test_bottleneck_is_inconclusive_where_the_machine_does_not_show_what_was_planted(monkeypatch):
    monkeypatch.setattr(one_process, "_ridge", lambda: 200.0)  # a machine of far more arithmetic a byte
    result = check("one-process.bottleneck", misnamed())
    assert result.status == "inconclusive" and "intensity" in result.message
    assert check("one-process.bottleneck", misnamed(compute="memory")).status == "inconclusive"


@pytest.mark.parametrize("product", [True, False])
@pytest.mark.parametrize("kind", bottlenecks.KINDS)
def test_planted_programs_are_of_their_kind_by_counts(kind, product):
    for seed in range(3):
        program = bottlenecks.planted(kind, random.Random(seed), product=product)
        again = bottlenecks.planted(kind, random.Random(seed), product=product)
        flops, nbytes = roofline.count(program.work, program.load())
        assert (flops, nbytes) == roofline.count(again.work, again.load()) and program.batches == again.batches
        if kind != "data":
            assert flops / nbytes > 50 if kind == "compute" else flops / nbytes < 1
    with pytest.raises(ValueError, match=r"kind \(='network'\) must be one of compute, memory, data"):
        bottlenecks.planted("network", random.Random(0))


@pytest.mark.parametrize(("quiz", "answer"), QUIZZES.items())
def test_a_quiz_has_one_answer_whatever_the_seed(quiz, answer, monkeypatch):
    monkeypatch.setenv("HPCLAB_SEED", "teacher")
    assert check(quiz, answer)


STATEMENTS = [
    quiz
    for quiz, answer in QUIZZES.items()
    if {*map(str, answer if hasattr(answer, "__iter__") else "1")} <= {*"abcdef"}
]


@pytest.mark.parametrize("quiz", STATEMENTS)
def test_of_all_sets_of_statements_one_passes_and_each_false_one_has_its_message(quiz):
    right, letters = {*QUIZZES[quiz]}, "abcdef"
    sets = [set(chosen) for size in range(7) for chosen in itertools.combinations(letters, size)]
    assert [one for one in sets if check(quiz, one)] == [right]
    messages = [check(quiz, right | {letter}).message for letter in letters if letter not in right]
    assert len({*messages}) == len(messages) >= 3
    assert "but you missed 1 more" in check(quiz, right - {min(right)}).message
    for odd in ("g", 3, {"a": 1}, {1}):
        assert "a set of letters" in check(quiz, odd).message


@pytest.mark.parametrize(
    ("quiz", "answer", "message"),
    [
        ("start.quiz_allreduce", 10, "There are two calls"),
        ("start.quiz_allreduce", 20, "Four ranks take part"),
        ("start.quiz_allreduce", 2.5, "to average"),
        ("one-process.quiz_split", 2, "doesn't make the whole step twice as fast"),
        ("one-process.quiz_split", 1.333, "What about the data"),
        ("one-process.quiz_split", 0.65, "the time that is left"),
        ("ddp-from-scratch.quiz_deadlock", [3, 6, 9, 12], "Ranks 1 and 2 do meet"),
        ("ddp-from-scratch.quiz_deadlock", [0, 0, 0, 0], "could go first"),
        ("ddp-from-scratch.quiz_deadlock", [3, 7, 10, 13], "You have 3 of 4"),
        ("ddp-from-scratch.quiz_line", (500, 200), "Swapped"),
        ("ddp-from-scratch.quiz_line", (200, 4000), "megabits"),
        ("ddp-from-scratch.quiz_line", (200, 250), "A small message's time"),
        ("cnn.quiz_batch", (1600, 0.5), "images of all ranks"),
        ("cnn.quiz_batch", (400, 0.4), "by the number of ranks alone"),
        ("cnn.quiz_batch", (400, 0.1), "Unscaled"),
        ("dask.quiz_tasks", (77.3, 85), "isn't computing"),
        ("dask.quiz_tasks", (0.727, 80), "in percent"),
        ("dask.quiz_tasks", (73, 110), "one worker idle"),
        ("dask.quiz_lazy", 3, "Nothing is kept"),
        ("dask.quiz_lazy", 15, "holds its result"),
        ("dask.quiz_lazy", 6, "Persisting is computing"),
        ("queues.quiz_array", (21, 110), "a stride"),
        ("queues.quiz_array", (4, 20), "Both ends"),
        ("queues.quiz_array", (5, 25), "only one job"),
        ("too-big.quiz_memory", (212, 26.5), "ZeRO shards no activations"),
        ("too-big.quiz_memory", (192, 24), "You counted no activations"),
        ("too-big.quiz_memory", (44, 23), "2 of the 16 bytes"),
        ("too-big.quiz_memory", (44, 44), "shards nothing"),
        ("faults.quiz_recovery", (55, 3), "Not all of it was lost"),
        ("faults.quiz_recovery", (40, 3), "Those were kept"),
        ("faults.quiz_recovery", (15, 1.5), "the time of the lost steps"),
        ("faults.quiz_mtbf", 99.6, "one machine's chance"),
        ("faults.quiz_mtbf", 86.5, "something fails"),
        ("faults.quiz_mtbf", 50, "a chance of one half"),
        ("security.quiz_mask", (134, 100), "wrap around at 100"),
        ("security.quiz_mask", (34, 1), "which can be anything"),
        ("security.quiz_mask", (34, 37), "larger than the share"),
        ("capstone.quiz_ranks", (64, 64), "More ranks compute less"),
        ("capstone.quiz_ranks", (8, 8), "What about the messages"),
        ("capstone.quiz_ranks", (11, 10.8), "not each pair"),
        ("capstone.quiz_ranks", 8, "as many numbers as the question asks for (2), not 8"),
        ("capstone.quiz_ranks", (8, "a"), "as many numbers"),
    ],
)
def test_a_quiz_of_numbers_names_each_mistake(quiz, answer, message):
    result = check(quiz, answer)
    assert result.status == "fail" and message in result.message, result
