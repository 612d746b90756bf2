"""Checks of the notebook *faults*: intervals are priced by Daly's formula, and a resumed training by its bits."""

from operator import index
from typing import Any

import numpy as np

from hpclab.course.verdicts import Result, call, dice, exercise, failed, number, passed, reject
from hpclab.language import translate as _


@exercise("faults.interval", imports=("scipy.optimize",))
def _interval(interval: object) -> Result:
    cases = [(5.0, 3600.0, 30.0), (60.0, 86400.0, 300.0), (0.01, 5.0, 0.3), (120.0, 3600.0, 600.0)]
    hidden = dice("faults.interval")
    cases = [(save_s, mtbf * hidden.uniform(0.8, 1.2), restart_s) for save_s, mtbf, restart_s in cases]
    for save_s, mtbf, restart_s in cases:
        seconds = _seconds(call(interval, save_s, mtbf, restart_s))
        if np.isclose(seconds, _seconds(call(interval, 3 * save_s, mtbf, restart_s))):
            return failed(_("A checkpoint that takes longer to write gets the same interval from you."))
        if np.isclose(seconds, _seconds(call(interval, save_s, 3 * mtbf, restart_s))):
            return failed(_("A machine that fails less often gets the same interval from you."))
        best = _best_interval(save_s, mtbf, restart_s)
        cost, least = (_cost(at, save_s, mtbf, restart_s) - 1 for at in (seconds, best))
        if cost > 1.1 * least:
            costs = {"mtbf": mtbf, "save": save_s, "cost": cost, "least": least}
            return failed(
                _(
                    "You write too often: with a failure every {mtbf:g} s and {save:g} s to write, {cost:.1%} is"
                    " spent; {least:.1%} would do.",
                    **costs,
                )
                if seconds < best
                else _(
                    "You write too seldom, and each failure loses much: with one every {mtbf:g} s and {save:g} s to"
                    " write, {cost:.1%} is spent; {least:.1%} would do.",
                    **costs,
                )
            )
    return passed(_("No other interval costs much less: neither for a laptop nor for a supercomputer."))


def _cost(interval: float, save_s: float, mtbf: float, restart_s: float) -> float:
    """Expected time over the time without failures or checkpoints (Daly 2006, equation 13, for long runs)."""
    return mtbf * np.exp(restart_s / mtbf) * np.expm1((interval + save_s) / mtbf) / interval


def _best_interval(save_s: float, mtbf: float, restart_s: float) -> float:
    from scipy.optimize import minimize_scalar

    return float(minimize_scalar(_cost, bounds=(save_s / 100, 10 * mtbf), args=(save_s, mtbf, restart_s)).x)


def _seconds(returned: Any) -> float:
    seconds = number(returned) or 0.0
    if not 0 < seconds < 1e9:  # thirty years
        reject(_("The function returns seconds, a number above 0, not {returned!r}.", returned=returned))
    return seconds


@exercise("faults.state", imports=("torch",))
def _state(functions: Any) -> Result:
    import torch

    try:
        pack, unpack = functions
    except (TypeError, ValueError):
        return failed(_("The answer is a pair of functions, (pack, unpack), not {answer!r}.", answer=functions))
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
        return failed(_("unpack returns the step to go on with, a whole number, not {step!r}.", step=step))
    for message, same in {
        _(
            "It goes on at step {step!r}, and the checkpoint was after {crash}.", step=resumed.step, crash=crash
        ): resumed.step == crash,
        _("Its weights aren't those of the checkpoint."): _same(resumed.model, undisturbed.model),
        _("The optimiser has forgotten its momentum."): _same(resumed.optimizer, undisturbed.optimizer),
        _("The learning rate is where it was at the start."): _same(resumed.schedule, undisturbed.schedule),
        _("Dropout draws other numbers than it would have drawn."): torch.equal(torch.get_rng_state(), draws),
    }.items():
        if not same:
            return failed(message)
    resumed.train(until=12)
    torch.set_rng_state(draws)
    undisturbed.train(until=12)
    if not _same(resumed.model, undisturbed.model):
        return failed(_("It begins as it should, and ends with other weights: something else went on changing."))
    return passed(_("Twelve steps with a crash among them, and not a bit differs."))


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
        reject(_("What you packed can't be written and read again as plain tensors and numbers: {error}", error=error))


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
