"""One contract for every kind of cluster that `connect` gives; and its errors."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import psutil
import pytest
from conftest import ours, require
from distributed import LocalCluster, Security
from distributed.utils import LoopRunner

import hpclab
from hpclab import machine, slurm


@pytest.fixture(params=["local", "local without TLS", "address", "slurm", "slurm without TLS"])
def connected(request):
    """Clients of two workers, however they came by them."""
    if request.param == "local":
        with hpclab.connect(workers=2) as client:
            yield client
    elif request.param == "local without TLS":
        with hpclab.connect(workers=2, security=False) as client:
            yield client
    elif "slurm" in request.param:
        require(not slurm.missing(), "Slurm")
        security = "without" not in request.param
        paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # of this module, whose functions the workers run
        with hpclab.connect("slurm", workers=2, private=True, security=security, env=paths) as client:
            yield client
    else:
        security = Security.temporary()
        with (
            LocalCluster(
                n_workers=2, threads_per_worker=1, security=security, dashboard_address="127.0.0.1:0"
            ) as cluster,
            hpclab.connect(cluster.scheduler_address, security=security) as client,
        ):
            yield client
            assert cluster.status.name == "running", "connect closed a cluster that it did not open"


def total(numbers):
    import torch
    import torch.distributed as dist

    mine = torch.tensor([float(numbers[dist.get_rank()])])
    dist.all_reduce(mine)
    return mine.item()


def test_contract(connected):
    assert connected.submit(lambda: 6 * 7).result() == 42
    workers = connected.scheduler_info()["workers"].values()
    assert [worker["nthreads"] for worker in workers] == [1, 1]
    run = hpclab.launch(connected, total, [20, 22], ranks=2)
    assert run.result(60) == [42, 42]
    assert run.status == "finished"


def test_default_fits_the_machine():
    with hpclab.connect() as client:
        assert len(client.scheduler_info()["workers"]) == machine.fits()
        assert client.scheduler.address.startswith("tls://127.0.0.1:")


def test_close_ends_everything():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    client = hpclab.connect(workers=2)
    started = {child.pid for child in psutil.Process().children(recursive=True)} - before
    cluster = client.cluster
    client.close()
    client.close()  # closing twice is no error
    assert len(started) >= 2
    assert cluster.status.name == "closed"
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in started if psutil.pid_exists(pid)], timeout=10)
    running = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not [process for process in running if "spawn_main" in " ".join(process.cmdline())]


def test_works_in_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import hpclab\n"
        "def where(): return hpclab.machine.cpus()\n"
        "if __name__ == '__main__':\n"
        "    with hpclab.connect(workers=1) as client:\n"
        "        print(client.submit(where).result(), hpclab.launch(client, where, ranks=1).result())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(machine.cpus()), f"[{machine.cpus()}]"], done.stderr


def test_works_in_a_notebook_that_sets_its_file(tmp_path):
    (tmp_path / "analysis.ipynb").write_text('{"cells": [null]}')  # as Python, it breaks off
    program = (
        "__file__ = 'analysis.ipynb'\n"
        "import hpclab\n"
        "with hpclab.connect(workers=1) as client:\n"
        "    print(client.submit(abs, -3).result())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--quiet", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(Path(hpclab.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["3"], done.stderr


def test_a_script_without_its_guard_is_told_so_in_a_few_lines(tmp_path):
    (tmp_path / "script.py").write_text("import hpclab\nhpclab.connect(workers=2)\n")
    before = ours("spawn_main")
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    *_, last = lines = done.stderr.splitlines()
    assert last.startswith("RuntimeError: no worker could be started") and '`if __name__ == "__main__":`' in last
    assert lines[0].startswith("A worker that imports ") and "script.py reached hpclab.connect()" in lines[0]
    assert len(lines) < 15
    assert not ours("script.py") and {*ours("spawn_main")} <= {*before}


def test_what_else_keeps_a_cluster_from_starting_is_not_hidden(monkeypatch):
    def start(**_):
        raise RuntimeError("Cluster failed to start") from OSError("Too many open files")

    monkeypatch.setattr("hpclab.cluster.client.LocalCluster", start)
    with pytest.raises(RuntimeError, match="Cluster failed to start") as caught:
        hpclab.connect(workers=1)
    assert str(caught.value.__cause__) == "Too many open files"


PAGES = """
import sys, urllib.error, urllib.request
import hpclab

def page(path):
    try:
        with urllib.request.urlopen(base + path) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""

if __name__ == "__main__":
    with_bokeh = sys.argv[1:] == []
    if not with_bokeh:
        sys.modules["bokeh"] = None
    with hpclab.connect(workers=1, security=False) as client:
        base = client.dashboard_link.removesuffix("/status")
        assert page("/health") == (200, "ok")
        assert page("/info/main/workers.html")[0] == 200
        assert not {"aiohttp", "bokeh.server"} & sys.modules.keys()
        status = page("/status")
        assert status[0] == page("/")[0] == 200
        assert ("Dask needs" in status[1]) != with_bokeh
        assert page("/workers")[0] == (200 if with_bokeh else 404)
        assert page("/proxy/22/127.0.0.1/")[0] == 400
        assert page("/nothing")[0] == 404
"""


@pytest.mark.parametrize("arguments", [[], ["without bokeh"]])
def test_the_dashboard_is_imported_when_a_page_of_it_is_asked_for(arguments):
    require(None not in map(machine.installed, ("bokeh", "jupyter-server-proxy")), "bokeh and jupyter-server-proxy")
    done = subprocess.run([sys.executable, "-", *arguments], input=PAGES, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"workers": 0}, r"workers \(=0\) must be a whole number >= 1"),
        ({"workers": -1}, r"workers \(=-1\)"),
        ({"workers": 2.5}, r"workers \(=2.5\)"),
        ({"workers": True}, r"workers \(=True\)"),
        ({"workers": 100_000}, r"workers \(=100000\) need .*: more than the .* of this machine; use workers<=\d+"),
        ({"memory": "many"}, r"memory \(='many'\) must be bytes or a size such as '2GB'"),
        ({"memory": "1PB"}, r"memory \(='1PB'\) for each of \d+ workers"),
        ({"memory": -1}, r"memory \(=-1\)"),
        ({"memory": float("inf")}, r"memory \(=inf\) must be bytes"),
        ({"memory": [1]}, r"memory \(=\[1\]\) must be bytes"),
        ({"where": "slrum"}, r"where \(='slrum'\) must be 'local', the address"),
        ({"where": "tcp://127.0.0.1:1", "workers": 2}, r"workers \(=2\) can't be chosen for a running cluster"),
        ({"memory": "60MB"}, r"memory \(='60MB'\) for each of \d+ workers must be at least 128.00 MiB"),
        (
            {"where": "tcp://127.0.0.1:1"},
            r"security \(=True\) can't be had at tcp://127.0.0.1:1, which is not encrypted",
        ),
        ({"where": "tcp://head", "security": False}, r"where \(='tcp://head'\) must be an address with a port"),
        ({"where": "tls://127.0.0.1:1"}, r"security \(=True\) must be the distributed.Security of the scheduler"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        hpclab.connect(**arguments)


def test_a_host_that_nobody_knows_is_told_at_once():
    with pytest.raises(OSError, match=r"its host no-such-host.invalid isn't known here: "):
        hpclab.connect("tcp://no-such-host.invalid:8786", security=False)


def test_a_closed_client_may_be_collected_at_any_time():
    """Also while another starts, which holds a lock that closing takes."""
    client = hpclab.connect(workers=1)
    client.close()
    gone = weakref.ref(client)
    collected = threading.Event()

    def collect():
        nonlocal client
        with LoopRunner._lock:
            del client
            gc.collect()
        collected.set()

    threading.Thread(target=collect, daemon=True).start()
    assert collected.wait(30)
    assert gone() is None
