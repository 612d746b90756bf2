"""What the README shows is what one can run."""

import re
import subprocess
import sys
from pathlib import Path

import hpclab

ROOT = Path(__file__).parents[1]


def programs(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)


def program(name):
    (found,) = programs(name)
    return re.sub(r" +#.*", "", found)


def test_the_program_runs(tmp_path):
    (tmp_path / "program.py").write_text(program("README.md"))
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.search(r"<Fit 50,186 weights, accuracy 0.[78]\d+", done.stdout)
    assert "not identifiable: 2 different counts" in done.stdout
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_hours_programs_run(tmp_path):
    hello, sweep = programs("docs/first-hour.md")
    done = subprocess.run([sys.executable, "-c", hello], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[3.0, 3.0]\n", done.stderr
    (tmp_path / "sweep.py").write_text(sweep)
    done = subprocess.run([sys.executable, "sweep.py"], capture_output=True, text=True, timeout=240)
    assert "not identifiable: 2 different counts" in done.stdout, done.stderr
    assert (tmp_path / "my-speedup.png").read_bytes().startswith(b"\x89PNG")


def test_the_loop_that_goes_on_does_so_also_after_its_last_step(client):
    loop, draws, shards = programs("docs/going-on.md")
    names = {"__name__": "page"}
    exec(loop + draws + shards, names)
    run = hpclab.launch(client, names["training"], 2, ranks=2)
    first, _ = run.result(60)
    again, _ = hpclab.launch(client, names["training"], 2, ranks=2, resume=run.folder).result(60)
    assert first.keys() == again.keys() and all(first[name].equal(again[name]) for name in first)
    run = hpclab.launch(client, names["draws"], 3, ranks=2)
    run.result(60)
    assert hpclab.launch(client, names["draws"], 4, ranks=2, resume=run.folder).result(60) == [None, None]


def test_the_chinese_program_is_its_beginning():
    assert program("README.md").startswith(program("README.zh-CN.md").rstrip())
