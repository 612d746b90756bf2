"""What keeps the daemons of a private Slurm: a program of its own, which outlives nothing that it started.

Run as a file by `hpclab.slurm`, as it starts faster without the package: ``python -I -S FILE FOLDER``, with a plan as
JSON on its standard input. Each daemon has a *host*, a small process that adopts all orphans below it (a
"subreaper"), so that whatever a daemon started can be found and ended, however it detached itself. When a daemon ends,
all of its host does, as when a machine loses power. Hosts end with the keeper, and the keeper with its owner.

Requests come over a socket in the folder, whose permissions say who may call: JSON lists such as ``["kill", "n1"]``.
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LOOK_SECONDS = 0.1
"""How often the keeper looks whether its owner lives."""
PATIENCE_SECONDS = 1.0
"""How long a caller may take to say what it wants; others wait meanwhile."""
MESSAGE_BYTES = 65536

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def main(folder: Path) -> None:
    """Keep the daemons of a plan until the owner ends, or a request or a signal says stop."""
    plan = json.load(sys.stdin)
    if plan["owner"] is None and os.fork():
        os._exit(0)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # hosts inherit it: free means that all of this Slurm is gone
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD})
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    keeper = Keeper(folder, plan)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "keeper"))
        listener.listen(64)
        print("ready", flush=True)
        caller = keeper.serve(listener)
        purge()
        clear(folder, plan["keep"])
        if caller is not None:
            caller.send(b"null")


class Keeper:
    """The daemons of a plan, each in a host of its own.

    Parameters
    ----------
    folder : Path
        Of this Slurm.
    plan : dict
        ``owner``, the process whose end is this one's too, or None; ``daemons``, for each name its ``command`` and
        ``env``; ``nodes``, those names whose end Slurm is told; ``scontrol``, the program, and ``env`` for it.
    """

    def __init__(self, folder: Path, plan: dict):
        self.folder = folder
        self.plan = plan
        self.hosts: dict[str, int] = {}
        self.tellers: set[int] = set()  # processes that tell Slurm of a node's end

    def serve(self, listener: socket.socket) -> socket.socket | None:
        """Do what callers ask until it is time to stop; returns the caller that asked for it, if one did."""
        listener.settimeout(LOOK_SECONDS)
        verbs: dict[str, Callable] = {"start": self.start, "kill": self.kill, "alive": self.alive}
        while not signal.sigpending() & {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
            self.reap()
            if self.plan["owner"] not in (None, os.getppid()) or not (self.folder / "keeper").exists():
                break  # nobody is left who could call
            try:
                caller, _ = listener.accept()
            except TimeoutError:
                continue
            caller.settimeout(PATIENCE_SECONDS)
            try:
                verb, *arguments = json.loads(caller.recv(MESSAGE_BYTES) or '["alive"]')
                if verb == "stop":
                    return caller
                caller.send(json.dumps(verbs[verb](*arguments)).encode())
            except OSError as error:  # the caller went away, or no process can be started; others can still call
                print(f"a request failed: {error!r}", file=sys.stderr, flush=True)
            caller.close()
        return None

    def start(self, *names: str) -> None:
        """Start daemons that don't run."""
        while self.tellers:  # else one could report a node's end after its next start
            os.waitpid(self.tellers.pop(), 0)
        for name in names:
            if name not in self.hosts:
                self.hosts[name] = host(**self.plan["daemons"][name], log=self.folder / f"{name}.log")

    def kill(self, name: str) -> None:
        """End a daemon and everything below it at once, and tell Slurm if it is a node."""
        if pid := self.hosts.get(name):
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
            self.gone(name, "killed by slurm.kill")

    def alive(self) -> list[str]:
        """Names of the daemons that run."""
        self.reap()
        return list(self.hosts)

    def reap(self) -> None:
        """Take note of what has ended, and end what lost its host."""
        while pid := ended():
            self.tellers.discard(pid)
            for name in [name for name, host in self.hosts.items() if host == pid]:
                self.gone(name, "its slurmd ended")
            for orphan in set(children()) - self.tellers - set(self.hosts.values()):
                os.kill(orphan, signal.SIGKILL)

    def gone(self, name: str, reason: str) -> None:
        """Forget a host; of a node, tell Slurm as a site's health check would, which needs no timeout to notice."""
        del self.hosts[name]
        if name in self.plan["nodes"] and "slurmctld" in self.hosts:
            words = ["scontrol", "update", f"nodename={name}", "state=down", f"reason={reason}"]
            self.tellers.add(os.posix_spawn(self.plan["scontrol"], words, self.plan["env"], setsigmask=[]))


def host(command: list[str], env: dict[str, str], log: Path) -> int:
    """Start a daemon in a process that adopts what it leaves behind; returns the pid of that process."""
    keeper = os.getpid()
    if pid := os.fork():
        return pid
    try:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        daemon = run(command, env, log)
        while os.getppid() == keeper and signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGCHLD:
            if daemon in iter(ended, 0):
                break
        purge()
    finally:
        os._exit(0)


def run(command: list[str], env: dict[str, str], log: Path) -> int:
    """Start a program that dies with this process; what it prints goes into a log."""
    host = os.getpid()
    if pid := os.fork():
        return pid
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != host:
            os._exit(0)
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.execve(command[0], command, env)
    except OSError as error:
        os.write(2, f"{command[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def ended() -> int:
    """Reap one child that has ended and return its pid; 0 if there is none."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0


def children() -> list[int]:
    """Process ids of all children of this process, from /proc."""
    pids = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just gone
            if int(file.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                pids.append(int(file.parent.name))
    return pids


def purge() -> None:
    """Kill everything below this process: its children, then those whom it adopts by that, until none is left."""
    while below := children():
        for pid in below:
            os.kill(pid, signal.SIGKILL)  # a child's pid stays its own until it is reaped
        for pid in below:
            os.waitpid(pid, 0)


def clear(folder: Path, keep: bool) -> None:
    """Remove the folder; or, if it is to be kept, what opens this Slurm."""
    import shutil

    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in ("keeper", "lock", "munge.key", "munge", "munge.lock", "munge.seed", "munge.pid"):
        (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
