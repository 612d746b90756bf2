"""Gangs: what ranks find, what they send, how they fail, and that nothing outlives them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
from conftest import no_rank_left, ranks_alive

import hpclab
from hpclab import machine


def describe():
    import torch
    import torch.distributed as dist

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {name: int(os.environ[name]) for name in names} | {
        "rank": dist.get_rank(),
        "ranks": dist.get_world_size(),
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "malloc": os.environ["MALLOC_TRIM_THRESHOLD_"],
        "slurm": [name for name in os.environ if name.startswith("SLURM_")],
    }


def test_what_a_rank_finds(client):
    first, second = hpclab.launch(client, describe, ranks=2).result(60)
    assert [first[n] for n in ("RANK", "LOCAL_RANK", "rank")] == [0, 0, 0]
    assert [second[n] for n in ("RANK", "LOCAL_RANK", "rank")] == [1, 1, 1]
    assert {first[n] for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ranks")} == {2}
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert int(first["malloc"]) > 65536, "Dask's trim threshold halves a rank's speed"
    assert first["slurm"] == []
    assert no_rank_left()


def test_threads(client):
    (found,) = hpclab.launch(client, describe, ranks=1, threads=2).result(60)
    assert found["threads"] == 2


def talk(steps):
    import torch

    for step in range(steps):
        hpclab.report(step=step, loss=torch.tensor(0.5), name="x")
    print("hello\nworld")
    print("to stderr", file=sys.stderr)
    os.system("echo from a child")


def test_rows_and_prints_arrive_whole(client):
    run = hpclab.launch(client, talk, 2000, ranks=2)
    assert run.result(60) == [None, None]
    for rank in (0, 1):
        steps = [row for row in run.rows if row["kind"] == "step" and row["rank"] == rank]
        assert [row["step"] for row in steps] == list(range(2000))
        assert {(row["loss"], row["name"], row["ranks"], row["attempt"], row["run"]) for row in steps} == {
            (0.5, "x", 2, 0, run.name)
        }
        assert sorted(run.logs(rank).splitlines()) == ["from a child", "hello", "to stderr", "world"]
    assert [json.loads(line) for line in (run.folder / "rows.jsonl").read_text().splitlines()] == run.rows
    assert run.rows[0]["kind"] == "run"
    assert run.rows[0]["cpus"] == machine.cpus()


def test_rows_say_emulated_beyond_the_cpus(client):
    run = hpclab.launch(client, talk, 1, ranks=2, threads=machine.cpus(), oversubscribe=True)
    run.result(60)
    assert {row["source"] for row in run.rows if row["kind"] == "step"} == {"emulated"}


def test_report_outside_a_gang_does_nothing():
    assert hpclab.report(step=1, loss=0.5) is None


def test_watchers_see_every_row_once_whenever_they_come(client):
    run = hpclab.launch(client, talk, 500, ranks=2)
    early, late = [], []
    run.watch(lambda run, rows: early.append(list(rows)))
    run.result(60)
    run.watch(lambda run, rows: late.append(list(rows)))
    for seen in (early, late):
        assert [row for rows in seen for row in rows] == run.rows
        assert seen[-1] == []


def raise_on(guilty):
    import torch
    import torch.distributed as dist

    if dist.get_rank() == guilty:
        raise LookupError(f"planted on {guilty}")
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_failed_rank_raises_its_own_error_here(client, guilty):
    run = hpclab.launch(client, raise_on, guilty, ranks=2)
    with pytest.raises(LookupError, match=f"planted on {guilty}") as caught:
        run.result(60)
    (note,) = caught.value.__notes__
    assert f"rank {guilty} of 2 on " in note
    assert 'raise LookupError(f"planted on' in note
    assert run.status == "failed"
    assert no_rank_left()


def hang_or(action):
    import torch
    import torch.distributed as dist

    if dist.get_rank() == 1:
        action()
    dist.all_reduce(torch.ones(1))


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("no")


def raise_unpicklable():
    raise Unpicklable("its message")


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (lambda: sys.exit(3), "SystemExit: 3"),
        (lambda: os._exit(4), "rank 1 of 2 .* exited with code 4"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 of 2 .* was killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "rank 1 of 2 .* was killed by SIGSEGV"),
        (raise_unpicklable, "Unpicklable: its message"),
    ],
    ids=["sys.exit", "os._exit", "SIGKILL", "segfault", "unpicklable error"],
)
def test_a_dead_rank_is_named(client, action, says):
    with pytest.raises(hpclab.RankError, match=says):
        hpclab.launch(client, hang_or, action, ranks=2).result(60)
    assert no_rank_left()
    assert hpclab.launch(client, describe, ranks=2).result(60)[1]["rank"] == 1, "the cluster is usable straight after"


def test_unpicklable_return_value(client):
    with pytest.raises(TypeError, match=r"return value \(of type lock\) can't be pickled"):
        hpclab.launch(client, threading.Lock, ranks=2).result(60)


def sleep():
    print("asleep", flush=True)
    time.sleep(600)


def started(run):
    while "asleep" not in run.logs():
        time.sleep(0.05)


def test_stop(client):
    run = hpclab.launch(client, sleep, ranks=2)
    started(run)
    with pytest.raises(TimeoutError, match=r"still running after timeout \(=0.1\)"):
        run.result(0.1)
    run.stop()
    assert run.status == "stopped"
    assert no_rank_left()
    with pytest.raises(hpclab.RankError, match="was stopped"):
        run.result()
    run.stop()


def test_a_killed_worker_ends_its_gang():
    with hpclab.connect(workers=2) as client:
        run = hpclab.launch(client, sleep, ranks=2)
        started(run)
        victim = run._places[1].worker
        os.kill(client.run(os.getpid, workers=[victim])[victim], signal.SIGKILL)
        with pytest.raises(hpclab.RankError, match=r"rank 1 of 2 .* (was lost with its worker|its worker .* has gone)"):
            run.result(60)
        assert no_rank_left()
        client.wait_for_workers(2, timeout=60)
        assert hpclab.launch(client, describe, ranks=2).result(60)


def test_closing_the_client_ends_the_gang():
    client = hpclab.connect(workers=2)
    run = hpclab.launch(client, sleep, ranks=2)
    started(run)
    client.close()
    with pytest.raises(hpclab.RankError):
        run.result(60)
    assert no_rank_left()
    with pytest.raises(ValueError, match="client is closed; open a new one"):
        hpclab.launch(client, sleep)


SCRIPT = textwrap.dedent(
    """
    import time, hpclab
    def sleep():
        print("asleep", flush=True)
        time.sleep(600)
    if __name__ == "__main__":
        with hpclab.connect(workers=2) as client:
            hpclab.launch(client, sleep, ranks=2).result()
    """
)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda ending: ending.name)
def test_nothing_outlives_a_script(tmp_path, ending):
    """Ctrl-C goes to the whole foreground group of a terminal, so it does here; the others to the script alone."""
    (tmp_path / "script.py").write_text(SCRIPT)
    script = subprocess.Popen(
        [sys.executable, "script.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    assert [script.stdout.readline().strip()[-6:] for _ in range(2)] == ["asleep"] * 2
    family = psutil.Process(script.pid).children(recursive=True)
    assert len(ranks_alive()) == 2
    if ending == signal.SIGINT:
        os.killpg(script.pid, ending)
    else:
        os.kill(script.pid, ending)
    said = script.communicate(timeout=60)[0]
    assert script.returncode != 0
    if ending == signal.SIGINT:
        assert said.rstrip().endswith("KeyboardInterrupt")
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert no_rank_left()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"ranks": 0}, ValueError, r"ranks \(=0\) must be a whole number >= 1"),
        ({"ranks": -1}, ValueError, r"ranks \(=-1\)"),
        ({"ranks": 2.5}, ValueError, r"ranks \(=2.5\)"),
        (
            {"ranks": 8},
            ValueError,
            r"ranks \(=8\) with threads \(=1\) take 8 CPUs; this cluster gives a gang 2 .*; use ranks<=2, or over",
        ),
        ({"threads": 0}, ValueError, r"threads \(=0\)"),
        ({"function": 3}, TypeError, r"function \(=3\) must be callable"),
    ],
)
def test_bad_arguments(client, arguments, error, says):
    with pytest.raises(error, match=says):
        hpclab.launch(client, **({"function": describe} | arguments))
    assert not os.path.exists("results")


def test_unpicklable_argument_is_named(client):
    with pytest.raises(TypeError, match=r"args\[1\] \(=<unlocked _thread.lock.*can't be pickled"):
        hpclab.launch(client, print, 1, threading.Lock(), ranks=2)


def test_occupied_folder(client, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"folder \(=.*mine'\) already holds something"):
        hpclab.launch(client, describe, folder=tmp_path / "mine")
    with pytest.raises(ValueError, match="already holds something"):
        hpclab.launch(client, describe, folder=tmp_path / "mine" / "thesis.txt")
    with pytest.raises(PermissionError, match=r"folder \(=.*inside'\) can't be made"):
        hpclab.launch(client, describe, folder=tmp_path / "mine" / "thesis.txt" / "inside")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def reserved():
    hpclab.report(rank=3)


def unwritable():
    hpclab.report(loss=[1, 2])


def test_bad_reports(client):
    with pytest.raises(ValueError, match=r"report\(rank=...\) is set by the launcher"):
        hpclab.launch(client, reserved, ranks=1).result(60)
    with pytest.raises(TypeError, match=r"report\(loss=\[1, 2\]\) must be a number"):
        hpclab.launch(client, unwritable, ranks=1).result(60)
