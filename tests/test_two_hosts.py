"""Gangs over two real hosts, as far as namespaces can be: see `two_hosts`."""

import os
import sys
import textwrap
import time

import cloudpickle
import pytest
import test_hosts
import torch
import torch.distributed as dist
from conftest import require, until
from test_hosts import train
from two_hosts import EPHEMERAL, Lan, needed

import hpclab
from hpclab import figures, machine, scaling, slurm, tasks, timeline
from hpclab.gangs import run as runs

cloudpickle.register_pickle_by_value(test_hosts)  # also where its own tests aren't run
BOTH = {"host": "east; west", "hosts": 2, "cpu": "CPU of east; CPU of west", "cpus": 2 * machine.cpus()}
ONE = {"hosts": 1, "cpus": machine.cpus()}
EAST, WEST = (ONE | {"host": name, "cpu": f"CPU of {name}"} for name in ("east", "west"))


@pytest.fixture(scope="module")
def lan(tmp_path_factory):
    needed()
    there = Lan(tmp_path_factory.getbasetemp())
    try:
        there.schedule()
        there.join("east", 2)
        there.join("west", 3)
        with there.client() as there.user:
            there.user.wait_for_workers(2, timeout=120)
            yield there
    finally:
        there.close()


@pytest.fixture
def client(lan):
    lan.user.wait_for_workers(2, timeout=120)
    return lan.user


def part(row, names):
    return {name: row[name] for name in names}


def traced():
    """Steps in which the ranks meet, traced; when this host's clock says that they began."""
    began = time.time()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timeline.profiler(3) as profiler:
        for step in range(10):
            optimizer.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            hpclab.report(step=step, samples=1)
            profiler.step()
    return began


def test_times_are_of_one_clock(client):
    run = hpclab.launch(client, traced, ranks=2)
    east, west = run.result(120)
    assert west - east < -50, "the clocks of these hosts differ"
    assert run.rows[-1]["kind"] == "end"
    assert all(0 < row["time_s"] < run.rows[-1]["time_s"] for row in run.rows if row["kind"] == "step")
    by_rank = [[row["time_s"] for row in run.rows if row["kind"] == "step" and row["rank"] == rank] for rank in (0, 1)]
    # No rank takes its next step but one before the other has taken this one.
    assert all(one < other for one, other in zip(by_rank[0], by_rank[1][2:], strict=False))
    assert all(one < other for one, other in zip(by_rank[1], by_rank[0][2:], strict=False))
    assert max(row["start_s"] for row in timeline.spans(run.folder)) < run.rows[-1]["time_s"]


def test_rows_and_figures_name_the_machines_of_the_ranks(client):
    run = hpclab.launch(client, traced, ranks=2)
    run.result(120)
    assert part(run.rows[0], BOTH) == BOTH
    assert run.rows[0]["cpus_host"] == 2 * os.cpu_count()
    assert {row["source"] for row in run.rows if row["kind"] == "step"} == {"measured"}
    for rows in (run.rows, timeline.spans(run.folder), [scaling.trial(run.rows)]):
        assert f"CPU of east; CPU of west, {2 * machine.cpus()} CPU on 2 hosts" in figures.provenance(rows)
    one = hpclab.launch(client, int, ranks=1)
    one.result(60)
    assert part(one.rows[0], EAST) in (EAST, WEST)
    grain = tasks.sweep(lambda count: tasks.clock(client, abs, range(count)), [1], items=1, repeats=1, client=client)
    assert part(grain[0], BOTH) == BOTH
    messages = scaling.allreduce(client, sizes=[1000], repeats=1)
    assert part(messages[0], BOTH) == BOTH


def fail_in_turn():
    """The rank whose clock is ahead fails first."""
    time.sleep(0.3 * dist.get_rank())
    raise ValueError(f"rank {dist.get_rank()}")


def test_the_first_failure_is_blamed_whatever_the_clocks_say(client):
    with pytest.raises(ValueError, match="rank 0"):
        hpclab.launch(client, fail_in_turn, ranks=2).result(60)
    with hpclab.gang(client, ranks=2) as gang, pytest.raises(hpclab.CellError, match=r"^\[rank 0\]"):
        gang.run("import time; time.sleep(0.2 * rank); raise ValueError(rank)")


def by_env():
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item(), os.environ["MASTER_ADDR"], os.environ["GLOO_SOCKET_IFNAME"], os.uname().nodename


def test_ranks_meet_on_the_network_of_their_workers(lan, client):
    """Not on that of the default route, which leads nowhere, nor on the loopback; at ports that are open."""
    first = f"{lan.net}.2"
    expected = [(2.0, first, "ib0", "east"), (2.0, first, "ib0", "west")]
    assert hpclab.launch(client, by_env, ranks=2, init=False).result(60) == expected
    ask = "from hpclab.cluster import jobs; print(jobs._facing(['127.0.0.1', 'east']))"
    assert lan.head.run(sys.executable, "-c", ask) == f"{lan.net}.1\n", (
        "where a scheduler of jobs on these hosts listens"
    )
    with hpclab.gang(client, ranks=2) as gang:
        assert gang.run("x = torch.ones(1); dist.all_reduce(x); x.item()") == {0: "2.0", 1: "2.0"}


def test_a_host_that_loses_its_power_and_comes_back_costs_nothing_but_time(lan, client):
    undisturbed = hpclab.launch(client, train, 60, ranks=2).result(60)
    run = hpclab.launch(client, train, 60, ranks=2, max_restarts=3)
    until(lambda: any(row["kind"] == "checkpoint" and row["step"] >= 20 for row in run.rows), run)
    lan.hosts["west"].kill()
    lan.join("west", 3)
    assert run.result(120) == undisturbed
    [restart] = [row for row in run.rows if row["kind"] == "restart"]
    assert part(restart, BOTH) == BOTH
    assert 0 < restart["failed_s"] < restart["time_s"] < run.rows[-1]["time_s"]


@pytest.mark.long
def test_a_host_that_falls_silent_leaves_the_other_at_work(lan, client, monkeypatch):
    """Its cable is pulled: nothing tells that it has gone, and what runs there goes on."""
    monkeypatch.setattr(runs, "RETURN_SECONDS", 1.0)
    west = lan.hosts["west"]
    run = hpclab.launch(client, train, 60, ranks=2, max_restarts=1, min_ranks=1)
    until(lambda: any(row["kind"] == "checkpoint" for row in run.rows), run)
    west.run("ip", "link", "set", "ib0", "down")
    assert len(run.result(180)) == 1
    [restart] = [row for row in run.rows if row["kind"] == "restart"]
    assert part(restart, EAST) == EAST
    assert "was lost with its worker" in restart["cause"]
    west.kill()
    lan.join("west", 3)


def test_a_port_that_is_closed_is_named(lan, client):
    ports = f"{EPHEMERAL[0]}-{EPHEMERAL[1]}"
    east = lan.hosts["east"]
    east.close_ports(ports)
    try:
        where = rf"rank 1 on west can't reach rank 0 on east at {lan.net}\.2, port 410\d\d: timed out.* {ports}"
        with pytest.raises(ConnectionError, match=where):
            hpclab.launch(client, int, ranks=2, hang_after=None).result(60)
    finally:
        east.open_ports(ports)


JOBS = """
    import os, time
    import dask, hpclab, torch, torch.distributed as dist

    def train():
        saved = hpclab.restore() or {"step": 0, "sum": torch.zeros(1)}
        for step in range(saved["step"], 100):
            total = torch.ones(1)
            dist.all_reduce(total)
            saved = {"step": step + 1, "sum": saved["sum"] + total}
            hpclab.report(step=step)
            if step % 10 == 9:
                hpclab.save(saved, step + 1)
            time.sleep(0.01)
        return saved["sum"].item(), os.uname().nodename

    if __name__ == "__main__":
        site = {
            "scheduler-options": {"port": 8799},
            "worker-extra-args": ["--worker-port", "40000:40009", "--nanny-port", "40010:40019"],
        }
        with dask.config.set({f"jobqueue.slurm.{name}": value for name, value in site.items()}):
            with hpclab.connect("slurm", memory="1GB", timeout=120, folder="logs") as client:
                print(client.cluster.scheduler_address)
                run = hpclab.launch(client, train, ranks=2, max_restarts=1, min_ranks=1)
                while not any(row["kind"] == "checkpoint" for row in run.rows):
                    time.sleep(0.01)
                open("saved", "w").close()
                print(run.result(120))
                print([row["host"] for row in run.rows if "host" in row])
"""


@pytest.mark.long
def test_jobs_of_a_site_run_on_its_nodes_and_outlive_one(lan, client):
    require(not slurm.missing(), "Slurm")
    settings = lan.slurm()
    script = lan.head.home / "jobs.py"
    script.write_text(textwrap.dedent(JOBS))
    with open(lan.head.home / "said", "w+") as said:
        lan.head.start(sys.executable, script, said=said, SLURM_CONF=str(settings), HOME=str(lan.head.home))
        job = lan.head.jobs[-1]
        while not (lan.head.home / "saved").exists() and job.poll() is None:
            time.sleep(0.01)
        lan.hosts["west"].kill()
        lan.join("west", 3)
        assert job.wait(240) == 0
        said.seek(0)
        where, *_, values, hosts = said.read().splitlines()
    assert where == f"tls://{lan.net}.1:8799"
    assert values.endswith(", 'east')]")
    assert hosts in ("['east; west', 'east']", "['west; east', 'east']")
