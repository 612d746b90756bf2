"""A real Slurm of your own on this machine: no root, no container, no database, up in a moment.

Its slurmctld, its slurmds (one a virtual node) and its munged run as you, listen on the loopback only, and keep what
they have in one folder that only you can enter. They end with the process that started them, however that ends.

Virtual nodes n1, n2, ... have addresses of their own, 127.0.0.2, 127.0.0.3, ...: a job finds its node's in the
environment variable ``HPCLAB_NODE_ADDRESS``, or with `here`.

What it doesn't do: memory and CPUs are counted and not enforced (no cgroups), so a job can use more than it was given,
and virtual CPUs may exceed the real ones; there is no accounting database, so no `sacct`, no fair share and no QOS. Nor
does it restart a daemon that ends. `salloc`, unlike all else, listens on every interface while it runs (it answers
nobody without a credential of yours).
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from hpclab import _private
from hpclab.language import translate as _
from hpclab.slurm import conf, folders, programs, states
from hpclab.slurm.conf import SlurmSettings
from hpclab.slurm.folders import PATIENCE_SECONDS

ATTEMPTS = 3
"""Starts before giving up, as another program may take a port that was free a moment ago."""
TAKEN = "Address already in use"
"""What daemons write then."""
LOG_LINES = 12
"""Of a daemon's log that are shown when it ends."""
SLURMS_OWN = ("SLURM", "SBATCH_", "SALLOC_", "SQUEUE_", "SINFO_", "SCONTROL_", "SCANCEL_")
"""Variables that would change what a command does here, such as a site's defaults."""


def here() -> str | None:
    """Address of the node that this process runs on as a job's, such as "127.0.0.2"; None outside of jobs."""
    return os.environ.get("HPCLAB_NODE_ADDRESS")


class Slurm:
    """A private Slurm that is up; from `start` or `find`.

    Attributes
    ----------
    folder : Path
        Where its settings, logs and state lie; only this user can enter it.
    owner : int or None
        Process that it ends with; None if it was started detached.
    started_s : float
        When, in seconds since the epoch.
    addresses : dict
        Address of each node, by its name.
    """

    def __init__(self, folder: Path):
        facts = json.loads((folder / "about.json").read_text())
        self.folder = folder
        self.owner: int | None = facts["owner"]
        self.started_s: float = facts["started_s"]
        self.addresses: dict[str, str] = facts["nodes"]
        self._port: int = facts["port"]
        self.seen: tuple[list[dict], list[dict], float] | None = None
        """Its nodes and jobs as a view showed them last, and when (seconds since the epoch)."""
        self._keeper: subprocess.Popen | None = None  # as far as this process started it

    @property
    def env(self) -> dict[str, str]:
        """Environment in which Slurm's commands use it: this process', without what a site says there of its own."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(SLURMS_OWN)}
        path = f"{self.folder}/bin:{os.environ.get('PATH', '')}"
        return clean | {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": path}

    def __repr__(self) -> str:
        return f"<private Slurm of {len(self.addresses)} nodes in {self.folder}>"

    def __enter__(self) -> "Slurm":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(
        self,
        *words: object,
        input: str | None = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Run one of Slurm's commands on it, and return what it prints.

        Parameters
        ----------
        *words : object
            Such as ``"sbatch", "--wrap", "hostname"``.
        input : str, optional
            Text for its standard input, such as a job's script for ``sbatch``.
        cwd : path, optional
            Where it runs; default: here.
        env : mapping of str to str, optional
            Further variables of its environment.

        Raises
        ------
        RuntimeError
            If it fails, with what it said; or if this Slurm isn't up, with the end of its log.
        """
        self._check()
        command = [str(word) for word in words]
        environment = {**self.env, **(env or {})}
        process = subprocess.run(command, env=environment, cwd=cwd, input=input, capture_output=True, text=True)
        if process.returncode:
            self._check()
            raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}): {process.stderr.strip()}")
        return process.stdout

    def nodes(self) -> list[dict]:
        """All nodes; one row each.

        Returns
        -------
        list of dict
            ``node``, ``address``, ``state`` (as sinfo says it: "idle", "mixed", "allocated", "down", "drained", ...; a
            "*" after it: it doesn't answer), ``reason`` and ``since_s`` of a state that someone set (epoch), ``cpus``,
            ``cpus_used``, ``memory_mb``, ``memory_used_mb`` (of 2**20 bytes), ``partitions``.
        """
        return states.nodes(self.run)

    def jobs(self) -> list[dict]:
        """All jobs since the start, the ended ones too; one row each, by their number.

        Returns
        -------
        list of dict
            ``job`` (its id), ``array`` ("7_3" for a task of one, else None), ``name``, ``partition``, ``state`` (in
            Slurm's words: "PENDING", "RUNNING", "COMPLETED", "NODE_FAIL", ...), ``reason``, ``nodes`` (as "n[1-2]"),
            ``submitted_s``, ``expected_s`` (when the scheduler thinks that a pending one starts), ``started_s`` and
            ``ended_s`` (epoch, None if it hasn't), ``walltime_s`` (None: unlimited), ``cpus``, ``memory_mb``,
            ``priority``, ``restarts`` and ``exit_code`` (as "code:signal").

        Notes
        -----
        Slurm forgets none here within a year, and takes no more than 100,000. Its own log of those that have ended is
        ``completed`` in `folder`.
        """
        return states.jobs(self.run)

    def look(self) -> None:
        """Read nodes and jobs of one moment, for `seen`.

        Raises
        ------
        RuntimeError
            If it has ended.
        """
        self.seen = (*states.together(self.run), time.time())

    def kill(self, node: str) -> None:
        """Let a node fail, as if it lost power: its slurmd and all processes of its jobs end at once.

        Returns when Slurm marks the node as down, without a timeout: the daemons' keeper sees this one end, and tells
        Slurm, as a site's health check would. Jobs on the node are requeued, or fail if they can't be.
        """
        self._named(node)
        self._call("kill", node)
        self._until(lambda: "DOWN" in self._state(node), f"node {node} to be seen down")

    def revive(self, node: str) -> None:
        """Start a killed node again; returns when Slurm uses it again, even if it was drained before."""
        self._named(node)
        if node in self._call("alive"):
            raise ValueError(f"node (={node!r}) is up; revive those that were killed. After drain, use resume.")
        self._call("start", node)
        self.resume(node)

    def drain(self, node: str, reason: str) -> None:
        """Give a node no more jobs; its running jobs continue."""
        self._named(node)
        self.run("scontrol", "update", f"nodename={node}", "state=drain", f"reason={reason}")

    def resume(self, node: str) -> None:
        """Give a drained node jobs again; returns when the node has answered."""
        self._named(node)
        self._check(node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

        def used() -> bool:
            self._check(node)
            return not {"DOWN", "DRAIN", "NOT_RESPONDING"}.intersection(self._state(node))

        self._until(used, f"node {node} to be used again")

    def _ipython_display_(self) -> None:
        from hpclab.slurm import view

        view.follow(self)

    def status(self) -> str:
        """Nodes and jobs as text, for people to read."""
        jobs = self.jobs()
        parts = [self.folder, states.node_table(self.nodes()), states.job_table(jobs) if jobs else _("no jobs")]
        return "\n\n".join(map(str, parts))

    def stop(self) -> None:
        """End it and all its jobs' processes at once, and remove its folder; calling it twice is no error.

        If `start` was given the folder, then settings, logs and the completion log stay there.
        """
        if self.seen is not None:  # a view follows it, and shows how it was at the end
            with suppress(RuntimeError):  # it has ended already
                self.look()
        try:
            self._call("stop")
        except (ConnectionError, FileNotFoundError):  # it has ended, or lost its folder
            if self._keeper:
                self._keeper.terminate()
        if self._keeper:
            self._keeper.wait()

    def log(self, daemon: str = "slurmctld", lines: int = LOG_LINES) -> str:
        """Return the end of a daemon's log: "slurmctld", "munged", or a node's name."""
        with suppress(OSError):
            return "\n".join((self.folder / f"{daemon}.log").read_text(errors="replace").splitlines()[-lines:])
        return ""

    @property
    def up(self) -> bool:
        """Whether it is still up, though one of its daemons may have ended."""
        with suppress(TimeoutError):  # its keeper is busy
            try:
                self._call("alive")
            except (ConnectionError, FileNotFoundError):
                return False
        return True

    def _named(self, node: str) -> None:
        if node not in self.addresses:
            raise ValueError(f"node (={node!r}) must be one of {', '.join(self.addresses)}.")

    def _state(self, node: str) -> list[str]:
        """What Slurm's controller holds of a node, such as "DOWN" and "DRAIN"; sinfo mixes it up with other nodes'."""
        return self.run("scontrol", "--oneliner", "show", "node", node).split(" State=")[1].split()[0].split("+")

    def _check(self, *daemons: str) -> None:
        """Raise an error that says why daemons don't run; by default, those that a Slurm can't do without."""
        try:
            alive = self._call("alive")
        except (ConnectionError, FileNotFoundError):
            raise RuntimeError(f"the private Slurm in {self.folder} has ended; start another.") from None
        for daemon in daemons or ("munged", "slurmctld"):
            if daemon not in alive:
                way = f"revive({daemon!r})" if daemon in self.addresses else "stop it and start another"
                raise RuntimeError(
                    f"{daemon} of the private Slurm in {self.folder} has ended; {way}. The end of its log:\n"
                    f"{self.log(daemon)}"
                )

    def _call(self, *words: str) -> list[str]:
        return folders.call(self.folder, *words)

    def _until(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {PATIENCE_SECONDS} s for {what}. The end of the log:\n{self.log()}")
            time.sleep(0.01)


def start(
    nodes: int = 4,
    cpus: int = 2,
    memory: int | str = "2GiB",
    *,
    scheduler: str = "backfill",
    walltime: str | None = None,
    partitions: dict[str, dict[str, object]] | None = None,
    folder: str | Path | None = None,
    detached: bool = False,
) -> Slurm:
    """Start a private Slurm, and return when all its nodes are idle.

    Parameters
    ----------
    nodes : int, default 4
        Virtual nodes, n1, n2, ...
    cpus : int, default 2
        CPUs of each node; together they may exceed this machine's.
    memory : int or str, default "2GiB"
        Memory of each node, in bytes or with a unit, as everywhere in hpclab: "2GiB" is 2 * 2**30 bytes, which Slurm's
        own commands call "2G" or "2GB", and "2GB" is 2 * 10**9.
    scheduler : {"backfill", "builtin"}
        "backfill" goes by priority, and also starts later jobs that delay no earlier one. "builtin" is first in, first
        out, whatever a job's priority (only its partition's PriorityTier counts).
    walltime : str, optional
        The longest walltime that a job may ask for, such as "00:30:00", and the default for jobs that don't ask. Slurm
        counts in minutes and checks twice a minute. Default: no limit.
    partitions : dict, optional
        Options of each partition, by name, as in slurm.conf, such as ``{"short": {"MaxTime": 5, "PriorityTier": 2},
        "long": {"Nodes": "n1,n2"}}``. The first partition is the default; each has all nodes, and `walltime` as its
        MaxTime, unless it says otherwise. Default: one partition, "main".
    folder : path, optional
        Where it keeps its files; new or empty. Its settings and logs stay there after the end. Default: a private
        folder among the temporary files, which is removed.
    detached : bool, default False
        Whether it outlives this process, until `stop` (any process of this user can call it, with `find`).

    Returns
    -------
    Slurm
        Use it in a ``with`` block, or call its `stop`.

    Raises
    ------
    ValueError
        If an argument is wrong.
    FileNotFoundError
        If a program is missing; the message has the line that installs it.
    RuntimeError
        If a daemon doesn't start, with the end of its log.
    """
    settings = SlurmSettings(nodes, cpus, memory, scheduler, walltime, partitions or {"main": {}})
    paths = programs.find()
    for tries_left in reversed(range(ATTEMPTS)):
        slurm = _keep(settings, paths, folder, detached)
        try:
            _boot(slurm)
            break
        except BaseException as error:
            slurm.stop()
            shutil.rmtree(slurm.folder, ignore_errors=True)
            if not tries_left or TAKEN not in str(error):
                raise
    return slurm


def find(folder: str | Path | None = None) -> Slurm | None:
    """Return this user's running private Slurm, or None.

    Parameters
    ----------
    folder : path, optional
        The folder that was given to `start`. Default: any; of several, a detached one is preferred, then the newest.
    """
    running = []
    for path in [Path(folder).expanduser().absolute()] if folder else folders.own():
        with suppress(FileNotFoundError):  # it has just ended
            if folders.kept(path):
                running.append(Slurm(path))
    return max(running, key=lambda slurm: (slurm.owner is None, slurm.started_s), default=None)


def _keep(settings: SlurmSettings, paths: dict[str, str], wanted: str | Path | None, detached: bool) -> Slurm:
    """Make a folder with all that the daemons read, and a keeper, which starts none before it is asked to."""
    with _private.locked(folders.home()):
        folders.clear()
        folder = folders.make(wanted)
        try:
            plan = conf.write(folder, settings, paths, None if detached else os.getpid(), wanted is not None)
            facts = {name: plan[name] for name in ("owner", "nodes", "port")} | {"started_s": time.time()}
            (folder / "about.json").write_text(json.dumps(facts))
            slurm = Slurm(folder)
            slurm._keeper = folders.hire(folder, plan)
            return slurm
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _boot(slurm: Slurm) -> None:
    """Start the daemons, each when what it needs is there."""

    def bring_up(names: list[str], ready: Callable[[], bool]) -> None:
        def up() -> bool:
            slurm._check(*names)
            return ready()

        slurm._call("start", *names)
        slurm._until(up, f"{', '.join(names)} to be up")

    bring_up(["munged"], (slurm.folder / "munge").exists)
    if _listens(slurm._port):
        raise RuntimeError(f"port {slurm._port}: {TAKEN}.")
    bring_up(["slurmctld"], lambda: _listens(slurm._port))
    bring_up([*slurm.addresses], lambda: all(row["state"] == "idle" for row in slurm.nodes()))


def _listens(port: int) -> bool:
    """Whether someone listens on a port of 127.0.0.1, without a call that would end up in its log."""
    return f"0100007F:{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()
