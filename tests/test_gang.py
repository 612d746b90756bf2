"""The fault matrix: what can go wrong with a gang, what its owner is told, and that nothing is left behind."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid

import psutil
import pytest
import torch
from conftest import no_rank_left, ranks_alive, until, zygotes_alive
from distributed import Client

import hpclab
from hpclab.gangs import host, process


def rank():
    import torch.distributed as dist

    return dist.get_rank()


def all_reduce():
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def usable(client):
    """The cluster takes the next gang straight after, once its workers are there."""
    assert no_rank_left()
    client.wait_for_workers(2, timeout=60)
    assert hpclab.launch(client, all_reduce, ranks=2).result(60) == [2, 2]


def on_rank_1(action):
    """Do something odd on rank 1, in the middle of a run, while rank 0 waits for it."""
    all_reduce()
    hpclab.report(step=1)
    if rank() == 1:
        action()
    all_reduce()


def fail():
    raise LookupError("planted")


@pytest.mark.parametrize(
    ("action", "error", "says"),
    [
        (fail, LookupError, "planted"),
        (lambda: sys.exit(3), hpclab.RankError, "SystemExit: 3"),
        (lambda: os._exit(1), hpclab.RankError, "rank 1 of 2 on .* exited with code 1"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), hpclab.RankError, "rank 1 of 2 on .* was killed by SIGKILL"),
        (lambda: ctypes.string_at(0), hpclab.RankError, "rank 1 of 2 on .* was killed by SIGSEGV"),
    ],
    ids=["raise", "sys.exit", "os._exit", "SIGKILL", "segfault"],
)
def test_one_rank_ends(client, action, error, says):
    with pytest.raises(error, match=says) as caught:
        hpclab.launch(client, on_rank_1, action, ranks=2).result(60)
    blamed = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "rank 1 of 2" in blamed
    for told in re.findall("As a consequence, (.*)", blamed):  # none if rank 0 was ended before it noticed
        assert re.match("rank 0: .*Connection (closed|reset)", told)
    usable(client)


def test_all_ranks_raise(client):
    with pytest.raises(LookupError, match="planted"):
        hpclab.launch(client, fail, ranks=2).result(60)
    usable(client)


def hold_the_gil():
    while True:
        ctypes.PyDLL(None).sleep(1000)  # returns when a signal comes, such as the one that asks for the stack


def broadcast():
    import torch
    import torch.distributed as dist

    dist.broadcast(torch.ones(1), src=1)
    dist.barrier()


def wait_for_all():
    import torch
    import torch.distributed as dist

    work = dist.all_reduce(torch.ones(1), async_op=True)
    work.wait()


def wait_alone():
    """Rank 0 holds the handle of a collective that rank 1 never enters."""
    if rank() == 0:
        wait_for_all()
    time.sleep(1000)


class NeverJoins:
    def __reduce__(self):
        return (stay_away, ())


def stay_away():
    if os.environ["RANK"] == "1":
        time.sleep(1000)


@pytest.mark.parametrize(
    ("action", "stands"),
    [
        (lambda: time.sleep(1000), r"in <lambda>\n +\(lambda: time.sleep\(1000\)"),
        (lambda: os.kill(os.getpid(), signal.SIGSTOP), r"\(none: it is stopped"),
        (hold_the_gil, "in hold_the_gil"),
        (broadcast, "in broadcast"),
    ],
    ids=["waits elsewhere", "SIGSTOP", "holds the GIL", "mismatched collectives"],
)
def test_a_hang_is_found_shown_and_ended(client, action, stands):
    run = hpclab.launch(client, on_rank_1, action, ranks=2, hang_after=2)
    with pytest.raises((hpclab.HangError, RuntimeError)) as caught:
        run.result(60)
    assert re.search(
        r"longer than hang_after \(=2\).*rank 0:\n.* in all_reduce.*rank 1:\n.*" + stands, str(caught.value), re.S
    )
    assert "_rank.py" not in str(caught.value)
    usable(client)


def test_a_rank_that_never_joins(client):
    with pytest.raises(hpclab.HangError, match=r"(?s)rank 0:\n.*in init_process_group.*rank 1:\n.*in stay_away"):
        hpclab.launch(client, print, NeverJoins(), ranks=2, hang_after=2).result(60)
    usable(client)


def test_a_collective_in_the_background_hangs(client):
    with pytest.raises(hpclab.HangError, match=r"(?s)in wait_for_all\n +work.wait\(\).*rank 1:\n.*in wait_alone"):
        hpclab.launch(client, wait_alone, ranks=2, hang_after=2).result(60)
    usable(client)


def work_in_a_child():
    code = "import time\nend = time.monotonic() + 6\nwhile time.monotonic() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_who_waits_for_a_busy_child_gets_on(client):
    assert hpclab.launch(client, on_rank_1, work_in_a_child, ranks=2, hang_after=2).result(60) == [None, None]


def test_who_waits_for_nobody_may_take_long(client):
    """Asleep for longer than `hang_after`, but no rank stands in a collective."""
    assert hpclab.launch(client, time.sleep, 4, ranks=2, hang_after=1).result(60) == [None, None]


def hog(make):
    kept = []
    while True:
        kept.append(make(10_000_000))


@pytest.mark.parametrize(("make", "error"), [(bytes, MemoryError), (torch.ones, RuntimeError)], ids=["Python", "torch"])
def test_over_its_memory(client, make, error):
    with pytest.raises(error) as caught:
        hpclab.launch(client, on_rank_1, lambda: hog(make), ranks=2, memory="500MB").result(60)
    told = "".join(caught.value.__notes__)
    assert "limit is 500,000,000 bytes of memory; launch(memory=...) sets it" in told
    assert "rank 1 of 2" in told
    usable(client)


def test_200_megabytes_come_back(client):
    values = hpclab.launch(client, lambda: bytes(200_000_000), ranks=2).result(60)
    assert [len(value) for value in values] == [200_000_000] * 2


def test_a_model_of_the_notebook(client):
    """A class that no rank can import, as one defined in a cell."""

    class Local(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

    first, second = hpclab.launch(client, Local, ranks=2).result(60)
    assert type(first).__name__ == type(second).__name__ == "Local"
    assert first.layer.weight.shape == (1, 2)


def print_lines(count):
    for number in range(count):
        print("line", number)


def test_a_million_lines(client):
    run = hpclab.launch(client, print_lines, 500_000, ranks=2)
    run.result(120)
    for number in (0, 1):
        assert run.logs(number) == "".join(f"line {line}\n" for line in range(500_000))


def train_until_told(steps, ask):
    for step in range(steps):
        all_reduce()
        hpclab.report(step=step)
        if ask and hpclab.should_stop():
            return step
        time.sleep(0.001 * (1 + rank()))
    return None


def reports(run, count):
    while len(run.rows) < count:
        assert not run.wait(0.05), run.status


@pytest.mark.parametrize("launch", range(5))
def test_ranks_that_ask_end_at_one_step(client, launch):
    run = hpclab.launch(client, train_until_told, 100_000, True, ranks=2)
    reports(run, 20 + 7 * launch)
    run.stop()
    assert run.status == "stopped"
    first, second = run.result()
    assert first == second > 0
    usable(client)


def test_ranks_that_do_not_ask_are_interrupted(client):
    run = hpclab.launch(client, train_until_told, 100_000, False, ranks=2)
    reports(run, 20)
    run.stop()
    assert run.status == "stopped"
    with pytest.raises(hpclab.RankError, match="was stopped"):
        run.result()
    usable(client)


def test_stop_ends_one_that_holds_the_gil(client):
    run = hpclab.launch(client, on_rank_1, hold_the_gil, ranks=2)
    reports(run, 3)
    run.stop()
    assert run.status == "stopped"
    usable(client)


def test_a_killed_rank_is_told_as_one(client):
    run = hpclab.launch(client, train_until_told, 100_000, True, ranks=2)
    reports(run, 20)
    run.kill(1)
    with pytest.raises(hpclab.RankError, match=r"rank 1 of 2 on .* was killed by SIGKILL, on request"):
        run.result(60)
    with pytest.raises(ValueError, match=r"rank \(=2\) must be from 0 to 1"):
        run.kill(2)
    usable(client)


@pytest.fixture
def own(monkeypatch):
    """A cluster of the test's own, to be broken."""
    monkeypatch.setenv("HPCLAB_TESTS", uuid.uuid4().hex)  # to tell its processes from those of the common cluster
    with hpclab.connect(workers=2) as client:
        yield client
    until(lambda: not zygotes_alive(), seconds=20)


def running(client):
    run = hpclab.launch(client, train_until_told, 100_000, False, ranks=2)
    reports(run, 20)
    return run


def test_killed_worker(own):
    run = running(own)
    victim = run._attempt.places[1].worker
    os.kill(own.run(os.getpid, workers=[victim])[victim], signal.SIGKILL)
    with pytest.raises(hpclab.RankError, match=r"rank 1 of 2 .* was lost with its worker"):
        run.result(60)
    own.wait_for_workers(2, timeout=60)
    usable(own)


def test_killed_nanny():
    """Of a worker that was started from a shell: there the nanny is a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # this module is there too
    with hpclab.connect(workers=1, security=False) as client:
        command = [
            sys.executable,
            "-m",
            "dask",
            "worker",
            client.scheduler.address,
            "--nthreads",
            "1",
            "--no-dashboard",
        ]
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as nanny:
            client.wait_for_workers(2, timeout=60)
            run = running(client)
            os.kill(nanny.pid, signal.SIGKILL)
            with pytest.raises(hpclab.RankError, match=r"rank . of 2 .* was lost with its worker"):
                run.result(60)
        assert no_rank_left()
        assert hpclab.launch(client, all_reduce, ranks=1).result(60) == [1]


@pytest.mark.skipif(not host.FORK, reason="without fork there is no zygote")
def test_killed_zygote(own):
    run = running(own)
    (zygote,) = {psutil.Process(pid).ppid() for pid in ranks_alive()}
    os.kill(zygote, signal.SIGKILL)
    with pytest.raises(hpclab.RankError, match="was killed by SIGKILL"):
        run.result(60)
    usable(own)
    assert {psutil.Process(pid).status() for pid in zygotes_alive()} <= {"sleeping", "running"}


def test_without_fork(own):
    """As on macOS and Windows: a standby process that has imported torch becomes the rank."""

    def forbid():
        from hpclab.gangs import process

        process.FORK = False

    own.run(forbid)
    assert hpclab.launch(own, all_reduce, ranks=2).result(60) == [2, 2]
    with pytest.raises(LookupError, match="planted"):
        hpclab.launch(own, on_rank_1, fail, ranks=2).result(60)
    assert hpclab.launch(own, os.getpid, ranks=2).result(60) != hpclab.launch(own, os.getpid, ranks=2).result(60)


def all_reduce_by_env():
    """As a function that was written for torchrun."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = all_reduce()
    dist.destroy_process_group()
    return total


def step_and_destroy():
    """As PyTorch's tutorial: the model outlives the group, and goes with the function's frame."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(10, 5))
    model(torch.randn(20, 10)).sum().backward()
    dist.destroy_process_group()
    return not dist.is_initialized()


def test_a_destroyed_group_does_not_deadlock(client):
    """Without `_keep_groups`, torch hung at the end of about one in five."""
    for _ in range(20):
        assert hpclab.launch(client, step_and_destroy, ranks=2, init=False).result(60) == [True, True]


def test_what_was_written_for_torchrun(client):
    assert hpclab.launch(client, all_reduce_by_env, ranks=2, init=False).result(60) == [2, 2]
    with pytest.raises(LookupError, match="planted"):
        hpclab.launch(client, fail, ranks=2, init=False).result(60)
    usable(client)


def initialise_again():
    torch.distributed.init_process_group("gloo")


def test_who_initialises_again_is_told_of_init_false(client):
    with pytest.raises(ValueError, match="process group twice") as caught:
        hpclab.launch(client, initialise_again, ranks=1).result(60)
    assert "launch(..., init=False)" in "".join(caught.value.__notes__)


def test_a_worker_that_joins_harms_no_gang():
    with hpclab.connect(workers=1) as client:
        run = hpclab.launch(client, train_until_told, 100_000, True, ranks=1)
        reports(run, 20)
        client.cluster.scale(2)
        client.wait_for_workers(2, timeout=60)
        assert hpclab.launch(client, all_reduce, ranks=1).result(60) == [1]
        assert run.status == "running"
        run.stop()
        assert len(run.result()) == 1


def test_who_waits_is_seated_when_a_lost_worker_is_back(own):
    run = running(own)
    waiting = hpclab.launch(own, all_reduce, ranks=2, wait=True)
    third = hpclab.launch(own, all_reduce, ranks=2, oversubscribe=True)
    assert third.result(60) == [2, 2], "it takes turns, and nobody's place"
    victim = run._attempt.places[0].worker
    os.kill(own.run(os.getpid, workers=[victim])[victim], signal.SIGKILL)
    with pytest.raises(hpclab.RankError, match="was lost with its worker"):
        run.result(60)
    assert waiting.result(60) == [2, 2]


def test_an_error_outlives_its_client():
    with hpclab.connect(workers=1) as client:
        run = hpclab.launch(client, fail)
        run.wait(60)
    with pytest.raises(LookupError, match="planted"):
        run.result()


def save_on_a_full_disk():
    while not hpclab.should_stop():
        all_reduce()
        hpclab.report(step=1)
    raise OSError("No space left on device")


def test_a_failure_after_a_stop_is_told(client):
    run = hpclab.launch(client, save_on_a_full_disk, ranks=2)
    reports(run, 20)
    run.stop()
    assert run.status == "failed"
    with pytest.raises(OSError, match="No space left"):
        run.result()


def test_restarted_cluster(own):
    run = running(own)
    own.restart()
    with pytest.raises(hpclab.RankError):
        run.result(60)
    usable(own)


def test_closed_client_ends_ranks_in_order():
    client = hpclab.connect(workers=2)
    run = hpclab.launch(client, train_until_told, 100_000, True, ranks=2)
    reports(run, 20)
    client.close()
    assert run.status == "stopped"
    first, second = run.result()
    assert first == second > 0
    assert no_rank_left()


CLUSTER = textwrap.dedent(
    """
    import sys, time
    from distributed import LocalCluster
    if __name__ == "__main__":
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
            print(cluster.scheduler_address, flush=True)
            time.sleep(600)
    """
)


@pytest.mark.parametrize("keeps_the_gil", [False, True])
def test_killed_scheduler(tmp_path, keeps_the_gil):
    (tmp_path / "cluster.py").write_text(CLUSTER)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # this module is there too
    cluster = subprocess.Popen([sys.executable, "cluster.py"], stdout=subprocess.PIPE, text=True, env=env)
    with Client(cluster.stdout.readline().strip()) as client:
        if keeps_the_gil:
            run = hpclab.launch(client, on_rank_1, hold_the_gil, ranks=2)
            reports(run, 3)
        else:
            run = running(client)
        family = psutil.Process(cluster.pid).children(recursive=True)
        os.kill(cluster.pid, signal.SIGKILL)
        with pytest.raises(hpclab.RankError):
            run.result(60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert no_rank_left(30)
    cluster.communicate()


SCRIPT = textwrap.dedent(
    """
    import ctypes, signal, sys, time, hpclab
    def work():
        print("at work", flush=True)
        if sys.argv[1] == "gil":
            ctypes.PyDLL(None).sleep(1000)
        while True:
            try:
                time.sleep(1000)
            except KeyboardInterrupt:
                if sys.argv[1] != "stubborn":
                    raise
    if __name__ == "__main__":
        with hpclab.connect(workers=2) as client:
            hpclab.launch(client, work, ranks=2).result()
    """
)


@pytest.mark.parametrize(
    ("ending", "work"),
    [("killed", "plain"), ("killed", "gil"), ("Ctrl-C", "plain"), ("Ctrl-C", "gil"), ("Ctrl-C twice", "stubborn")],
)
def test_nothing_outlives_a_script(tmp_path, ending, work):
    """Ctrl-C goes to the whole foreground group of a terminal, so it does here."""
    (tmp_path / "script.py").write_text(SCRIPT)
    script = subprocess.Popen(
        [sys.executable, "script.py", work],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    while "at work" not in (line := script.stdout.readline()):
        assert line, "the script ended"
    family = psutil.Process(script.pid).children(recursive=True)
    if ending == "killed":
        os.kill(script.pid, signal.SIGKILL)
    for _ in range({"killed": 0, "Ctrl-C": 1, "Ctrl-C twice": 2}[ending]):
        os.killpg(script.pid, signal.SIGINT)
        time.sleep(0.2)
    said = script.communicate(timeout=60)[0]
    if ending != "killed":
        assert "KeyboardInterrupt" in said
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert no_rank_left()


def test_launches_in_a_row_leave_no_trace(own):
    """Of processes, file descriptors, threads and memory, here and in the workers."""

    def state():
        here = [psutil.Process(), *psutil.Process().children(recursive=True)]
        here += [psutil.Process(pid) for pid in zygotes_alive()]
        sums = [(p.num_fds(), p.num_threads(), p.memory_info().rss) for p in here if p.is_running()]
        return len(sums), *map(sum, zip(*sums, strict=True))

    def launch_some(count):
        for _ in range(count):
            assert hpclab.launch(own, all_reduce, ranks=2, folder=None).result(60) == [2, 2]
        assert no_rank_left()
        threading.Event().wait(6)  # the scheduler keeps the topic of a run for some seconds

    launch_some(20)
    before = state()
    launch_some(50)
    after = state()
    assert after[0] == before[0]
    assert after[1] <= before[1] + 5
    assert after[2] <= before[2] + 5
    assert after[3] <= before[3] + 60e6


def test_ranks_go_on_without_the_folder_of_temporary_files(tmp_path):
    (tmp_path / "t").mkdir()
    program = (
        "import os, shutil, tempfile, time, hpclab\n"
        "def work():\n    hpclab.report(step=1)\n    time.sleep(7)\n    return 1\n"
        "if __name__ == '__main__':\n"
        "    with hpclab.connect(workers=1) as client:\n"
        "        run = hpclab.launch(client, work, ranks=1, folder='r')\n"
        "        while not run.rows or run.rows[-1]['kind'] != 'step':\n"
        "            time.sleep(0.1)\n"
        "        shutil.rmtree(tempfile.gettempdir())\n"
        "        print(run.result(60))\n"
    )
    (tmp_path / "p.py").write_text(program)
    env = os.environ | {"TMPDIR": str(tmp_path / "t"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "p.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["[1]"], done.stderr


def killed_at_once():
    made = []
    for _ in range(25):
        made.append(process.start(os.environ | {"RANK": "0"}, "a cluster"))
        made[-1].kill()
    deadline = time.monotonic() + 30
    while any(rank.poll() is None for rank in made) and time.monotonic() < deadline:
        time.sleep(0.05)
    return {rank.poll() for rank in made}


def test_a_kill_that_comes_before_a_fork_has_its_session_is_not_lost(client):
    assert client.submit(killed_at_once).result(60) == {-signal.SIGKILL}
