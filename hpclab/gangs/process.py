"""Worker: how it gets a rank's process, a fork of the host's zygote or a standby process; and orders for it."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from typing import BinaryIO, ClassVar

from distributed import Worker, WorkerPlugin

from hpclab import _namesakes, machine
from hpclab.gangs import wire
from hpclab.gangs.host import FORK, MALLOC, call_zygote, socket_of, unbound, zygote_code
from hpclab.gangs.zygote import FORK_ORDER, MESSAGE_BYTES, kill_group

BACKOFF_SECONDS = (0.5, 60.0)
"""How long to wait before a zygote that has died is replaced: at first, and at most."""
LOOK_SECONDS = 5.0
"""How often a worker looks whether the zygote can still be called: who cleans ``/tmp`` removes its socket."""
ANSWER_SECONDS = 0.02
"""How long a worker that is told to die lives on."""
ORDER = "hpclab-order"
"""What the scheduler sends a worker for its ranks, in the stream in which it sends tasks: so it waits for none."""
POOLS = "hpclab-pools"
"""Topic on which workers tell which CPUs they may use."""
inboxes: dict[tuple[str, int, int], queue.SimpleQueue] = {}
"""Where the ranks that this worker supervises get their orders: by run, rank and attempt."""
_ended: deque[tuple[str, int]] = deque(maxlen=1000)
"""Newest attempts that were told to end."""
_lock = threading.Lock()


def open_inbox(run: str, rank: int, attempt: int) -> queue.SimpleQueue:
    """Where a rank gets its orders; the one to end may have come before it, if others of its attempt failed early."""
    with _lock:
        inbox = inboxes[run, rank, attempt] = queue.SimpleQueue()
        if (run, attempt) in _ended:
            inbox.put(wire.End())
    return inbox


class ZygoteDied(RuntimeError):
    """The zygote went before it had forked a rank; another takes its place."""


def give(run: str, encoded: bytes, rank: int | None = None, attempt: int = 0) -> None:
    """Give ranks of a run that this worker supervises an order; called on the worker, in its event loop."""
    [order] = wire.decode(encoded)
    if isinstance(order, wire.Die):
        threading.Timer(ANSWER_SECONDS, os.kill, (os.getpid(), signal.SIGKILL)).start()
    with _lock:
        if isinstance(order, wire.End):
            _ended.append((run, attempt))
        supervised = list(inboxes.items())
    for (name, number, of_attempt), inbox in supervised:
        if (name, of_attempt) == (run, attempt) and rank in (None, number):
            inbox.put(order)


class Warmth(WorkerPlugin):
    """Has each worker take orders and tell its CPUs, and keep ready what ranks start from.

    That is a lease on the host's zygote, or a standby process.
    """

    name = "hpclab-warmth"
    idempotent = True  # registered again, Dask would take the running one down, and with its lease the zygote

    def setup(self, worker: Worker) -> None:
        """Begin, in the background; called by Dask on each worker, also on one that comes later."""
        # First it can take orders, then it tells its CPUs: the ledger sends orders to whoever has told, and a message
        # that a worker doesn't know ends it.
        worker.stream_handlers[ORDER] = give
        worker.log_event(POOLS, {"pool": machine.introduce()})
        self.closed = threading.Event()
        self.leases: list[socket.socket] = []
        if FORK:
            threading.Thread(target=self._keep, args=(worker.scheduler.address,), daemon=True).start()
        else:
            _Standby.prepare()

    def teardown(self, worker: Worker) -> None:
        """Give the lease back."""
        self.closed.set()
        for lease in self.leases:
            with suppress(OSError):
                lease.shutdown(socket.SHUT_RDWR)

    def _keep(self, cluster: str) -> None:
        """Hold a lease on the zygote that can be called now, beside those on others, under which ranks may be at work.

        One that has died is replaced, and one whose socket has gone gets a successor.
        """
        (pause, longest), lost = BACKOFF_SECONDS, True
        while not self.closed.is_set():
            with suppress(OSError):  # none can be started, such as since the folder of sockets has gone
                if lost or not socket_of(cluster).exists():
                    started = time.monotonic()
                    self.leases.append(call_zygote(cluster))
                    self.leases[-1].settimeout(LOOK_SECONDS)
                    self.leases[-1].send(b"lease")
                    lost = False
                if not self._has_ended():
                    continue
                self.leases.pop().close()
                lost = True
            pause = BACKOFF_SECONDS[0] if time.monotonic() - started > longest else min(2 * pause, longest)
            self.closed.wait(pause)
        for lease in self.leases:
            lease.close()

    def _has_ended(self) -> bool:
        """Wait a while for the end of the newest lease, or of its zygote, which says nothing else."""
        try:
            return not self.leases[-1].recv(1)
        except TimeoutError:
            return False
        except OSError:
            return True


class Process:
    """A rank's process: its streams, and how it ends.

    Attributes
    ----------
    pid : int
    stdin, stdout, stderr : binary file
        This side of its pipes.
    """

    pid: int
    stdin: BinaryIO
    stdout: BinaryIO
    stderr: BinaryIO

    def poll(self) -> int | None:
        """Exit code, or None while it runs; below 0 it is the number of the signal that ended it."""
        raise NotImplementedError

    def kill(self) -> None:
        """End it, and all that it started."""
        raise NotImplementedError

    def send_signal(self, name: str) -> bool:
        """Send it SIGINT, which raises KeyboardInterrupt, or SIGUSR1, for its stack; False where the system can't."""
        if sys.platform == "win32" or self.poll() is not None:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, getattr(signal, name))
        return True

    def wait(self) -> int:
        """Exit code, once it has ended."""
        while (code := self.poll()) is None:
            time.sleep(0.002)
        return code


def start(env: dict[str, str], cluster: str) -> Process:
    """Start the process of a rank, in a session of its own so that it and all its children can be ended together.

    Parameters
    ----------
    env : dict
        Its whole environment.
    cluster : str
        Address of the scheduler; the clusters of a host have zygotes of their own.

    Raises
    ------
    ZygoteDied
        If the host's zygote ended meanwhile.
    RuntimeError
        If it can't import what a rank needs, with its traceback; or can't fork.
    """
    return _Forked(env, cluster) if FORK else _Standby.take(env)


class _Forked(Process):
    def __init__(self, env: dict[str, str], cluster: str):
        self.returncode: int | None = None
        order = {"env": env, "cwd": os.getcwd(), "cpus": machine.affinity()}
        with ExitStack() as theirs, ExitStack() as ours:  # of the files; a rank that starts keeps both
            self.zygote = ours.enter_context(call_zygote(cluster))
            file = theirs.enter_context(os.fdopen(os.memfd_create("hpclab-order"), "wb"))
            file.write(json.dumps(order).encode())  # an environment may exceed any message
            file.flush()
            fds, streams = [file.fileno()], []
            for mode in ("wb", "rb", "rb"):
                reads, writes = os.pipe()
                fds.append(reads if mode == "wb" else writes)
                theirs.callback(os.close, fds[-1])
                streams.append(ours.enter_context(os.fdopen(writes if mode == "wb" else reads, mode)))
            self.stdin, self.stdout, self.stderr = streams
            self.pid = self._ask(fds)
            ours.pop_all()

    def _ask(self, fds: list[int]) -> int:
        """Have the zygote fork a rank that gets these files, the order and its standard streams; its process id."""
        whose = f"the zygote of host {socket.gethostname()}"
        try:
            socket.send_fds(self.zygote, [FORK_ORDER], fds)
            answer = json.loads(self.zygote.recv(MESSAGE_BYTES) or "{}")
        except ConnectionError:
            answer = {}
        except OSError as error:
            answer = {"error": str(error)}
        if "pid" in answer:
            return answer["pid"]
        if "error" not in answer:
            last = "; ".join(filter(None, ["the worker's log has its last output", _namesakes.blame()]))
            raise ZygoteDied(f"did not start: {whose} ended before it was ready; {last}")
        what = f"{whose} can't fork ranks: {answer['error']}"
        raise OSError(answer["errno"], what) if "errno" in answer else RuntimeError(what)

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                reply = self.zygote.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except ConnectionError:
                reply = b""
            # Without a reply the zygote has died, and its ranks with it.
            self.returncode = json.loads(reply)["returncode"] if reply else -signal.SIGKILL
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            kill_group(self.pid)


class _Standby(Process):
    """A process that has imported torch and waits for its work; another takes its place when it gets some."""

    ready: ClassVar["list[_Standby]"] = []
    lock = threading.Lock()
    watcher: ClassVar["subprocess.Popen | None"] = None
    """Kills those that are alive when this worker has ended."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", zygote_code("stand_by()")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=unbound(os.environ) | MALLOC,
            start_new_session=True,
        )
        self.pid = self.popen.pid
        self.stdin, self.stdout, self.stderr = self.popen.stdin, self.popen.stdout, self.popen.stderr  # type: ignore
        self.watched = True
        self._tell_watcher(f"+{self.pid}")

    @classmethod
    def prepare(cls) -> None:
        """Have one ready."""
        with cls.lock:
            cls.ready = [standby for standby in cls.ready if standby.poll() is None] or [cls()]

    @classmethod
    def take(cls, env: dict[str, str]) -> "_Standby":
        """Give the one that is ready an environment, and start the next."""
        with cls.lock:
            standby, *cls.ready = [standby for standby in cls.ready if standby.poll() is None] or [cls()]
        standby.stdin.write(json.dumps(env).encode() + b"\n")
        standby.stdin.flush()
        threading.Thread(target=cls.prepare, daemon=True).start()
        return standby

    def poll(self) -> int | None:
        code = self.popen.poll()
        if code is not None and self.watched:
            self.watched = False
            self._tell_watcher(f"-{self.pid}")
        return code

    def kill(self) -> None:
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):  # the latter on macOS, of a group that has ended
                os.killpg(self.pid, signal.SIGKILL)
        else:
            self.popen.kill()

    @staticmethod
    def _tell_watcher(news: str) -> None:
        """Say that a rank has started, "+1234", or ended, "-1234"."""
        if _Standby.watcher is None:
            _Standby.watcher = subprocess.Popen(
                [sys.executable, "-c", zygote_code("watch_over_ranks()")],
                stdin=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        with suppress(OSError):  # somebody has killed it
            _Standby.watcher.stdin.write(f"{news}\n".encode())  # type: ignore[union-attr]
