"""Workers that have gone or hang: what others are told, launched, stopped and asked doesn't wait for them."""

import _thread
import os
import signal
import threading
import time

import pytest
from conftest import no_rank_left, until
from distributed import LocalCluster

import hpclab
from hpclab.gangs import attempt as _attempt
from hpclab.gangs import process, scheduler, wire
from hpclab.gangs.scheduler import aside

ALL = "t = torch.ones(3) * (rank + 1)\ndist.all_reduce(t)\nt.tolist()"


@pytest.fixture(scope="module")
def three():
    """A client that joined three workers, without TLS: there Dask has no limit for one that hangs."""
    options = {"n_workers": 3, "threads_per_worker": 1, "security": None, "dashboard_address": "127.0.0.1:0"}
    with (
        LocalCluster(**options) as cluster,
        hpclab.connect(cluster.scheduler_address, security=False) as client,
    ):
        yield client


def pid_of(client, address):
    return client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.workers[address].pid)


def soon(call):
    """What a call returns, if it does."""
    return aside(call).result(60)


def test_who_hangs_holds_up_neither_a_launch_nor_cells_nor_a_stop_nor_another_attempt(three, monkeypatch):
    monkeypatch.setattr(scheduler, "SILENT_SECONDS", 2.0)  # the scheduler is in this process
    monkeypatch.setattr(_attempt, "KILL_SECONDS", 1.0)
    *_, last = three.scheduler_info(n_workers=-1)["workers"]
    stopped = pid_of(three, last)
    os.kill(stopped, signal.SIGSTOP)  # before anybody has asked it a thing
    assert soon(lambda: hpclab.launch(three, int, ranks=2).result()) == [0, 0]
    os.kill(stopped, signal.SIGCONT)
    deadline = time.monotonic() + 60
    places = set()
    while last not in places and time.monotonic() < deadline:
        run = hpclab.launch(three, int, ranks=3, oversubscribe=True)
        run.result(60)
        places = {place.worker for place in run._attempt.places}
    assert len(places) == 3, "it has told since"

    gang = hpclab.gang(three, ranks=3, oversubscribe=True)
    assert gang.run(ALL) == dict.fromkeys(range(3), "[6.0, 6.0, 6.0]")
    stopped = pid_of(three, gang._workers[1])
    os.kill(stopped, signal.SIGSTOP)
    threading.Timer(1, _thread.interrupt_main).start()
    with pytest.raises(hpclab.CellInterrupt) as told:
        gang.run(ALL)
    _, others, lonely = str(told.value).splitlines()
    assert others.startswith("[ranks 0,2] was in ") and "has not left" not in others
    assert lonely.startswith("[rank 1] was in ") and "has not left" in lonely
    soon(gang.close)
    os.kill(stopped, signal.SIGCONT)
    assert no_rank_left(60)

    run = hpclab.launch(three, twice, ranks=2, max_restarts=1, hang_after=20)
    until(lambda: any(row["kind"] == "step" for row in run.rows), run)
    stopped = pid_of(three, run._attempt.places[1].worker)
    os.kill(stopped, signal.SIGSTOP)
    run.kill(0)
    assert run.result(60) == [1, 1]
    os.kill(stopped, signal.SIGCONT)


def twice():
    """The first attempt waits for its end."""
    attempt = hpclab.gangs.rank._context.place.attempt
    hpclab.report(step=attempt)
    time.sleep(0 if attempt else 1000)
    return attempt


def test_an_end_that_comes_before_its_rank_is_not_lost():
    """Of an attempt that has failed already, such as with a worker that died at once."""
    process.give("run", wire.encode(wire.End()), attempt=1)
    assert process.open_inbox("run", 0, 1).get_nowait() == wire.End()
    assert process.open_inbox("run", 0, 2).empty(), "the next attempt isn't meant"
    for attempt in (1, 2):
        del process.inboxes["run", 0, attempt]
