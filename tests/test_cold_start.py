"""The zygote that a kernel starts before it imports Dask: whose it is, who finds it, and when it ends."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from conftest import ours, require, until, zygotes_alive
from distributed import LocalCluster

import hpclab
from hpclab.gangs import host

pytestmark = pytest.mark.skipif(not host.FORK, reason="needs fork, and so Linux")
STAGES = ("zygote", "dask", "cluster", "client", "run")
KERNEL = """
import os, sys, time
import hpclab, hpclab.cluster
stage = sys.argv[1]

def reach(here):
    if here == stage:
        print(here, flush=True)
        time.sleep(600)

def after(owner, name, here):
    real = getattr(owner, name)
    def call(*args, **options):
        result = real(*args, **options)
        reach(here)
        return result
    setattr(owner, name, call)

if __name__ == "__main__":
    after(hpclab.cluster, "_start_zygote", "zygote")
    after(hpclab.cluster, "_client", "dask")
    if stage not in ("zygote", "dask"):
        after(hpclab.cluster._client(), "LocalCluster", "cluster")
    client = hpclab.connect(workers=1)
    reach("client")
    hpclab.launch(client, os.getppid, ranks=1).result()
    reach("run")
"""


def scripts() -> set[int]:
    """All that the tests' programs have started, and is no zombie."""
    return {*ours("spawn_main"), *ours("resource_tracker"), *zygotes_alive()}


def sockets() -> set[Path]:
    """Of all zygotes that this test has started."""
    return {path for path in Path(tempfile.gettempdir(), f"hpclab-{os.getuid()}").glob("*") if path.is_socket()}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_kernel_that_ends_at_any_stage_leaves_nothing(number, tmp_path):
    (tmp_path / "kernel.py").write_text(KERNEL)
    before = scripts()
    kernels = [
        subprocess.Popen(
            [sys.executable, "kernel.py", stage],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for stage in STAGES
    ]
    for stage, kernel in zip(STAGES, kernels, strict=True):
        with kernel:
            assert kernel.stdout.readline() == f"{stage}\n"
            assert any(psutil.Process(pid).ppid() == kernel.pid for pid in zygotes_alive())
            kernel.send_signal(number)
        assert kernel.returncode == -number
    until(lambda: scripts() <= before and not sockets())


def zygote_and_hash():
    return os.getppid(), hash("text")


def test_workers_share_the_zygote_of_their_kernel_and_replace_it_once():
    with hpclab.connect(workers=2) as client:
        ((zygote, hashed),) = set(hpclab.launch(client, zygote_and_hash, ranks=2).result(60))
        assert psutil.Process(zygote).ppid() == os.getpid()
        assert len(sockets()) == 1
        os.kill(zygote, signal.SIGKILL)
        ((other, again),) = set(hpclab.launch(client, zygote_and_hash, ranks=2, max_restarts=5).result(60))
        assert other != zygote and len(sockets()) == 1
        assert psutil.Process(other).ppid() in client.run(os.getpid).values()
        assert again == hashed, "sets have another order in a zygote that workers start"
    until(lambda: not psutil.pid_exists(zygote) and not psutil.pid_exists(other) and not sockets())


def test_the_collector_runs_again_after_the_imports():
    program = (
        "import gc, hpclab\n"
        "with hpclab.connect(workers=1) as client:\n"
        "    print(gc.isenabled(), *hpclab.launch(client, gc.isenabled).result())\n"
        "    gc.disable()\n"
        "hpclab.connect(workers=1).close()\n"
        "print(gc.isenabled())\n"
    )
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr


def test_two_clusters_of_a_kernel_have_zygotes_of_their_own():
    with hpclab.connect(workers=1) as first, hpclab.connect(workers=1) as second:
        (one,), (other,) = (hpclab.launch(client, os.getppid).result(60) for client in (first, second))
        assert one != other
        first.close()
        until(lambda: not psutil.pid_exists(one))
        assert hpclab.launch(second, os.getppid).result(60) == [other]


def test_what_a_worker_starts_is_no_sibling_of_its():
    program = "from hpclab.gangs.host import socket_of; print(socket_of('tls://127.0.0.1:1'))"

    def sockets_of_worker_and_child():
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return str(host.socket_of("tls://127.0.0.1:1")), child.stdout.strip()

    with hpclab.connect(workers=1) as client:
        mine, childs = client.submit(sockets_of_worker_and_child).result()
        assert Path(mine) in sockets()
    assert Path(childs).parent == Path(mine).parent and childs != mine


def test_a_connect_that_fails_leaves_nothing():
    before = set(zygotes_alive())
    with pytest.raises(ValueError, match="workers"):
        hpclab.connect(workers=100_000)
    until(lambda: not sockets() and set(zygotes_alive()) <= before)


def test_another_scheduler_gets_nothing_before_a_launch():
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        hpclab.connect(cluster.scheduler_address, security=False) as client,
    ):
        before = set(zygotes_alive())
        assert client.submit(abs, -1).result() == 1
        assert not any("hpclab" in name for name in client.run_on_scheduler(plugins))
        assert set(zygotes_alive()) == before
        (zygote,) = hpclab.launch(client, os.getppid).result(60)
        assert psutil.Process(zygote).ppid() in client.run(os.getpid).values()


def plugins(dask_scheduler):
    return [*dask_scheduler.plugins, *dask_scheduler.worker_plugins]


def test_dask_works_without_a_place_for_the_socket(tmp_path):
    folder = tmp_path / f"hpclab-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    program = (
        "import hpclab\n"
        "with hpclab.connect(workers=1) as client:\n"
        "    print(client.submit(abs, -3).result())\n"
        "    hpclab.launch(client, abs, -3).result()\n"
    )
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, timeout=120)
    assert done.stdout == "3\n"
    assert "must belong to this user alone; remove it, or set TMPDIR" in done.stderr


def test_a_fork_of_the_kernel_keeps_no_zygote():
    require(hasattr(os, "fork"), "fork")
    program = (
        "import os, time, hpclab\n"
        "with hpclab.connect(workers=1) as client:\n"
        "    (zygote,) = hpclab.launch(client, os.getppid).result()\n"
        "    if not (child := os.fork()):\n"
        "        time.sleep(600)\n"
        "os.waitpid(-1, os.WNOHANG)\n"
        "while os.path.exists(f'/proc/{zygote}'): time.sleep(0.01)\n"
        "os.kill(child, 9)\n"
        "print('ended')\n"
    )
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, timeout=120)
    assert done.stdout == "ended\n", done.stderr


def test_one_cpu():
    program = (
        "import os, hpclab\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "with hpclab.connect() as client:\n"
        "    print(hpclab.launch(client, os.sched_getaffinity, 0).result() == [os.sched_getaffinity(0)])\n"
    )
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr
