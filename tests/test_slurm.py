"""A private Slurm: real daemons, as root and, in a second run, as an ordinary user."""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from conftest import ours, require, until

from hpclab import cli, live, plots, slurm
from hpclab.slurm import conf, programs, states

TEMPORARY = tempfile.gettempdir()
NOBODY, STRANGER = 65534, 33
"""Users that every Debian machine has: nobody, www-data."""
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")


@pytest.fixture(autouse=True)
def _installed():
    require(not slurm.missing(), f"{', '.join(slurm.missing())}: {slurm.install_line()}")


def test_a_table_of_jobs_leaves_out_what_says_nothing():
    row = dict.fromkeys(("array", "nodes", "cpus", "submitted_s", "started_s", "ended_s", "reason"))
    rows = [row | {"job": job, "name": "a", "partition": "main", "state": "RUNNING"} for job in (1, 2)]
    assert not {"partition", "reason"} & states.job_table(rows)[0].keys()
    rows[1] |= {"partition": "gpu", "reason": "Priority"}
    assert [(row["partition"], row["reason"]) for row in states.job_table(rows)] == [
        ("main", None), ("gpu", "Priority")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def place():
    """A temporary folder with a short path, as sockets need; that of pytest is longer."""
    path = tempfile.mkdtemp(prefix="hpc")
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def _apart(place, monkeypatch):
    """Private Slurms that others on this machine have aren't to be found by these tests, nor these by them."""
    live_in(place, monkeypatch)


def live_in(place, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", str(place))


@pytest.fixture(scope="module")
def up(place):
    """One for all tests that leave it as it was: four nodes, idle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", place)
        one = slurm.start(nodes=4)
    with one:
        yield one


def submit(one, command, *options, cwd=None):
    """Submit a job, whose output goes nowhere; returns its number."""
    return int(one.run("sbatch", "--parsable", "-o", "/dev/null", *options, "--wrap", command, cwd=cwd))


def job(one, number):
    return next(row for row in one.jobs() if row["job"] == number)


def in_state(one, number, *states, patience=frozenset()):
    """Wait for a job to come into a state; one that has ended in another, which it may not pass, is an error."""
    row = until(lambda: (row := job(one, number))["state"] in {*states, *ENDS} - patience and row)
    assert row["state"] in states, row
    return row


def node(one, name):
    return next(row for row in one.nodes() if row["node"] == name)


def sleepers(marker):
    """Processes of jobs of ours that sleep for an odd time, by which they are known."""
    mine = ours(marker)
    return [p.pid for p in psutil.process_iter(["name"]) if p.pid in mine and p.info["name"] == "sleep"]


def daemons():
    """All processes of private Slurms that these tests started: keepers and all below, also steps and jobs."""
    pids = {*ours("slurm/keeper.py"), *ours("slurmctld"), *ours("munged")}
    for keeper in ours("slurm/keeper.py"):
        with suppress(psutil.NoSuchProcess):  # it ends just now
            pids.update(process.pid for process in psutil.Process(keeper).children(recursive=True))
    return pids


def test_every_node_is_a_host_of_its_own(up):
    rows = up.nodes()
    assert {row["node"]: row["address"] for row in rows} == up.addresses
    assert sorted(up.addresses.values()) == ["127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"]
    assert {(row["state"], row["cpus"], row["memory_mb"], row["partitions"]) for row in rows} == {
        ("idle", 2, 2048, "main")
    }
    code = "import os, socket; from hpclab import slurm; print(os.environ['SLURMD_NODENAME'], slurm.here())"
    code += "; socket.create_server((slurm.here(), 5055), reuse_port=True)"
    said = up.run("srun", "-N4", sys.executable, "-c", code)
    assert sorted(said.split("\n")[:-1]) == [f"{name} {address}" for name, address in sorted(up.addresses.items())]
    assert slurm.here() is None


def test_a_task_finds_no_trace_of_what_keeps_slurm_on_the_loopback(up):
    said = up.run("srun", "sh", "-c", "hostname; env")
    assert said.splitlines()[0] == socket.gethostname()
    assert "NSS_WRAPPER" not in said and "LD_PRELOAD" not in said
    assert f"SLURM_CONF={up.env['SLURM_CONF']}" in said


def test_jobs_are_rows_as_long_as_it_lives(up, tmp_path):
    before = time.time()
    named = submit(up, "true", "-J", "lr=0.1 batch=3\nnext")
    good = int(up.run("sbatch", "--parsable", input="#!/bin/sh\n#SBATCH -n2\nsrun hostname\n", cwd=tmp_path))
    bad = submit(up, "exit 3", "-t", "1-02:03:00", "-J", "my job", "-n2")
    array = submit(up, "true", "--array=0-1", "--mem=1GB")
    long = submit(up, "sleep 1000")
    assert in_state(up, good, "COMPLETED")["exit_code"] == "0:0"
    assert in_state(up, named, "COMPLETED")["name"] == "lr=0.1 batch=3\nnext"
    assert (tmp_path / f"slurm-{good}.out").read_text().split() == [socket.gethostname()] * 2
    row = in_state(up, bad, "FAILED")
    assert (row["name"], row["exit_code"], row["walltime_s"], row["cpus"]) == ("my job", "3:0", 93780, 2)
    assert before - 1 <= row["submitted_s"] <= row["started_s"] <= row["ended_s"] <= time.time() + 1
    row = in_state(up, long, "RUNNING")
    assert row["started_s"] and row["ended_s"] is row["exit_code"] is row["walltime_s"] is None
    up.run("scancel", long)
    in_state(up, long, "CANCELLED")
    stubborn = submit(up, "trap '' TERM; echo > ready; while :; do sleep 0.1; done", cwd=tmp_path)
    until((tmp_path / "ready").exists)
    up.run("scancel", stubborn)
    row = in_state(up, stubborn, "COMPLETING", patience={"CANCELLED"})
    assert row["ended_s"] is row["exit_code"] is None
    assert in_state(up, stubborn, "CANCELLED")["ended_s"]
    held = submit(up, "true", "--hold")
    up.run("scancel", held)
    row = in_state(up, held, "CANCELLED")
    assert row["started_s"] is row["nodes"] is None and row["ended_s"]
    assert plots.gantt([row]).get_yticklabels()
    tasks = until(lambda: [r for r in up.jobs() if r["array"] and r["state"] == "COMPLETED"][1:] and up.jobs()[-5:])
    assert {f"{array}_0", f"{array}_1"} < {row["array"] for row in tasks}
    assert {row["memory_mb"] for row in tasks if row["array"]} == {1024}
    assert not [row for row in up.nodes() if row["cpus_used"]]


def test_nothing_listens_beyond_the_loopback(up):
    step = subprocess.Popen(["srun", "-N4", "-n4", sys.executable, "-c", "input()"], env=up.env, stdin=subprocess.PIPE)
    until(lambda: {row["state"] for row in up.nodes()} == {"mixed"})
    until(lambda: len(ours("input()")) >= 5)
    heard = {pid: psutil.Process(pid).net_connections("inet") for pid in {*daemons(), *ours("srun")}}
    listening = [c.laddr.ip for found in heard.values() for c in found if c.status == psutil.CONN_LISTEN]
    step.communicate(b"\n")
    assert step.returncode == 0
    assert set(up.addresses.values()) | {"127.0.0.1"} == set(listening)
    assert [c for found in heard.values() for c in found if c.type == socket.SOCK_DGRAM] == []


def test_a_node_fails_with_all_that_ran_on_it_and_comes_back(up):
    again = submit(up, "setsid sleep 1001 & nohup sleep 1001 & sleep 1001", "-w", "n1")
    once = submit(up, "sleep 1002", "-w", "n1", "--no-requeue")
    other = submit(up, "setsid sleep 1003 & wait", "-w", "n2")
    until(lambda: (len(sleepers("1001")), len(sleepers("1002")), len(sleepers("1003"))) == (3, 1, 1))
    up.kill("n1")
    up.kill("n1")  # what is dead stays so
    assert (sleepers("1001"), sleepers("1002"), len(sleepers("1003"))) == ([], [], 1)
    assert (node(up, "n1")["state"], node(up, "n1")["reason"]) == ("down", "killed by slurm.kill")
    assert in_state(up, once, "NODE_FAIL")["nodes"] == "n1"
    assert in_state(up, again, "PENDING")["restarts"] == 1
    assert job(up, other)["state"] == "RUNNING"
    up.revive("n1")
    up.run("scontrol", "update", f"jobid={again}", "starttime=now")  # it would wait some seconds
    in_state(up, again, "RUNNING")
    with pytest.raises(ValueError, match=r"node \(='n1'\) is up; revive those that were killed"):
        up.revive("n1")
    up.run("scancel", again, other)
    until(lambda: {row["state"] for row in up.nodes()} == {"idle"})


def test_a_slurmd_killed_by_hand_is_a_node_that_fails(up):
    number = submit(up, "sleep 1004", "-w", "n4", "--no-requeue")
    until(lambda: sleepers("1004"))
    (daemon,) = [pid for pid in ours("slurmd.conf") if psutil.Process(pid).cmdline()[-1] == "n4"]
    os.kill(daemon, signal.SIGKILL)
    until(lambda: node(up, "n4")["state"] == "down")
    assert node(up, "n4")["reason"] == "its slurmd ended"
    assert sleepers("1004") == []
    in_state(up, number, "NODE_FAIL")
    up.revive("n4")
    assert node(up, "n4")["state"] == "idle"


def test_drain_and_resume(up):
    up.drain("n1", "for the cleaner")
    assert (node(up, "n1")["state"], node(up, "n1")["reason"]) == ("drained", "for the cleaner")
    assert set(up.run("srun", "-N3", "sh", "-c", "echo $SLURMD_NODENAME").split()) == {"n2", "n3", "n4"}
    with pytest.raises(RuntimeError, match=r"srun .* failed"):
        up.run("srun", "-N4", "--immediate=1", "true")
    up.resume("n1")
    assert (node(up, "n1")["state"], node(up, "n1")["reason"]) == ("idle", None)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["sbatch", "--mem=3GB", "--wrap", "true"], "sbatch --mem=3GB .*failed.*: .*[Mm]emory"),
        (["sbatch", "-p", "gpu", "--wrap", "true"], "invalid partition specified: gpu"),
        (["sbatch", "-t", "soon", "--wrap", "true"], "Invalid --time specification"),
        (["sbatch", "-N5", "--wrap", "true"], "failed"),
    ],
)
def test_what_could_never_run_is_refused_with_slurms_own_words(up, command, says):
    with pytest.raises(RuntimeError, match=says):
        up.run(*command)


def test_a_node_that_is_not_there(up):
    for verb in (up.kill, up.revive, up.resume, lambda name: up.drain(name, "why")):
        with pytest.raises(ValueError, match=r"node \(='n9'\) must be one of n1, n2, n3, n4"):
            verb("n9")


@pytest.mark.parametrize("scheduler", ["builtin", "backfill"])
def test_backfill_lets_short_jobs_pass_and_builtin_does_not(scheduler):
    with slurm.start(nodes=2, cpus=1, scheduler=scheduler) as one:
        first = in_state(one, submit(one, "sleep 1000", "-t", "20"), "RUNNING")
        wide = submit(one, "sleep 1000", "-N2", "-t", "20")
        until(lambda: job(one, wide)["reason"] == "Resources")
        short = submit(one, "sleep 1000", "-t", "1")
        if scheduler == "backfill":
            in_state(one, short, "RUNNING")
            assert until(lambda: job(one, wide)["expected_s"]) >= first["started_s"] + 20 * 60
        else:
            until(lambda: job(one, short)["reason"] == "Priority")
            time.sleep(3)  # some rounds of the scheduler, in which it could start
            assert job(one, short)["state"] == "PENDING"
        assert job(one, wide)["state"] == "PENDING"
        one.run("scancel", wide)
        in_state(one, short, "RUNNING")


def test_a_job_of_higher_priority_goes_first():
    with slurm.start(nodes=1, cpus=1) as one:
        first = in_state(one, submit(one, "sleep 1000"), "RUNNING")
        early, late = submit(one, "sleep 1000"), submit(one, "sleep 1000", "--nice=-10")
        assert job(one, late)["priority"] > job(one, early)["priority"]
        one.run("scancel", first["job"])
        in_state(one, late, "RUNNING")
        assert job(one, early)["state"] == "PENDING"


def test_limits_and_partitions():
    partitions = {"short": {"MaxTime": 5, "PriorityTier": 2}, "long": {"Nodes": "n2"}}
    with slurm.start(nodes=2, memory=1_500_000_000, walltime="00:30:00", partitions=partitions) as one:
        assert [row["memory_mb"] for row in one.nodes()] == [1431, 1431]
        assert [row["partitions"] for row in one.nodes()] == ["short", "long,short"]
        with pytest.raises(RuntimeError, match="time limit"):
            submit(one, "true", "-t", "6")
        with pytest.raises(RuntimeError, match="time limit"):
            submit(one, "true", "-p", "long", "-t", "31")
        numbers = submit(one, "sleep 1000"), submit(one, "sleep 1000", "-p", "long", "-t", "30")
        rows = [in_state(one, number, "RUNNING") for number in numbers]
        assert [(row["partition"], row["walltime_s"]) for row in rows] == [("short", 300), ("long", 1800)]
        assert rows[1]["nodes"] == "n2"


def test_up_and_down_leave_no_process_and_no_file(place):
    before = daemons()
    with slurm.start(nodes=3) as one:
        folder = one.folder
        assert folder.stat().st_mode & 0o077 == 0
        assert str(folder) in one.status() and "no jobs" in one.status()
        submit(one, "setsid sleep 1005 & nohup setsid sleep 1005 & sleep 1005", "-N2")
        until(lambda: len(sleepers("1005")) == 3)
        assert len(daemons() - before) >= 3 * 2 + 4
    assert sleepers("1005") == []
    assert daemons() <= before
    assert not folder.exists()
    one.stop()  # once more is no error
    with pytest.raises(RuntimeError, match=r"the private Slurm in .* has ended; start another"):
        one.jobs()


def test_one_that_is_started_where_another_is_in_use(up, monkeypatch):
    for name, value in up.env.items():
        monkeypatch.setenv(name, value)
    with slurm.start(nodes=1) as second:
        assert second.run("srun", "sh", "-c", "echo $SLURM_CONF").strip() == f"{second.folder}/slurm.conf"


def test_several_at_once_and_the_one_that_is_found(up):
    assert slurm.find().folder == up.folder
    with slurm.start(nodes=1) as second:
        assert slurm.find().folder == second.folder
        detached = slurm.start(nodes=1, detached=True)
        try:
            with slurm.start(nodes=1):
                assert slurm.find().folder == detached.folder
                assert slurm.find().owner is None
                numbers = [submit(one, "true") for one in (up, second, detached)]
                for one, number in zip((up, second, detached), numbers, strict=True):
                    in_state(one, number, "COMPLETED")
        finally:
            slurm.find().stop()
        assert not detached.folder.exists()


OWNER = """
import time
from hpclab import slurm
one = slurm.start(nodes=2)
one.run("sbatch", "-o", "/dev/null", "--wrap", "setsid sleep 1006 & sleep 1006")
print(one.folder, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def owner():
    """A process that has a private Slurm with a job, and its folder."""
    before = daemons()
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    folder = Path(process.stdout.readline().strip())
    until(lambda: len(sleepers("1006")) == 2)
    yield process, folder
    process.stdout.close()
    until(lambda: daemons() <= before and not sleepers("1006"))


def test_it_ends_when_its_owner_is_killed(owner):
    process, folder = owner
    process.kill()
    process.wait()
    until(lambda: not folder.exists())
    assert slurm.find(folder) is None


def test_it_ends_when_its_keeper_is_killed_and_the_next_start_clears_what_was_left(owner):
    process, folder = owner
    (keeper,) = psutil.Process(process.pid).children()
    keeper.kill()
    until(lambda: not sleepers("1006"))
    process.kill()
    process.wait()
    assert folder.exists()
    until(lambda: slurm.find(folder) is None)
    slurm.start(nodes=1).stop()
    assert not folder.exists()


def test_no_daemon_survives_when_all_that_watches_is_killed_at_once(owner):
    process, folder = owner
    family = [p for p in psutil.Process(process.pid).children(recursive=True) if "slurm/keeper.py" in str(p.cmdline())]
    below = [p for keeper in family for p in keeper.children() if p not in family]
    ends_with_them = [p for p in below if p.name() in ("slurmctld", "slurmd", "munged")]
    for watcher in [process, *family]:
        watcher.kill()
    process.wait()
    psutil.wait_procs(ends_with_them)
    assert len(sleepers("1006")) == 2  # jobs go on, as nobody is left who knows them, but for the next start
    slurm.start(nodes=1).stop()
    assert not folder.exists()
    until(lambda: not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])


def test_it_ends_when_its_folder_is_taken_away():
    with slurm.start(nodes=1) as one:
        shutil.rmtree(one.folder)
        with pytest.raises(RuntimeError, match="has ended"):
            until(one.nodes)
    assert not [pid for pid in daemons() if str(one.folder) in " ".join(psutil.Process(pid).cmdline())]


def test_a_controller_that_was_killed_is_told_with_its_log():
    with slurm.start(nodes=1) as one:
        (daemon,) = [p for p in ours(str(one.folder)) if psutil.Process(p).name() == "slurmctld"]
        os.kill(daemon, signal.SIGKILL)
        until(lambda: "slurmctld" not in one._call("alive"))
        with pytest.raises(RuntimeError, match=r"slurmctld of the private Slurm in .* has ended; .*of its log:\nslurm"):
            one.nodes()


def test_a_node_that_does_not_come_back_is_told_with_its_log():
    with slurm.start(nodes=1) as one:
        one.kill("n1")
        port = int(re.search(r" Port=(\d+)", (one.folder / "slurm.conf").read_text())[1])
        with (
            socket.create_server((one.addresses["n1"], port)),
            pytest.raises(RuntimeError, match=r"(?s)n1 of .*in use"),
        ):
            one.revive("n1")
        one.revive("n1")
        assert one.run("srun", "echo", "here") == "here\n"


def test_it_shows_itself_as_text_without_a_kernel_and_says_when_it_has_ended(capsys):
    with slurm.start(nodes=1) as one:
        one._ipython_display_()
        assert f"{one.folder}\n\nnode  address    state" in capsys.readouterr().out
    one._ipython_display_()
    assert "has ended; start another" in capsys.readouterr().out


class Shown:
    """Stands in for a browser's place of an output."""

    def __init__(self, page, display_id):
        self.pages = [page.data]

    def update(self, page):
        self.pages.append(page.data)


@pytest.fixture
def shown(monkeypatch):
    """The places at which something is shown."""
    shown = []
    monkeypatch.setattr(live, "SHARE", 1.0)  # on a loaded machine drawing takes long, and the rest ten times as long
    monkeypatch.setattr(live, "get_ipython", lambda: types.SimpleNamespace(kernel=None))
    monkeypatch.setattr(live, "display", lambda *args, **named: shown.append(Shown(*args, **named)) or shown[-1])
    return shown


def no_view_left():
    return not [thread for thread in threading.enumerate() if thread.name == "hpclab-view"]


@pytest.mark.parametrize("way", ["stop", "kill its keeper"])
def test_what_stays_of_a_view_is_no_false_frame(shown, way):
    """It says that it is over, and the job is running on a node in use: of one moment, though read by two commands."""
    with slurm.start(nodes=1, cpus=1) as one:
        job = submit(one, "sleep 600")
        in_state(one, job, "RUNNING")
        one._ipython_display_()
        if way != "stop":
            one._keeper.kill()
    until(no_view_left)
    page = shown[0].pages[-1]
    assert "This Slurm has ended. This is how it was at" in page
    assert "RUNNING" in page and "allocated" in page and "idle" not in page


def test_nodes_and_jobs_are_of_one_moment(monkeypatch):
    """A job that ends between the two commands is read again with the node that it has left."""
    nodes, jobs = iter(["busy", "idle", "idle"]), iter(["running", "completed"])
    monkeypatch.setattr(states, "nodes", lambda run: next(nodes))
    monkeypatch.setattr(states, "jobs", lambda run: next(jobs))
    assert states.together(None) == ("idle", "completed")


def test_only_its_newest_view_follows(up, shown):
    """Each costs time, and cells are run again and again."""
    first = slurm.find(up.folder)
    first._ipython_display_()
    up._ipython_display_()
    job = submit(up, "true", "-J", "seen")
    in_state(up, job, "COMPLETED")
    until(lambda: "seen" in shown[1].pages[-1])
    assert "seen" not in shown[0].pages[-1]
    del live._newest[up.folder]
    until(no_view_left)


def test_a_port_that_is_taken_meanwhile_is_no_end(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_server(("127.0.0.2", 0)) as node:
        ports = [[other.getsockname()[1], 0], [0, node.getsockname()[1]]]

        def free_ports(hosts):
            free = original(hosts)
            return [bad or good for bad, good in zip(ports.pop(0), free, strict=True)] if ports else free

        original = conf.free_ports
        monkeypatch.setattr(conf, "free_ports", free_ports)
        with slurm.start(nodes=1) as one:
            assert one.run("srun", "echo", "here") == "here\n"
        assert ports == []


def test_a_folder_of_ones_own_keeps_the_logs_and_no_secret(place):
    folder = Path(place, "mine")
    with slurm.start(nodes=1, folder=folder) as one:
        assert slurm.find(folder).folder == folder
        in_state(one, submit(one, "true"), "COMPLETED")
    left = {path.name for path in folder.iterdir()}
    assert {"slurm.conf", "slurmctld.log", "n1.log", "completed"} <= left
    assert not {"munge.key", "munge", "keeper"} & left
    assert slurm.find(folder) is None
    with pytest.raises(ValueError, match=r"folder \(='.*mine'\) already holds something"):
        slurm.start(folder=folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"nodes": 0}, r"nodes \(=0\) must be a whole number from 1 to 200"),
        ({"nodes": True}, r"nodes \(=True\)"),
        ({"cpus": 1.5}, r"cpus \(=1.5\) must be a whole number from 1 to"),
        ({"memory": "lots"}, r"memory \(='lots'\) must be bytes or a size such as '2GB'"),
        ({"memory": -1}, r"memory \(=-1\)"),
        ({"memory": 0}, r"memory \(=0\)"),
        ({"scheduler": "fair"}, r"scheduler \(='fair'\) must be one of backfill, builtin"),
        ({"walltime": "soon"}, r"walltime \(='soon'\) must be text as Slurm reads it: 'MINUTES'"),
        ({"walltime": 30}, r"walltime \(=30\)"),
        ({"partitions": {"a b": {}}}, r"partitions \(='a b'\) must have names of letters"),
        ({"partitions": {"a": {"MaxTime": "1\nNodeName=x"}}}, r"partitions\['a'\] .* must be an option of slurm.conf"),
        ({"partitions": {"a": {"Speed": "high"}}}, r"slurmctld of the private Slurm in .* has ended.*Speed"),
        ({"folder": "with space"}, r"folder \(='.*with space'\) must have .* only letters, digits"),
        ({"folder": "x" * 100}, r"folder \(='.*xxx'\) must have at most \d+ bytes"),
    ],
)
def test_bad_arguments(arguments, says, place):
    before = sorted(Path(place).rglob("*"))
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){says}"):
        slurm.start(**arguments)
    assert sorted(Path(place).rglob("*")) == before
    assert list(Path().iterdir()) == []


def test_what_is_missing_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(programs, "SBIN", ())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"a private Slurm needs slurmctld, slurmd, munged, .*: .*install"):
        slurm.start()


@pytest.mark.parametrize(
    ("system", "about", "line"),
    [
        ("Linux", {"ID": "debian"}, "sudo apt install slurm-wlm munge libnss-wrapper"),
        ("Linux", {"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "sudo apt install slurm-wlm munge libnss-wrapper"),
        ("Linux", {"ID": "fedora"}, "sudo dnf install slurm slurm-slurmctld slurm-slurmd munge nss_wrapper"),
        (
            "Linux",
            {"ID": "rocky", "ID_LIKE": "rhel centos fedora"},
            "sudo dnf install epel-release && sudo dnf",
        ),
        ("Linux", {"ID": "arch"}, "quickstart_admin"),
        ("Darwin", {}, "Slurm needs Linux, and this is Darwin"),
    ],
)
def test_the_line_that_installs_it(monkeypatch, system, about, line):
    monkeypatch.setattr(programs.platform, "system", lambda: system)
    monkeypatch.setattr(programs.platform, "freedesktop_os_release", lambda: about)
    assert line in slurm.install_line()


@pytest.mark.rounds
def test_no_job_is_lost_when_a_node_fails_and_returns(up, tmp_path):
    """A hundred jobs; with HPCLAB_KILLS set they take a second each."""
    seconds = 1 if os.environ.get("HPCLAB_KILLS") else 0.2
    tell = 'echo "$SLURMD_NODENAME" > done-$SLURM_JOB_ID'
    caught = submit(up, f"[ $SLURM_RESTART_COUNT ] || sleep 1000; {tell}", "-w", "n3", cwd=tmp_path)
    numbers = {caught} | {submit(up, f"sleep {seconds}; {tell}", cwd=tmp_path) for _ in range(99)}
    in_state(up, caught, "RUNNING")
    until(lambda: len(list(tmp_path.iterdir())) >= 20)
    up.kill("n3")
    up.revive("n3")
    done = {
        number: in_state(up, number, "COMPLETED", patience={"NODE_FAIL", "CANCELLED"}) for number in sorted(numbers)
    }
    assert {path.name for path in tmp_path.iterdir()} == {f"done-{number}" for number in numbers}
    assert done[caught]["restarts"] == 1
    assert {path.read_text().strip() for path in tmp_path.iterdir()} == set(up.addresses)


class Other:
    """Another user of this machine, who runs programs in a folder of its own."""

    def __init__(self, uid, python=False):
        self.home = tempfile.mkdtemp(prefix="hpc", dir=TEMPORARY)
        os.chown(self.home, uid, -1)
        capabilities = "-all,+dac_read_search" if python else "-all"  # for an interpreter in a closed folder
        self.words = ["setpriv", f"--reuid={uid}", "--regid=65534", "--clear-groups", f"--inh-caps={capabilities}"]
        self.words += [f"--ambient-caps={capabilities}"]
        self.env = os.environ | {"HOME": self.home, "TMPDIR": self.home}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.home)

    def start(self, *words, **options):
        """Start a program as this user."""
        options = {"env": self.env, "cwd": self.home, "text": True, "stdout": subprocess.PIPE} | options
        return subprocess.Popen([*self.words, *words], **options)


@as_root
def test_all_of_this_as_an_ordinary_user():
    require(shutil.which("setpriv") is not None, "setpriv")
    chosen = "host_of_its_own or rows or loopback or ends or by_hand or drain or leave_no or all_that_ran or returns"
    pytest_again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__]
    with Other(NOBODY, python=True) as user:
        again = user.start(*pytest_again, f"--rootdir={Path(__file__).parents[1]}", stderr=subprocess.STDOUT)
        said = again.communicate(timeout=300)[0]
        assert again.returncode == 0, said
        assert " passed" in said and "skipped" not in said
        assert [path.name for path in Path(user.home).iterdir() if path.name.startswith("hpc")] == []


HOLDER = """
import sys
from hpclab import slurm
with slurm.start(nodes=2) as one:
    print(one.folder, flush=True)
    sys.stdin.readline()
    print(one.run("srun", "-N2", "id", "-u").split(), len(one.nodes()), flush=True)
"""


@as_root
def test_two_users_at_once_each_serve_their_owner_alone():
    """Nobody's group isn't the stranger's first one, either: as in containers."""
    with Other(NOBODY, python=True) as ann, Other(STRANGER, python=True) as bob, Other(STRANGER) as bare:
        holders = [user.start(sys.executable, "-c", HOLDER, stdin=subprocess.PIPE) for user in (ann, bob)]
        anns, bobs = [Path(holder.stdout.readline().strip()) for holder in holders]

        def squeue(conf, **options):
            return bare.start("squeue", env=bare.env | {"SLURM_CONF": str(conf)}, **options)

        assert "JOBID" in squeue(bobs / "slurm.conf").communicate(timeout=60)[0]
        with squeue(anns / "slurm.conf", stderr=subprocess.PIPE) as asked:
            assert "Permission denied" in asked.stderr.readline()
            asked.terminate()  # it would try again for a minute
            assert asked.stdout.read() == ""
        # With the ports known all the same, by another way, and credentials of one's own.
        stolen = Path(bare.home, "slurm.conf")
        stolen.write_text((anns / "slurm.conf").read_text().replace(f"{anns}/munge", f"{bobs}/munge"))
        stolen.chmod(0o644)
        with squeue(stolen) as asked:
            until(lambda: "Munge decode failed: Invalid credential" in (anns / "slurmctld.log").read_text())
            asked.terminate()
            assert asked.stdout.read() == ""
        # And none of its owner's.
        forger = bare.start("munge", "--no-input", "--socket", str(anns / "munge"), stderr=subprocess.PIPE)
        assert "Permission denied" in forger.communicate(timeout=60)[1]
        said = [holder.communicate("go\n", timeout=60)[0] for holder in holders]
        assert said == [f"['{uid}', '{uid}'] 2\n" for uid in (NOBODY, STRANGER)]
        assert not anns.exists() and not bobs.exists()


@as_root
def test_ten_users_at_once():
    every = sorted({entry.pw_uid for entry in pwd.getpwall()} - {0})[:10]
    assert len(every) == 10
    with ExitStack() as stack:
        users = [stack.enter_context(Other(uid, python=True)) for uid in every]
        holders = [user.start(sys.executable, "-c", HOLDER, stdin=subprocess.PIPE) for user in users]
        assert len({holder.stdout.readline() for holder in holders}) == 10
        said = [holder.communicate("go\n", timeout=120)[0] for holder in holders]
        assert said == [f"['{uid}', '{uid}'] 2\n" for uid in every]


@as_root
@pytest.mark.parametrize(
    ("what", "hide"), [("uts", "hostname no-such-host"), ("mount", "mount -t tmpfs none /sys/fs/cgroup")]
)
def test_neither_a_host_name_that_leads_nowhere_nor_missing_cgroups_matter(what, hide):
    hidden = ["unshare", f"--{what}", "sh", "-c", f'{hide} && exec "$0" "$@"']
    require(subprocess.run([*hidden, "true"], capture_output=True).returncode == 0, f"unshare --{what}")
    command = [*hidden, sys.executable, "-c", HOLDER]
    done = subprocess.run(command, input="go\n", capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[1:] == ["['0', '0'] 2"], done.stderr


ALONE = """
import hpclab
from hpclab import slurm
def add():
    import torch, torch.distributed as dist
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()
if __name__ == "__main__":
    with slurm.start(nodes=2, cpus=1) as one:
        one.run("sbatch", "--wait", "-o", "said", "--wrap", "echo batch")
        one.kill("n2")
        one.revive("n2")
        print(open("said").read().strip(), *one.run("srun", "-N2", "id", "-u").split())
        with hpclab.connect(one, workers=2, memory="1GB") as client:
            print(len({worker["host"] for worker in client.scheduler_info()["workers"].values()}), end=" ")
            print(hpclab.launch(client, add, ranks=2, oversubscribe=True).result(60))
"""


@as_root
def test_a_host_whose_only_interface_is_lo(tmp_path):
    """As an ordinary user: it needs no second address on lo, which only root could give it."""
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"']
    require(subprocess.run([*alone, "true"], capture_output=True).returncode == 0, "unshare --net, and ip")
    with Other(NOBODY, python=True) as user:
        script = Path(user.home, "alone.py")
        script.write_text(ALONE)
        command = [*alone, *user.words, sys.executable, script]
        done = subprocess.run(command, env=user.env, cwd=user.home, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["batch 65534 65534", "2 [2.0, 2.0]"], done.stderr


@as_root
def test_a_host_with_addresses_of_ipv6_alone():
    make = "ip link set lo up && ip link add v0 type veth peer name v1 && ip link set v1 up && ip link set v0 up"
    beyond = f"{make} && ip addr add fd00:77::1/64 dev v0 nodad"
    only = ["unshare", "--net", "sh", "-c", f'{beyond} && exec "$0" "$@"']
    require(subprocess.run([*only, "true"], capture_output=True).returncode == 0, "unshare --net, and veth")
    command = [*only, sys.executable, "-c", HOLDER]
    done = subprocess.run(command, input="go\n", capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[1:] == ["['0', '0'] 2"], done.stderr


def test_the_command(capsys, place, monkeypatch):
    Path(place, "own").mkdir()
    live_in(Path(place, "own"), monkeypatch)
    monkeypatch.setenv("SHELL", "/bin/sh")
    assert cli.main(["slurm", "status"]) == 1
    assert "no private Slurm is up; hpclab slurm up" in capsys.readouterr().err
    command = [sys.executable, "-m", "hpclab", "slurm"]
    shell = subprocess.run([*command, "up", "--nodes", "2"], capture_output=True, text=True)
    assert shell.returncode == 0, shell.stderr
    one = slurm.find()
    assert f"export SLURM_CONF={one.folder}/slurm.conf PATH={one.folder}/bin:$PATH" in shell.stdout
    assert cli.main(["slurm", "up"]) == 1
    assert f"a private Slurm is already up, in {one.folder}" in capsys.readouterr().err
    script = "which srun; sinfo -h -o %D; sbatch -o /dev/null --wrap 'sleep 1007'"
    shell = subprocess.run([*command, "shell"], input=script, capture_output=True, text=True)
    assert shell.stdout.splitlines() == [f"{one.folder}/bin/srun", "2", "Submitted batch job 1"]
    in_state(one, 1, "RUNNING")
    assert cli.main(["slurm", "status"]) == 0
    said = capsys.readouterr().out
    assert "127.0.0.3" in said and "RUNNING" in said
    assert cli.main(["slurm", "down"]) == 0
    assert slurm.find() is None and sleepers("1007") == [] and not one.folder.exists()
    with slurm.start(nodes=1) as one:
        assert cli.main(["slurm", "down"]) == 1
        assert f"was started by process {os.getpid()}, and ends with it" in capsys.readouterr().err
        assert cli.main(["slurm", "down", "--folder", str(one.folder)]) == 0
