"""How these tests run: two at a time, or alone; skipped nowhere in CI; and what they leave as rows."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require

from hpclab import rows

TESTS = Path(__file__).parent
TIMED = """
import time
import pytest

@pytest.mark.{mark}
@pytest.mark.parametrize("number", range(4))
def test_timed(number):
    begun = time.time()
    time.sleep(0.25)
    with open({log!r}, "a") as log:
        print("{mark}", begun, time.time(), file=log)
"""


def run(folder, *options, **environment):
    """Run the tests of a folder as those of this one are run; what it prints."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "-c",
        TESTS.parent / "pyproject.toml",
    ]
    env = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST")}
    env |= {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])} | environment
    return subprocess.run([*command, *options, folder], env=env, cwd=folder, capture_output=True, text=True).stdout


def test_who_is_alone_has_nobody_beside_it_and_others_have(tmp_path):
    require(os.name == "posix", "locks of files")
    log = tmp_path / "log"
    for name, mark in (("a", "alone"), ("b", "browser"), ("c", "alone"), ("d", "browser")):
        (tmp_path / f"test_{name}.py").write_text(TIMED.format(mark=mark, log=str(log)))
    said = run(tmp_path, "-n", "2")
    assert "16 passed" in said, said
    assert re.search(r"\d  test_a.py\n", said) and re.search(r"4  all 4 files", said), "seconds by file"
    spans = [(mark, float(begun), float(ended)) for mark, begun, ended in map(str.split, log.read_text().splitlines())]
    beside = [
        {one[0], other[0]} for one, other in itertools.combinations(spans, 2) if one[1] < other[2] and other[1] < one[2]
    ]
    assert beside and all(marks == {"browser"} for marks in beside)


def test_an_interrupt_that_escapes_fails_its_test_alone(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it():\n    raise KeyboardInterrupt\ndef test_next(): pass\n")
    said = run(tmp_path, "-n", "2")
    assert "1 failed, 1 passed" in said and "an interrupt escaped from this test" in said, said


@pytest.mark.parametrize("line", ["pytest.skip('why')", "pytest.importorskip('no_such_module')"])
def test_a_skip_is_a_failure_in_ci(tmp_path, line):
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it():\n    {line}\n")
    assert "1 skipped" in run(tmp_path)
    said = run(tmp_path, CI="true")
    assert "1 failed" in said and "CI skips nothing" in said


def test_long_ones_wait_for_make_long_which_keeps_a_row_of_each(tmp_path):
    source = "import pytest\n@pytest.mark.long\ndef test_it(record_property):\n    record_property('measured', '7 s')\n"
    (tmp_path / "test_it.py").write_text(source)
    assert "1 deselected" in run(tmp_path)
    assert "1 passed" in run(tmp_path, "-m", "long or rounds", "--record", "rows.jsonl", HPCLAB_KILLS="25")
    (row,) = rows.read(tmp_path / "rows.jsonl")
    assert (row["kind"], row["outcome"], row["measured"], row["rounds"]) == ("test", "passed", ["7 s"], 25)
    assert (
        row["source"] == "recorded"
        and row["commit"]
        and row["cpus"] >= 1
        and re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
    )
