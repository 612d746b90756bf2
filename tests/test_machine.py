"""Limits are read from trees of cgroup files as kernels write them, and from a real cgroup where one can be made."""

import math
import mmap
import os
import resource
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hpclab import machine


def tree(tmp_path: Path, proc: str, files: dict[str, str]) -> tuple[str, str]:
    (tmp_path / "proc").write_text(proc)
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return str(tmp_path / "proc"), str(tmp_path / "cgroup")


@pytest.mark.parametrize(
    ("proc", "files", "cpus", "memory"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n", "memory.max": "1610612736\n"}, 1.5, 1610612736),
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, math.inf, math.inf),
        (
            "0::/a/b\n",
            {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "400000 100000\n", "a/b/memory.max": "max\n"},
            1,
            math.inf,
        ),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000\n", "memory.max": "5000\n"}, 2, 5000),
        (
            "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "memory/job/memory.limit_in_bytes": "2147483648\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            3,
            2147483648,
        ),
        ("", {}, math.inf, math.inf),
    ],
    ids=["v2", "v2 open", "v2 nested, parent tighter", "v2 path of the host", "v1", "none"],
)
def test_cgroup_limits(tmp_path, proc, files, cpus, memory):
    where = tree(tmp_path, proc, files)
    assert machine._cpu_quota(*where) == (os.cpu_count() if math.isinf(cpus) else cpus)
    assert machine._memory_limit(*where) == memory


def ask(expression: str, *before: str) -> str:
    code = f"from hpclab import machine; print({expression})"
    return subprocess.run(
        [*before, sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds a process to CPUs")
def test_affinity_counts():
    first = str(min(os.sched_getaffinity(0)))
    assert ask("machine.cpus()", "taskset", "-c", first) == "1"


@pytest.mark.parametrize(("siblings", "cores"), [("{cpu}", 8), ("{core}", 4)], ids=["cores", "hardware threads"])
def test_hardware_threads_of_a_core_are_one(tmp_path, monkeypatch, siblings, cores):
    monkeypatch.setattr(machine, "affinity", lambda: list(range(8)))
    assert machine.cores(str(tmp_path)) is None
    for cpu in range(16):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(
            siblings.format(cpu=cpu, core=f"{cpu - cpu % 2},{cpu - cpu % 2 + 1}")
        )
    assert machine.cores(str(tmp_path)) == cores


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v works on Linux")
def test_ulimit_counts():
    assert ask("machine.memory()", "bash", "-c", 'ulimit -v 1500000; exec "$0" "$@"') == str(1500000 * 1024)


def test_a_real_cgroup_counts():
    """The whole way, from the kernel: a group of our own with half a CPU of quota more than one, and 1.5 GB."""
    v1 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/memory")
    if not all(os.access(folder, os.W_OK) and (folder / "cgroup.procs").exists() for folder in v1):
        pytest.skip("cgroups (version 1) can't be made here")
    groups = [folder / f"hpclab-{uuid.uuid4().hex[:8]}" for folder in v1]
    try:
        for group in groups:
            group.mkdir()
        (groups[0] / "cpu.cfs_quota_us").write_text("150000")
        (groups[1] / "memory.limit_in_bytes").write_text(str(3 * 2**29))
        enter = "; ".join(f"echo $$ > {group}/cgroup.procs" for group in groups)
        found = ask("machine.cpus(), machine.memory(), machine.fits()", "bash", "-c", f'{enter}; exec "$0" "$@"')
    finally:
        for group in groups:
            if group.exists():
                group.rmdir()
    assert found == f"1 {3 * 2**29} 1"


def test_what_fits_is_bounded_by_cpus_and_memory(monkeypatch):
    monkeypatch.setattr(machine, "cpus", lambda: 8)
    monkeypatch.setattr(machine, "memory", lambda: machine.BASE_MEMORY + 3 * machine.RANK_MEMORY)
    assert machine.fits() == 3
    monkeypatch.setattr(machine, "cpus", lambda: 2)
    assert machine.fits() == 2
    monkeypatch.setattr(machine, "memory", lambda: 2**28)
    assert machine.fits() == 1


def test_describe_names_this_machine():
    about = machine.describe()
    assert about["cpus"] <= about["cpus_host"] == os.cpu_count()
    assert about["memory_host_gb"] == round(psutil.virtual_memory().total / 1e9, 2)
    assert about["cpu"]


def test_machines_of_several_workers_are_one_row():
    one = machine.describe() | {"host": "a", "cpu": "X", "cpus": 1, "cpus_host": 4, "memory_gb": 2.0}
    other = one | {"host": "b", "cpu": "Y", "cpus": 3, "memory_gb": 3.0}
    both = machine.together([("1", "0", 1, one), ("1", "1", 1, one), ("1", "1", 1, one), ("2", "0,1,2", 3, other)])
    expected = {"hosts": 2, "host": "a; b", "cpu": "X; Y", "cpus": 5, "cpus_host": 8, "memory_gb": 5.0}
    assert both == one | expected | {"memory_host_gb": 2 * one["memory_host_gb"]}
    overlapping = [("1", "0,1,2", 3, one), ("1", "1,2,3", 3, one)]
    assert machine.together(overlapping)["cpus"] == 4, "no more than the host has"
    assert machine.together([machine.introduce()]) == {"hosts": 1} | machine.describe()


def test_a_clock_is_compared_by_the_quickest_round_trip(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(machine, "time", SimpleNamespace(time=lambda: now[0]))

    def ask(there, back):
        now[0] += there
        told = now[0] - 60
        now[0] += back
        return told

    trips = iter([(0.0, 1.0), (0.01, 0.02), (3.0, 0.0)])
    assert machine.ahead(lambda: ask(*next(trips))) == pytest.approx(60, abs=0.02)
    assert machine.ahead(lambda: ask(0.1, 0.3) + 60) == 0, "within what the trip leaves open"


def too_many_files():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        os.pipe()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def too_long_a_path():
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("/tmp/" + "x" * 120)


def too_large_a_thread():
    size = threading.stack_size(2**46)  # more than there are addresses
    try:
        threading.Thread(target=print).start()
    finally:
        threading.stack_size(size)


@pytest.mark.parametrize(
    ("fail", "says"),
    [
        (too_many_files, "raise `ulimit -n`"),
        (too_large_a_thread, "`ulimit -u` shows"),
        (lambda: mmap.mmap(-1, 2**46), "no memory left"),
        (too_long_a_path, "set TMPDIR to a folder with a shorter name"),
        (lambda: Path("/dev/full").write_text("x"), "make room"),
    ],
)
def test_what_to_do_about_a_limit(fail, says):
    with pytest.raises((OSError, RuntimeError)) as caught:
        fail()
    assert says in machine.remedy(caught.value)


def test_nothing_is_to_be_done_about_other_errors():
    for error in (OSError("odd"), FileNotFoundError(2, "none"), ValueError("no space left")):
        assert machine.remedy(error) == ""
