"""What is asked of a job queue, in one way for all of them, and the job script that comes of it."""

import math
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dask
from dask.utils import format_bytes
from distributed import Security

from hpclab import machine, sites
from hpclab._arguments import clock, plain, seconds, size, whole_number

# Dask samples the stacks of each worker 100 times a second and ticks 50 times: on a machine whose CPUs all train, every
# wake-up makes a rank late, and the others wait for it.
QUIET = {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "200ms"}

LEAST_MEMORY = 128 * 2**20
"""Bytes below which Dask would pause or restart a worker that does nothing."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a queue: a job for each worker."""

    kind: str
    """The queue's kind, one of `QUEUES`."""
    workers: int = 2
    """Number of workers, each a job of its own and so with room for one rank."""
    memory: int | str = "2GB"
    """Memory of each worker, in bytes or as "2GB"."""
    cores: int = 1
    """CPUs of each worker, and its threads."""
    walltime: str | int = "00:30:00"
    """How long each job may run, as "HH:MM:SS" or in seconds. A worker whose job has ended gets a new one."""
    queue: str | None = None
    """Which queue (partition) of the site. Default: the site's choice."""
    account: str | None = None
    """The account (project) that pays. Default: the site's choice."""
    resources: str | None = None
    """The site's own words for CPUs and memory, what follows ``-l``. Default: made of `cores` and `memory`."""
    disk: int | str = "1GB"
    """Scratch disk of each worker, in bytes or as "1GB"."""
    directives: Sequence[str] = ()
    """Further directives without their prefix, such as "--gres=gpu:1" for Slurm and "key = value" for HTCondor."""
    prologue: Sequence[str] = ()
    """Lines of shell that each job runs before its worker, such as "module load python"."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the workers. They are in the job script, which others may read: no secrets, please."""
    interface: str | None = None
    """Network interface that scheduler and workers listen on, such as "ib0". Default: the scheduler listens on the one
    address by which this machine reaches its network, and workers where Dask chooses."""
    folder: str | Path | None = None
    """Folder of the jobs' logs, on a disk that the nodes see. Default: one in the user's cache, removed at the end."""
    timeout: float | None = 600
    """Seconds to wait for all workers; None waits for ever."""
    private: bool = False
    """Whether to start a Slurm on this machine for it, which ends with it."""

    @property
    def bytes(self) -> int:
        """Memory of each worker, in bytes."""
        return size("memory", self.memory)

    @property
    def seconds(self) -> int:
        """The walltime in seconds."""
        if isinstance(self.walltime, int):  # also what YAML makes of 12:00:00 without quotes
            return self.walltime
        # Of what Slurm reads, only what other queues read alike: "30:00" is half an hour for it, and 30 for LSF.
        return seconds(self.walltime) or 0 if str(self.walltime).count(":") == 2 else 0

    @property
    def clock(self) -> str:
        """The walltime as HH:MM:SS."""
        return clock(self.seconds)


def _place(request: Request, account: str = "account") -> dict[str, Any]:
    return {"queue": request.queue, account: request.account, "walltime": request.clock}


def _slurm(request: Request) -> dict[str, Any]:
    # Mebibytes: dask-jobqueue would ask 3 GiB for 2.1, which no node may have. And a lost job is submitted anew at once
    # (`cluster.jobs`); Slurm's own way takes two minutes.
    return _place(request) | {"job_mem": f"{request.bytes // 2**20}M", "job_extra_directives": ["--no-requeue"]}


def _pbs(request: Request) -> dict[str, Any]:
    return _place(request) | {"resource_spec": request.resources}


def _moab(request: Request) -> dict[str, Any]:
    # dask-jobqueue would write PBS Professional's select=, which Moab doesn't know.
    spec = f"nodes=1:ppn={request.cores},mem={math.ceil(request.bytes / 2**20)}mb"
    return _place(request) | {"resource_spec": request.resources or spec}


def _sge(request: Request) -> dict[str, Any]:
    if request.cores > 1 and not any(directive.startswith("-pe ") for directive in request.directives):
        raise ValueError(
            f"cores (={request.cores}) of an sge job need the name of one of the site's parallel environments, which"
            f" `qconf -spl` lists; use directives=['-pe NAME {request.cores}']."
        )
    spec = request.resources or f"mem_free={math.ceil(request.bytes / 2**20)}M"
    return _place(request, "project") | {"resource_spec": spec}


def _lsf(request: Request) -> dict[str, Any]:
    minutes = math.ceil(request.seconds / 60)
    clock = f"{minutes // 60:02d}:{minutes % 60:02d}"
    return _place(request, "project") | {"walltime": clock}


def _oar(request: Request) -> dict[str, Any]:
    # Each site has its own property for a node's memory: it configures that, or users give a directive '-p ...'.
    memory = dask.config.get("jobqueue.oar.memory-per-core-property-name") or "not_applicable"
    return _place(request, "project") | {"resource_spec": request.resources, "memory_per_core_property_name": memory}


def _htcondor(request: Request) -> dict[str, Any]:
    account = [f"accounting_group = {request.account}"] if request.account else []
    return {"disk": str(request.disk), "job_extra_directives": account}


@dataclass(frozen=True)
class Queue:
    """How a kind of queue is asked, through dask-jobqueue."""

    job: str
    """Name of dask-jobqueue's class of a job."""
    command: str
    """The program that submits a job."""
    own: str
    """Options that not every queue has."""
    translate: Callable[[Request], dict[str, Any]]
    """Gives the class' own arguments."""


QUEUES = {
    "slurm": Queue("SLURMJob", "sbatch", "walltime queue account private", _slurm),
    "pbs": Queue("PBSJob", "qsub", "walltime queue account resources", _pbs),
    "sge": Queue("SGEJob", "qsub", "walltime queue account resources", _sge),
    "lsf": Queue("LSFJob", "bsub", "walltime queue account", _lsf),
    "oar": Queue("OARJob", "oarsub", "walltime queue account resources", _oar),
    "htcondor": Queue("HTCondorJob", "condor_submit", "account disk", _htcondor),
    "moab": Queue("MoabJob", "msub", "walltime queue account resources", _moab),
}
_OWN = {name for queue in QUEUES.values() for name in queue.own.split()}


def ask(where: str, options: Mapping[str, Any]) -> Request:
    """Make a checked request of the name of a queue, or of a site's profile, and of options, which go before its own.

    Raises
    ------
    ValueError
        If there is no such queue or profile, if it has no such option, or if an option can't be so.
    """
    profiles = sites.read()
    profile = {queue: {"kind": queue} for queue in QUEUES} | profiles
    if where not in profile:
        raise ValueError(
            f"where (={where!r}) must be 'local', the address of a Dask scheduler, 'tls://host:port', a queue"
            f" ({', '.join(QUEUES)}), or a site's profile ({', '.join(profiles) or 'none is here'})."
        )
    return request(where, profile[where], options)


def request(where: str, profile: Mapping[str, Any], options: Mapping[str, Any]) -> Request:
    """Make a checked request of a profile and of options, which go before it; errors name it as `where`."""
    if "kind" in options or profile["kind"] not in QUEUES:
        kind = options.get("kind", profile["kind"])
        raise ValueError(f"kind (={kind!r}) of {where} must be one of {', '.join(QUEUES)}, and be set in its profile.")
    wishes = {**profile, **options}
    _refuse_unknown(where, wishes)
    asked = Request(**{name: plain(value) for name, value in wishes.items()})
    _check(asked)
    return asked


def _refuse_unknown(where: str, wishes: dict[str, Any]) -> None:
    specific = QUEUES[wishes["kind"]].own.split()
    names = [option.name for option in fields(Request) if option.name not in _OWN or option.name in specific]
    for name, value in wishes.items():
        if name not in names:
            defaults = Request(kind=wishes["kind"])
            shown = ", ".join(f"{option}={getattr(defaults, option)!r}" for option in names[1:])
            raise ValueError(f"{name} (={value!r}) isn't an option of {where}; it has {shown}.")


def _check(request: Request) -> None:
    for name in ("workers", "cores"):
        whole_number(name, getattr(request, name))
    for name, least in (("memory", LEAST_MEMORY), ("disk", 1)):
        if size(name, value := getattr(request, name)) < least:
            raise ValueError(f"{name} (={value!r}) must be at least {format_bytes(least)}.")
    if request.seconds < 1:
        raise ValueError(f"walltime (={request.walltime!r}) must be 'HH:MM:SS', such as '01:30:00', or seconds.")
    for name in ("queue", "account", "resources", "interface"):
        value = getattr(request, name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} (={value!r}) must be text, in quotes.")
    for name in ("directives", "prologue"):
        value = getattr(request, name)
        if isinstance(value, str) or not all(isinstance(line, str) for line in value):
            raise ValueError(f"{name} (={value!r}) must be a list of lines.")
    if not isinstance(request.env, Mapping):
        raise ValueError(f"env (={request.env!r}) must be a dictionary of names and values.")
    if request.kind == "htcondor" and not all("=" in line for line in request.directives):
        raise ValueError(f"directives (={request.directives!r}) of htcondor must be lines 'key = value'.")
    if request.timeout is not None and not (isinstance(request.timeout, int | float) and request.timeout > 0):
        raise ValueError(f"timeout (={request.timeout!r}) must be seconds > 0, or None for no end.")


def script(where: str, *, security: Security | bool = True, **options: Any) -> str:
    """Return the job script that `hpclab.connect` would submit for each worker, without starting anything.

    Parameters
    ----------
    where : str
        A queue or a site's profile, as for `hpclab.connect`.
    security, **options
        As for `hpclab.connect`.

    Returns
    -------
    str
        The script, with ``<scheduler>`` where there will be the scheduler's address, and ``<folder>`` for a folder that
        only this user can enter.

    Notes
    -----
    hpclab's tests run those for Slurm on a real one. Those for PBS, SGE, LSF, OAR, HTCondor and Moab were compared line
    by line with the documentation of these queues, and that is all that was checked.

    Examples
    --------
    >>> print(script("slurm", queue="teaching", cores=2, walltime="01:00:00"))  # doctest: +ELLIPSIS
    #!/usr/bin/env bash
    <BLANKLINE>
    #SBATCH -J hpclab
    #SBATCH -e <folder>/hpclab-%J.err
    #SBATCH -o <folder>/hpclab-%J.out
    #SBATCH -p teaching
    #SBATCH -n 1
    #SBATCH --cpus-per-task=2
    #SBATCH --mem=1907M
    #SBATCH -t 01:00:00
    #SBATCH --no-requeue
    ...
    """
    request = ask(where, options)
    shown = "<folder>"
    if request.folder is not None:
        shown = _written(request.kind, check_folder(request.kind, Path(request.folder).expanduser()))
    with tempfile.TemporaryDirectory() as folder:  # dask-jobqueue would make the logs' folder here and now
        tls: dict[str, Any] = {}
        if security:
            files = Security(**{f"tls_{name}": f"<folder>/{name}.pem" for name in WORKER_TLS})
            tls = {"protocol": TLS, "security": files}
        job = job_class(request.kind)("<scheduler>", name="hpclab-0", **job_options(request, folder), **tls)
        text = job.job_script().replace(_written(request.kind, folder), shown)
        return re.sub(r"(''|')(<folder>/\w+\.pem)\1", r"\2", text)  # not quoted just for its brackets


TLS = "tls"
"""Not "tls://", dask-jobqueue's own: with that, a worker takes the address of its default route, not that on its
way to the scheduler (distributed 2026.8)."""
WORKER_TLS = ("ca_file", "worker_cert", "worker_key")
"""What a worker needs to be let in: names of arguments of `distributed.Security`, after ``tls_``."""


@cache
def jobqueue() -> Any:
    """Import dask-jobqueue, which fills Dask's configuration with defaults (and writes the user a template of them).

    It would also make Ctrl-C end this program without a word, and fail outside of the main thread (0.9.0).
    """
    with patch.object(signal, "signal"):
        return import_module("dask_jobqueue")


@cache
def job_class(kind: str) -> Any:
    """Return dask-jobqueue's class of a job, which writes paths so that the job's shell and the queue read them."""
    base: Any = getattr(getattr(jobqueue(), kind), QUEUES[kind].job)

    class Job(base):
        job_header: str

        def __init__(self, *arguments: Any, security: Security | None = None, **options: Any):
            # dask-jobqueue puts the paths of files into a worker's command as they are.
            quoted = security and change_files(security, lambda _, path: shlex.quote(path))
            super().__init__(*arguments, security=quoted, **options)
            if kind == "slurm":
                self.job_header = self.job_header.replace(self.log_directory, _written(kind, self.log_directory))

    return Job


def change_files(security: Security, change: Callable[[str, str], str]) -> Security:
    """Return the same, with other texts or paths in what a worker needs; `change` takes the name and what is there."""
    changed = copy(security)
    for name in WORKER_TLS:
        if value := getattr(security, f"tls_{name}"):
            setattr(changed, f"tls_{name}", change(name, value))
    return changed


def _written(kind: str, folder: str | Path) -> str:
    """A folder of logs in the header of a script: Slurm takes quotes, and % for a pattern unless it is doubled."""
    text = str(folder)
    if kind != "slurm" or not _ODD.search(text):
        return text
    return '"' + text.replace("%", "%%").replace('"', '\\"') + '"'


_ODD = re.compile(r"[^/\w.+@=~-]")
"""What needs quotes somewhere."""


def check_folder(kind: str, folder: Path) -> Path:
    """Return a folder of logs, absolute, if the script of a job can name it.

    Raises
    ------
    ValueError
        If it can't.
    """
    path = folder.absolute()
    sign = re.search(r"[\n\\]", str(path)) if kind == "slurm" else _ODD.search(str(path))
    if sign:
        raise ValueError(
            f"folder (={str(path)!r}) of the jobs' logs contains {sign[0]!r}, which {kind} may misread; use folder="
            " with a path that doesn't contain it."
        )
    return path


def job_options(request: Request, folder: str | Path) -> dict[str, Any]:
    """Return arguments of `job_class` for a request with logs in a folder; the rest is up to Dask's configuration."""
    jobqueue()
    site = dask.config.get(f"jobqueue.{request.kind}")
    specific = {name: value for name, value in QUEUES[request.kind].translate(request).items() if value is not None}
    if request.kind == "oar":  # dask-jobqueue leaves its logs in the working folder
        specific["job_extra_directives"] = [f"-O {folder}/hpclab-%jobid%.out", f"-E {folder}/hpclab-%jobid%.err"]
    # A worker's own web server is not encrypted: only its node may reach it.
    arguments = [*site["worker-extra-args"], "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    if request.kind == "slurm":  # a virtual node of `hpclab.slurm` has an address of its own
        arguments.append("${HPCLAB_NODE_ADDRESS:+--host $HPCLAB_NODE_ADDRESS}")
    ends = [f"export {machine.ENDS}=$(($(date +%s) + {request.seconds}))"] if "walltime" in specific else []
    if request.kind in ("pbs", "moab"):  # others start jobs where they were submitted, and so find modules there
        ends.append('cd "$PBS_O_WORKDIR"')
    quiet = {f"DASK_{name.replace('.', '__').upper()}": value for name, value in QUIET.items()}
    env = [f"export {name}={shlex.quote(str(value))}" for name, value in {**quiet, **request.env}.items()]
    # A site may say more than the path of a program, such as "module run python".
    python = site["python"] or shlex.quote(sys.executable)
    common = {
        "python": python,
        "cores": request.cores,
        "memory": str(request.bytes),
        "processes": 1,
        "interface": request.interface,
        "job_name": "hpclab",
        "log_directory": str(folder),
        "worker_extra_args": arguments,
        "job_script_prologue": [*ends, *site["job-script-prologue"], *request.prologue, *env],
    }
    directives: Any = [*specific.pop("job_extra_directives", []), *request.directives]
    if request.kind == "htcondor":
        directives = dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in directives)
        return {**common, **specific, "job_extra_directives": {**site["job-extra-directives"], **directives}}
    return {**common, **specific, "job_extra_directives": [*site["job-extra-directives"], *directives]}
