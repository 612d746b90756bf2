"""Answers that do harm, in forks: each is stopped, told apart, and leaves nothing; the kernel is as it was."""

import os
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ours

from hpclab.course import fork, verdicts
from hpclab.course.check import check
from hpclab.course.checks import cnn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's forks")


def lr(base_lr, base_batch, batch_size, ranks):
    return base_lr * batch_size * ranks / base_batch


def descendants() -> list[int]:
    return sorted(process.pid for process in psutil.Process().children(recursive=True))


def pipes() -> set[str]:
    """All that a check opens here; sockets, event loops and files are the tests' cluster's, whose threads open some."""
    links = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            links.add(os.readlink(f"/proc/self/fd/{number}"))
    return {link for link in links if link.startswith("pipe:")}


@pytest.fixture
def nothing_left():
    """Neither a process, nor a zombie, nor a pipe stays."""
    check("cnn.learning_rate", lr)  # what a first check opens once and for all
    before = descendants(), pipes()
    yield
    assert descendants() == before[0]
    assert pipes() <= before[1]  # one of an earlier test may be closed only now


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setenv("HPCLAB_PATIENCE", "0.3")


def loop(*arguments):
    while True:
        pass


def sleep(*arguments):
    time.sleep(1000)


def chatter(*arguments):
    while True:
        print("still at it " * 20)


def daemons(*arguments):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    os.fork()
    time.sleep(1000)


def deaf(*arguments):
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            continue


@pytest.mark.parametrize("answer", [loop, sleep, chatter, daemons, deaf])
def test_what_never_ends_is_stopped_with_all_it_started(answer, impatient, nothing_left, capsys):
    result = check("cnn.learning_rate", answer)
    assert result.status == "fail" and "didn't end: it was stopped after" in result.message
    assert len(capsys.readouterr().out) <= 2 * fork.PRINTED
    assert ours("time.sleep(1000)") == []


def hoard(*arguments):
    held = []
    while True:
        held.append(bytearray(10**8))


@pytest.mark.parametrize(
    "answer",
    [hoard, lambda *given: np.ones(10**10), lambda *given: torch.ones(10**10), lambda *given: bytearray(10**11)],
)
def test_what_eats_memory_is_stopped(answer, nothing_left):
    result = check("cnn.learning_rate", answer)
    assert result.status == "fail" and "used more memory than it may" in result.message, result


def orphan(*arguments):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    if os.fork():
        os._exit(0)
    time.sleep(1000)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (orphan, "ended its own process"),
        (lambda *given: os._exit(0), "ended its own process"),
        (lambda *given: sys.exit(0), "raised SystemExit: 0"),
        (lambda *given: os.kill(os.getpid(), 15), "crashed its own process: SIGTERM"),
        (lambda *given: os.kill(os.getpid(), 9), "was killed"),
        (lambda *given: os.close(1), "Not answered yet"),
        (lambda *given: [float("x")], "raised ValueError"),
        (7, "The answer must be a function, not 7"),
    ],
)
def test_what_ends_its_process_is_a_verdict(answer, message, nothing_left):
    result = check("cnn.learning_rate", answer)
    assert result.status == "fail" and message in result.message, result
    assert ours("time.sleep(1000)") == []


def test_a_long_answer_is_cut_and_arrives(nothing_left):
    for text in ("\0" * 10**6, "长" * 10**6, "\ud83d" * 10**6, "🦜" * 10**6):

        def fails(*given, text=text):
            raise ValueError(text)

        message = check("cnn.learning_rate", fails).message
        assert message.startswith("Your function raised ValueError: ") and message.endswith("...")
        assert len(message) == fork.CHARACTERS


class Odd:
    def __float__(self):
        raise RuntimeError("no number, never")


def test_what_is_too_odd_to_look_at_is_a_verdict():
    assert "make sense of what your function gave: RuntimeError" in check("cnn.learning_rate", lambda *g: Odd()).message


def test_prints_are_shown_from_subprocesses_too_and_not_without_end(capsys):
    def answer(*given):
        print("mine")
        subprocess.run(["echo", "its own"], check=True)
        return lr(*given)

    assert check("cnn.learning_rate", answer)
    assert capsys.readouterr().out.startswith("mine\nits own\nmine\n")

    def verbose(*given):
        print("x" * 10**6)
        return lr(*given)

    assert check("cnn.learning_rate", verbose)
    shown = capsys.readouterr().out
    assert len(shown) < fork.PRINTED + 10 and shown.endswith("x ...\n")


def test_neither_its_input_nor_the_kernel_is_changed():
    seen = []

    def mutates(parts, shift, rank, ranks):
        seen.append(rank)
        os.environ["HPCLAB_TRACE"] = "1"
        for part in parts:
            part.zero_()
        return parts[rank]

    before = torch.get_rng_state()
    assert check("ddp-from-scratch.reduce_scatter", mutates).status == "fail"
    assert check("faults.state", (lambda *parts: {}, lambda *parts: 5)).status == "fail"
    assert seen == [] and "HPCLAB_TRACE" not in os.environ
    assert torch.equal(torch.get_rng_state(), before)


def test_torch_that_has_used_its_threads_works_in_a_fork():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        big = torch.ones(500, 500, requires_grad=True)
        (big @ big).relu().sum().backward()

        def trains(*given):
            other = torch.ones(500, 500, requires_grad=True)
            (other @ other).relu().sum().backward()
            return lr(*given)

        assert check("cnn.learning_rate", trains)
    finally:
        torch.set_num_threads(threads)


def test_a_killed_kernel_takes_its_check_along(tmp_path):
    program = textwrap.dedent(
        """
        import os, pathlib, time
        from hpclab.course.check import check
        def answer(*given):
            pathlib.Path("pid").write_text(str(os.getpid()))
            os.rename("pid", "there")
            time.sleep(1000)
        check("cnn.learning_rate", answer)
        """
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fork.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as kernel:
        deadline = time.monotonic() + 120
        while not (tmp_path / "there").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        child = psutil.Process(int((tmp_path / "there").read_text()))
        kernel.kill()
    assert psutil.wait_procs([child], timeout=60)[1] == []


def test_an_interrupt_ends_the_check(nothing_left, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(fork, "_followed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check("cnn.learning_rate", sleep)


def test_where_no_fork_can_be_the_check_runs_in_place(monkeypatch):
    monkeypatch.setattr(fork, "possible", lambda: False)
    seen = []
    assert check("cnn.learning_rate", lambda *given: seen.append(given) or lr(*given))
    assert seen
    assert "used more memory" in check("cnn.learning_rate", lambda *given: bytearray(2**62)).message


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan"])
def test_patience_is_a_number_of_seconds(given, monkeypatch):
    monkeypatch.setenv("HPCLAB_PATIENCE", given)
    with pytest.raises(ValueError, match=rf"HPCLAB_PATIENCE \(={given}\) must be a number of seconds above 0"):
        check("cnn.learning_rate", lr)


def test_the_seed_draws_other_variants_and_the_class_has_one(monkeypatch):
    def drawn():
        return list(cnn._recipes()), verdicts.numpy_dice("x").random(), verdicts.dice("x").random()

    usual = drawn()
    assert drawn() == usual
    monkeypatch.setenv("HPCLAB_SEED", "7")
    other = drawn()
    assert drawn() == other
    assert all(one != two for one, two in zip(usual, other, strict=True))
