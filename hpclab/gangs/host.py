"""Kernel and worker: the zygote of this host, where it listens, and how it is started and called.

A worker calls the zygote that it shares with its siblings, and starts it if it isn't there. For a local cluster the
kernel starts it first of all, before it imports Dask: the two imports then take a CPU each.
"""

import hashlib
import os
import platform
import re
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from hpclab import _private, machine

FORK = sys.platform == "linux" and os.environ.get("HPCLAB_FORK") != "0"
"""Elsewhere fork is missing (Windows), or not safe with the system's libraries (macOS); ``HPCLAB_FORK=0`` does without
it here, too: to try what runs there."""
KEPT = 2**30 if [*map(int, re.findall(r"\d+", platform.libc_ver()[1]))] >= [2, 36] else 2**25
"""Bytes of the largest block that malloc keeps. An older glibc takes no more than 32 MiB (mallopt(3)): told more, it
keeps its first 128 kB for ever, as it no longer adapts that once the other threshold is set (so does 2.31)."""
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(KEPT), "MALLOC_MMAP_THRESHOLD_": str(KEPT)}
"""glibc keeps the memory of freed tensors for the next step: giving its pages back each time halves a rank's speed."""
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables that would bind each process that imports torch to the same first CPU, and so all ranks of a host."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""What the libraries of numpy and torch start when they are imported, a fork can't keep."""
HASHES = {"PYTHONHASHSEED": "6640"}
"""What Dask gives all workers, and they a zygote that they start: sets of text have one order in all ranks and runs."""
SHARED = "HPCLAB_ZYGOTE"
"""Variable of a local cluster's workers: the kernel that is their parent, and where its zygote listens."""


class KernelZygote:
    """The zygote of a local cluster, started by the kernel; it ends when this is closed, or with the kernel.

    Attributes
    ----------
    env : dict of str to str
        By this the cluster's workers find it. If it dies they start another at the same place, as on any host.

    Raises
    ------
    OSError
        If the folder of temporary files takes no socket, or the user has no more processes.
    RuntimeError
        If the user has no more threads.
    """

    def __init__(self) -> None:
        path = _private.folder() / uuid.uuid4().hex[:16]
        self.env = {SHARED: f"{os.getpid()}:{path}"}
        self._lifeline, zygotes_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with zygotes_end, machine.every_cpu(), _private.locked(path.parent) as handle:
                process = _start(path, _address(path, handle), os.environ | HASHES, zygotes_end)
            threading.Thread(target=process.wait, name="hpclab-zygote", daemon=True).start()  # which leaves no zombie
        except BaseException:
            self._lifeline.close()
            path.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Have it end, as soon as no worker holds it either."""
        with suppress(OSError):  # it has gone
            self._lifeline.shutdown(socket.SHUT_RDWR)  # also where a fork of this process still has it
        self._lifeline.close()


def call_zygote(cluster: str) -> socket.socket:
    """Connect to the zygote of this worker and its siblings in a cluster, which is started if it isn't there.

    Siblings have one parent, and so are of one job: with it a job queue ends all that it started.
    """
    path = socket_of(cluster)
    with ExitStack() as stack, _private.locked(path.parent) as handle:
        caller = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        address = _address(path, handle)
        try:
            caller.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
            _start(path, address, os.environ)
            caller.connect(address)
        stack.pop_all()
        return caller


def socket_of(cluster: str) -> Path:
    """Where the zygote of this worker and its siblings listens."""
    parent, _, shared = os.environ.get(SHARED, "").partition(":")
    if parent == str(os.getppid()):  # else this is no worker of that kernel, but something that one of them has started
        path = Path(shared)
        return _private.folder(str(path.parents[1])) / path.name
    name = hashlib.sha256(f"{cluster} {socket.gethostname()} {os.getppid()}".encode()).hexdigest()[:16]
    return _private.folder() / name


def zygote_code(call: str) -> str:
    """Program that calls something of `hpclab.gangs.zygote`, which it finds where this process does.

    Not by PYTHONPATH: a folder's name may hold the colon that parts them.
    """
    return f"import sys; sys.path[:] = {import_path()!r}; import hpclab.gangs.zygote; hpclab.gangs.zygote.{call}"


def import_path() -> list[str]:
    """Where this process finds modules: of `sys.path` what Python looks at, which is text and no `Path`."""
    return [entry for entry in sys.path if isinstance(entry, str)]


def unbound(env: Mapping[str, str]) -> dict[str, str]:
    """Variables of an environment that bind no process to a CPU."""
    return {name: value for name, value in env.items() if name not in BINDING}


def _address(path: Path, handle: int) -> str:
    """By which to bind or call a socket: its path has at most 107 bytes, and TMPDIR may be long."""
    return f"/proc/self/fd/{handle}/{path.name}"


def _start(
    path: Path, address: str, env: Mapping[str, str], owner: socket.socket | None = None
) -> subprocess.Popen[bytes]:
    """It inherits the listening socket, so that callers can queue while it imports torch."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(1024)
        inherited = [end.fileno() for end in (listener, owner) if end is not None]
        return subprocess.Popen(
            [sys.executable, "-c", zygote_code(f"main({str(path)!r}, {', '.join(map(str, inherited))})")],
            stdin=subprocess.DEVNULL,
            env=unbound(env) | MALLOC | ONE_THREAD,
            pass_fds=inherited,
            start_new_session=True,
        )
