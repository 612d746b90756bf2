"""Checks of the notebook *faults*: intervals read from planted logs, and a resumed training by its bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

from hpclab.course import quizzes
from hpclab.course.questions import Numbers, numbers
from hpclab.course.verdicts import Result, call, dice, exercise, failed, number, passed, reject
from hpclab.language import translate as _


@exercise("faults.interval", imports=("scipy.optimize",))
def _interval(interval: object) -> Result:
    logs = list(_logs())
    answers = [_seconds(call(interval, log.rows, log.machines)) for log in logs]
    if np.allclose(answers, answers[0]):
        return failed(
            _("You gave the same interval for every log: it must depend on the rows and on the number of machines.")
        )
    costs = np.array([_cost(at, log.save_s, log.mtbf_s) - 1 for at, log in zip(answers, logs, strict=True)])
    bests = np.array([_best_interval(log.save_s, log.mtbf_s) for log in logs])
    least = np.array([_cost(best, log.save_s, log.mtbf_s) - 1 for best, log in zip(bests, logs, strict=True)])
    if (costs <= 1.1 * least).all():
        return passed(_("No other interval costs much less, for any of the jobs: you read their logs well."))
    for misread in zip(*map(_misread, logs), strict=True):
        if np.allclose(answers, [at for _message, at in misread], rtol=0.03):
            return failed(misread[0][0])
    worst = int(np.argmax(costs / least))
    values = {"cost": costs[worst], "least": least[worst]}
    return failed(
        _("You save too often: saves and failures cost {cost:.1%} of the work; {least:.1%} is possible.", **values)
        if answers[worst] < bests[worst]
        else _(
            "You save too rarely, so each failure loses a lot: saves and failures cost {cost:.1%} of the work;"
            " {least:.1%} is possible.",
            **values,
        )
    )


@dataclass
class _Log:
    """Rows of a run of some machines, and what is true of a job on others: its machines, MTBF and seconds to save."""

    rows: list[dict]
    machines: int
    mtbf_s: float
    save_s: float


def _logs() -> Iterator[_Log]:
    """Runs of which few attempts failed, which waited long in a queue, and had one slow rank each."""
    hidden = dice("faults.interval")
    for recorded, machines, mtbf_s, save_s, wait, others in (
        (64, 1024, 4e3, 20.0, 7.0, 1),  # seconds in the queue for one that runs, and other ends for one by a failure
        (256, 32, 9e4, 60.0, 0.5, 8),
        (16, 16, 2e4, 5.0, 0.2, 4),
    ):
        mtbf_s, save_s = mtbf_s * hidden.uniform(0.8, 1.2), save_s * hidden.uniform(0.8, 1.2)
        failures = hidden.randint(6, 9)
        uptime = failures * mtbf_s * machines / recorded
        causes = ["node failure"] * failures + hidden.choices(("time limit", "preempted"), k=others * failures)
        hidden.shuffle(causes)
        lengths = [hidden.uniform(0.5, 1.5) for _cause in causes]
        rows, clock = [], 0.0
        for attempt, (cause, length) in enumerate(zip(causes, lengths, strict=True)):
            start = clock + wait * uptime / len(causes)
            end = start + uptime * length / sum(lengths)
            times = {"submitted_s": clock, "started_s": start, "ended_s": end}
            rows.append({"kind": "attempt", "attempt": attempt, "machines": recorded, **times, "cause": cause})
            slow = hidden.randrange(8)
            for rank in range(8):
                own = {"rank": rank, "save_s": save_s if rank == slow else save_s * hidden.uniform(0.12, 0.18)}
                rows.append({"kind": "checkpoint", "attempt": attempt, **own})
            clock = end
        yield _Log(rows, machines, mtbf_s, save_s)


def _misread(log: _Log) -> list[tuple[str, float]]:
    """The message to each misreading of a log, and the interval that it gives by Young's formula."""
    attempts = [row for row in log.rows if row["kind"] == "attempt"]
    failures = [row for row in attempts if row["cause"] == "node failure"]
    saves = [row["save_s"] for row in log.rows if row["kind"] == "checkpoint"]
    ratio, count = log.machines / attempts[0]["machines"], len(failures)
    lived = sum(row["ended_s"] - row["started_s"] for row in failures)
    waiting = _("A job that waits in a queue can't fail: only the time in which its machines ran counts.")
    partly = _("Attempts that didn't fail were also time without a failure: leave none of it out.")
    slowest = _("A checkpoint isn't done until its slowest rank is.")
    readings = [
        (_("Not every end is a failure: look at the causes."), log.save_s, log.mtbf_s * count / len(attempts)),
        (waiting, log.save_s, attempts[-1]["ended_s"] / count / ratio),
        (partly, log.save_s, lived / count / ratio),
        (
            _("The log's MTBF is for the machines in the log; your job uses more, or fewer."),
            log.save_s,
            log.mtbf_s * ratio,
        ),
        (_("More machines fail more often, not less."), log.save_s, log.mtbf_s * ratio**2),
        (_("That is the MTBF of one machine, but any of yours can fail."), log.save_s, log.mtbf_s * log.machines),
        (slowest, float(np.median(saves)), log.mtbf_s),
        (slowest, float(np.mean(saves)), log.mtbf_s),
    ]
    return [(message, (2 * save_s * mtbf_s) ** 0.5) for message, save_s, mtbf_s in readings]


def _cost(interval: float, save_s: float, mtbf: float) -> float:
    """Expected time over the time without failures or checkpoints (Daly 2006, equation 13, without restarts)."""
    return mtbf * np.expm1((interval + save_s) / mtbf) / interval


def _best_interval(save_s: float, mtbf: float) -> float:
    from scipy.optimize import minimize_scalar

    return float(minimize_scalar(_cost, bounds=(save_s / 100, 10 * mtbf), args=(save_s, mtbf)).x)


def _seconds(returned: Any) -> float:
    seconds = number(returned) or 0.0
    if not 0 < seconds < 1e9:  # thirty years
        reject(_("The function must return seconds, a number above 0, not {returned!r}.", returned=returned))
    return seconds


@exercise("faults.state", imports=("torch",))
def _state(functions: Any) -> Result:
    import torch

    try:
        pack, unpack = functions
    except (TypeError, ValueError):
        return failed(_("The answer must be a pair of functions, (pack, unpack), not {answer!r}.", answer=functions))
    with torch.random.fork_rng(devices=[]):  # the reader's own random numbers stay as they are
        return _resume(pack, unpack)


def _resume(pack: Any, unpack: Any) -> Result:
    """Train, pack after some steps, unpack into another training, and compare them to the twelfth."""
    import torch

    hidden = dice("faults.state")
    crash = hidden.randint(4, 8)
    undisturbed = _Training(seed=hidden.getrandbits(32))
    undisturbed.train(until=crash)
    packed = call(pack, undisturbed.model, undisturbed.optimizer, undisturbed.schedule, undisturbed.step)
    written = _written(packed)
    draws = torch.get_rng_state()
    resumed = _Training(seed=hidden.getrandbits(32))
    step = call(unpack, written, resumed.model, resumed.optimizer, resumed.schedule)
    try:
        resumed.step = index(step)
    except (TypeError, ValueError, RuntimeError):  # what numpy and torch raise of several numbers
        return failed(_("unpack must return the step to resume from, a whole number, not {step!r}.", step=step))
    for message, same in {
        _(
            "It resumes at step {step!r}, but the checkpoint was written after {crash} steps.",
            step=resumed.step,
            crash=crash,
        ): resumed.step == crash,
        _("Its weights aren't those of the checkpoint."): _same(resumed.model, undisturbed.model),
        _("The optimiser has forgotten its momentum."): _same(resumed.optimizer, undisturbed.optimizer),
        _("The learning rate is back at its initial value."): _same(resumed.schedule, undisturbed.schedule),
        _("Dropout draws different numbers from those it would have drawn."): torch.equal(torch.get_rng_state(), draws),
    }.items():
        if not same:
            return failed(message)
    resumed.train(until=12)
    torch.set_rng_state(draws)
    undisturbed.train(until=12)
    if not _same(resumed.model, undisturbed.model):
        return failed(_("It begins as it should but ends with different weights: something else kept changing."))
    return passed(_("Twelve steps with a crash in between, and not a single bit differs."))


class _Training:
    """A small training of which every part has a memory: weights, momentum, learning rate, random numbers, step."""

    def __init__(self, seed: int):
        import torch
        from torch import nn

        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.8)
        self.step = 0

    def train(self, until: int) -> None:
        import torch

        for step in range(self.step, until):
            inputs = torch.sin(torch.arange(12.0).reshape(3, 4) * (step + 1))  # (B, features): another batch each step
            self.optimizer.zero_grad()
            (self.model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
            self.optimizer.step()
            self.schedule.step()
        self.step = until


def _written(packed: Any) -> Any:
    """A state as it comes back from a disk."""
    import io

    import torch

    disk = io.BytesIO()
    try:
        torch.save(packed, disk)
        disk.seek(0)
        return torch.load(disk, weights_only=True)
    except Exception as error:
        reject(_("What you packed can't be written and read back as plain tensors and numbers: {error}", error=error))


def _same(left: Any, right: Any) -> bool:
    """Whether two modules, optimisers or schedules hold the same, to the last bit."""
    import torch

    def plain(state: Any) -> Any:
        if isinstance(state, torch.Tensor):
            return state.tolist()
        if isinstance(state, dict):
            return {name: plain(value) for name, value in state.items()}
        return [plain(value) for value in state] if isinstance(state, list | tuple) else state

    return plain(left.state_dict()) == plain(right.state_dict())


@numbers("faults.quiz_recovery", tolerance=0.15)
def _recovery() -> Numbers:
    first, second = ([row for row in quizzes.RECOVERY if row.get("attempt") == number] for number in (0, 1))
    steps = {row["step"] for row in first} & {row["step"] for row in second if row["kind"] == "step"}
    failed_s = next(row["failed_s"] for row in second if row["kind"] == "restart")
    seconds = min(row["time_s"] for row in second if row["kind"] == "step") - failed_s
    return (len(steps), seconds), [
        ((55, seconds), _("Not all of it was lost: a checkpoint had kept most of those steps.")),
        ((40, seconds), _("Those were kept. Which steps were done twice?")),
        ((len(steps), 1.5), _("That is the time of the lost steps; how long did nothing run?")),
    ]


@numbers("faults.quiz_mtbf", tolerance=0.05)
def _undisturbed() -> Numbers:
    machines, mtbf_days, days = 500, 1000.0, 4
    one = np.exp(-days / mtbf_days)
    chance = np.prod(np.full(machines, one))
    return (float(100 * chance),), [
        ((float(100 * one),), _("That is one machine's chance; all of them have to last.")),
        ((float(100 * (1 - chance)),), _("That is the chance that something fails.")),
        ((float(chance),), _("The number should be in percent.")),
        ((50.0,), _("Two expected failures don't make a chance of one half.")),
    ]
