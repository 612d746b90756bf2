"""A Dask cluster whose workers are jobs of a queue; a lost one gets a new job."""

import asyncio
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dask
import platformdirs
import psutil
from distributed import Security, Status
from distributed.utils import get_ip
from tqdm.auto import tqdm

from hpclab import _namesakes, _private, machine, queues, slurm
from hpclab.cluster import site, tls
from hpclab.cluster.healing import LOST_SECONDS, Tended
from hpclab.queues import QUEUES, QUIET, Request
from hpclab.slurm.private import Slurm

LOOK_SECONDS = 0.5
"""How often a private Slurm is asked about missing workers' jobs."""
SITE_LOOK_SECONDS = 15.0
"""How often a site's queue is, which others ask too."""
STEADY_SECONDS = 60.0
"""A worker that lived for so long, or for half of its walltime, didn't die of its start."""
NO_SLURM = "configuration source"
"""In what Slurm's commands say where no Slurm is configured."""
LOOK_UPS = 3
"""Nodes whose names are looked up to find the way there."""
LIVES = 3
"""Early deaths in a row after which a worker gets no new job."""
LOG_LINES = 15
"""Of a job's log that an error shows."""

logger = logging.getLogger("hpclab")


def submit(where: str | Slurm, security: Security | bool, options: Mapping[str, Any]) -> "JobCluster":
    """Submit a job for each worker; see `hpclab.connect`. `JobCluster.wait` waits for them."""
    if isinstance(where, str):
        request = queues.ask(where, options)
    else:
        request = queues.request("slurm", {"kind": "slurm"}, options)  # what a profile says is of the site's
    with ExitStack() as stack:
        env, host, virtual = None, None, False
        if request.kind == "slurm":
            env, host, virtual = _reach(request, where, stack)
        elif not shutil.which(QUEUES[request.kind].command):
            raise FileNotFoundError(
                f"where (={where!r}) needs {QUEUES[request.kind].command}, which isn't on this machine."
            )
        cache = platformdirs.user_cache_path("hpclab", ensure_exists=True)
        own_folder = _temporary(f"jobs-{socket.gethostname()}-", cache, stack)
        folder = own_folder if request.folder is None else Path(request.folder).expanduser()
        folder = queues.check_folder(request.kind, folder)
        folder.mkdir(parents=True, exist_ok=True)
        certificates = _on_disk(tls.temporary() if security is True else security, own_folder) if security else None
        if virtual:  # a virtual node's disk is this machine's, where what a killed worker left would stay
            scratch = _temporary("jobs-", _private.folder(), stack)
            request = replace(request, env={"TMPDIR": str(scratch), **request.env})
        with dask.config.set(QUIET):
            cluster = JobCluster(request, env, host, virtual, folder, certificates)
        cluster.after = stack.pop_all()
        return cluster


def _reach(request: Request, where: str | Slurm, stack: ExitStack) -> tuple[Mapping[str, str] | None, str | None, bool]:
    """Find a Slurm, and check that it can meet the request.

    Returns the environment of its commands, None for that of this process; the address at which its nodes reach this
    machine, None if that isn't known; and whether they are virtual nodes of this machine.
    """
    env: Mapping[str, str] | None = where.env if isinstance(where, Slurm) else None
    if request.private and env is None:
        if request.workers > machine.most():
            raise ValueError(
                f"workers (={request.workers}) exceed the {machine.most()} that fit into this machine's memory."
            )
        private = slurm.start(nodes=request.workers, cpus=request.cores, memory=request.bytes)
        env = stack.enter_context(private).env
    try:
        nodes = site.nodes(env)
    except OSError as error:
        if env is not None:
            raise ConnectionError(f"where (={where!r}) doesn't answer: {error}; stop it, and start another.") from None
        none = isinstance(error, ConnectionError) and NO_SLURM in str(error)
        private_slurm = slurm.find() if none else None  # where the site has one, another is never taken without a word
        if private_slurm is None:
            raise ConnectionError(
                f"where (={where!r}): no Slurm answers here ({error}); private=True starts one on this machine."
            ) from None
        env = private_slurm.env
        nodes = site.nodes(env)
    site.check(request, request.queue or dask.config.get("jobqueue.slurm.queue", None), nodes)
    virtual = all(node.address.startswith("127.") for node in nodes)
    return env, "127.0.0.1" if virtual else _facing([node.address for node in nodes[:LOOK_UPS]]), virtual


def _facing(hosts: list[str]) -> str | None:
    """This machine's address on its way to some hosts, which need not be that of its default route."""
    for host in hosts:
        with suppress(OSError):  # a name that isn't known here, or no way there
            family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(place)  # which sends nothing
                address = probe.getsockname()[0]
            if not ip_address(address.partition("%")[0]).is_loopback:  # as a node on this machine is reached
                return address
    return None


def _temporary(prefix: str, base: Path, stack: ExitStack) -> Path:
    """Make a folder for this user alone that goes in the end, and remove those of processes that were killed."""
    for leftover in base.iterdir():
        owner = re.fullmatch(rf"{re.escape(prefix)}(\d+)-\w+", leftover.name)
        if owner and not psutil.pid_exists(int(owner[1])):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=base))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _on_disk(security: Security, private: Path) -> Security:
    """Return the same, with what workers read in files of a folder that only this user can enter."""

    def write(name: str, value: str) -> str:
        if "\n" not in value:  # a path already
            return value
        path = private / f"{name}.pem"
        path.touch(mode=0o600)
        path.write_text(value)
        return str(path)

    return queues.change_files(security, write)


@dataclass
class _Life:
    """What became of a worker, over all of its jobs."""

    came: float | None = None
    """When that of the present job came."""
    left: float | None = None
    """Since when it has been away."""
    deaths: int = 0
    """Jobs in a row that ended early."""


class JobCluster(Tended, queues.jobqueue().JobQueueCluster):  # type: ignore[misc]
    """A cluster of jobs; see `submit`."""

    def __init__(
        self,
        request: Request,
        env: Mapping[str, str] | None,
        host: str | None,
        virtual: bool,
        folder: Path,
        security: Security | None,
    ):
        self.request = request
        self.folder = folder
        self.trouble: str | None = None
        """Why workers are missing for good."""
        self.places: dict[str, site.Standing] | None = None
        """Where this user's jobs are in the queue, if it can say."""
        self._ask_places: Callable | None = site.places if request.kind == "slurm" else None
        self._silence = ""
        """Why the queue doesn't answer, if it doesn't."""
        self.pause = LOOK_SECONDS if virtual else SITE_LOOK_SECONDS
        self._env = env
        self.after = ExitStack()
        """What to clear away in the end."""
        self._lives: dict[str, _Life] = {}
        self._buried: list[str] = []
        """Jobs that were lost."""
        self._ready = False
        options = queues.job_options(request, folder)
        defaults = dask.config.get(f"jobqueue.{request.kind}")
        listen: dict[str, Any] = {"dashboard_address": "127.0.0.1:0"} | defaults["scheduler-options"]
        if not (request.interface or defaults["interface"] or {"host", "interface"} & listen.keys()):
            listen["host"] = host or get_ip()
        super().__init__(  # type: ignore[call-arg]
            job_cls=_job_class(request.kind, env),
            name="hpclab",
            security=security,
            protocol=queues.TLS if security else None,
            scheduler_options=listen,
            **options,
        )
        self.scale(request.workers)

    def wait(self) -> None:
        """Wait until all workers are here, and show meanwhile what they wait for.

        Raises
        ------
        TimeoutError
            If they aren't within `Request.timeout`.
        RuntimeError
            If the queue refuses a job, or a worker dies again and again; with its words, or the end of the job's log.
        """
        wanted, timeout = self.request.workers, self.request.timeout
        until = None if timeout is None else time.monotonic() + timeout
        with tqdm(total=wanted, desc="workers", unit="worker", leave=False) as bar:
            while (came := len(self.scheduler.workers)) < wanted:
                standing = self.standing()
                if self.trouble:
                    raise RuntimeError(self.trouble)
                if until is not None and time.monotonic() > until:
                    raise TimeoutError(
                        f"{came} of {wanted} workers joined within timeout (={timeout}) seconds: {standing}. All jobs"
                        " have been cancelled; use a longer timeout=, or ask for less."
                        + self._log([*self._buried, *self._ids()])
                    )
                if (bar.n, bar.postfix) != (came, standing):
                    bar.n = came
                    bar.set_postfix_str(standing)
                time.sleep(0.05)
            bar.n = wanted  # else tqdm leaves it in the notebook, red, as a failure
        self._ready = True

    def standing(self) -> str:
        """What the jobs of missing workers wait for, such as "job 12 is 4th in the queue, PENDING (Resources)"."""
        present = {worker.name for worker in list(self.scheduler.workers.values())}
        places = self.places or {}
        alike: dict[str, list[str]] = {}
        for job in sorted(self._ids(without=present), key=lambda job: (len(job), job)):
            alike.setdefault(str(places.get(job, "submitted")), []).append(job)
        words = [f"job{'s' * (len(jobs) > 1)} {', '.join(jobs)}: {place}" for place, jobs in alike.items()]
        words += [f"the queue doesn't answer ({self._silence})"] * bool(self._silence)
        return "; ".join(words) or "submitting jobs"

    def _ids(self, without: Iterable = ()) -> list[str]:
        """Ids of jobs in the queue, but for those of some workers."""
        return [job.job_id for name, job in list(self.workers.items()) if name not in without and job.job_id]

    async def _look(self) -> None:
        """Ask about the jobs, and replace those that are lost."""
        now = time.monotonic()
        present = {worker.name for worker in self.scheduler.workers.values()}
        away = {name: job for name, job in self.workers.items() if name not in present and name in self.worker_spec}
        for name in present:
            life = self._lives.setdefault(name, _Life())
            life.came, life.left = life.came or now, None
        if away and self._ask_places is not None:
            try:
                self.places, self._silence = await asyncio.to_thread(self._ask_places, self._env), ""
            except OSError as error:  # its controller is away, and may come back
                self._silence = str(error)
        for name, job in away.items():
            life = self._lives.setdefault(name, _Life())
            if life.came is not None:
                life.left = life.left or now
            lost = self._over(job) or (life.left is not None and now - life.left > LOST_SECONDS)
            if lost and self.workers.get(name) is job:  # else it was given up meanwhile
                await self._bury(name, job, life)
        if self._differs():
            await self.correct_soon()

    def _over(self, job: Any) -> bool:
        """Whether the queue says that a job has ended, or never took it."""
        if job.job_id is None:
            return True
        if self.places is None:
            return False
        return job.job_id not in self.places or self.places[job.job_id].over

    async def _bury(self, name: str, job: Any, life: _Life) -> None:
        """Take note that a worker's job is lost; it gets a new one, unless it died too often."""
        del self.workers[name]
        self._buried += [job.job_id] if job.job_id else []
        enough = min(STEADY_SECONDS, self.request.seconds / 2)
        steady = life.came is not None and time.monotonic() - life.came > enough
        life.deaths = 0 if steady else life.deaths + 1
        life.came = life.left = None
        if life.deaths == LIVES:
            self.worker_spec.pop(name, None)
            self._give_up(f"worker {name} ended early {LIVES} times; {self._last_words(job)}")
        await job.close()

    def _last_words(self, job: Any) -> str:
        place, log, hint = (self.places or {}).get(job.job_id, "gone"), self._log(filter(None, [job.job_id])), ""
        if "Timed out" in log:
            hint = (
                f"\nIts node may not reach the scheduler at {self.scheduler.address}; use interface= with the name of a"
                " network that both can reach."
            )
        if why := _namesakes.blame(log, [os.getcwd(), *sys.path]):
            hint += f"\n{why}"
        return f"its last job, {job.job_id}, is {place}.{log}{hint}"

    def _log(self, jobs: Iterable[str]) -> str:
        """End of the logs of some jobs."""
        patterns = [re.compile(rf"(?<!\d){re.escape(job)}(?!\d)") for job in jobs]  # job 1 is not job 12
        logs = filter(Path.is_file, self.folder.glob("[!.]*"))
        files = [file for file in logs if any(job.search(file.name) for job in patterns)]
        files.sort(key=lambda file: file.stat().st_mtime)
        lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
        return "\nThe end of its log:\n" * bool(lines) + "\n".join(lines[-LOG_LINES:])

    def _give_up(self, why: str) -> None:
        self.trouble = why
        if self._ready:
            logger.warning("%s", why)

    async def correct(self) -> None:
        """Submit a job for each worker that has none; what the queue says against it ends `wait`."""
        try:
            await super().correct()
        except (RuntimeError, ValueError, OSError) as error:  # its words; unreadable ones; no such command
            words = str(error).partition("stderr:\n")[2].strip()  # after all of dask-jobqueue's
            self._give_up(f"the queue refuses a job: {words or error}")

    def close(self, timeout: float | None = None) -> Any:
        """Cancel the jobs and close, then remove what was there for them."""
        try:
            return super().close(timeout)
        finally:
            self.after.close()


def _job_class(kind: str, env: Mapping[str, str] | None) -> type:
    """dask-jobqueue's class of a job, for commands that run in an environment of their own."""
    base: Any = queues.job_class(kind)
    prefix = ""
    if env is not None:
        without = [f"--unset={name}" for name in os.environ if name not in env]
        changed = [f"{name}={value}" for name, value in env.items() if os.environ.get(name) != value]
        prefix = shlex.join(["env", *without, *changed]) + " "

    class Job(base):
        submit_command = prefix + base.submit_command
        cancel_command = prefix + base.cancel_command

        @contextmanager
        def job_file(self) -> Iterator[str]:
            """Its script, where only this user can read or replace it."""
            with tempfile.NamedTemporaryFile(suffix=".sh") as file:
                file.write(os.fsencode(self.job_script()))  # paths as they are, in whatever encoding
                file.flush()
                yield file.name

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed  # else SpecCluster's close fails

    return Job
