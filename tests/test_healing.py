"""A cluster on this machine whose workers die: it comes back to the size that was asked for, and runs go on."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import until

import hpclab
from hpclab.cluster import healing

pytestmark = pytest.mark.alone  # it fills the machine, and what takes long to start counts as lost
KILLS = int(os.environ.get("HPCLAB_KILLS", "4"))
"""Kills of workers; by hand more."""


@contextmanager
def busy(loops=2):
    """What else a machine has to do."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def pids(client, young=False):
    """Process ids of a cluster's workers that have joined it, or of those that are just starting."""
    joined = {worker.pid for worker in list(client.cluster.scheduler.workers.values())}
    there = [nanny.pid for nanny in list(client.cluster.workers.values())]
    return [pid for pid in there if pid and (pid in joined) != young]


def kill(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def has(client, size):
    """Whether so many workers are there, and nothing else is under way."""
    return len(client.cluster.workers) == len(client.cluster.scheduler.workers) == len(pids(client)) == size


def count_until(file):
    state = hpclab.restore() or {"step": 0}
    while not Path(file).exists():
        state["step"] += 1
        hpclab.save(state, state["step"])
        hpclab.report(step=state["step"])
        time.sleep(0.05)
    return state["step"]


@pytest.mark.rounds
def test_a_cluster_whose_workers_die_young_comes_back_and_a_run_goes_on(tmp_path, record_property):
    """Every other one while it is starting."""
    dice = random.Random(0)
    with hpclab.connect(workers=2) as client, busy():
        run = hpclab.launch(client, count_until, tmp_path / "enough", ranks=2, max_restarts=1000, wait=True)
        for number in range(KILLS):
            young = bool(number % 2)
            until(lambda young=young: pids(client, young))
            for pid in dice.sample(pids(client, young), 1):
                kill(pid)
            time.sleep(dice.random() / 2)
        last = time.monotonic()
        until(lambda: has(client, 2))
        record_property("measured", f"{KILLS} kills of workers: back after {time.monotonic() - last:.1f} s")
        until(lambda: run.rows[-1]["kind"] == "step" and run.rows[-1]["attempt"] > 0)
        (tmp_path / "enough").touch()
        assert run.result(60)[0] > 0
        assert hpclab.launch(client, int, ranks=2).result(60) == [0, 0]


@pytest.fixture(scope="module")
def two():
    """A cluster of two workers, some of which are lost."""
    with hpclab.connect(workers=2) as client:
        yield client


def test_who_has_closed_is_replaced_and_who_is_starting_is_not(two):
    cluster = two.cluster
    first, second = cluster.workers.values()
    cluster.sync(second.close)
    kill(first.pid)
    until(lambda: second not in cluster.workers.values() and has(two, 2))
    assert first in cluster.workers.values(), "it started its worker itself"


def test_who_keeps_no_worker_is_replaced(two, monkeypatch):
    """Its worker said that it was going, and then hung."""
    monkeypatch.setattr(healing, "LOST_SECONDS", 1.0)
    nanny = next(iter(two.cluster.workers.values()))
    nanny.close_gracefully()
    stopped = psutil.Process(nanny.pid)
    stopped.suspend()
    two.cluster.sync(two.cluster.scheduler.remove_worker, nanny.worker_address, stimulus_id="test", close=False)
    until(lambda: has(two, 2) and nanny not in two.cluster.workers.values())
    assert not stopped.is_running()


def test_what_was_scaled_down_stays_down(two):
    two.cluster.scale(1)
    until(lambda: has(two, 1))
    time.sleep(3 * healing.LOOK_SECONDS)
    assert has(two, 1)
    two.cluster.adapt(minimum=2, maximum=2, interval="100ms")
    until(lambda: has(two, 2))
    two.cluster.adapt(minimum=1, maximum=1, interval="100ms", wait_count=1)
    until(lambda: has(two, 1))
    time.sleep(3 * healing.LOOK_SECONDS)
    assert has(two, 1)
    two.cluster._adaptive.stop()
    two.cluster.scale(2)
    until(lambda: has(two, 2))


def test_a_worker_that_cannot_start_is_tried_less_and_less_often_and_told_once(two, tmp_path, monkeypatch, caplog):
    (tmp_path / "distributed.py").write_text("raise SystemExit('broken')")
    monkeypatch.syspath_prepend(tmp_path)  # workers look where this process does
    monkeypatch.setattr(healing, "TRIES", 3)
    with caplog.at_level(logging.WARNING, "hpclab"):
        for pid in pids(two):
            kill(pid)
        until(lambda: "failed to start 2 times in a row" in caplog.text)
        two.cluster.scale(3)  # a first start
        tries = max(nanny.tries for nanny in two.cluster.workers.values())
        until(lambda: max(nanny.tries for nanny in two.cluster.workers.values()) > tries)
    assert caplog.text.count("failed to start") == 1
    (tmp_path / "distributed.py").unlink()
    until(lambda: has(two, 3))
    two.cluster.scale(2)
    until(lambda: has(two, 2))


def test_a_start_that_hangs_is_killed(two, monkeypatch):
    monkeypatch.setattr(healing, "START_SECONDS", 2.0)
    kill(pids(two)[0])
    until(lambda: pids(two, young=True))
    monkeypatch.undo()  # of others, on a slow machine
    (hangs,) = pids(two, young=True)
    os.kill(hangs, signal.SIGSTOP)
    until(lambda: has(two, 2))
    assert not psutil.pid_exists(hangs)


def test_closing_races_with_healing():
    before = psutil.Process().children()
    client = hpclab.connect(workers=2)
    for pid in pids(client):
        kill(pid)
    until(lambda: pids(client, young=True))
    client.close()
    assert client.cluster.status.name == "closed"
    left = [process for process in psutil.Process().children() if process not in before]
    assert not [process for process in left if "spawn_main" in " ".join(process.cmdline())]


def test_nannies_at_work_are_no_news(client, caplog):
    """A worker that was killed on purpose comes back without a warning in the notebook; others are shown."""
    nannies = logging.getLogger("distributed.nanny")
    nannies.warning("Restarting worker (status=%s)", "failed")
    nannies.warning("Worker process still alive after 4.0 seconds, killing")
    nannies.warning("Worker exceeded 95% memory budget. Restarting...")
    assert [record.message for record in caplog.records if record.name == nannies.name] == [
        "Worker exceeded 95% memory budget. Restarting..."
    ]
