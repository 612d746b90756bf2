import collections
import functools
import itertools
import os
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from pathlib import Path

import cloudpickle
import psutil
import pytest

import hpclab
from hpclab import machine, rows

try:
    import fcntl
except ImportError:  # Windows: one test at a time
    fcntl = None
try:
    from xdist.scheduler import LoadFileScheduling
except ImportError:  # one test at a time
    LoadFileScheduling = object

SHARED, ROOM = pytest.StashKey[tempfile.TemporaryDirectory](), pytest.StashKey["Room"]()
ALONE = "alone"
LONGEST = (
    *("notebooks", "strategies", "browser", "training", "gang", "recovery", "queues", "exercises", "slurm", "grading"),
    *("gangs", "hosts", "readme", "debugging", "wheel"),
)
"""Files of tests that take longest, in this order: they begin first, so that two workers end at about the same time."""
SHOWN_SECONDS = 1.0
"""What a file took is shown from here on."""


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="append a row for each test to this file, as JSON lines")


def pytest_configure(config):
    # Not where this module is imported: ranks and Dask's workers import it too, with a test's function.
    os.environ["HPCLAB_TESTS"] = uuid.uuid4().hex  # every process that a test starts inherits it: this worker's own
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it; tests send it
    if worker := getattr(config, "workerinput", None):
        config.stash[ROOM] = Room(worker["room"])
    elif config.option.record:
        config.pluginmanager.register(Record(config))


class Record:
    """Keeps what tests took and measured: a row for each as soon as it has ended, with commit, date and machine."""

    def __init__(self, config):
        self.file = config.invocation_params.dir / config.option.record
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(command, cwd=config.rootpath, capture_output=True, text=True).stdout.strip()
        rounds = int(os.environ.get("HPCLAB_KILLS", 1))
        self.about = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "rounds": rounds, "source": "recorded"}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            measured = [text for name, text in report.user_properties if name == "measured"]
            row = {"kind": "test", "test": report.nodeid, "outcome": report.outcome, "measured": measured}
            rows.append(self.file, row | {"duration_s": round(report.duration, 1)} | self.about | machine.describe())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Two tests at a time, since many wait; on one CPU, and where files can't be locked, one, in this process."""
    return 2 if fcntl and machine.cpus() > 1 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config):
    """Make a folder for what all workers of this run share."""
    config.stash[SHARED] = tempfile.TemporaryDirectory(prefix="hpclab-tests-")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["room"] = node.config.stash[SHARED].name


def pytest_unconfigure(config):
    if SHARED in config.stash:
        config.stash[SHARED].cleanup()


class Scheduling(LoadFileScheduling):
    """A worker takes all tests of a file; but one of them takes all that are marked "alone", before the others.

    Each that came in its file's turn would wait until the other worker has ended its own test, for minutes at worst.
    """

    @functools.cached_property
    def alone(self):
        return {*Path(self.config.stash[SHARED].name, ALONE).read_text("utf-8").splitlines()}

    def _split_scope(self, nodeid):
        return ALONE if nodeid in self.alone else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Run tests marked "alone" while no other worker runs any; to wait for that is no part of their time."""
    alone, more = (bool(some and some.get_closest_marker(ALONE)) for some in (item, nextitem))
    room = item.config.stash.get(ROOM, None)
    if room:
        room.enter(alone)
    try:
        return (yield)
    finally:
        if room and not (alone and more):
            room.leave()


class Room:
    """Where tests run: those of all workers together, or of one worker alone.

    Who waits to enter holds the door against those behind: else two workers that take turns would keep it out for good.
    """

    def __init__(self, folder):
        self.door, self.room = (os.open(f"{folder}/{name}", os.O_RDWR | os.O_CREAT) for name in ("door", "room"))
        self.alone = False

    def enter(self, alone):
        if not self.alone:
            fcntl.flock(self.door, fcntl.LOCK_EX)
            fcntl.flock(self.room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(self.door, fcntl.LOCK_UN)
            self.alone = alone

    def leave(self):
        fcntl.flock(self.room, fcntl.LOCK_UN)  # also where a process that the test has forked has the file open
        self.alone = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a test whose own interrupt escapes from it: in a worker it would end the whole run."""
    try:
        return (yield)
    except KeyboardInterrupt as stray:
        if ROOM in item.config.stash:
            raise AssertionError("an interrupt escaped from this test") from stray
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """In CI, where every component is installed, a test that skips has failed."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"CI skips nothing: {report.longrepr[2]}"
    return report


def pytest_terminal_summary(terminalreporter):
    """Tell what tests have measured, as each recorded it under "measured", and the time that each file took."""
    seconds = collections.Counter()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.split("::")[0]] += report.duration
            for name, value in report.user_properties if report.when == "call" else ():
                if name == "measured":
                    terminalreporter.write_line(value)
    if len(seconds) > 1:
        terminalreporter.section("seconds by file")
        for file, took in seconds.most_common():
            if took >= SHOWN_SECONDS:
                terminalreporter.write_line(f"{took:7.0f}  {file}")
        terminalreporter.write_line(f"{seconds.total():7.0f}  all {len(seconds)} files, as if one after the other")


def pytest_collection_modifyitems(config, items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if worker := getattr(config, "workerinput", None):
        items.sort(key=lambda item: item.get_closest_marker(ALONE) is None)
        alone = [item.nodeid for item in items if item.get_closest_marker(ALONE)]
        Path(worker["room"], ALONE).write_text("\n".join(alone), "utf-8")  # the scheduler hears names, no marks


def pytest_collection_finish(session):
    """Send tests' functions to ranks by value, like a notebook's; else each rank imports their module and pytest."""
    for module in {item.module for item in session.items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)


def require(present: bool, what: str) -> None:
    """Skip a test whose real component isn't on this machine."""
    if not present:
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
        while not self.done.wait(1):
            self.peak = max(self.peak, self._sample())

    def _sample(self) -> int:
        if (pid := self.pid()) is None:  # psutil takes None for this process
            return 0
        try:
            first = psutil.Process(pid)
            processes = [first, *first.children(recursive=True)]
        except psutil.Error:  # it has ended
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
