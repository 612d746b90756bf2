"""What the README shows is what one can run."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_program_runs(tmp_path, name):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)
    head, body = program.split("\n\n", 1)
    (tmp_path / "program.py").write_text(
        f"{head}\nif __name__ == '__main__':\n{textwrap.indent(body, '    ')}", "utf-8"
    )
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.search(r"<Fit 50,186 weights, accuracy 0.[78]\d+", done.stdout)
