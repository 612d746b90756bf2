"""The inside of a rank: whatever its function reports, prints, returns, raises or leaves behind harms nobody else."""

import atexit
import dataclasses
import enum
import io
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from conftest import until
from hypothesis import given, settings
from hypothesis import strategies as st

import hpclab
from hpclab.gangs import errors, host, rank
from hpclab.gangs import run as runs


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    pass


class Mute(RuntimeError):
    def __str__(self):
        raise KeyError("no message")


class Exits:
    """Its bytes, when they are read again, end the program."""

    def __reduce__(self):
        return (sys.exit, (0,))


class ExitsError(Exits, Exception):
    pass


def workers(client):
    return sorted(client.scheduler_info()["workers"])


@pytest.fixture(autouse=True)
def _no_worker_lost(client):
    before = workers(client)
    yield
    assert hpclab.launch(client, os.getpid, ranks=2).result(60)
    assert workers(client) == before


ODD = [
    *(2**63, 2**64, -(2**64), 2**1000, 2**1100, 10**5000, True, None, math.nan, math.inf, -math.inf, 5e-324, 1e308),
    *("", "\0", "a\nb\r\n", "\x1b[31m", "é中😀", "\udcff", "caf\udce9", "\ud800", "x" * 2_000_000, Text("a\udc80")),
    *(
        Number.ONE,
        np.float16(1),
        np.int8(-1),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.str_("q\udcff"),
        np.longdouble(1),
    ),
    *(np.complex64(1), np.datetime64("2020-01-01"), np.array([[7]]), np.array([1, 2]), np.array([]), np.array("a")),
    *(torch.tensor(0.5), torch.tensor([3]), torch.ones(2), torch.tensor(1 + 1j), torch.tensor(True)),
    *(b"x", [1], (1, 2), {"a": 1}, {math.nan: 1}, {1: {2: 3}}, {1, 2}, object(), int, len, 1j, range(3), ...),
]


def report_each(values):
    """What became of each: None if it was reported, else what was raised here."""
    became = []
    for place, value in enumerate(values):
        try:
            hpclab.report(step=place, value=value)
            became.append(None)
        except (TypeError, ValueError) as error:
            became.append(f"{type(error).__name__}: {error}")
    return became


def test_every_value_arrives_or_raises_in_its_rank(client):
    run = hpclab.launch(client, report_each, ODD, ranks=1)
    (became,) = run.result(60)
    arrived = {row["step"]: row["value"] for row in run.rows if row["kind"] == "step"}
    assert len(ODD) > 50
    for place, (value, error) in enumerate(zip(ODD, became, strict=True)):
        assert (place in arrived) == (error is None), (value, error)
        if error is not None:
            assert "report(" in error, "it names what can't be"
            continue
        expected = value.item() if hasattr(value, "item") else value
        assert arrived[place] == expected or (expected != expected and arrived[place] != arrived[place])
    assert hpclab.open_run(run.folder).rows[-1]["status"] == "finished"


def print_each(values):
    for value in values:
        print(value)
    return values


def test_every_value_is_printed_and_returned(client, capsys):
    values = [value for value in ODD if not (isinstance(value, int) and value > 10**4000)]  # Python prints no such one
    run = hpclab.launch(client, print_each, values, ranks=1)
    (returned,) = run.result(60)
    assert len(returned) == len(values) > 50
    assert "caf\\udce9\n" in run.logs(0)
    with hpclab.gang(client, ranks=1) as gang:
        gang.push(values=values)
        for place in range(len(values)):
            gang.run(f"print(values[{place}])")
            gang.run(f"values[{place}]")
            assert len(gang.pull(f"values[{place}]")) == 1
            with pytest.raises(hpclab.CellError, match="ValueError"):
                gang.run(f"raise ValueError(values[{place}])")
    assert "[rank 0] caf\\udce9\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"kind": 5}, r"TypeError: report\(kind=5\) must be text"),
        ({"kind": "end"}, r"ValueError: report\(kind='end'\) is a kind of row that hpclab writes itself"),
        ({"step": "a"}, r"TypeError: report\(step='a'\) must be a number"),
        ({"loss": "low"}, r"TypeError: report\(loss='low'\) must be a number"),
        ({"time_s": None}, r"TypeError: report\(time_s=None\) must be a finite number of seconds"),
        ({"k" * 2_000_000: 1}, r"ValueError: report\(...\) of 2,000,\d+ characters exceeds 1,000,000"),
    ],
    ids=["kind", "kind of ours", "step", "loss", "time_s", "long"],
)
def test_a_row_that_figures_could_not_take_is_refused(client, row, error):
    with pytest.raises((TypeError, ValueError)) as caught:
        hpclab.launch(client, lambda: hpclab.report(**row), ranks=1).result(60)
    assert re.match(error, f"{caught.typename}: {caught.value}")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.floats(), inner, max_size=3),
    max_leaves=6,
)


def report_print_return(rows, value):
    became = []
    for row in rows:
        try:
            hpclab.report(**row)
            became.append(True)
        except (TypeError, ValueError):
            became.append(False)
    print(value)
    return became, value


def same(one, other):
    """Whether two values are equal, NaN like NaN."""
    return repr(one) == repr(other)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(st.text(st.characters(codec=None)), anything, max_size=4), max_size=6), anything)
def test_whatever_is_reported_printed_and_returned(client, rows, value):
    """A property of `report` and `launch`: what they take comes back equal, and what they don't take raises."""
    run = hpclab.launch(client, report_print_return, rows, value, ranks=1)
    ((became, returned),) = run.result(60)
    assert same(returned, value)
    arrived = [row for row in run.rows if row["kind"] not in ("run", "end")]
    plain = [
        all(isinstance(part, str | int | float | None) for part in row.values()) and not set(row) & set(rank.RESERVED)
        for row in rows
    ]
    assert became == plain
    kept = [row for row, took in zip(rows, plain, strict=True) if took]
    assert all(
        same({name: arrived_row[name] for name in row}, row) for arrived_row, row in zip(arrived, kept, strict=True)
    )
    assert run.logs(0).rstrip("\n") == errors.printable(str(value)).rstrip("\n").replace("\r\n", "\n")


def test_what_a_cell_prints_and_shows(client, capsys):
    with hpclab.gang(client, ranks=2) as gang:
        gang.run(r"print('caf\udce9', '\ud800', 2**64)")
        assert r"caf\udce9 \ud800 18446744073709551616" in capsys.readouterr().out
        assert str(gang.run(r"type('Odd', (), {'__repr__': lambda self: 'o\udcff'})()")) == r"[ranks 0-1] o\udcff"
        with pytest.raises(hpclab.CellError, match=r"ValueError: o\\udcff"):
            gang.run(r"raise ValueError('o\udcff')")
        assert gang.pull(r"{float('nan'): '\udcff', 2**64: None}", on=0)[0].keys() >= {2**64}


@pytest.mark.parametrize(
    ("action", "error", "says"),
    [
        (lambda: sys.exit("caf\udce9"), hpclab.RankError, r"SystemExit: caf\\udce9"),
        (lambda: (_ for _ in ()).throw(Mute()), Mute, ""),
        (lambda: (_ for _ in ()).throw(ExitsError()), hpclab.RankError, "ExitsError"),
        (Exits, hpclab.RankError, r"return value of rank 0 can't be unpickled here: SystemExit\(0\)"),
        (lambda: (_ for _ in ()).throw(ValueError("x" * 50_000_000)), hpclab.RankError, "ValueError: x+\n... 49,9"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt()), hpclab.RankError, "KeyboardInterrupt"),
        (
            lambda: os.write(rank._context.records.fileno(), b"x\n") and time.sleep(60),
            hpclab.RankError,
            "pipe that hpclab reads",
        ),
    ],
    ids=["exit", "no message", "exits here", "value exits here", "50 MB", "interrupt", "broken record"],
)
def test_odd_ends(client, action, error, says):
    run = hpclab.launch(client, action, ranks=1, max_restarts=3)
    with pytest.raises(error) as caught:
        run.result(120)
    if not says:
        return
    assert re.search(says, str(caught.value))
    assert not [row for row in run.rows if row["kind"] == "restart"], "what the function does is no loss"
    assert run.rows[-1]["kind"] == "end"


def leave_things(how):
    """Threads, exit handlers, a temporary folder and an open file, as a function leaves them that ends in some way."""
    global folder, kept
    folder = tempfile.TemporaryDirectory()
    kept = open("kept.txt", "w")  # noqa: SIM115  # left open
    kept.write("written")
    atexit.register(print, "exit handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print(folder.name)
    if how == "raise":
        raise LookupError("planted")
    if how == "exit":
        sys.exit(0)


@pytest.mark.parametrize("how", ["return", "exit", "raise"])
def test_a_rank_ends_as_python_does(client, how, tmp_path):
    run = hpclab.launch(client, in_folder, tmp_path, leave_things, how, ranks=1)
    if how == "raise":
        with pytest.raises(LookupError, match="planted"):
            run.result(60)
    else:
        assert run.result(60) == [None]
    left, *said = run.logs(0).splitlines()
    assert said == ["thread", "exit handler"]
    assert not os.path.exists(left)
    assert (tmp_path / "kept.txt").read_text() == "written"


def in_folder(folder, function, *arguments):
    os.chdir(folder)
    return function(*arguments)


def leave_what_blocks():
    """A pipe that nobody reads, in which something is left to be written; and a file whose code fails."""
    global kept, pipe, odd

    class Odd(io.RawIOBase):
        closed = property(lambda self: 1 / 0)

    odd = Odd()
    kept = open("kept.txt", "w")  # noqa: SIM115  # left open
    kept.write("written")
    pipe = subprocess.Popen(["sleep", "1000"], stdin=subprocess.PIPE)
    pipe.stdin.write(b"x" * 65536)
    pipe.stdin.flush()
    pipe.stdin.write(b"y")
    atexit.register(time.sleep, 1000)
    raise LookupError("planted")


def test_what_blocks_keeps_no_rank(client, tmp_path):
    with pytest.raises(LookupError, match="planted"):
        hpclab.launch(client, in_folder, tmp_path, leave_what_blocks, ranks=1).result(60)
    assert (tmp_path / "kept.txt").read_text() == "written"


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """It takes no notes."""

    code: int = 3


class Stubborn(Exception):
    awaited = object()

    def __str__(self):  # noqa: PLE0307
        sys.exit(5)


def test_errors_that_do_as_they_like(client):
    run = hpclab.launch(client, lambda: (_ for _ in ()).throw(Frozen()), ranks=1)
    with pytest.raises(hpclab.RankError, match="Frozen") as caught:
        run.result(60)
    assert "Raised first by rank 0 of 1" in "".join(caught.value.__notes__)
    assert "error" in run.rows[-1]
    with hpclab.gang(client, ranks=1) as gang:
        gang.push(Stubborn=Stubborn)
        with pytest.raises(hpclab.CellError, match="Stubborn"):
            gang.run("raise Stubborn()")
        gang.run("print('x' * 12_000_000, end='')")
        assert str(gang.run("1 + 1")) == "[rank 0] 2", "its names are there still"


def hold_memory(then):
    kept = []
    try:
        while True:
            kept.append(np.ones(10**6))
    except MemoryError:
        atexit.register(print, "exit handler")
        if then == "raise":
            raise
    globals()["held"] = kept


@pytest.mark.parametrize("then", ["raise", "return"])
def test_who_has_no_memory_left_ends_in_order_too(client, then):
    run = hpclab.launch(client, hold_memory, then, ranks=1, memory="300MB")
    if then == "raise":
        with pytest.raises(MemoryError):
            run.result(60)
    else:
        assert run.result(60) == [None]
    assert run.logs(0) == "exit handler\n"


def fail_slowly():
    atexit.register(time.sleep, 1.5)
    hpclab.report(step=1)
    raise LookupError("planted")


def test_a_stop_hides_no_failure(client):
    run = hpclab.launch(client, fail_slowly, ranks=1)
    until(lambda: any(row["kind"] == "step" for row in run.rows), run)
    time.sleep(0.5)
    run.stop()
    with pytest.raises(LookupError, match="planted"):
        run.result(60)


def test_an_interrupt_in_the_midst_of_a_record_breaks_none(client):
    with hpclab.gang(client, ranks=1) as gang:
        gang.run("import hpclab, itertools; numbers = itertools.count()")
        for _ in range(3):
            timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                gang.run("while True: hpclab.report(step=next(numbers), text='x' * 20_000)")
            timer.join()
            gang.run("hpclab.report(kind='after')")
        assert str(gang.run("1 + 1")) == "[rank 0] 2"
    assert len([row for row in gang._run.rows if row["kind"] == "after"]) == 3


def report_from_children(count, rows, size):
    """As workers of a DataLoader do, and the rank itself meanwhile."""
    children = []
    for child in range(count):
        if (pid := os.fork()) == 0:
            for step in range(rows):
                hpclab.report(kind="child", step=step, child=child, text="x" * size)
            os._exit(0)
        children.append(pid)
    for step in range(rows):
        hpclab.report(step=step, text="x" * size)
    for pid in children:
        os.waitpid(pid, 0)


def test_rows_of_forked_children_arrive_whole(client):
    run = hpclab.launch(client, report_from_children, 3, 100, 20_000, ranks=1)
    assert run.result(60) == [None]
    came = [(row.get("child"), row["step"]) for row in run.rows if row["kind"] in ("child", "step")]
    assert sorted(came, key=str) == sorted(((c, s) for c in (None, 0, 1, 2) for s in range(100)), key=str)


class Reporting(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, place):
        hpclab.report(kind="sample", step=place, text="x" * 20_000)
        return place


def test_rows_of_a_data_loaders_workers_arrive_whole(client):
    def load():
        return sum(len(batch) for batch in torch.utils.data.DataLoader(Reporting(), batch_size=4, num_workers=2))

    run = hpclab.launch(client, load, ranks=1)
    assert run.result(60) == [40]
    assert sorted(row["step"] for row in run.rows if row["kind"] == "sample") == list(range(40))


def start_daemons(mark):
    """One in a session of its own; one that has left its parent too, as daemons do; and a child of that."""
    subprocess.Popen(["sleep", mark], start_new_session=True)
    subprocess.run(["sh", "-c", f"setsid sh -c 'sleep {mark} & sleep {mark}' &"], check=True)
    while subprocess.run(["pgrep", "-fxc", f"sleep {mark}"], capture_output=True, text=True).stdout.strip() != "3":
        time.sleep(0.05)


@pytest.mark.skipif(not host.FORK, reason="needs the zygote: only a subreaper is told of what has left its parent")
@pytest.mark.parametrize("end", ["return", "kill", "raise"])
def test_what_a_rank_has_started_ends_with_it(client, end):
    mark = {"return": "6001", "kill": "6002", "raise": "6003"}[end]

    def daemons():
        return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", mark]]

    def work():
        start_daemons(mark)
        if end == "raise":
            raise LookupError("planted")
        if end == "kill":
            time.sleep(600)

    run = hpclab.launch(client, work, ranks=1)
    if end == "kill":
        until(lambda: len(daemons()) == 3, run)
        run.kill(0)
    run.wait(60)
    deadline = time.monotonic() + 10  # patience for a loaded machine
    while daemons() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not daemons()


def return_or_wait():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        dist.recv(torch.ones(1), src=0)


def test_of_a_returned_rank_a_hang_says_that_it_has_returned(client):
    with pytest.raises(hpclab.HangError, match=r"(?s)rank 0:\n.*its function has returned.*rank 1:\n.*return_or_wait"):
        hpclab.launch(client, return_or_wait, ranks=2, hang_after=1).result(60)


LIMITED = textwrap.dedent(
    """
    import os, sys, threading, time, hpclab
    if __name__ == "__main__":
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # as a notebook's kernel has others
        import torch  # which binds this one
        with hpclab.connect(workers=2) as client:
            run = hpclab.launch(client, lambda: sorted(os.sched_getaffinity(0)), ranks=2)
            print(run.result(60), run.rows[0]["cpus"])
            try:
                hpclab.launch(client, bytes, 450_000_000, ranks=1).result(60)
            except ValueError as error:
                print(error)
    """
)


def test_neither_bindings_nor_limits_of_the_shell_reach_ranks(tmp_path):
    """OMP_PROC_BIND has whatever imports torch stay on one CPU; `ulimit -d` is below a rank's share."""
    (tmp_path / "script.py").write_text(LIMITED)
    env = os.environ | {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "GOMP_CPU_AFFINITY": "0"}
    limit = 3_000_000_000
    done = subprocess.run(
        [sys.executable, "script.py"],
        env=env,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    every = sorted(os.sched_getaffinity(0))
    found, refused = done.stdout.splitlines()
    assert found == f"{[every] * 2} {len(every)}", done.stderr
    assert re.match("the return value takes 450,000,0.. bytes, more than a worker with .* bytes a rank", refused)


def die():
    os.kill(os.getpid(), 9)


def test_what_dies_at_once_again_and_again_is_not_tried_without_pause(client, monkeypatch):
    pauses = []
    monkeypatch.setattr(runs.Run, "_pause", lambda run, seconds: pauses.append(seconds))
    run = hpclab.launch(client, die, ranks=1, max_restarts=3)
    with pytest.raises(hpclab.RankError, match="SIGKILL"):
        run.result(60)
    assert len([row for row in run.rows if row["kind"] == "restart"]) == 3
    assert pauses == [0.5, 1.0], "the first is tried at once"


@pytest.mark.skipif(not host.FORK, reason="without fork there is no zygote")
def test_a_zygote_that_can_not_import_is_told_once(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('planted')")
    with hpclab.connect(workers=1) as own:
        (zygote,) = hpclab.launch(own, os.getppid).result(60)
        own.run(lambda: sys.path.insert(0, str(folder)))
        os.kill(zygote, signal.SIGKILL)
        run = hpclab.launch(own, os.getpid, max_restarts=100)
        with pytest.raises(hpclab.RankError, match=r"(?s)could not start: .* can't fork ranks: .*planted"):
            run.result(60)
    restarts = [row for row in run.rows if row["kind"] == "restart"]
    assert len(restarts) <= 1, "for the zygote that was killed"
