import os
import signal
import threading
import time
import uuid

import cloudpickle
import psutil
import pytest

import hpclab

os.environ["HPCLAB_TESTS"] = uuid.uuid4().hex  # every process that a test starts inherits it
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it; tests send it


def pytest_terminal_summary(terminalreporter):
    """Tell what tests have measured, as each recorded it under "measured"."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "measured":
                terminalreporter.write_line(value)


def pytest_collection_finish(session):
    """Send tests' functions to ranks by value, like a notebook's; else each rank imports their module and pytest."""
    for module in {item.module for item in session.items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)


def require(present: bool, what: str) -> None:
    """Skip a test whose real component isn't on this machine; in CI, where all are installed, that is a failure."""
    if present:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI must have {what}")
    pytest.skip(f"needs {what}")


def ours(part: str) -> list[int]:
    """Process ids on this machine that descend from these tests, orphans too, with a name or command of this part."""
    return [
        process.pid
        for process in psutil.process_iter(["name", "cmdline", "environ"])
        if part in f"{process.info['name']} {process.info['cmdline']}"
        and (process.info["environ"] or {}).get("HPCLAB_TESTS") == os.environ["HPCLAB_TESTS"]
    ]


def ranks_alive() -> list[int]:
    """Process ids of all ranks; a fork has the zygote's command, and a name of its own."""
    return ours("hpclab-rank")


def zygotes_alive() -> list[int]:
    """Process ids of all zygotes, and of no rank."""
    return sorted(set(ours("hpclab.gangs.zygote")) - set(ranks_alive()))


def no_rank_left(seconds: float = 10) -> bool:
    """Whether all ranks are gone within some seconds, which is patience for a loaded machine and no measurement."""
    deadline = time.monotonic() + seconds
    while ranks_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not ranks_alive()


def until(true, run=None, seconds=120):
    """Wait for something, and return it: patience for a loaded machine, no measurement; fail if a run ends before."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert run is None or not run.wait(0), run
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


class Footprint:
    """Samples the memory of a process and all its descendants while a block runs: the peak, in bytes.

    Parameters
    ----------
    pid : callable
        Returns the process's id; None as long as it isn't there.
    """

    def __init__(self, pid):
        self.pid, self.done, self.peak, self.seen = pid, threading.Event(), 0, set()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    def _watch(self):
        while not self.done.wait(0.3):
            self.peak = max(self.peak, self._sample())

    def _sample(self) -> int:
        try:
            first = psutil.Process(self.pid())
            processes = [first, *first.children(recursive=True)]
        except (psutil.Error, TypeError):  # not started yet, or ended
            return 0
        self.seen.update(processes)
        return sum(map(self._memory, processes))

    @staticmethod
    def _memory(process) -> int:
        """Proportional set size where there is one: forked ranks share most of their pages."""
        try:
            return getattr(process.memory_full_info(), "pss", 0) or process.memory_info().rss
        except psutil.Error:
            return 0


@pytest.fixture(scope="session")
def client():
    """One encrypted cluster of two workers, for all tests that leave it as it was."""
    with hpclab.connect(workers=2) as client:
        yield client


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    """Every test works in a folder of its own, so that default results land there."""
    monkeypatch.chdir(tmp_path)
