"""Interactive gangs, from plain Python and from a real kernel: cells, and what hangs, fails and dies in them."""

import _thread
import os
import re
import signal
import threading
import time
from contextlib import suppress

import psutil
import pytest
from conftest import no_rank_left, ours, ranks_alive, until
from jupyter_client.manager import start_new_kernel

import hpclab
from hpclab.gangs import cells
from hpclab.gangs.cells import _label, _Lines

ALL = "t = torch.ones(3) * (rank + 1)\ndist.all_reduce(t)\nt.tolist()"


@pytest.fixture
def gang(client):
    with hpclab.gang(client, ranks=4, oversubscribe=True) as gang:
        yield gang
    assert no_rank_left()


def works(gang):
    """Whether a collective does."""
    return gang.run(ALL) == dict.fromkeys(range(4), "[10.0, 10.0, 10.0]")


def interrupt_after(seconds):
    """Ctrl-C, as far as the main thread can tell."""
    timer = threading.Timer(seconds, _thread.interrupt_main)
    timer.start()
    return timer


def interrupted(gang, code, seconds=0.5):
    """What is told of a cell that is interrupted; it must be left with patience for a loaded machine only."""
    started = time.monotonic()
    interrupt_after(seconds)
    with pytest.raises(hpclab.CellInterrupt) as told:
        gang.run(code)
    assert time.monotonic() - started < 60
    return str(told.value)


def test_ranks_of_a_closed_gang_end_as_python_does(client, tmp_path):
    with hpclab.gang(client, ranks=2) as gang:
        gang.run("import atexit, tempfile; folder = tempfile.TemporaryDirectory(); atexit.register(print, 'ended')")
        folders = gang.pull("folder.name")
        gang.run(f"kept = open({str(tmp_path)!r} + f'/{{rank}}.txt', 'w'); kept.write('written')")
    assert not any(os.path.exists(folder) for folder in folders)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["written"] * 2
    assert [gang._run.logs(rank) for rank in range(2)] == ["ended\n"] * 2


def test_names_live_from_cell_to_cell(gang):
    assert gang.run("x = 10 * rank\ndef f(y):\n    return x + y") is None
    assert gang.run("f(ranks)") == {0: "4", 1: "14", 2: "24", 3: "34"}
    assert works(gang)


def test_each_rank_may_pickle_its_own_classes(gang):
    """Plain pickle, which torch uses for objects, looks for a class in ``__main__``."""
    gang.run("class Point:\n    def __init__(self, x): self.x = x\nfound = [None] * ranks")
    assert gang.run("dist.all_gather_object(found, Point(rank))\n[p.x for p in found]")[2] == "[0, 1, 2, 3]"


def test_equal_prints_and_values_are_folded(gang, capsys):
    values = gang.run(
        "print('hello')\nprint('rank', rank // 2)\nimport sys\nprint('end', end='', file=sys.stderr)\nrank // 3"
    )
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == ["[ranks 0-1] rank 0", "[ranks 0-3] end", "[ranks 0-3] hello", "[ranks 2-3] rank 1"]
    assert lines[0] == "[ranks 0-3] hello"
    assert repr(values) == "[ranks 0-2] 0\n[rank 3] 1"
    assert repr(gang.run("torch.eye(2)")) == "[ranks 0-3] tensor([[1., 0.],\n                    [0., 1.]])"


def test_prints_come_while_the_cell_runs(gang, capsys, tmp_path):
    """It ends only when what it has printed was seen."""
    shown, seen = [], tmp_path / "seen"

    def look():
        shown.append(until(lambda: capsys.readouterr().out))
        seen.touch()

    threading.Thread(target=look).start()
    gang.run(
        f"import os, time\nprint('begun')\nwhile not os.path.exists({str(seen)!r}): time.sleep(0.01)\nprint('ended')"
    )
    assert re.fullmatch(r"(\[ranks? [0-3,-]+\] begun\n)+", shown[0])
    assert capsys.readouterr().out.endswith("] ended\n")


def test_a_line_that_overwrites_itself_shows_its_last_state(gang, capsys):
    gang.run("for i in range(5): print(i, end='\\r', flush=True)\nprint('done')", on=0)
    assert capsys.readouterr().out == "[rank 0] done\n"


def test_a_flood_goes_to_the_log(gang, capsys):
    gang.run("for i in range(20_000): print('line', i)", on=0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["[rank 0] line 0", "[rank 0] line 1"]
    assert any(re.fullmatch(r"\[rank 0\] \.\.\. 1\d,\d+ more lines are in .*rank-0.log", line) for line in lines)
    deadline = time.monotonic() + 60
    log = gang.folder / "rank-0.log"
    while "line 19999\n" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "line 19999\n" in log.read_text()
    assert works(gang)


def test_lines_keep_each_ranks_order(capsys):
    lines = _Lines()
    for rank, text in ((1, "own\nboth\n"), (0, "both\n"), (0, "last\n")):
        lines.take(rank, text)
    lines.show(set())
    assert capsys.readouterr().out.splitlines() == ["[rank 1] own", "[ranks 0-1] both", "[rank 0] last"]


@pytest.mark.parametrize(("ranks", "label"), [([2], "[rank 2]"), ([3, 1, 2], "[ranks 1-3]"), ([0, 2], "[ranks 0,2]")])
def test_labels(ranks, label):
    assert _label(ranks) == label


IPYTHONS = [
    ("!echo out; echo err >&2; exit 3", "[rank 0] out\n[rank 0] err\n", None),
    ("x = !printf 'a\\nb'\nx, _exit_code", "", "(['a', 'b'], 3)"),
    ("w = 'w'\n!echo {w * 2} $w\n!echo '{print $1}' | cat", "[rank 0] ww w\n[rank 0] {print $1}\n", None),
    ("def f(n):\n    !echo {n}\n    return n\nf(7)", "[rank 0] 7\n", "7"),
    ("import asyncio\nasync def g(): return 5\nawait g() + 1", "", "6"),
    ("async def h(): yield 1; yield 2\nasync for i in h(): print(i)", "[rank 0] 1\n[rank 0] 2\n", None),
    ("g?", "[rank 0] g()\n[rank 0] It has no docstring.\n", None),
    ("g??", "[rank 0] async def g(): return 5\n", None),
    ("%env SEEN=yes\n%env SEEN", "[rank 0] env: SEEN=yes\n", "'yes'"),
    ("%cd /\n%pwd", "[rank 0] /\n", "'/'"),
    ("display({'a': 1})", "[rank 0] {'a': 1}\n", None),
    ("import hpclab.tables\nhpclab.tables.Table([{'a': 1}])", "", "a\n-\n1"),
    ("5;", "", None),
    ("'%time'", "", "'%time'"),
    ("s = %timeit -n 1 -r 1 v = !true\ns", None, None),
    ("import matplotlib.figure\nmatplotlib.figure.Figure()", "", "<Figure size 640x480 with 0 Axes>"),
    ("import tqdm\nfor i in tqdm.tqdm(range(3), bar_format='{n}'): pass", "[rank 0] 3\n", None),
]  # fmt: skip


def test_cells_are_ipythons(gang, capsys):
    for code, prints, value in IPYTHONS:
        values = gang.run(code, on=0)  # of all ranks, lines that come late are not folded
        shown = capsys.readouterr().out
        assert prints in (shown, None), code
        assert values == (value and {0: value}), code


def test_magics_that_measure(gang, capsys):
    assert gang.run("x = %time 3\n%time y = x + 1\nx, y", on=0) == {0: "(3, 4)"}
    assert gang.run("%%time\n!echo inside\nz = 5\nz + 1", on=0) == {0: "6"}
    shown = capsys.readouterr().out
    assert len(re.findall(r"\[rank 0\] wall time [\d.]+ [mµn]?s, CPU time [\d.]+ [mµn]?s\n", shown)) == 3
    assert "[rank 0] inside\n[rank 0] wall" in shown
    gang.run("t = torch.ones(1)\n%timeit -n 5 -r 3 dist.all_reduce(t)")
    assert "per loop (mean and std. dev. of 3 runs, 5 loops each)" in capsys.readouterr().out
    gang.run("%%timeit -n 4 -r 2 n = [0]\nn[0] += 1")
    assert gang.run("n") == dict.fromkeys(range(4), "[8]")
    with pytest.raises(
        hpclab.CellError, match=r"RuntimeError: %timeit n: .*same on all.* %timeit -n 100 -r 7 STATEMENT"
    ):
        gang.run("%timeit n")


WRONG = [
    ("\n\n!true \\\n  a\n1 / 0", "line 5, in <module>\n    1 / 0\n    ~~^~~\nZeroDivisionError"),
    ("%%time\n\n%time 1 / 0", "line 3, in <module>\n    %time 1 / 0\nZeroDivisionError"),
    ("x = 1\ny = (", "line 2\n    y = (\n        ^\nSyntaxError: '(' was never closed"),
    ("1\nreturn 5", "line 2\nSyntaxError: 'return' outside function"),
    (
        "import sys\nsys.exit(3)",
        "SystemExit: 3\nA cell can't end its rank, which keeps running with its variables; gang.",
    ),
    (
        "1\n%matplotlib inline",
        "line 2, in <module>\n    %matplotlib inline\nRuntimeError: %matplotlib isn't available on",
    ),
    ("1\n%%time\n2", "line 2, in <module>\n    %%time\nRuntimeError: %%time must be the first line"),
    ("%%bash\nls", "RuntimeError: %%bash isn't available on the ranks, which have %cd, %env, "),
    ("!sleep 1 &", "OSError: !sleep 1 & would be left behind; start background programs with subprocess.Popen."),
    ("input('name')", "EOFError: input('name') can't ask on a rank; ask in a cell without %%ranks"),
    ("%time y = = 3", "line 1\n    y = = 3\n        ^\nSyntaxError: invalid syntax"),
    ("1\n%timeit -n 1 1 / 0", "line 2, in timed\n    %timeit -n 1 1 / 0\nZeroDivisionError"),
    ("1\nnowhere?", "line 2, in <module>\n    nowhere?\nNameError: name 'nowhere' is not defined"),
    ("breakpoint()", "RuntimeError: breakpoint() can't ask on a rank"),
    ("class Odd:\n    def __repr__(self): 1 / 0\nOdd()", "line 2, in __repr__\n"),
]


def test_a_cell_that_can_not_be_is_told_once_and_with_its_line(gang):
    gang.run("kept = 1; print = rank = None; del torch")  # names of a cell are no more than names
    for code, told in WRONG:
        with pytest.raises(hpclab.CellError, match=r"^\[ranks 0-3\]\n") as raised:
            gang.run(code)
        text = str(raised.value)
        assert told in text and "hpclab/" not in text and len(text.splitlines()) <= 9, text
    assert gang.run("kept", on=1) == {1: "1"}


def test_some_ranks(gang):
    assert gang.run("rank", on=[0, 2]) == {0: "0", 2: "2"}
    assert gang.run("rank", on=3) == {3: "3"}
    assert gang.pull("rank * rank", on=[3, 1]) == [1, 9]
    for wrong in ([4], [], [-1]):
        with pytest.raises(ValueError, match=r"on \(=.*\) must name ranks from 0 to 3"):
            gang.run("rank", on=wrong)


def test_an_error_shows_its_rank_and_lines(gang):
    gang.run("def f(x):\n    return 1 / x")
    with pytest.raises(hpclab.CellError) as told:
        gang.run("y = 3\nf(rank)")
    text = str(told.value)
    assert text.startswith('[rank 0]\nTraceback (most recent call last):\n  File "<ranks run')
    assert text.endswith("ZeroDivisionError: division by zero")
    assert "line 2, in <module>\n    f(rank)\n" in text and "    return 1 / x\n" in text
    assert "hpclab" not in text
    assert works(gang)


@pytest.mark.parametrize("code", ["x +", "exit()", "raise KeyboardInterrupt", "1 / 0"])
def test_whatever_a_cell_raises_it_is_one_error_of_all(gang, code):
    with pytest.raises(hpclab.CellError, match=r"^\[ranks 0-3\]\n"):
        gang.run(code)
    assert works(gang)


def test_a_rank_that_fails_is_named_and_not_those_that_waited_for_it(gang):
    gang.run("kept = 5")
    with pytest.raises(hpclab.CellError) as told:
        gang.run("if rank == 2:\n    raise ValueError('planted')\ndist.all_reduce(torch.ones(2))")
    text = str(told.value)
    assert text.startswith("[rank 2]\nTraceback") and "ValueError: planted\n" in text
    assert re.search(r"\[ranks 0-1,3\] was left waiting in <ranks run \d+>, line 3: dist.all_reduce", text)
    assert works(gang)
    assert gang.run("kept", on=2) == {2: "5"}


def test_a_cell_that_takes_long_says_where_its_ranks_are(gang, monkeypatch, capsys):
    monkeypatch.setattr(cells, "SLOW_SECONDS", 1.0)
    gang.run("import time\nif rank == 0:\n    time.sleep(6)\ndist.all_reduce(torch.ones(2))")
    told = capsys.readouterr().out
    assert told.startswith("after 1 s:\n[rank 0] <ranks run ")
    assert ", line 3: time.sleep(6)\n[ranks 1-3] <ranks run " in told
    assert ", line 4: dist.all_reduce(torch.ones(2))\n" in told and "after 3 s:" in told
    gang.run("1")
    assert capsys.readouterr().out == "", "it took no time"


def test_ranks_that_still_compute_are_not_broken_off(gang):
    with pytest.raises(hpclab.CellError, match=r"^\[rank 0\]\n") as told:
        gang.run("import time\nif rank == 0:\n    1 / 0\ntime.sleep(4)\nout = 7")
    assert "waited" not in str(told.value)
    assert gang.run("out", on=[1, 2, 3]) == {1: "7", 2: "7", 3: "7"}


def test_what_only_gloo_says_is_no_cause(gang):
    """A rank whose peer has closed its connections fails too, sooner than it is interrupted."""
    with pytest.raises(hpclab.CellError) as told:
        gang.run(
            "import time\nif rank == 1:\n    time.sleep(0.5)\n    raise KeyError('cause')\ndist.recv(torch.ones(1), 1)"
        )
    assert str(told.value).startswith("[rank 1]\n")
    assert works(gang)


def test_what_a_cell_reports_is_here_when_it_has_ended(gang):
    for number in range(5):
        gang.run(f"import hpclab\nfor _ in range(100): hpclab.report(number={number})", on=[0, 2])
        assert [row["rank"] for row in gang.rows if row.get("number") == number].count(2) == 100
    assert gang.rows[0]["ranks"] == 4


def test_push_and_pull(gang):
    table = {"a": [1, 2], "f": lambda x: x + 1}
    gang.push(table=table, n=3)
    assert gang.run("table['f'](n)")[3] == "4"
    assert gang.pull("rank + n") == [3, 4, 5, 6]
    with pytest.raises(TypeError, match=r"lock \(=.*can't be pickled"):
        gang.push(lock=threading.Lock())
    with pytest.raises(hpclab.CellError, match="NameError: name 'nothing'"):
        gang.pull("nothing")
    with pytest.raises(hpclab.CellError, match=r"pickle"):
        gang.pull("dist.group.WORLD")
    assert works(gang)


def test_push_and_pull_20_megabytes(gang):
    big = os.urandom(20_000_000)
    gang.push(big=big)
    assert gang.run("len(big)")[3] == "20000000"
    gang.run("big = bytes([rank]) + big[1:]")
    pulled = gang.pull("big")
    assert [p[0] for p in pulled] == [0, 1, 2, 3]
    assert all(p[1:] == big[1:] for p in pulled)
    from hpclab.gangs.worker import _values

    left = gang._client.run(lambda: dict(_values))
    assert all(not values for values in left.values()), "nothing stays with the workers"


RECEIVE = "import time\nif rank == 0:\n    dist.recv(torch.ones(1), src=1)\nelse:\n    dist.barrier()"


def test_a_deadlock_is_left_without_losing_a_name(gang):
    gang.run("kept = rank")
    text = interrupted(gang, RECEIVE)
    assert re.search(r"\[rank 0\] was in <ranks run \d+>, line 3: dist.recv\(torch.ones\(1\), src=1\)\n", text)
    assert re.search(r"\[ranks 1-3\] was in <ranks run \d+>, line 5: dist.barrier\(\)", text)
    assert works(gang)
    assert gang.run("kept")[3] == "3"
    for _ in range(3):
        interrupted(gang, RECEIVE, 0.2)
        assert works(gang)


@pytest.mark.alone  # a rank that gets no CPU doesn't leave its cell in time either; so below
@pytest.mark.parametrize(
    "line",
    [
        "while True: pass",
        "time.sleep(1000)",
        "dist.new_group([0, 1])",
        "dist.irecv(torch.ones(1), src=1).wait()",
        "t = torch.ones(1); dist.broadcast(t, src=1)",
        "threading.Event().wait()",
        "!trap '' INT; sleep 1000; true",
        "await asyncio.sleep(1000)",
    ],
)
def test_one_rank_is_interrupted_wherever_it_is(gang, line):
    text = interrupted(gang, f"import asyncio, threading, time\nif rank == 0:\n    {line}")
    assert f"line 3: {line}\n[ranks 1-3] had ended" in text
    assert works(gang)
    assert ours("sleep 1000") == []


DDP = """
from torch.nn.parallel import DistributedDataParallel
model = DistributedDataParallel(torch.nn.Linear(500, 500))
while True:
    model(torch.randn(64, 500)).sum().backward()
"""


@pytest.mark.alone
def test_training_is_interrupted_in_the_midst_of_its_messages(gang):
    for number in range(12):
        assert "has not left" not in interrupted(gang, DDP, 0.2 + 0.03 * number)
        assert works(gang)


def test_an_interrupt_of_some_ranks_gives_all_a_new_group(gang):
    interrupt_after(0.5)
    with pytest.raises(KeyboardInterrupt, match=r"\[rank 3\] was in"):
        gang.run("dist.recv(torch.ones(1), src=0)", on=3)
    assert works(gang)


def test_a_rank_that_hears_nothing_is_named_and_comes_back(gang):
    """``sum`` holds the GIL, and hears no signal before it ends."""
    text = interrupted(gang, "if rank == 1:\n    x = sum(range(3 * 10**8))")
    assert re.search(
        r"\[rank 1\] was in .*line 2: x = sum\(.*\(has not left it within 2 s; gang.close\(\) ends it\)", text
    )
    assert works(gang)


@pytest.mark.alone
def test_an_interrupt_that_comes_too_late_harms_nothing(gang):
    for _ in range(20):
        timer = interrupt_after(0.01)
        with suppress(KeyboardInterrupt):  # where it comes, in a cell or between two, is left to chance
            while timer.is_alive():
                gang.run("rank")
            time.sleep(0.01)
    assert works(gang)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("os._exit(3)", "exited with code 3"),
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "was killed by SIGSEGV"),
    ],
)
def test_a_rank_that_dies_in_a_cell(gang, capsys, line, cause):
    with pytest.raises(hpclab.CellError, match=rf"rank 2 of 4 on .* {cause}.*hpclab.gang\(...\) makes a new one"):
        gang.run(
            f"import os\nprint('all')\ndist.barrier()\nif rank == 2:\n    print('last')\n    {line}\ndist.barrier()"
        )
    assert capsys.readouterr().out == "[ranks 0-3] all\n[rank 2] last\n"
    with pytest.raises(hpclab.CellError, match=cause):
        gang.run("1")
    assert no_rank_left()


def test_a_rank_that_dies_between_cells(gang, client):
    (pid,) = gang.pull("__import__('os').getpid()", on=1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(hpclab.CellError, match=r"rank 1 of 4 on .* was killed by SIGKILL"):
        gang.run("dist.barrier()")
    with hpclab.gang(client, ranks=2, oversubscribe=True) as another:
        assert another.run("ranks") == {0: "2", 1: "2"}


def test_two_gangs_at_once(gang, client):
    with hpclab.gang(client, ranks=2, oversubscribe=True) as other:
        other.push(x="other")
        gang.push(x="first")
        interrupted(other, "dist.recv(torch.ones(1), src=1 - rank)")
        assert (gang.run("x, ranks")[0], other.run("x, ranks")[0]) == ("('first', 4)", "('other', 2)")
        assert works(gang)
    assert works(gang)


def test_the_rules_of_launch_hold(client, tmp_path):
    with pytest.raises(ValueError, match="oversubscribe"):
        hpclab.gang(client, ranks=1000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="already holds something"):
        hpclab.gang(client, ranks=1, folder=tmp_path / "full")
    with hpclab.gang(client, ranks=1, memory="300MB", folder=tmp_path / "new") as gang:
        with pytest.raises(hpclab.CellError, match=r"300,000,000 bytes of memory; gang\(memory=...\) sets it"):
            gang.run("torch.ones(10**9)")
        assert gang.run("1")[0] == "1"
    assert (tmp_path / "new" / "rows.jsonl").exists()


def test_close_leaves_nothing_whatever_goes_on(client):
    with hpclab.gang(client, ranks=2, oversubscribe=True) as gang:
        gang.run("import hpclab, subprocess\nsubprocess.Popen(['sleep', '1000'])\nhpclab.should_stop()")
        pids = ranks_alive()
        assert len(pids) == 2
        started = [child for pid in pids for child in psutil.Process(pid).children()]
        assert len(started) == 2
        gang.close()
    assert no_rank_left()
    assert not psutil.wait_procs(started, timeout=30)[1]
    with pytest.raises(hpclab.CellError, match=r"was closed.*makes a new one"):
        gang.run("1")


def test_the_clients_end_is_the_gangs():
    with hpclab.connect(workers=1) as client:
        gang = hpclab.gang(client, ranks=1)
    assert no_rank_left()
    with pytest.raises(hpclab.CellError, match="makes a new one"):
        gang.run("1")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A real kernel, in which a gang of four is open."""
    manager, client = start_new_kernel(cwd=str(tmp_path_factory.mktemp("kernel")))
    try:
        notebook = Notebook(manager, client)
        notebook("import os, hpclab\nclient = hpclab.connect(workers=2)")
        notebook("gang = hpclab.gang(client, ranks=4, oversubscribe=True)")
        yield notebook
        notebook("client.close()")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert no_rank_left()


class Notebook:
    """Runs cells in a kernel, and gathers what they show."""

    def __init__(self, manager, client):
        self.manager, self.client = manager, client

    def __call__(self, code, until=None):
        """Run a cell, interrupted once it has printed `until`; its prints, value and error."""
        cell, shown = self.client.execute(code), {"prints": "", "value": None, "error": None}
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != cell:
                continue
            content = message["content"]
            match message["msg_type"]:
                case "stream":
                    shown["prints"] += content["text"]
                    if until and until in shown["prints"]:
                        self.manager.interrupt_kernel()
                        until = None
                case "execute_result":
                    shown["value"] = content["data"]["text/plain"]
                case "error":
                    shown["error"] = content["ename"], "\n".join(content["traceback"])
                case "status" if content["execution_state"] == "idle":
                    return shown


def test_cells_in_a_kernel(kernel):
    assert kernel("%%ranks\nx = rank\nprint('hello')") == {
        "prints": "[ranks 0-3] hello\n",
        "value": None,
        "error": None,
    }
    assert kernel("%%ranks --on 1,3\nx")["value"] == "[rank 1] 1\n[rank 3] 3"
    assert kernel("import sys; 'torch' in sys.modules")["value"] == "False"


def test_magics_around_the_ranks_and_inside(kernel):
    assert kernel("%%ranks\n%%time\nrank * 0")["value"] == "[ranks 0-3] 0"
    outside = kernel("%%time\n%%ranks\n!echo seen\nrank * 0")
    assert outside["value"] == "[ranks 0-3] 0" and "Wall time" in outside["prints"]
    assert "seen\n" in outside["prints"]


def test_an_error_in_a_kernel_is_no_wall(kernel):
    kernel("before = len(In) - 1")
    name, shown = kernel("%%ranks\nif rank == 1:\n    1 / 0")["error"]
    assert f"<ranks cell {int(kernel('before')['value']) + 1}>, line 3" in shown.replace('"', "")
    assert name == "CellError"
    assert shown.startswith("CellError: [rank 1]\nTraceback") and shown.endswith("ZeroDivisionError: division by zero")
    assert len(shown.splitlines()) < 8


def test_a_name_of_the_notebook_is_told_from_one_of_the_ranks(kernel):
    kernel("here = 3")
    shown = kernel("%%ranks\nhere + 1")["error"][1]
    assert shown.endswith("here is defined in the notebook, not on the ranks: gang.push(here=here)")
    assert "gang.push" not in kernel("%%ranks\nnowhere + 1")["error"][1]
    kernel("gang.push(here=here)")
    assert kernel("%%ranks\nhere + 1")["value"] == "[ranks 0-3] 4"


def test_options_are_told(kernel):
    assert kernel("%%ranks --off 1\nx")["prints"].endswith(
        "the only option is --on with ranks, as in: %%ranks --on 0,2\n"
    )
    assert kernel("%%ranks --on 9\nx")["error"][0] == "ValueError"


def test_a_kernels_interrupt_leaves_a_deadlock(kernel):
    kernel("%%ranks\nkept = rank")
    name, shown = kernel("%%ranks\nprint('deadlock')\nif rank:\n    dist.barrier()", until="deadlock")["error"]
    assert name == "CellInterrupt"
    assert re.search(r"\[ranks 1-3\] was in <ranks cell \d+>, line 4: dist.barrier\(\)$", shown)
    assert "[rank 0] had ended" in shown and len(shown.splitlines()) == 3
    assert kernel("%%ranks\nt = torch.ones(1)\ndist.all_reduce(t)\nt.item(), kept")["value"].startswith(
        "[rank 0] (4.0, 0)\n"
    )


def test_the_kernel_outlives_its_ranks(kernel):
    before = kernel("client.scheduler_info()['id'], os.getpid()")["value"]
    assert "exited with code 7" in kernel("%%ranks --on 2\nimport os\nos._exit(7)")["error"][1]
    assert "makes a new one" in kernel("%%ranks\n1")["error"][1]
    kernel("gang.close()")
    assert "make one: gang = hpclab.gang(client" in kernel("%%ranks\n1")["prints"]
    kernel("gang = hpclab.gang(client, ranks=4, oversubscribe=True)")
    assert kernel("%%ranks\nranks")["value"] == "[ranks 0-3] 4"
    assert kernel("client.scheduler_info()['id'], os.getpid()")["value"] == before
