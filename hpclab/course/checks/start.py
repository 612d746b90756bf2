"""Check of the notebook *start*: a gang that just fits this machine, by what this process may use of it."""

import os

import numpy as np

from hpclab import machine
from hpclab.course.verdicts import Result, exercise, failed, passed
from hpclab.language import translate as _


@exercise("start.gang", forked=False)
def _gang(answer: object) -> Result:
    if isinstance(answer, bool) or not isinstance(answer, int | np.integer):
        return failed(_("The answer is a whole number of ranks (an int), not {answer!r}.", answer=answer))
    ranks, fits = int(answer), machine.fits()
    if ranks == fits:
        return passed(_("One rank more wouldn't fit, and one fewer would leave a part of this machine idle."))
    if ranks < 1:
        return failed(_("A gang has at least one rank."))
    if ranks < fits:
        return failed(_("It fits, but isn't the largest: a part of what you may use would stay idle."))
    if ranks == machine.cpus():
        return failed(_("The CPUs would do, but not the memory: each rank needs its own share of it."))
    if ranks == os.cpu_count():
        return failed(_("That is the host's CPU count. You share the host: how much of it is yours?"))
    return failed(_("Too large: some of its ranks would wait for others, or run out of memory."))
