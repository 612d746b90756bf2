"""Checks of the notebook *queues*: a private Slurm really gets what an answer asks for; what came of it is read."""

import itertools
import math
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hpclab import slurm
from hpclab.course import quizzes
from hpclab.course.questions import Numbers, Truths, numbers, statements
from hpclab.course.verdicts import Decided, Result, exercise, failed, inconclusive, passed, reject
from hpclab.language import translate as _

SECONDS = 60.0
"""How long jobs of a check may take, which take some seconds."""


@exercise("queues.backfill", forked=False)
def _backfill(options: object) -> Result:
    words = shlex.split(_text(options))
    if forbidden := [word for word in words if re.match(r"--(priority|nice|qos|reservation|begin|partition)|-p", word)]:
        return failed(
            _("{option} would change whose turn it is; say what your job needs instead.", option=forbidden[0])
        )
    with _site(cpus=4) as site:
        for name, size, minutes, seconds in (
            ("long", ("-N1", "-n4"), 5, 10),
            ("side", ("-N1", "-n1"), 2, 10),
            ("wide", ("-N2", "-n8"), 2, 1),
        ):
            site.run("sbatch", "-J", name, *size, "-t", minutes, "-o", "/dev/null", "--wrap", f"sleep {seconds}")
        try:
            site.run("sbatch", "-J", "yours", "-o", "/dev/null", *words, "--wrap", "sleep 2")
        except RuntimeError as error:
            return failed(_("Slurm rejects these options: {error}", error=str(error)))
        if (jobs := _ended(site)) is None:
            return failed(_("Your job never starts: it asks for more than this machine has."))
    return _slipped(jobs["yours"], jobs["wide"])


def _slipped(yours: dict, wide: dict) -> Result:
    """What became of the reader's job, beside the wide one."""
    if yours["state"] != "COMPLETED":
        return failed(_("Your job ended as {state}, not as COMPLETED.", state=yours["state"]))
    if "[" in yours["nodes"]:
        return failed(_("Its CPUs are on two nodes, but simulate is one process: it can only use those of one node."))
    needed, limit = 1 + 9 / yours["cpus"], (yours["walltime_s"] or math.inf) / 60
    if needed > limit:
        return failed(
            _(
                "Killed at its limit: with the CPUs that you asked for, simulate takes {needed:.3g} minutes, but you"
                " asked for {limit:g}.",
                needed=needed,
                limit=limit,
            )
        )
    if yours["ended_s"] <= wide["started_s"]:
        return passed(_("Your job fitted into the hole: it was done before the wide one started, and delayed nobody."))
    if yours["cpus"] > 3:
        return failed(_("It waited behind the wide one: the hole isn't that wide; count the CPUs that are idle now."))
    return failed(
        _("It waited behind the wide one: as far as Slurm could tell, it might have run too long for the hole.")
    )


@exercise("queues.array", forked=False)
def _array(script: object) -> Result:
    text = _text(script)
    with _site() as site, TemporaryDirectory(dir=site.folder) as folder:
        square = Path(folder, "square")
        square.write_text(_SQUARE)
        square.chmod(0o700)
        try:
            site.run("sbatch", "--chdir", folder, input=text, cwd=folder)
        except RuntimeError as error:
            return failed(_("Slurm rejects this script: {error}", error=str(error)))
        if _ended(site) is None:
            return failed(_("Part of it never starts: it asks for more than this machine has."))
        jobs = site.jobs()
        squares = {path.name: path.read_text().strip() for path in Path(folder).glob("out-*")}
        calls = Path(folder, "calls").read_text().split() if Path(folder, "calls").exists() else []
    if not any(job["array"] for job in jobs):
        return failed(_("This isn't an array: Slurm saw one job."))
    if missing := [number for number in range(3, 9) if f"out-{number}" not in squares]:
        return failed(_("The square of {number} is missing.", number=missing[0]))
    if len(squares) != 6 or len(calls) != 12:
        return failed(_("It did more than was asked: square each number from 3 to 8 once."))
    at_once = itertools.accumulate(1 if call == "begin" else -1 for call in calls)
    if (most := max(at_once)) > 2:
        return failed(_("{most} of them ran at the same time.", most=most))
    return passed(_("Six squares, one script, and never more than two at a time."))


_SQUARE = """#!/bin/bash
echo begin >> calls
sleep 1
echo $(($1 * $1)) > out-$1
echo end >> calls
"""


@contextmanager
def _site(cpus: int = 2) -> Iterator[slurm.Slurm]:
    """A private Slurm of two nodes, if this machine can have one."""
    if missing := slurm.missing():
        what = ", ".join(missing)
        raise Decided(
            inconclusive(
                _("This needs Slurm; missing here: {what}. To get it: {line}", what=what, line=slurm.install_line())
            )
        )
    with slurm.start(nodes=2, cpus=cpus) as site:
        yield site


def _text(answer: object) -> str:
    if not isinstance(answer, str):
        reject(_("The answer must be text, not {answer!r}.", answer=answer))
    return answer


def _ended(site: slurm.Slurm) -> dict[str, dict] | None:
    """Jobs by name once all have ended; None if one never starts."""
    deadline = time.monotonic() + SECONDS
    jobs = site.jobs()
    while any(job["ended_s"] is None for job in jobs):
        if time.monotonic() > deadline or any("Partition" in (job["reason"] or "") for job in jobs):
            return None
        time.sleep(0.2)
        jobs = site.jobs()
    return {job["name"]: job for job in jobs}


@statements("queues.quiz_gantt")
def _gantt() -> Truths:
    long, wide, short, _other, greedy = quizzes.JOBS
    idle = quizzes.CPUS - sum(job["cpus"] for job in quizzes.JOBS if job["started_s"] <= 60 < job["ended_s"])
    free_s = max(job["ended_s"] for job in quizzes.JOBS if job["name"] == "short")
    ran = [job["ended_s"] - job["started_s"] for job in (short, greedy)]
    truths = {
        "a": short["started_s"] < wide["started_s"] and short["submitted_s"] > wide["submitted_s"],
        "b": free_s > long["ended_s"],
        "c": idle == 2,
        "d": free_s + greedy["walltime_s"] > long["started_s"] + long["walltime_s"],
        "e": ran[1] > ran[0],
        "f": wide["cpus"] <= quizzes.CPUS - long["cpus"],
    }
    return truths, {
        "b": _("The job that wide waits for is long; when did the short ones end?"),
        "e": _("Compare the lengths of the bars, not what the jobs asked for."),
        "f": _("Some CPUs are idle beside long, but how many does wide need?"),
    }


@numbers("queues.quiz_array")
def _rounds() -> Numbers:
    first, last, stride, at_once, minutes = 0, 20, 5, 2, 10
    numbers_ = list(range(first, last + 1, stride))
    jobs, clock = len(numbers_), 0
    while numbers_:
        numbers_, clock = numbers_[at_once:], clock + minutes
    return (jobs, clock), [
        ((21, 110), _("The array has a stride.")),
        ((4, 20), _("Both ends belong to the array.")),
        ((jobs, 10), _("They mustn't all run at once.")),
        ((jobs, 50), _("Two may run at once.")),
        ((jobs, 25), _("A round with only one job takes as long as any other.")),
    ]
