"""Checks of *debugging*, on real ranks: stubs show their symptom, solutions pass, wrong repairs and shortcuts don't.

The programs are the notebook's own, with a line of them changed.
"""

import linecache
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from pipeline import build

from hpclab.course import debugging, fork, ranks, verdicts
from hpclab.course.check import check

SOURCE = build.HERE / "source" / "20_debugging.py"
PROGRAMS = {
    "division": "train_in_parts",
    "collective": "train_until",
    "last_batch": "train_epoch",
    "batchnorm": "train_normed",
    "seed": "train_noisy",
    "checkpoint": "train_on",
}
BROADCAST = "[dist.broadcast(weight.data, 0) for weight in model.parameters()]"


def program(exercise, *changes, edition=build.solution):
    """A program of the notebook, with its solution or without, in which lines were changed as (old, new)."""
    code = []
    for cell in edition(SOURCE).cells:
        if cell.id == "imports" or cell.id.endswith("-answer"):
            before, start, body = cell.source.replace("[SIZE]", '["small"]').partition(f"def {PROGRAMS[exercise]}(")
            for old, new in changes if start else ():
                assert body.count(old) == 1, old
                body = body.replace(old, new)
            code.append(before + start + body)
    text = "\n\n".join(code)
    file = f"<{exercise} {hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    names = {}
    exec(compile(text, file, "exec"), names)
    return names[PROGRAMS[exercise]]


def verdict(exercise, *changes, edition=build.solution):
    return check(f"debugging.{exercise}", program(exercise, *changes, edition=edition))


@pytest.mark.parametrize("seed", ["", "1", "teacher"])
@pytest.mark.parametrize("exercise", PROGRAMS)
def test_solutions_pass(exercise, seed, monkeypatch):
    monkeypatch.setenv("HPCLAB_SEED", seed)
    result = verdict(exercise)
    assert result, result


SYMPTOMS = {
    "division": "With 2 ranks of 3 pieces, the gradient is 6 times",
    "collective": "waits in dist.all_reduce(weight.grad)",
    "last_batch": "all shares count the same",
    "batchnorm": "each computes a different function",
    "seed": "Ranks 0 and 1 see the same noise",
    "checkpoint": "rank 0 draws the same numbers as at the start",
}


@pytest.mark.parametrize("exercise", PROGRAMS)
def test_a_program_as_it_is_given_fails_with_its_symptom(exercise):
    result = verdict(exercise, edition=build.student)
    assert result.status == "fail" and SYMPTOMS[exercise] in result.message, result


RETURN = "    return parameters_to_vector(model.parameters()).detach()"
EARLY = [("rank, ranks = dist.get_rank(), dist.get_world_size()", RETURN.strip())]
DIVISION = "weight.grad /= ranks * parts"
BACKWARD = "mse_loss(model(piece), target).backward()"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(DIVISION, "weight.grad /= ranks")], "those of the 3 pieces are summed"),
        ([(DIVISION, "weight.grad /= parts")], "those of the 2 ranks are summed"),
        (
            [(BACKWARD, "(mse_loss(model(piece), target) / ranks / parts).backward()")],
            "divided by more than you added up",
        ),
        ([(DIVISION, "weight.grad /= len(x)")], "aren't those of one process"),
        ([(DIVISION, ""), ("lr=0.3", "lr=0.3 / (ranks * parts)")], "A lower learning rate only hides it"),
        ([("dist.all_reduce(weight.grad)", ""), (DIVISION, "weight.grad /= parts")], "end with different weights"),
        (
            [
                ("dist.all_reduce(weight.grad)", ""),
                (DIVISION, "weight.grad /= parts"),
                ("optimizer.step()", f"optimizer.step()\n        {BROADCAST}"),
            ],
            "learned them from one rank's samples only",
        ),
        ([("zip(x[rank::ranks]", "zip(x"), (" y[rank::ranks]", " y")], "more often"),
        (EARLY, "no step was taken"),
        ([(RETURN, "    return torch.zeros(4)")], "aren't those of one process"),
    ],
)
def test_division_names_each_wrong_repair(changes, message):
    result = verdict("division", *changes)
    assert result.status == "fail" and message in result.message, result


REDUCE = "dist.all_reduce(reached)\n"
MEAN = "reached /= ranks"
STEP = "step(model, optimizer, loss)"
OWN_STEP = "optimizer.zero_grad(); loss.backward(); optimizer.step()"
TRIED = f"try:\n            {STEP}\n        except Exception:\n            break"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(REDUCE, "dist.barrier()\n"), (MEAN, "")], "Deadlock"),
        ([(REDUCE, "\n"), (MEAN, ""), (RETURN, f"    dist.barrier()\n{RETURN}")], "A barrier is one more call"),
        ([(MEAN, "")], "The ranks' losses are added up"),
        ([(REDUCE, "dist.broadcast(reached, 0)\n"), (MEAN, "")], "when one of them has reached the target"),
        ([(REDUCE, "dist.all_reduce(reached, dist.ReduceOp.MIN)\n"), (MEAN, "")], "as soon as any of them"),
        ([(REDUCE, "dist.all_reduce(reached, dist.ReduceOp.MAX)\n"), (MEAN, "")], "until each has reached"),
        ([("if reached < target:", "if False:")], "The ranks never stop early"),
        ([(REDUCE, "\n"), (MEAN, ""), (STEP, OWN_STEP)], "end with different weights"),
        ([(REDUCE, "\n"), (MEAN, ""), (STEP, TRIED)], "Deadlock"),
        ([(REDUCE, "\n"), (MEAN, ""), ("break", "continue")], "Deadlock"),
        (EARLY, "but one process stops after"),
    ],
)  # fmt: skip
def test_collective_names_each_wrong_repair(changes, message):
    result = verdict("collective", *changes)
    assert result.status == "fail" and message in result.message, result


SUM = "loss = errors.square().sum() * ranks / len(batch_x)"
FIRST = "batch_x, batch_y = x[first : first + batch_size], y[first : first + batch_size]"

CUT = "".join(f"\n        batch_{name} = batch_{name}[: len(batch_{name}) // ranks * ranks]" for name in "xy")
PADDED = "".join(
    f"\n        batch_{name} = torch.cat([batch_{name}, batch_{name}[: -len(batch_{name}) % ranks]])" for name in "xy"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(SUM, "loss = errors.square().sum() * ranks / batch_size")], "divided as if it were full"),
        ([(SUM, "loss = errors.square().sum() * ranks")], "Errors are added up"),
        ([(SUM, "loss = loss * ranks / min(ranks, len(batch_x))")], "all shares count the same"),
        ([(SUM, "loss = loss.nan_to_num()")], "all shares count the same"),
        ([("range(0, len(x), batch_size)", "range(0, len(x) - batch_size + 1, batch_size)")], "less often"),
        ([(FIRST, f"{FIRST}{CUT}")], "less often"),
        ([(FIRST, f"{FIRST}{PADDED}")], "more often"),
        ([(SUM, "if not len(errors):\n            continue")], "(all shares count the same|Deadlock)"),
        (EARLY, "less often"),
    ],
)  # fmt: skip
def test_last_batch_names_each_wrong_repair(changes, message):
    result = verdict("last_batch", *changes)
    assert result.status == "fail" and any(part in result.message for part in message.strip("()").split("|")), result


OVER, SPREAD = "mean = mean_over_ranks(mean)", "variance = mean_over_ranks(variance)"
OWN = "variance = features.var(0, unbiased=False)"
PLAIN, BLIND = "dist.all_reduce({0}); {0} /= ranks", "{0} = mean_over_ranks({0}.detach())"
NORMED = "(features - mean) / (variance + 1e-5).sqrt()"


@pytest.mark.filterwarnings("ignore:c10d")  # that autograd doesn't see it, which raises here
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(SPREAD, "")], "the variance is still each rank's own"),
        ([(OVER, "")], "how far apart their means are"),
        ([(SPREAD, f"{OWN}\n        {SPREAD}")], "how far apart their means are"),
        ([(OVER, PLAIN.format("mean")), (SPREAD, PLAIN.format("variance"))], "autograd doesn't see"),
        ([(OVER, BLIND.format("mean")), (SPREAD, BLIND.format("variance"))], "autograd doesn't see"),
        ([(NORMED, "features")], "There is no batch norm left"),
        ([(NORMED, "torch.nn.functional.layer_norm(features, (4,))")], "aren't those of one process"),
        ([(OVER, "x = y = features"), (SPREAD, "")], "raised"),
        (EARLY, "less often"),
    ],
)  # fmt: skip
def test_batchnorm_names_each_wrong_repair(changes, message):
    result = verdict("batchnorm", *changes)
    assert result.status == "fail" and message in result.message, result


SEED, FIRST_SEED = "torch.manual_seed(1000 * seed + rank)", "torch.manual_seed(seed)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(SEED, "torch.seed()")], "nobody could repeat"),
        ([(SEED, "import os, time\n    torch.manual_seed(os.getpid() + time.time_ns())")], "nobody could repeat"),
        ([(SEED, ""), (FIRST_SEED, SEED)], "begin with different weights"),
        ([(SEED, "torch.manual_seed(seed + rank)")], "sees with seed"),
        ([(SEED, "torch.manual_seed(rank)")], "sees with seed"),
        ([(SEED, "for _ in range(rank):\n        torch.randn(len(x[rank::ranks]), x.shape[1])")], "from one sequence"),
        ([("noise = ", "torch.manual_seed(1000 * seed + rank)\n        noise = ")], "in one step as in another"),
        ([("noise = 0.3 *", "noise = (-1) ** rank * 0.3 *"), (SEED, "")], "aren't independent"),
        ([("noise = 0.3 *", "noise = 0.3 * (1 + rank) *")], "The noise isn't what it was"),
        ([("noise = 0.3 *", "noise = 0 *")], "The noise isn't what it was"),
    ],
)
def test_seed_names_each_wrong_repair(changes, message):
    result = verdict("seed", *changes)
    assert result.status == "fail" and message in result.message, result


@pytest.mark.parametrize(
    "changes",
    [
        [(SEED, "torch.manual_seed(seed * ranks + rank)")],
        [(SEED, BROADCAST), (FIRST_SEED, SEED)],
        [("torch.randn(len(x[rank::ranks]), x.shape[1])", "torch.randn(x.shape)[rank::ranks]"), (SEED, "")],
    ],
    ids=["another formula", "broadcast", "all draw everything"],
)  # fmt: skip
def test_seed_passes_with_other_right_repairs(changes):
    result = verdict("seed", *changes)
    assert result, result


PYTHON, TORCH = "random.setstate(of_python)", "torch.set_rng_state(of_torch)"
SEEDED = "random.seed(seeds[rank] + {0}); torch.manual_seed(seeds[rank] + {0})"
LOOP = "for _ in range(done, steps):"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(PYTHON, "")], "but the choice of samples doesn't"),
        ([(TORCH, "")], "but the noise doesn't"),
        ([('state["random"][rank]', 'state["random"][0]')], "Rank 1 continues with another rank's random numbers"),
        ([(PYTHON, SEEDED.format("done")), (TORCH, "")], "different numbers"),
        ([(LOOP, f"{SEEDED.format(0)}\n    {LOOP}")], "same numbers as at the start"),
        ([('done = state["done"]', 'done = 0')], "were left to take"),
        ([('optimizer.load_state_dict(state["optimizer"])', "")], "something else was forgotten"),
        ([("if file.exists():", "if False:")], "were left to take"),
        ([("random.seed(seeds[rank])", ""), ("torch.manual_seed(seeds[rank])", "")], "before any interruption"),
        (EARLY, "were left to take"),
    ],
)  # fmt: skip
def test_checkpoint_names_each_wrong_repair(changes, message):
    result = verdict("checkpoint", *changes)
    assert result.status == "fail" and message in result.message, result


def alike():
    numbers = torch.full((3,), dist.get_rank() + 1.0)
    dist.all_reduce(numbers)
    return numbers


def on_ranks(function, number=2):
    """The verdict of a check that runs a function on ranks, and what they returned."""
    return verdicts.apart(lambda: verdicts.passed(str(ranks.run(lambda rank: verdicts.call(function), number))))


def test_ranks_are_a_group_that_ends_with_the_check():
    assert on_ranks(alike, 3).message.count("6., 6., 6.") == 3


def test_elsewhere_than_on_linux_ranks_are_started_anew(monkeypatch):
    monkeypatch.setattr(fork, "possible", lambda: False)
    assert on_ranks(alike).message.count("3., 3., 3.") == 2


def late():
    if dist.get_rank():
        time.sleep(3 * ranks.ROUNDS * ranks.PAUSE_SECONDS)
    return alike()


def alone():
    return alike() if dist.get_rank() else 1


def by_handle():
    if dist.get_rank():
        dist.all_reduce(torch.ones(3), async_op=True).wait()
    return 1


def unequal():
    dist.all_reduce(torch.ones(3 + 1000 * dist.get_rank()))
    return 1


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        (late, "pass", "3., 3., 3."),  # to sleep is no deadlock
        (alone, "fail", "rank 0 has returned; rank 1 waits in dist.all_reduce(numbers)"),
        (by_handle, "fail", "rank 1 waits in dist.all_reduce(torch.ones(3), async_op=True).wait()"),
        (unequal, "fail", "tensors of different sizes"),
    ],
)
def test_ranks_that_wait_for_ever_are_told_from_slow_ones(function, status, message):
    result = on_ranks(function)
    assert result.status == status and message in result.message, result


def test_the_notebooks_tools_show_what_a_program_does(client, capsys):
    x, y = debugging.samples(6)
    stub = program("last_batch", edition=build.student)
    table = debugging.differences(client, stub, torch.nn.Linear(3, 1), x, y, 4, counts=(4, 5))
    small, large = ([*row.values()][1] for row in table)
    assert small < 1e-6 < 1e-4 < large
    stub = program("collective", edition=build.student)
    assert debugging.show(client, stub, torch.nn.Linear(3, 1), x, y, 0.5, 100) is None
    assert "dist.all_reduce(weight.grad)" in capsys.readouterr().out


def soon(happens):
    return any(happens() or time.sleep(0.1) for _ in range(600))


def test_ranks_end_with_the_check_that_started_them(tmp_path):
    """Killed in the middle, as a kernel is that restarts."""
    code = f"""
import os, time
from hpclab.course import ranks

def wait(rank):
    open(r"{tmp_path}" + f"/{{rank}}", "w").write(str(os.getpid()))
    time.sleep(1000)

ranks.run(wait, 2)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert soon(lambda: len([file for file in tmp_path.iterdir() if file.read_text()]) == 2)
        process.kill()
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert soon(lambda: not any(psutil.pid_exists(pid) for pid in pids))
