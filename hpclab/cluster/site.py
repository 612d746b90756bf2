"""What a user of a Slurm sees of it: its nodes and limits, and the places of jobs in its queue."""

import errno
import math
import os
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import dask
from dask.utils import format_bytes

from hpclab._arguments import clock, seconds
from hpclab.queues import Request
from hpclab.slurm.states import ENDED, fields

PATIENCE_SECONDS = 20
"""How long Slurm's commands may take before it counts as out of reach."""
OVER = ENDED | {"COMPLETING", "SPECIAL_EXIT"}
"""States of jobs that have ended, or are about to."""
_NODE = "partition=partition name=nodelist address=nodeaddr cpus=cpus memory=memory limit=time"
_JOB = "job=jobarrayid state=state partition=partition reason=reason"


@dataclass(frozen=True)
class Node:
    """A node, as one of a partition."""

    partition: str
    default: bool
    """Whether jobs that name no partition go there."""
    name: str
    address: str
    cpus: int
    memory: float
    """Bytes; infinite where the site hasn't configured it."""
    limit: float
    """Seconds that a job may run there."""


@dataclass(frozen=True)
class Standing:
    """Where a job is in the queue."""

    state: str
    reason: str
    number: int | None
    """Its number among those that wait for the same partition, from 1, if it waits."""

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in OVER

    def __str__(self) -> str:
        if self.number is None:
            return self.state
        ending = "th" if self.number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(self.number % 10, "th")
        why = "" if self.reason == "None" else f" ({self.reason})"  # None: it has just come
        return f"{self.number}{ending} in the queue, {self.state}{why}"


def nodes(env: Mapping[str, str] | None) -> list[Node]:
    """All nodes, once for each of their partitions.

    Parameters
    ----------
    env : mapping or None
        Environment of Slurm's commands; None: this process'.

    Raises
    ------
    OSError
        If no Slurm answers; the message has its words.
    """
    listed = []
    for row in fields(partial(_ask, env), ["sinfo", "--Node"], _NODE):
        memory = int(row["memory"]) * 2**20 if int(row["memory"]) > 1 else math.inf  # 1: Slurm's default
        limits = {"cpus": int(row["cpus"]), "memory": memory, "limit": seconds(row["limit"]) or math.inf}
        name = row["partition"].rstrip("*")
        listed.append(Node(**row | limits | {"partition": name, "default": name != row["partition"]}))
    return listed


def places(env: Mapping[str, str] | None) -> dict[str, Standing]:
    """Where each of this user's jobs is in the queue, by its id; those that ended long ago are forgotten.

    Raises
    ------
    OSError
        As `nodes`.
    """
    ask = partial(fields, partial(_ask, env), wanted=_JOB)
    jobs = ask(["squeue", f"--user={os.getuid()}", "--states=all"])
    numbers: dict[tuple[str, str], int] = {}  # of jobs that wait, from 1 in each partition
    if partitions := {row["partition"] for row in jobs if row["state"] == "PENDING"}:
        ahead: Counter[str] = Counter()
        for row in ask(["squeue", "--states=PENDING", f"--partition={','.join(partitions)}", "--sort=-p,i"]):
            ahead[row["partition"]] += 1
            numbers[row["partition"], row["job"]] = ahead[row["partition"]]
    return {
        row["job"]: Standing(row["state"], row["reason"], numbers.get((row["partition"], row["job"]))) for row in jobs
    }


def check(request: Request, queue: str | None, available: list[Node]) -> None:
    """Refuse what could never start.

    Raises
    ------
    ValueError
        If partition, walltime, cores, memory or number of workers are more than there is; the message says what is.
    """
    names = sorted({node.partition for node in available})
    if unknown := [name for name in (queue or "").split(",") if name and name not in names]:
        raise ValueError(f"queue (={unknown[0]!r}) must be a partition of this Slurm: {', '.join(names)}.")
    chosen = [node for node in available if (node.partition in queue.split(",") if queue else node.default)]
    if not chosen:
        raise ValueError(f"queue (={queue!r}) must be given, as this Slurm has no default: {', '.join(names)}.")
    where = ",".join(dict.fromkeys(node.partition for node in chosen))
    if request.seconds > (limit := max(node.limit for node in chosen)):
        raise ValueError(f"walltime (={request.walltime!r}) exceeds the {clock(limit)} of partition {where}.")
    if request.cores > (most := max(node.cpus for node in chosen)):
        raise ValueError(f"cores (={request.cores}) exceed the {most} of any node in partition {where}.")
    fitting = {node.name: node for node in chosen if node.cpus >= request.cores}.values()
    asks = not any("--mem" in word for word in dask.config.get("jobqueue.slurm.job-directives-skip", ()))
    if asks and request.bytes > (memory := max(node.memory for node in fitting)):
        raise ValueError(
            f"memory (={request.memory!r}) exceeds the {format_bytes(int(memory))} of any node with {request.cores}"
            f" CPUs in partition {where}."
        )
    need = request.bytes if asks else 1
    room = sum(int(min(node.cpus // request.cores, node.memory // need)) for node in fitting)
    if request.workers > room:
        raise ValueError(
            f"workers (={request.workers}) of {request.cores} CPUs and {format_bytes(request.bytes)} exceed the {room}"
            f" that partition {where} takes at once."
        )


def _ask(cluster: Mapping[str, str] | None, *words: str, env: Mapping[str, str]) -> str:
    """Run one of Slurm's commands in a cluster's environment, with more in it; returns what it prints."""
    command = words[0]
    conf = (cluster or {}).get("SLURM_CONF")
    if conf and not os.path.exists(conf):  # Slurm itself would look for others, for a long time
        raise ConnectionError(f"its settings, {conf}, are gone")
    try:
        environment = {**(os.environ if cluster is None else cluster), **env}
        process = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    except (FileNotFoundError, NotADirectoryError):  # the latter if PATH names what is no folder
        raise FileNotFoundError(f"{command} is not installed") from None
    except OSError as error:  # "Permission denied" also if PATH names a folder that this user can't enter
        if error.errno not in (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP):  # such as no memory, no more processes
            raise
        raise FileNotFoundError(f"{command} is nowhere on PATH where it can be run ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command} gave no answer in {PATIENCE_SECONDS} s") from None
    if process.returncode:
        raise ConnectionError(process.stderr.strip() or f"{command} failed ({process.returncode})")
    return process.stdout
