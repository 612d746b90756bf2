"""Private parts of others that hpclab uses: which of them a new release has renamed, or turned into something else."""

import inspect
import subprocess
import sys

import distributed
import pytest
from conftest import until
from distributed import Nanny, SpecCluster
from distributed.deploy import Cluster
from ipykernel.comm.comm import BaseComm

from hpclab import _dask, queues
from hpclab._dask import HookedCluster

Job = queues.jobqueue().core.Job  # its import by itself would have Ctrl-C end this process

PARAMETERS = [
    (SpecCluster, "_start", ["self"]),
    (SpecCluster, "_close", ["self"]),
    (SpecCluster, "_correct_state", ["self"]),
    (SpecCluster, "_correct_state_internal", ["self"]),
    (SpecCluster, "_update_worker_status", ["self", "op", "msg"]),
    (Cluster, "_update_worker_status", ["self", "op", "msg"]),
    (Nanny, "instantiate", ["self"]),
    (Job, "job_file", ["self"]),
    (Job, "job_script", ["self"]),
    (Job, "close", ["self"]),
    (BaseComm, "_reply_subshell_for", ["self", "data", "default"]),
]


@pytest.mark.parametrize(("owner", "name", "parameters"), PARAMETERS)
def test_a_method_is_there_and_takes_what_it_took(owner, name, parameters):
    assert [*inspect.signature(vars(owner)[name]).parameters] == parameters


def test_a_clusters_own_methods_are_those_that_it_calls():
    """Else hpclab's would stand beside them, and never run."""
    source = inspect.getsource(SpecCluster) + inspect.getsource(Cluster)
    for name, method in vars(HookedCluster).items():
        if name.startswith("_") and not name.startswith("__") and inspect.isfunction(method):
            assert f"self.{name}" in source, name


def test_hooks_run():
    class Seen(HookedCluster):
        seen = ()

        async def opened(self):
            self.seen += ("opened",)

        async def correct(self):
            await super().correct()
            self.seen += ("correct",)

        async def closing(self):
            self.seen += ("closing",)

    options = {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1", "port": 0}
    with Seen(scheduler={"cls": "distributed.Scheduler", "options": options}) as cluster:
        cluster.sync(cluster.correct_soon)
    seen = list(cluster.seen)
    assert seen[0] == "opened" and seen.count("correct") >= 2 and seen.index("correct") < seen.index("closing")


def test_a_jobs_attributes_are_there():
    options = queues.job_options(queues.ask("slurm", {}), ".")
    job = queues.job_class("slurm")("<scheduler>", name="hpclab-0", **options)
    for name in ("job_header", "log_directory", "submit_command", "cancel_command", "job_id", "status"):
        assert hasattr(job, name), name


SCRIPT = """
import multiprocessing
from hpclab import machine
print(machine.imported_by_child(), flush=True)
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=print, args=["done"])
    child.start()
    child.join()
"""


def test_a_script_is_told_that_a_child_imports_it(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True", "done"], done.stderr


def test_events_of_a_topic_are_kept_and_forgotten(client):
    scheduler, version = client.cluster.scheduler, f"distributed {distributed.__version__}"
    scheduler.subscribe_topic("canary", client.id)
    _dask.keep_newest_event(scheduler, "canary")
    for number in range(3):
        scheduler.log_event("canary", number)
    assert [event for _, event in scheduler.get_events("canary")] == [2], f"{version} keeps events elsewhere"
    _dask.forget_topic(scheduler, "canary", 0.0)
    until(lambda: not scheduler.get_events("canary"))
