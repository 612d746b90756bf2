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
NEVER_SECONDS = 365 * 86400
"""What Slurm gives a job where there is no limit."""
_MARK = "\x1f"  # no name holds it
_WIDTH = 255
_NODE_FIELDS = (
    *("nodelist", "nodeaddr", "statelong", "reason", "timestamp", "cpusstate", "memory", "allocmem", "partitionname"),
)
_JOB_FIELDS = (
    *("jobid", "jobarrayid", "name", "partition", "state", "reason", "nodelist", "submittime", "starttime", "endtime"),
    *("timelimit", "tres-alloc", "prioritylong", "restartcnt", "exit_code"),
)

Run = Callable[..., str]
"""Runs a command, with further variables in its environment, and returns what it prints."""


def fields(run: Run, command: list[str], names: tuple[str, ...]) -> list[dict[str, str]]:
    """Some fields of each line that sinfo or squeue prints, by their names (see ``-O`` in their manuals).

    Not ``--json``, which needs a plugin that a site may lack, and whose form changes from one Slurm to the next. A mark
    after each field splits names of any length and with any other character.
    """
    wanted = ",".join(f"{name}:{_WIDTH}{_MARK}" for name in names)
    lines = run([*command, "--noheader", "-O", wanted], SLURM_TIME_FORMAT="%s").split(f"{_MARK}\n")[:-1]
    return [dict(zip(names, map(str.strip, line.split(_MARK)), strict=True)) for line in lines]


def nodes(run: Run) -> list[dict]:
    """See `hpclab.slurm.Slurm.nodes`."""
    rows: dict[str, dict] = {}
    for row in fields(run, ["sinfo", "--Node"], _NODE_FIELDS):
        name, partition = row["nodelist"], row["partitionname"]
        if name in rows:  # once for each of its partitions
            rows[name]["partitions"] = ",".join(sorted([*rows[name]["partitions"].split(","), partition]))
            continue
        allocated, *_others, total = row["cpusstate"].split("/")
        rows[name] = {
            "node": name,
            "address": row["nodeaddr"],
            "state": row["statelong"],
            "reason": None if row["reason"] == "none" else row["reason"],
            "since_s": _number(row["timestamp"]),
            "cpus": int(total),
            "cpus_used": int(allocated),
            "memory_mb": int(row["memory"]),
            "memory_used_mb": _number(row["allocmem"]),
            "partitions": partition,
        }
    return list(rows.values())


def jobs(run: Run) -> list[dict]:
    """See `hpclab.slurm.Slurm.jobs`."""
    return sorted(map(_job, fields(run, ["squeue", "-artall"], _JOB_FIELDS)), key=lambda row: row["job"])


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
    """Jobs for people to read."""
    return Table(
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
    )


def _clock(epoch: int | None) -> str | None:
    return None if epoch is None else time.strftime("%H:%M:%S", time.localtime(epoch))


def _job(row: dict[str, str]) -> dict:
    state, start = row["state"], _number(row["starttime"])
    going, pending = state not in ENDED, state == "PENDING"
    return {
        "job": int(row["jobid"]),
        "array": row["jobarrayid"] if "_" in row["jobarrayid"] else None,
        "name": row["name"],
        "partition": row["partition"],
        "state": state,
        "reason": None if row["reason"] == "None" else row["reason"],
        "nodes": row["nodelist"] or None,
        "submitted_s": _number(row["submittime"]),
        "expected_s": start if pending else None,
        "started_s": start if row["nodelist"] else None,  # one that was cancelled in the queue has a start too
        "ended_s": None if going else _number(row["endtime"]),
        "walltime_s": limit if (limit := seconds(row["timelimit"])) and limit < NEVER_SECONDS else None,
        **_resources(row["tres-alloc"]),
        "priority": _number(row["prioritylong"]),
        "restarts": _number(row["restartcnt"]),
        "exit_code": None if going else _status(int(row["exit_code"])),
        "source": "measured",
    }


def _resources(tres: str) -> dict:
    """CPUs and memory from "cpu=2,mem=1.50G,node=1,billing=2"."""
    amounts = dict(part.partition("=")[::2] for part in tres.split(","))
    row = {"cpus": _number(amounts.get("cpu", "")), "memory_mb": None}
    with suppress(ValueError):  # it tells no memory
        row["memory_mb"] = round(size("mem", amounts.get("mem", "") + "iB") / 2**20)  # Slurm's "G" is "GiB" here
    return row


def _status(raw: int) -> str:
    """A status of wait() as "code:signal"."""
    return f"{raw >> 8}:{raw & 127}"


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
