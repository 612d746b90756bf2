"""What Slurm's squeue and sinfo say, as rows; of a private one and of a site's."""

import time
from collections.abc import Callable
from contextlib import suppress

from hpclab._arguments import seconds, size
from hpclab.language import translate as _
from hpclab.tables import Table

ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
"""States of jobs that have ended; of one that is COMPLETING, processes still end, and squeue doesn't say as what."""
IN_USE = {"idle", "mixed", "allocated", "completing"}
"""States of nodes that jobs can have. Slurm 24.11 keeps the reason why one had been drained till the next job on it."""
TRIES = 3
"""How often nodes and jobs are read for one moment, on a Slurm that is never still."""
NEVER_SECONDS = 365 * 86400
"""What Slurm gives a job where there is no limit."""
_MARK = "\x1f"  # no name holds it
_FLAGS = "*~#!%$@^-"
"""What sinfo adds to a node's state, such as a "*" where it doesn't answer."""
_WIDTH = 255
_NODE = """
    node=nodelist address=nodeaddr state=statelong reason=reason since_s=timestamp cpus=cpusstate cpus_used=cpusstate
    memory_mb=memory memory_used_mb=allocmem partitions=partitionname
"""
_JOB = """
    job=jobid array=jobarrayid name=name partition=partition state=state reason=reason nodes=nodelist
    submitted_s=submittime expected_s=starttime started_s=starttime ended_s=endtime walltime_s=timelimit cpus=tres-alloc
    memory_mb=tres-alloc priority=prioritylong restarts=restartcnt exit_code=exit_code
"""
"""The fields of our rows, and what sinfo and squeue call each; see ``-O`` in their manuals."""

Run = Callable[..., str]
"""Runs a command, with further variables of its environment in `env`, and returns what it prints."""


def fields(run: Run, command: list[str], wanted: str) -> list[dict]:
    """Ask sinfo or squeue for some fields of each line, given as "OURS=THEIRS ..."; returns text under our names.

    Not with ``--json``, which needs a plugin that a site may lack, and whose form changes from one Slurm to the next. A
    mark after each field splits values of any length and with any other character.
    """
    names, theirs = zip(*(pair.split("=") for pair in wanted.split()), strict=True)
    form = ",".join(f"{name}:{_WIDTH}{_MARK}" for name in theirs)
    lines = run(*command, "--noheader", "-O", form, env={"SLURM_TIME_FORMAT": "%s"}).split(f"{_MARK}\n")[:-1]
    return [dict(zip(names, map(str.strip, line.split(_MARK)), strict=True)) for line in lines]


def nodes(run: Run) -> list[dict]:
    """See `hpclab.slurm.Slurm.nodes`."""
    rows: dict[str, dict] = {}
    for row in fields(run, ["sinfo", "--Node"], _NODE):
        if known := rows.get(row["node"]):  # once for each of its partitions
            known["partitions"] = ",".join(sorted([*known["partitions"].split(","), row["partitions"]]))
            continue
        allocated, _idle, _other, total = row["cpus"].split("/")
        row |= {"cpus": total, "cpus_used": allocated}
        if row["reason"] == "none" or row["state"].rstrip(_FLAGS) in IN_USE:
            row |= {"reason": None, "since_s": ""}
        numbers = ("since_s", "cpus", "cpus_used", "memory_mb", "memory_used_mb")
        rows[row["node"]] = row | {name: _number(row[name]) for name in numbers}
    return list(rows.values())


def jobs(run: Run) -> list[dict]:
    """See `hpclab.slurm.Slurm.jobs`."""
    return sorted(map(_job, fields(run, ["squeue", "-artall"], _JOB)), key=lambda row: row["job"])


def together(run: Run) -> tuple[list[dict], list[dict]]:
    """Nodes and jobs of one moment: they are read again if a node has changed meanwhile."""
    before = nodes(run)
    for _again in range(TRIES):
        found, after = jobs(run), nodes(run)
        if after == before:
            break
        before = after
    return before, found


def node_table(rows: list[dict]) -> Table:
    """Nodes for people to read."""
    return Table(
        {
            _("node"): row["node"],
            _("address"): row["address"],
            _("state"): row["state"],
            _("CPUs in use"): f"{row['cpus_used']}/{row['cpus']}",
            _("MB in use"): f"{row['memory_used_mb']}/{row['memory_mb']}",
            _("partitions"): row["partitions"],
            _("reason"): row["reason"],
        }
        for row in rows
    )


def job_table(rows: list[dict]) -> Table:
    """Jobs for people to read; without their partition where all have the same, or their reason where none has one."""
    partition = {_("partition")} if len({row["partition"] for row in rows}) == 1 else set()
    left_out = partition if any(row["reason"] for row in rows) else partition | {_("reason")}
    table = [
        {
            _("job"): row["array"] or row["job"],
            _("name"): row["name"],
            _("partition"): row["partition"],
            _("state"): row["state"],
            _("nodes"): row["nodes"],
            _("CPUs"): row["cpus"],
            _("submitted"): _clock(row["submitted_s"]),
            _("started"): _clock(row["started_s"]),
            _("ended"): _clock(row["ended_s"]),
            _("reason"): row["reason"],
        }
        for row in rows
    ]
    return Table({name: cell for name, cell in row.items() if name not in left_out} for row in table)


def _clock(epoch: int | None) -> str | None:
    return None if epoch is None else time.strftime("%H:%M:%S", time.localtime(epoch))


def _job(row: dict) -> dict:
    ended, limit = row["state"] in ENDED, seconds(row["walltime_s"])
    numbers = ("job", "submitted_s", "expected_s", "started_s", "ended_s", "priority", "restarts")
    row |= {name: _number(row[name]) for name in numbers} | _resources(row["cpus"])
    return row | {
        "array": row["array"] if "_" in row["array"] else None,
        "reason": None if row["reason"] == "None" else row["reason"],
        "nodes": row["nodes"] or None,
        "expected_s": row["expected_s"] if row["state"] == "PENDING" else None,
        "started_s": row["started_s"] if row["nodes"] else None,  # one that was cancelled in the queue has a start too
        "ended_s": row["ended_s"] if ended else None,
        "walltime_s": limit if limit and limit < NEVER_SECONDS else None,
        "exit_code": exit_code(row["exit_code"]) if ended else None,
        "source": "measured",
    }


def exit_code(text: str) -> str:
    """Exit code and signal of a job: so squeue of Slurm 24.11 gives them, that of 22.05 as a status of wait().

    >>> exit_code("256"), exit_code("15"), exit_code("143:0")
    ('1:0', '0:15', '143:0')
    """
    return text if ":" in text else f"{int(text) >> 8}:{int(text) & 127}"


def _resources(tres: str) -> dict:
    """CPUs and memory from "cpu=2,mem=1.50G,node=1,billing=2"."""
    amounts = dict(part.partition("=")[::2] for part in tres.split(","))
    row = {"cpus": _number(amounts.get("cpu", "")), "memory_mb": None}
    with suppress(ValueError):  # there is no memory in it
        row["memory_mb"] = round(size("mem", amounts.get("mem", "") + "iB") / 2**20)  # Slurm's "G" is "GiB" here
    return row


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
