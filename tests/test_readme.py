"""What the README shows is what one can run."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def program(name):
    (found,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)
    return re.sub(r" +#.*", "", found)


def test_the_program_runs(tmp_path):
    head, body = program("README.md").split("\n\n", 1)
    (tmp_path / "program.py").write_text(f"{head}\nif __name__ == '__main__':\n{textwrap.indent(body, '    ')}")
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.search(r"<Fit 50,186 weights, accuracy 0.[78]\d+", done.stdout)
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_the_chinese_program_is_its_beginning():
    assert program("README.md").startswith(program("README.zh-CN.md").rstrip())
