"""Gangs: what ranks find, what they send, how they fail, and that nothing outlives them."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
import torch
from conftest import no_rank_left, ranks_alive
from distributed import Client

import hpclab
from hpclab import machine, views
from hpclab.gangs import run as runs


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
        "openblas": int(os.environ["OPENBLAS_NUM_THREADS"]),
        "slurm": [name for name in os.environ if name.startswith("SLURM_")],
    }


def test_what_a_rank_finds(client):
    first, second = hpclab.launch(client, describe, ranks=2).result(60)
    assert [first[n] for n in ("RANK", "LOCAL_RANK", "rank")] == [0, 0, 0]
    assert [second[n] for n in ("RANK", "LOCAL_RANK", "rank")] == [1, 1, 1]
    assert {first[n] for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ranks")} == {2}
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert int(first["malloc"]) > 65536, "Dask's trim threshold halves a rank's speed"
    assert no_rank_left()


def test_a_job_of_slurm_is_hidden_from_ranks(monkeypatch):
    """A worker in a job of its own has SLURM_NTASKS=1, which would tell the libraries in a rank that it is alone."""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with hpclab.connect(workers=1) as client:
        assert client.submit(os.environ.get, "SLURM_NTASKS").result() == "1"
        assert hpclab.launch(client, describe).result(60)[0]["slurm"] == []


def test_threads(client):
    (found,) = hpclab.launch(client, describe, ranks=1, threads=2).result(60)
    assert (found["threads"], found["openblas"]) == (2, 2)


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


def test_a_failing_watcher_harms_nobody(client, caplog):
    calls, seen = [], []

    def fail_once_it_runs(run, rows):
        calls.append(rows)
        if len(calls) > 1:
            raise ZeroDivisionError("planted")

    run = hpclab.launch(client, talk, 10, ranks=2)
    run.watch(fail_once_it_runs)
    run.watch(lambda run, rows: seen.extend(rows))
    assert run.result(60) == [None, None]
    assert seen == run.rows
    assert len(calls) == 2
    assert "a watcher of run" in caplog.text
    assert "ZeroDivisionError: planted" in caplog.text


def test_a_run_is_shown_again_from_its_folder(client):
    run = hpclab.launch(client, talk, 30, ranks=2)
    run.result(60)
    again = hpclab.open_run(run.folder)
    assert (again.name, again.status, again.ranks, again.rows) == (run.name, "finished", 2, run.rows)
    assert again.logs() == run.logs()
    failed = hpclab.launch(client, raise_on, 1, ranks=2)
    failed.wait(60)
    again = hpclab.open_run(failed.folder)
    assert again.status == "failed"
    assert "rank 1 of 2" in again.rows[-1]["error"]
    assert "planted on 1" in views.page(again)


def test_past_runs_are_listed_with_what_opens_them_again(client, tmp_path):
    """The newest first; what isn't a run, or was cut off as its kernel went, does no harm."""
    assert hpclab.past_runs() == [] and "no runs" in hpclab.past_runs()._repr_html_()
    first = hpclab.launch(client, talk, 3, ranks=2, name="first")
    first.result(60)
    text = (first.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    later = first.folder.parent / "sweep" / "2"
    later.mkdir(parents=True)
    begun = text[0].replace('"started": "2', '"started": "3')
    step = '{"kind": "step", "loss": 0.25}\n{"kind": "epoch", "test_accuracy": 0.75}\n{"kind": "st'
    (later / "rows.jsonl").write_text(begun + step)
    (first.folder.parent / "rows.jsonl").write_text('{"kind": "trial"}\n')
    newest, oldest = hpclab.past_runs()
    assert (newest["status"], newest["loss"], newest["accuracy"], newest["time_s"]) == ("interrupted", 0.25, 0.75, None)
    assert oldest["name"] == "first" and oldest["status"] == "finished" and oldest["ranks"] == 2
    assert hpclab.open_run(oldest["folder"]).name == first.name
    shown = str(hpclab.past_runs())
    assert '<span style="overflow-wrap: anywhere">hpclab.open_run(' in hpclab.past_runs()._repr_html_()
    assert f"hpclab.open_run({oldest['folder']!r})" in shown and "interrupted, or still going" in shown


def test_a_run_whose_kernel_went_is_interrupted(client):
    run = hpclab.launch(client, chatter, ranks=2)
    started(run)
    lines = (run.folder / "rows.jsonl").read_text()
    run.stop()
    assert hpclab.open_run(run.folder).status == "stopped"
    (run.folder / "rows.jsonl").write_text(lines + '{"kind": "st')  # what a killed kernel leaves
    assert hpclab.open_run(run.folder).status == "interrupted"
    with pytest.raises(FileNotFoundError, match=r"folder \(=.*holds no rows.jsonl of a run"):
        hpclab.open_run(run.folder / "nowhere")


def test_the_view_tells_what_each_rank_does(client):
    run = hpclab.train(client, hpclab.models.CNN, "fashion_mnist", ranks=2, steps=20, progress=False)
    run.result(60)
    table = views.ranks(run.rows)
    assert [row["rank"] for row in table] == [0, 1]
    for row in table:
        shares = [int(row[name].rstrip("%")) for name in ("computing", "data", "talking and waiting")]
        assert 97 <= sum(shares) <= 103
    page = views.page(run)
    assert ": finished" in page
    assert 'alt="training loss against seconds of training (' in page


def report_odd_numbers():
    hpclab.report(loss=float("nan"), best=float("inf"), worst=0.5)


def test_odd_numbers_are_null_in_the_file(client):
    run = hpclab.launch(client, report_odd_numbers, ranks=1)
    run.result(60)
    row = json.loads((run.folder / "rows.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)
    assert (row["loss"], row["best"], row["worst"]) == (None, None, 0.5)
    assert run.rows[1]["loss"] != run.rows[1]["loss"], "it stays NaN in memory"


def test_a_full_disk_ends_the_run_and_is_told(client):
    """A limit on the size of files gives the error that a full disk gives, to this process alone."""
    run = hpclab.launch(client, chatter, ranks=2)
    started(run)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            run.result(60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert run.status == "failed"
    assert str(run.folder) in caught.value.__notes__[0]
    assert "raise `ulimit -f`" in caught.value.__notes__[0]
    assert no_rank_left()
    assert hpclab.launch(client, describe, ranks=2).result(60)


def chatter():
    print("asleep", flush=True)
    while True:
        hpclab.report(loss=0.5)
        time.sleep(0.01)


def leave_a_child():
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    print("its last output")


def test_a_child_left_behind_keeps_nobody_waiting(client):
    """It holds the rank's streams open."""
    run = hpclab.launch(client, leave_a_child, ranks=1)
    run.result(60)
    assert run.logs(0) == "its last output\n"


def test_floods_are_cut_short_on_the_screen_not_in_the_file(tmp_path, capsys):
    log = runs.Log(tmp_path / "rank-0.log", 0)
    text = "".join(f"line {number}\n" for number in range(1000))
    for first in range(0, len(text), 7):  # in pieces that end anywhere
        log.take(text[first : first + 7])
    log.take("progress  10%\rprogress  99%\n")
    log.take("no end")
    log.close()
    assert log.path.read_bytes().decode() == text + "progress  10%\rprogress  99%\nno end"
    shown = capsys.readouterr().out.splitlines()
    assert shown[: log.LINES] == [f"[rank 0] line {number}" for number in range(log.LINES)]
    assert f"... {1002 - log.LINES} more lines are in " in shown[-1]


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
    note, *others = caught.value.__notes__
    assert f"rank {guilty} of 2 on " in note
    assert 'raise LookupError(f"planted on' in note
    assert all(other.startswith(f"As a consequence, rank {1 - guilty}: ") for other in others)
    assert run.status == "failed"
    assert no_rank_left()


def test_a_function_of_a_module_beside_the_notebook(tmp_path, monkeypatch):
    """Such a one travels by its name, and the ranks find it where the notebook did when it connected."""
    (tmp_path / "beside.py").write_text("def name(): return __name__")
    monkeypatch.syspath_prepend(tmp_path)
    import beside

    with hpclab.connect(workers=2) as client:
        assert hpclab.launch(client, beside.name, ranks=2).result(60) == ["beside"] * 2


def return_early():
    import torch.distributed as dist

    if dist.get_rank() == 0:
        dist.barrier()


def test_a_rank_that_returned_too_early_is_named(client):
    with pytest.raises(RuntimeError) as caught:
        hpclab.launch(client, return_early, ranks=2).result(60)
    assert "Rank 1 returned without an error; a collective waits for all ranks." in caught.value.__notes__


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


def test_more_ranks_than_could_take_turns_are_refused(client):
    with pytest.raises(ValueError, match=r"ranks \(=100000000\) exceeds 64 for each CPU of this cluster; use ranks<="):
        hpclab.launch(client, print, ranks=10**8, oversubscribe=True)


def test_two_gangs_share_a_cluster(client):
    one = hpclab.launch(client, sleep, ranks=1)
    started(one)
    other = hpclab.launch(client, describe, ranks=1)
    assert len(other.result(60)) == 1
    with pytest.raises(RuntimeError, match=rf"take 2 CPUs, and 1 of 2 are free now: {one.name} holds 1; .* wait=True"):
        hpclab.launch(client, describe, ranks=2)
    assert one.status == "running"
    crowd = hpclab.launch(client, talk, 1, ranks=2, oversubscribe=True)
    crowd.result(60)
    assert {row["source"] for row in crowd.rows if row["kind"] == "step"} == {"emulated"}
    one.stop()


def test_gangs_wait_their_turn(client):
    first = hpclab.launch(client, chatter, ranks=2)
    second, third = (hpclab.launch(client, time.time, ranks=2, wait=True) for _ in range(2))
    given_up = hpclab.launch(client, describe, ranks=2, wait=True)
    assert (second.status, third.status) == ("waiting", "waiting")
    given_up.stop()
    assert given_up.status == "stopped"
    started(first)
    assert "waiting, 2 in the queue" in repr(third)
    first.stop()
    assert max(second.result(60)) < min(third.result(60))
    assert {row["source"] for row in first.rows if row["kind"] == "step"} == {"measured"}


def test_what_a_vanished_client_held_is_free(client):
    with Client(client.scheduler.address, security=client.security) as other:
        run = hpclab.launch(other, sleep, ranks=2)
        started(run)
        with pytest.raises(RuntimeError, match="holds 2"):
            hpclab.launch(client, describe, ranks=2)
        queued = hpclab.launch(client, describe, ranks=2, wait=True)
    assert len(queued.result(60)) == 2
    assert no_rank_left()


def test_a_result_that_was_there_survives_a_late_stop(client):
    run = hpclab.launch(client, describe, ranks=2)
    run.wait(60)
    run.stop()
    assert run.status == "finished"
    assert len(run.result()) == 2


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
        victim = run._attempt.places[1].worker
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
    with pytest.raises(TypeError, match=r"client \(=<function .*must be a distributed.Client"):
        hpclab.launch(sleep, client)


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


def test_nothing_outlives_a_script_that_is_ended(tmp_path):
    """By SIGTERM; of SIGKILL and Ctrl-C see test_gang. What its ranks print comes at once, also into a pipe."""
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    script = subprocess.Popen(
        [sys.executable, "script.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    assert [script.stdout.readline().strip()[-6:] for _ in range(2)] == ["asleep"] * 2
    family = psutil.Process(script.pid).children(recursive=True)
    assert len(ranks_alive()) == 2
    script.terminate()
    script.communicate(timeout=60)
    assert script.returncode != 0
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


def test_an_argument_that_would_kill_its_worker_is_refused():
    with hpclab.connect(workers=1, memory="300MB") as client:
        assert hpclab.launch(client, len, bytes(2**22)).result(60) == [2**22]
        with pytest.raises(ValueError, match=r"the function and its arguments take 20.00 MiB .* from a file inside"):
            hpclab.launch(client, len, bytes(20 * 2**20))
        with hpclab.gang(client) as gang, pytest.raises(ValueError, match=r"these values take 20.00 MiB"):
            gang.push(large=bytes(20 * 2**20))


def test_occupied_folder(client, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"folder \(=.*mine'\) already holds something"):
        hpclab.launch(client, describe, folder=tmp_path / "mine")
    with pytest.raises(ValueError, match="already holds something"):
        hpclab.launch(client, describe, folder=tmp_path / "mine" / "thesis.txt")
    with pytest.raises(PermissionError, match=r"folder \(=.*inside'\) can't be created"):
        hpclab.launch(client, describe, folder=tmp_path / "mine" / "thesis.txt" / "inside")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def reserved():
    hpclab.report(rank=3)


def unwritable(loss):
    hpclab.report(loss=loss)


def test_bad_reports(client):
    with pytest.raises(ValueError, match=r"report\(rank=...\) is set by the launcher"):
        hpclab.launch(client, reserved, ranks=1).result(60)
    with pytest.raises(TypeError, match=r"report\(loss=\[1, 2\]\) must be a number"):
        hpclab.launch(client, unwritable, [1, 2], ranks=1).result(60)
    with pytest.raises(TypeError, match=r"report\(loss=tensor\(\[0., 0.\]\)\) must be a number"):
        hpclab.launch(client, unwritable, torch.zeros(2), ranks=1).result(60)
