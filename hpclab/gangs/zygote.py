"""Host: the zygote, one process a host and cluster that has imported torch and forks a rank in about 15 ms.

It has one thread and runs no torch operation, since a fork keeps only the thread that forks, whatever locks the others
hold. It lives for as long as a worker holds a lease: a connection to its socket, which the system closes however the
worker ends. The notebook's kernel holds another one if it has started it. A rank has a connection too, from the worker
that supervises it; when that closes, the rank is killed.

What a rank has started ends with it, also what left its session. Linux hands a process whose parent has ended to the
nearest *subreaper* above it. Each rank is one, so as long as it lives all that it started is below it; so is the
zygote, and whichever child of it is no rank was left by one that has ended.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from hpclab import IN_RANKS, _namesakes

PRELOAD = ("cloudpickle", "numpy", "torch", "torch._dynamo", "torch.distributed", "torch.nn.parallel", "torch.optim")
"""What a rank, or its first step (torch._dynamo: 1 to 2.5 s), would else import; beside `hpclab.IN_RANKS`."""
PATIENCE_SECONDS = 10.0
"""How long it waits for a first lease."""
MESSAGE_BYTES = 1 << 18
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36  # <sys/prctl.h>
FORK_ORDER = b"fork"
"""What is sent with four files: the order as JSON, and a rank's standard streams."""


def main(path: str, listener: int, owner: int | None = None) -> None:
    """Serve forks on a listening socket until the last lease has ended.

    Parameters
    ----------
    path : str
        Of that socket; it is removed at the end.
    listener : int
        The socket, as a file descriptor.
    owner : int, optional
        Connection to the notebook's kernel, which has started this process: a lease.
    """
    own = None
    with suppress(FileNotFoundError):
        own = os.stat(path)

    def clean() -> None:
        with suppress(FileNotFoundError):
            # Else another one listens there, since somebody has cleaned /tmp.
            if own is not None and os.path.samestat(own, os.stat(path)):
                os.unlink(path)

    lease = None if owner is None else socket.socket(fileno=owner)
    if lease is not None:
        _watch(lease, clean)
    error = _preload()
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # from here on the zygote hears of a lease's end as of all else
    zygote = Zygote(socket.socket(fileno=listener), lease, error)
    try:
        zygote.serve()
    finally:
        zygote.kill_all()
        clean()


def _watch(lease: socket.socket, clean: Callable[[], None]) -> None:
    """Leave at once if a lease ends while this process imports; told by a signal, as it may have no second thread."""
    import fcntl  # Windows has none, and no zygotes

    def leave(*_: Any) -> None:
        if select.select([lease], [], [], 0)[0]:
            clean()
            os._exit(0)

    signal.signal(signal.SIGIO, leave)
    fcntl.fcntl(lease, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lease, fcntl.F_SETFL, fcntl.fcntl(lease, fcntl.F_GETFL) | os.O_ASYNC)
    leave()  # should it have ended before


class Zygote:
    """A single-threaded server: leases and forks in, process ids and exit codes out."""

    def __init__(self, listener: socket.socket, lease: socket.socket | None, error: str | None):
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.selector = selectors.DefaultSelector()
        self.leases: set[socket.socket] | None = None
        self.ranks: dict[int, socket.socket] = {}
        self.error = error
        wake, waker = socket.socketpair()
        wake.setblocking(False)
        waker.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self.waker = waker
        self._listen(wake, self._reap)
        self._listen(listener, self._accept)
        if lease is not None:
            self.leases = {lease}
            self._listen(lease, self._hear)

    def serve(self) -> None:
        """Answer until the last lease ends."""
        while self.leases is None or self.leases:
            ready = self.selector.select(PATIENCE_SECONDS if self.leases is None else None)
            if not ready and self.leases is None and not self.ranks:
                return
            for key, _ in ready:
                key.data(key.fileobj)

    def kill_all(self) -> None:
        """Kill every rank, and what they have started."""
        for pid in self.ranks:
            kill_group(pid)
        with suppress(ChildProcessError):  # until there is none
            while True:
                self._kill_orphans()
                self.ranks.pop(os.waitpid(-1, 0)[0], None)

    def _listen(self, source: socket.socket, answer: Callable[[socket.socket], None]) -> None:
        self.selector.register(source, selectors.EVENT_READ, answer)

    def _accept(self, listener: socket.socket) -> None:
        self._listen(listener.accept()[0], self._hear)

    def _hear(self, caller: socket.socket) -> None:
        try:
            message, fds, _, _ = socket.recv_fds(caller, MESSAGE_BYTES, 4)
        except ConnectionError:
            message, fds = b"", []
        if not message:
            self._hang_up(caller)
        elif message == b"lease":
            self.leases = (self.leases or set()) | {caller}
        elif self.error is not None:
            _tell(caller, {"error": self.error})
        else:
            self._fork(caller, json.loads(os.pread(fds[0], os.fstat(fds[0]).st_size, 0)), fds[1:])
        for fd in fds:
            os.close(fd)

    def _hang_up(self, caller: socket.socket) -> None:
        self.selector.unregister(caller)
        caller.close()
        if self.leases is not None:
            self.leases.discard(caller)
        for pid, supervisor in self.ranks.items():
            if supervisor is caller:
                kill_group(pid)

    def _fork(self, caller: socket.socket, order: dict, fds: list[int]) -> None:
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # no memory, or too many processes: the ranks that there are go on
            _tell(caller, {"error": error.strerror, "errno": error.errno})
            return
        if pid == 0:
            _become_rank(order, fds, parent)
        self.ranks[pid] = caller
        _tell(caller, {"pid": pid})

    def _reap(self, wake: socket.socket) -> None:
        with suppress(BlockingIOError):
            while wake.recv(4096):
                pass
        with suppress(ChildProcessError):  # until there is none
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                caller = self.ranks.get(ended.si_pid)
                if caller is not None:
                    kill_group(ended.si_pid)  # what it left; before it is reaped, no other group has its number
                _, status = os.waitpid(ended.si_pid, 0)
                self.ranks.pop(ended.si_pid, None)
                self._kill_orphans()
                if caller is not None:
                    _tell(caller, {"returncode": os.waitstatus_to_exitcode(status)})

    def _kill_orphans(self) -> None:
        """Kill what ranks that have ended left in other sessions; what that leaves in turn is seen when it ends."""
        for pid in _children():
            if pid not in self.ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def stand_by() -> None:
    """Without fork: be the next rank, with all imported, and wait for its environment and its work."""
    error = _preload()
    line = sys.stdin.buffer.raw.readline()  # type: ignore[union-attr]  # unbuffered: the rest is for the rank
    if not line:
        return
    if error is not None:
        raise ImportError(error)
    os.environ.clear()
    os.environ.update(json.loads(line))
    if sys.platform == "linux":
        _show_rank()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the worker ignores it, and so would this process
    from hpclab.gangs import rank

    rank.main()


def watch_over_ranks() -> None:
    """Without fork: outlive a worker, and then kill the ranks that it had.

    A rank sees by itself that its worker has ended, but not one that holds the GIL, or was stopped.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    alive: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        alive = alive | {pid} if line.startswith("+") else alive - {pid}
    for pid in alive:
        with suppress(OSError):  # it has ended meanwhile
            if sys.platform == "win32":
                os.kill(pid, signal.SIGTERM)  # there as final as SIGKILL, and there are no groups
            else:
                os.killpg(pid, signal.SIGKILL)


def _preload() -> str | None:
    """Import what ranks need; the traceback if that fails, for those who ask for a rank."""
    gc.disable()  # its passes take a sixth of the time of these imports, and find next to nothing
    try:
        for module in (*PRELOAD, *IN_RANKS):
            importlib.import_module(module)
    except (Exception, SystemExit):  # the latter of a script with the name of a module, which isn't one
        text = traceback.format_exc()
        return f"{text}{_namesakes.blame(text)}"
    gc.freeze()  # else the collector in a rank would write to every page that it shares with this process
    gc.enable()
    if sys.platform == "linux" and (threads := len(os.listdir("/proc/self/task"))) > 1:
        print(f"hpclab: the zygote has {threads} threads, so a forked rank may hang", file=sys.stderr)
    return None


def _become_rank(order: dict, fds: list[int], parent: int) -> NoReturn:
    """Turn a fork into a rank: its own session, streams, environment and folder, and nothing else of the zygote's."""
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGIO, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        for fd in map(int, os.listdir("/proc/self/fd")):  # not up to SC_OPEN_MAX, which may be a billion
            if fd >= len(fds):
                with suppress(OSError):  # that of the list itself
                    os.close(fd)
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        with suppress(OSError):  # CPUs that were taken away meanwhile
            os.sched_setaffinity(0, order["cpus"])
        _show_rank()
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also ends one that holds the GIL
        if os.getppid() == parent:
            import numpy

            from hpclab.gangs import rank

            numpy.random.seed()  # noqa: NPY002  # else all ranks would draw what the zygote would have drawn
            rank.main()
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):  # which stops it before it had any work
            traceback.print_exc()
    finally:
        os._exit(1)


def _show_rank() -> None:
    """Have ps and the like show this process as a rank."""
    _prctl(PR_SET_NAME, f"hpclab-rank-{os.environ['RANK']}".encode())


def _prctl(option: int, value: Any) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _children() -> list[int]:
    """Process ids of this process's children."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        import psutil

        return [child.pid for child in psutil.Process().children()]


def kill_group(pid: int) -> None:
    """Kill a rank and its group, also one so new that it has none yet."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
            return


def _tell(caller: socket.socket, answer: dict) -> None:
    with suppress(OSError):  # it has gone
        caller.send(json.dumps(answer).encode())
