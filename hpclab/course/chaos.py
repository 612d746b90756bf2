"""Failures on purpose: ranks or workers of a run are killed at random, as machines fail, or a rank is slowed."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpclab._arguments import whole_number

if TYPE_CHECKING:
    from hpclab.gangs.run import Run  # not on a rank, which takes `slowed` from here

HALVE = """
import sys, time, psutil
rank = psutil.Process(int(sys.argv[1]))
while True:  # until the rank has ended: psutil then raises, also if another process has got its number
    rank.suspend()
    time.sleep(0.01)
    rank.resume()
    time.sleep(0.01)
"""


def slowed(model: Callable[[], Any], rank: int = 1) -> Any:
    """Make a model; from then on a rank gets half of its time only, as from cpulimit: a machine half as fast.

    Parameters
    ----------
    model : callable
        Without arguments, returns the model.
    rank : int, default 1
        The one that is slowed.

    Notes
    -----
    Use it as ``train(client, functools.partial(slowed, models.CNN), ...)``.
    """
    if os.environ["RANK"] == str(rank):
        subprocess.Popen([sys.executable, "-c", HALVE, str(os.getpid())], stderr=subprocess.DEVNULL)
    return model()


class Chaos:
    """Kills of one run, at random moments with a given mean time between them, until it ends or `stop` is called.

    The time from one to the next is exponential, as that of machines that don't age. Also a context manager, which
    stops at its end.

    Parameters
    ----------
    run : Run
        From `launch` or `train`; with ``max_restarts`` it goes on.
    mtbf : float
        Mean time between failures, in seconds.
    kill : str, default "rank"
        "rank" kills a rank's process; "worker" the Dask worker of a rank, and with it all its ranks.
    seed : int, default 0
        Of the moments and of whom they meet.

    Attributes
    ----------
    rows : list of dict
        One of kind "kill" for each: ``time_s`` since the start of the chaos, ``rank``, ``what``.

    Raises
    ------
    ValueError
        If `mtbf` isn't above 0, or `kill` is something else.

    Notes
    -----
    Use it as ``with Chaos(run, mtbf=5.0): run.result()``.
    """

    def __init__(self, run: Run, mtbf: float, kill: str = "rank", seed: int = 0):
        if not 0 < mtbf < math.inf:
            raise ValueError(f"mtbf (={mtbf!r}) must be seconds above 0.")
        if kill not in ("rank", "worker"):
            raise ValueError(f"kill (={kill!r}) must be 'rank' or 'worker'.")
        self.run = run
        self.mtbf = mtbf
        self.what = kill
        self.rows: list[dict] = []
        self._dice = random.Random(whole_number("seed", seed, least=None))
        self._stopped = threading.Event()
        threading.Thread(target=self._rage, name="hpclab-chaos", daemon=True).start()

    def stop(self) -> None:
        """Kill no more."""
        self._stopped.set()

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _rage(self) -> None:
        started = time.monotonic()
        while not self._stopped.wait(self._dice.expovariate(1 / self.mtbf)) and self.run.going:
            if left := self.run.left():
                rank = self._dice.choice(left)
                (self.run.kill if self.what == "rank" else self.run.kill_worker)(rank)
                self.rows.append(
                    {"kind": "kill", "time_s": time.monotonic() - started, "rank": rank, "what": self.what}
                )
