"""Gangs over several hosts: here jobs with addresses, CPUs, folders and process groups of their own."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import no_rank_left, ours, require, until
from distributed import Scheduler, Security, SpecCluster

import hpclab
from hpclab.cluster import ClusterClient

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
KEYS = {"ca_file": "tls-ca-file", "cert": "tls-cert", "key": "tls-key"}


class Hosts:
    """A scheduler, and `dask worker` as a queue's job would start it on each host."""

    def __init__(self, folder):
        self.folder = folder
        self.security = Security.temporary()
        options = {"host": "127.0.0.1", "port": 0, "security": self.security, "protocol": "tls://"}
        scheduler = {"cls": Scheduler, "options": options | {"dashboard_address": "127.0.0.1:0"}}
        self.cluster = SpecCluster(scheduler=scheduler, security=self.security, silence_logs=40)
        self.client = ClusterClient(self.cluster)
        self.jobs = {}

    def start(self, number, seconds=None):
        """Start the worker of a host: with one CPU, in a folder of its own, for a walltime of so many seconds."""
        home = self.folder / f"host-{number}"
        home.mkdir(exist_ok=True)
        certificates = []
        for key, option in KEYS.items():
            path = home / key
            path.touch(mode=0o600)
            path.write_text(self.security.get_tls_config_for_role("worker")[key])
            certificates += [f"--{option}", path]
        command = ["taskset", "-c", str(CPUS[number]), sys.executable, "-m", "distributed.cli.dask_worker"]
        command += [self.cluster.scheduler_address, "--host", f"127.0.0.{number + 2}", "--nthreads", "1"]
        command += ["--name", str(number), "--memory-limit", "2GB", "--no-dashboard", *certificates]
        with open(home / "log", "a") as log:
            self.jobs[number] = subprocess.Popen(
                command,
                cwd=home,
                env=os.environ
                | {"TMPDIR": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
                | ({"HPCLAB_ENDS": str(time.time() + seconds)} if seconds else {}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, number):
        """Kill all that runs on a host, as one that loses its power."""
        job = self.jobs.pop(number)
        for process in ours(f"host-{number}"):
            os.kill(process, signal.SIGKILL)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        while len(self.client.scheduler_info()["workers"]) > len(self.jobs):
            time.sleep(0.01)


@pytest.fixture(scope="module")
def all_hosts(tmp_path_factory):
    require(len(CPUS) > 1 and shutil.which("taskset") is not None, "two CPUs, and taskset")
    there = Hosts(tmp_path_factory.mktemp("hosts"))
    yield there
    there.client.close()
    for job in there.jobs.values():
        os.killpg(job.pid, signal.SIGTERM)
        job.wait(30)


@pytest.fixture
def hosts(all_hosts):
    for number in {0, 1} - all_hosts.jobs.keys():
        all_hosts.start(number)
    all_hosts.client.wait_for_workers(2, timeout=60)
    return all_hosts


def place():
    return [os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")]


def add():
    numbers = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(numbers)
    pair = dist.new_group([0, 1])
    dist.all_reduce(numbers, group=pair)
    return numbers.item()


def add_by_env():
    dist.init_process_group("gloo")
    assert os.environ["MASTER_PORT"].isdigit()
    return add()


def test_a_gang_takes_hosts_together(hosts):
    assert hpclab.launch(hosts.client, place).result(60) == [["0", "1", "0", "2"], ["0", "1", "1", "2"]]
    run = hpclab.launch(hosts.client, add, ranks=2)
    assert run.result(60) == [6, 6]
    assert hpclab.launch(hosts.client, add_by_env, ranks=2, init=False).result(60) == [6, 6]
    with hpclab.gang(hosts.client, ranks=2) as gang:
        assert gang.run("x = torch.ones(1); dist.all_reduce(x); x.item()") == {0: "2.0", 1: "2.0"}
    with pytest.raises(ValueError, match=r"a gang 2 .2 workers on 2 hosts, 2 CPUs.; use ranks<=2, or oversubscribe"):
        hpclab.launch(hosts.client, add, ranks=3)
    with pytest.raises(ValueError, match=r"threads .=2. take 2 CPUs"):
        hpclab.launch(hosts.client, add, ranks=1, threads=2)
    four = hpclab.launch(hosts.client, place, ranks=4, oversubscribe=True)
    assert [found[1] for found in four.result(60)] == ["2"] * 4


def test_rows_say_that_hosts_are_one_machine(hosts):
    run = hpclab.launch(hosts.client, hpclab.report, ranks=2)
    run.result(60)
    assert {row["source"] for row in run.rows if row["kind"] == "step"} == {"emulated"}


def same_as_torch(store):
    """What a store of torch's answers, one thing after the other."""
    told = []
    store.set("a", "1")
    told += [store.get("a"), store.add("sum", 2), store.add("sum", 40), store.get("sum")]
    told += [store.check(["a", "sum"]), store.check(["a", "missing"]), store.num_keys()]
    told += [store.compare_set("a", "1", "2"), store.compare_set("a", "1", "3"), store.compare_set("new", "", "4")]
    told += [store.compare_set("none", "x", "5"), store.delete_key("a"), store.delete_key("a"), store.check(["a"])]
    store.set("bytes", bytes(range(256)).decode("latin-1"))
    store.wait(["bytes", "sum"])
    prefixed = dist.PrefixStore("under", store)
    prefixed.set("a", "9")
    return [*told, store.get("bytes"), prefixed.get("a"), store.check(["under/a"])]


def test_the_rendezvous_answers_as_torch_does(hosts):
    def ask():
        from hpclab.gangs import rank

        return same_as_torch(rank.store()) if dist.get_rank() == 0 else type(rank.store()).__name__

    answers, kind = hpclab.launch(hosts.client, ask, ranks=2).result(60)
    expected = same_as_torch(dist.HashStore())
    assert kind == "GangStore"
    answers[6], expected[6] = answers[6] > expected[6], True  # the number of keys: torch's own are there too
    assert answers == expected


def train(steps):
    torch.manual_seed(dist.get_rank())
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(20, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first = 0
    if (state := hpclab.restore()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, steps):
        loss = (model(torch.randn(8, 20)) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hpclab.report(step=step, loss=loss.detach())
        stop = hpclab.should_stop()
        if stop or step % 10 == 9:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            hpclab.save(state, step + 1)
        if stop:
            break
        time.sleep(0.01)
    return model.module.weight.detach().numpy().tobytes()


def test_a_host_that_dies_and_comes_back_costs_nothing_but_time(hosts):
    undisturbed = hpclab.launch(hosts.client, train, 100, ranks=2).result(60)
    run = hpclab.launch(hosts.client, train, 100, ranks=2, max_restarts=3)
    until(lambda: any(row["kind"] == "checkpoint" and row["step"] >= 30 for row in run.rows), run)
    hosts.kill(1)
    hosts.start(1)
    assert run.result(120) == undisturbed
    assert {row["attempt"] for row in run.rows if row["kind"] == "step"} == {0, 1}
    assert len(run.result()) == 2


def test_a_host_that_stays_away_leaves_the_others_at_work(hosts):
    run = hpclab.launch(hosts.client, train, 100, ranks=2, max_restarts=1, min_ranks=1)
    until(lambda: any(row["kind"] == "checkpoint" for row in run.rows), run)
    hosts.kill(1)
    assert len(run.result(120)) == 1


@pytest.mark.alone  # in its 15 seconds a worker must come, and begin
def test_a_walltime_that_ends_loses_no_step(hosts):
    undisturbed = hpclab.launch(hosts.client, train, 1500, ranks=2).result(60)
    hosts.kill(1)
    hosts.start(1, seconds=15)
    hosts.client.wait_for_workers(2, timeout=60)
    run = hpclab.launch(hosts.client, train, 1500, ranks=2, max_restarts=1, name="twice")
    once = hpclab.launch(hosts.client, train, 10**6, ranks=2, oversubscribe=True, name="once")
    with pytest.warns(UserWarning, match=r"the walltime of rank .'s worker .* continues from its checkpoint"):
        assert len(once.result(60)) == 2
    assert once.status == "stopped"
    while run.status == "running":
        time.sleep(0.01)
    hosts.kill(1)
    hosts.start(1)
    assert run.result(120) == undisturbed
    steps = [row["step"] for row in run.rows if row["kind"] == "step" and row["rank"] == 0]
    assert steps == list(range(1500))
    [restart] = [row for row in run.rows if row["kind"] == "restart"]
    assert "walltime" in restart["cause"]


def test_a_folder_that_a_node_does_not_see(hosts):
    def lose():
        if dist.get_rank() == 0:
            os.rename(hpclab.gangs.rank.run_folder(), "elsewhere")
        dist.barrier()
        hpclab.save({}, 1)

    with pytest.raises(FileNotFoundError, match=r"folder .* isn't there on .* name one on a disk that all nodes share"):
        hpclab.launch(hosts.client, lose, ranks=2).result(60)


def test_ranks_save_and_restore_before_they_have_a_process_group(hosts):
    """Over several hosts by way of the scheduler."""

    def begin():
        state = hpclab.restore()
        torch.manual_seed(int(os.environ["RANK"]))
        hpclab.save({"step": 7}, 7)
        return state or torch.rand(1).item(), torch.rand(1).item()

    run = hpclab.launch(hosts.client, begin, ranks=2, init=False)
    begun = run.result(60)
    assert len({number for number, _ in begun}) == 2
    held = hpclab.checkpoint.load(hpclab.checkpoint.newest(run.folder / "checkpoints"))
    assert [torch.Generator().set_state(kept["torch"]).initial_seed() for kept in held["random"]] == [0, 1]
    again = hpclab.launch(hosts.client, begin, ranks=2, init=False, resume=run.folder).result(60)
    assert [state for state, _ in again] == [{"step": 7}] * 2


def test_nothing_of_a_gang_is_left_on_its_hosts(hosts):
    hpclab.launch(hosts.client, add, ranks=2).result(60)
    assert no_rank_left()
    assert [path for path in hosts.folder.glob("host-*/**/*") if "-add-" in path.name] == []
