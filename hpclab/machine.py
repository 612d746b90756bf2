"""What this machine really gives: CPUs and memory after affinity, cgroups and ulimits, not what the host has."""

import errno
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

BASE_MEMORY = 500 * 2**20
"""Bytes for what is there once: the notebook's kernel with torch, and the scheduler in it."""
RANK_MEMORY = 400 * 2**20
"""Bytes for each rank: its Dask worker, its process with torch, a small model."""
TRIPS = 3
"""How often another machine is asked for its time."""

ENDS = "HPCLAB_ENDS"
"""Variable in the environment of a job of a queue: when its walltime is over, in seconds since the epoch."""


def cpus() -> int:
    """CPUs that this process may use: the smallest of its affinity and its cgroups' quota, at least 1."""
    return max(1, min(len(affinity()), math.floor(_cpu_quota())))


def cores(system: str = "/sys/devices/system/cpu") -> int | None:
    """Cores behind the CPUs that this process may use; fewer than those where they are hardware threads.

    None where the system doesn't tell. A virtual machine may hide it, and then shows a core for each hardware thread.
    """
    try:
        return len({Path(f"{system}/cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in affinity()})
    except OSError:
        return None


def cpu_pool() -> tuple[str, str, int]:
    """The machine, which of its CPUs this process may use, and their number.

    The first two are names that processes on the same machine, with the same CPUs, share.
    """
    allowed = affinity()
    bound = _own_cgroup() if _cpu_quota() < len(allowed) else ""  # what a quota gives, only its cgroup shares
    return boot(), ",".join(map(str, allowed)) + bound, cpus()


def memory() -> int:
    """Bytes of memory that this process may use: the smallest of the host's, the cgroups' limit and the ulimits."""
    return int(min(psutil.virtual_memory().total, _memory_limit(), _ulimit()))


def fits() -> int:
    """Ranks of one thread that fit on this machine at full speed, at least 1.

    The smaller of the CPUs and of what the memory allows, at `RANK_MEMORY` a rank beside `BASE_MEMORY`.
    """
    return min(cpus(), most())


def most() -> int:
    """Ranks for which this machine has memory, whatever its CPUs, at least 1."""
    return max(1, (memory() - BASE_MEMORY) // RANK_MEMORY)


def describe() -> dict:
    """Return this machine as a row: what every measurement made here depends on (memory in GB of 10**9 bytes)."""
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_model(),
        "cpus": cpus(),
        "cpus_host": os.cpu_count() or 1,
        "memory_gb": round(memory() / 1e9, 2),
        "memory_host_gb": round(psutil.virtual_memory().total / 1e9, 2),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "distributed": installed("distributed"),
        "hpclab": installed("hpclab"),
    }


def installed(package: str) -> str | None:
    """Version of an installed package, without importing it; None if it isn't there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


Introduction = tuple[str, str, int, dict]
"""What `introduce` returns."""


def introduce() -> Introduction:
    """What a worker says of itself: its `cpu_pool`, and its machine as `describe` has it."""
    return *cpu_pool(), describe()


def together(workers: Iterable[Introduction]) -> dict:
    """Describe the machines of some workers as one row.

    Returns
    -------
    dict
        As from `describe`, and ``hosts``, how many machines these are. ``cpus`` are those that any of the workers may
        use. CPUs and memory are added up over the machines. Names and versions that differ are joined: "X; Y".
    """
    pools: dict[tuple[str, str], int] = {}
    machines: dict[str, list[dict]] = {}
    for boot, allowed, count, facts in workers:
        pools[boot, allowed] = count
        machines.setdefault(boot, []).append(facts)
    rows = [facts for here in machines.values() for facts in here]
    if not rows:
        return {"hosts": 0}
    row = {name: joined(row[name] for row in rows) for name in rows[0]}
    for name in ("cpus_host", "memory_gb", "memory_host_gb"):
        row[name] = sum(max(facts[name] for facts in here) for here in machines.values())
    # Sets of CPUs on one machine may overlap.
    row["cpus"] = sum(
        min(here[0]["cpus_host"], sum(count for pool, count in pools.items() if pool[0] == boot))
        for boot, here in machines.items()
    )
    return {"hosts": len(machines)} | row


def joined(values: Iterable) -> object:
    """One value if all are alike, else each that there is once, as text: "X; Y"."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else "; ".join(map(str, different))


def ahead(ask: Callable[[], float]) -> float:
    """How many seconds this machine's clock is ahead of another's.

    Parameters
    ----------
    ask : callable
        Returns the other's time, in seconds since the epoch.

    Returns
    -------
    float
        Measured by the quickest of a few round trips, as in NTP. 0 if it can't tell the two clocks apart: those that a
        site keeps together differ less than a round trip takes.
    """
    trips = []
    for _ in range(TRIPS):
        sent = time.time()
        their_time = ask()
        back = time.time()
        trips.append((back - sent, (sent + back) / 2 - their_time))
    took, gap = min(trips)
    return gap if abs(gap) > took / 2 else 0.0


def node() -> str:
    """Name of the node that this process is on: a job queue's own name for it, as one machine may be several."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def remedy(error: BaseException) -> str:
    """A sentence on what to do about an error at a limit of this machine or user; "" for any other error."""
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return _TOO_MANY
    if not isinstance(error, OSError):
        return ""
    if "path too long" in str(error):
        return "A socket's path has at most 107 bytes: set TMPDIR to a folder with a shorter name, such as /tmp."
    return _REMEDIES.get(error.errno or 0, "")


_TOO_MANY = (
    "This user may start no more processes or threads (`ulimit -u` shows the limit, and a container has one of its"
    " own): use fewer workers, ranks or threads, or end other programs."
)
_REMEDIES = {
    errno.EMFILE: "The process can open no more files: raise `ulimit -n` before Python starts, or close clients.",
    errno.ENFILE: "The machine can open no more files: end other programs.",
    errno.EAGAIN: _TOO_MANY,
    errno.ENOMEM: "The machine has no memory left: use fewer ranks or smaller models, or end other programs.",
    errno.ENOSPC: "The disk is full: make room, or use folder= for results, and TMPDIR for the rest, on another one.",
    errno.EDQUOT: "The user's share of the disk is full: make room, or use folder= for results on another one.",
    errno.EFBIG: "A file has reached the size limit: raise `ulimit -f` before Python starts, or report and print less.",
    errno.EROFS: "The disk is read-only: use folder= for results, and TMPDIR for the rest, on another one.",
}


def imported_by_child() -> bool:
    """Whether this process is multiprocessing's child and just imports its parent's script, as multiprocessing asks."""
    import multiprocessing  # here, as it costs more than all else in this file

    return getattr(multiprocessing.current_process(), "_inheriting", False)


def boot() -> str:
    """Name of this machine since its start, the same in all its containers."""
    return " ".join(_lines(Path("/proc/sys/kernel/random/boot_id"))) or platform.node()


def _own_cgroup() -> str:
    try:
        return os.readlink("/proc/self/ns/cgroup") + " ".join(_lines(Path("/proc/self/cgroup")))
    except OSError:
        return ""


def affinity() -> list[int]:
    """Numbers of the CPUs that threads of this process may use.

    Of all of them, as OMP_PROC_BIND has `import torch` bind the one that does it to its first CPU.
    """
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    numbers = os.sched_getaffinity(0)
    with suppress(FileNotFoundError):  # not Linux
        for thread in map(int, os.listdir("/proc/self/task")):
            with suppress(ProcessLookupError):  # it has just ended
                numbers |= os.sched_getaffinity(thread)
    return sorted(numbers)


@contextmanager
def every_cpu() -> Iterator[None]:
    """Let what this thread starts use all of `affinity`: threads and processes inherit what theirs may use."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, affinity())
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpu_quota(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float:
    quotas = []
    for folder in _cgroups("cpu", proc, root):
        # Version 2 says "200000 100000" or "max 100000"; version 1 has two files, and -1 for no limit.
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            match [word for file in files for word in _words(folder / file)]:
                case [quota, period] if quota not in ("max", "-1"):
                    quotas.append(int(quota) / int(period))
    return min(quotas, default=float(os.cpu_count() or 1))


def _memory_limit(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float:
    files = [
        folder / name for folder in _cgroups("memory", proc, root) for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min((int(word) for file in files for word in _words(file) if word != "max"), default=math.inf)


def _ulimit() -> float:
    try:
        import resource
    except ImportError:  # Windows has none
        return math.inf
    soft = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([limit for limit in soft if limit != resource.RLIM_INFINITY], default=math.inf)


def _cgroups(controller: str, proc: str, root: str) -> Iterator[Path]:
    """Folders of the cgroups that bound this process: its own and all above it, as any may have a limit.

    In a container the path in /proc can be the host's and lie outside what is mounted; the mount's root is then ours.
    """
    for line in _lines(Path(proc)):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = Path(root, controllers)
        cgroup = mount / path.strip("/")
        for folder in (cgroup, *cgroup.parents):
            if folder.is_relative_to(mount):
                yield folder


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _cpu_model() -> str:
    names = [line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
