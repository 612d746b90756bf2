"""Files with the name of a module: nothing is said of them until something fails, and then they are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hpclab
from hpclab import _namesakes

SCRIPT = """
import json, os, sys
import hpclab, distributed, IPython, random, queue, select, signal


def one():
    return 1


def tries(name):
    try:
        with hpclab.connect(workers=1) as client:
            return hpclab.launch(client, one, ranks=1).result()
    except Exception as error:
        return str(error)


if __name__ == "__main__":
    told = {}
    for name in sys.argv[1:]:  # as a notebook's kernel, which has loaded the right ones before it enters its folder
        os.chdir(name)
        sys.path.insert(0, os.getcwd())
        told[name] = tries(name)
        del sys.path[0]
        os.chdir("..")
    print(json.dumps(told))
"""


def test_namesakes_are_found(tmp_path):
    for name in ("random.py", "torch.py", "os.py", "sys.py", "mine.py", "numpy.txt"):
        (tmp_path / name).touch()
    (tmp_path / "queue").mkdir()
    (tmp_path / "select").mkdir()
    (tmp_path / "select" / "__init__.py").touch()
    paths = [str(tmp_path), str(tmp_path / "none"), *sys.path]
    told = _namesakes.blame(None, paths)
    assert [word for word in told.split() if word.startswith(str(tmp_path))] == [
        str(tmp_path / name) for name in ("random.py", "torch.py", "select")
    ]
    assert _namesakes.blame("cannot import name 'Random' from 'random'", paths) == (
        f"{tmp_path}/random.py hides Python's own module random, which may be the cause; rename it."
    )
    assert "the installation's own module torch" in _namesakes.blame("no torch._dynamo", paths)
    assert _namesakes.blame("no torchvision", paths) == ""
    assert _namesakes.blame(None, [*sys.path, str(tmp_path)]) == ""  # what comes later hides nothing


def test_a_namesake_that_breaks_something_is_named(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    for name in ("queue", "signal"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").touch()
    env = os.environ | {"PYTHONPATH": str(Path(hpclab.__file__).parents[1])}
    command = [sys.executable, "script.py", "queue", "signal"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in ("queue", "signal"):
        assert f"{tmp_path}/{name}/{name}.py hides Python's own module {name}, which may be the cause" in told[name]
    assert "__main__" not in told["signal"]


def test_a_namesake_that_breaks_our_import_is_named(tmp_path):
    (tmp_path / "random.py").touch()
    env = os.environ | {"PYTHONPATH": str(Path(hpclab.__file__).parents[1])}
    for command, says in (
        (["-c", "import hpclab; hpclab.machine"], f"\n{tmp_path}/random.py hides Python's own module random"),
        (["-m", "hpclab", "doctor"], f"\n{tmp_path}/random.py hides Python's own module random"),
    ):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 1
        assert says in done.stderr


def test_a_namesake_that_a_rank_meets_is_named(client, tmp_path):
    (tmp_path / "calendar.py").touch()

    def work():
        sys.path.insert(0, str(tmp_path))
        sys.modules.pop("calendar", None)
        import calendar

        return calendar.monthrange(2000, 1)

    with pytest.raises(AttributeError, match="monthrange") as caught:
        hpclab.launch(client, work, ranks=1).result()
    assert f"{tmp_path}/calendar.py hides Python's own module calendar" in "".join(caught.value.__notes__)
