"""A class's notebooks, good and bad, graded for real: in fresh kernels, in bubblewrap, under limits."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from conftest import ours, require
from pipeline import build

import hpclab
from hpclab import cli, slurm
from hpclab.course import grading, submissions
from hpclab.course import sandbox as _sandbox
from hpclab.course.submissions import Unreadable

ROOT = Path(hpclab.__file__).parents[1]
RIGHT = "def scaled_lr(base_lr, base_batch, batch_size, ranks):\n    return base_lr * batch_size * ranks / base_batch"
WRONG = "def scaled_lr(base_lr, base_batch, batch_size, ranks):\n    return base_lr"
CHECK = 'hpclab.check("cnn.learning_rate", scaled_lr)'


@pytest.fixture(scope="module", autouse=True)
def _linux():
    if sys.platform != "linux":
        pytest.skip("needs Linux")


@pytest.fixture
def sandbox():
    require(_sandbox.missing() is None, f"a sandbox: {_sandbox.missing()}")


def notebook(*codes, check=CHECK) -> str:
    """A notebook with a cell that imports, cells of the student's, and a check cell unless that is gone."""
    new = nbformat.v4.new_code_cell
    cells = [new("import hpclab", id="setup"), *(new(code, id=f"cell-{n}") for n, code in enumerate(codes))]
    if check:
        metadata = {"grade_id": "rate-check", "grade": True, "solution": False, "locked": True, "points": 1}
        cells.append(new(check, id="rate-check", metadata={"nbgrader": metadata}))
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells))


@pytest.fixture
def course(tmp_path):
    folder = tmp_path / "course"
    folder.mkdir()
    (folder / "rate.ipynb").write_text(notebook("def scaled_lr(*given): ..."))
    return folder


def handed_in(folder: Path, **codes: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in codes.items():
        (folder / f"{name}.ipynb").write_text(text)
    return folder


def graded(folder, course, **settings) -> dict[str, tuple[str, float, str]]:
    """Verdict, points and reason by submission; no process and no folder stays."""
    folders = set(Path("/tmp").glob("hpclab-grade-*"))
    rows = grading.grade(folder, course=course, **settings)
    assert set(Path("/tmp").glob("hpclab-grade-*")) <= folders
    assert ours("ipykernel_launcher") == []
    return {Path(row["submission"]).stem: (row["verdict"], row["points"], row["reason"]) for row in rows}


SPY = """
import os, socket
seen = []
for way in ({ways}):
    try:
        seen.append(way())
    except OSError as error:
        seen.append(type(error).__name__)
print(seen)
assert all(isinstance(one, str) and one.endswith("Error") for one in seen), seen
"""


def test_a_class_is_graded_and_each_is_told_apart(tmp_path, course, sandbox, monkeypatch):
    monkeypatch.setenv("HPCLAB_PATIENCE", "2")
    monkeypatch.setenv("TEACHERS_SECRET", "s3cret")
    (tmp_path / "secret").write_text("marks")
    folder = tmp_path / "class"
    ways = ", ".join(
        f"lambda: {way}"
        for way in (
            "open('../right0.ipynb').read()",
            f"open({str(folder / 'right0.ipynb')!r}).read()",
            f"open({str(tmp_path / 'secret')!r}).read()",
            f"os.listdir({str(ROOT / 'notebooks')!r})",
            f"os.listdir({str(ROOT / 'tests')!r})",
            f"open({hpclab.__file__!r}, 'a')",
            "open('/etc/hosts', 'a')",
            "open('/etc/shadow').read()",
            "socket.create_connection(('192.0.2.1', 80), 5)",
        )
    )
    handed_in(
        folder,
        **{f"right{number}": notebook(RIGHT) for number in range(3)},
        **{f"wrong{number}": notebook(WRONG) for number in range(2)},
        stub=notebook("def scaled_lr(*given): ..."),
        loops=notebook("def scaled_lr(*given):\n    while True: pass"),
        hoards=notebook("import numpy\nheld = numpy.ones(10**10)", RIGHT),
        hoards_together=notebook(
            "import os, time\nfor rank in range(6):\n    if os.fork() == 0:\n        held = b'x' * 4 * 10**8\n"
            "        time.sleep(1000)\ntime.sleep(1000)"
        ),
        prints=notebook("import time\nwhile time.sleep(0.001) is None: print('x' * 10**5)", RIGHT),
        bomb=notebook("import os, time\nwhile True:\n    if os.fork() == 0:\n        time.sleep(1000)", RIGHT),
        killed=notebook(RIGHT, "import os\nos.kill(os.getpid(), 9)"),
        leaves=notebook("import sys\nsys.exit(3)", RIGHT),
        deleted=notebook(),
        unchecked=notebook(RIGHT, check=None),
        forged=notebook("def scaled_lr(*given): return 0", check="print('✓ pass: One large step')"),
        patched=notebook("def scaled_lr(*given): return 0\nhpclab.check = lambda *given: print('pass') or True"),
        raises=notebook("1 / 0", "x = [", RIGHT),
        spies=notebook(SPY.format(ways=ways), RIGHT),
        environment=notebook("import os\nassert 'TEACHERS_SECRET' not in os.environ and os.getuid() != 0", RIGHT),
        broken="{'cells': ",
        a_list="[1, 2]",
    )
    (folder / "essay.txt").write_text("I have no notebook.")
    (folder / "link.ipynb").symlink_to(tmp_path / "secret")
    found = graded(folder, course, time_s=60, memory=15 * 10**8)
    assert len(found) == 24
    for name, (verdict, says) in {
        **{f"right{number}": ("pass", "moves the weights as far") for number in range(3)},
        **{f"wrong{number}": ("fail", "Unscaled") for number in range(2)},
        "stub": ("fail", "Not answered yet"),
        "loops": ("fail", "didn't end"),
        "hoards": ("pass", "cell 2 raised MemoryError"),
        "hoards_together": ("not reached", "more than 1.5 GB of memory"),
        "prints": ("not reached", "printed more than 20 MB"),
        "bomb": ("not reached", "more than 128 processes"),
        "killed": ("not reached", "its kernel died"),
        "leaves": ("pass", "raised SystemExit: 3"),
        "deleted": ("fail", "scaled_lr isn't defined"),
        "unchecked": ("pass", "as far"),
        "forged": ("fail", "0 times as far"),
        "patched": ("fail", "0 times as far"),
        "raises": ("pass", "cell 2 raised ZeroDivisionError: division by zero"),
        "spies": ("pass", "as far"),
        "environment": ("pass", "as far"),
        "broken": ("not reached", "a broken one"),
        "a_list": ("not reached", "a broken one"),
        "essay": ("not reached", "doesn't end in .ipynb"),
        "link": ("not reached", "it is a link"),
    }.items():
        assert found[name][0] == verdict and says in found[name][2], (name, found[name])
        assert found[name][1] == (verdict == "pass"), name
    assert "raised" not in found["spies"][2] + found["environment"][2]  # whatever they tried failed as it should
    assert (folder / "right0.ipynb").read_text() == notebook(RIGHT)


def test_a_notebook_that_never_ends_is_stopped_and_the_next_one_graded(tmp_path, course, sandbox):
    folder = handed_in(tmp_path / "class", a=notebook("while True: pass", RIGHT), b="{}")
    found = graded(folder, course, time_s=3)
    assert found["a"] == ("not reached", 0, "stopped: it took more than 3 s")
    assert found["b"][0] == "not reached"


def test_what_could_not_be_told_earns_what_the_teacher_says(tmp_path, sandbox):
    """A check of this course that needs a Slurm, which is not in the sandbox's way of looking for programs."""
    course = handed_in(tmp_path / "course", q=notebook(check='hpclab.check("queues.backfill", "--time=1")'))
    hide = "import os\nos.environ['PATH'] = '/nowhere'"
    folder = handed_in(tmp_path / "class", q=notebook(hide, check=None))
    found = graded(folder, course, inconclusive=0.5)["q"]
    assert found[:2] == ("inconclusive", 0.5) and "This needs Slurm" in found[2]


def test_dask_works_on_the_sandboxs_loopback(tmp_path, course, sandbox):
    training = """
import torch, torch.distributed as dist
def total():
    value = torch.ones(1)
    dist.all_reduce(value)
    return value.item()
with hpclab.connect(workers=2) as client:
    assert hpclab.launch(client, total, ranks=2, oversubscribe=True).result() == [2.0, 2.0]
"""
    folder = handed_in(tmp_path / "class", rate=notebook(training, RIGHT))
    found = graded(folder, course)["rate"]
    assert found[0] == "pass" and "raised" not in found[2], found


def test_the_command_prints_a_table_and_writes_what_no_spreadsheet_obeys(tmp_path, course, sandbox, capsys):
    folder = tmp_path / "class"
    handed_in(folder / "=ann", rate=notebook(RIGHT))
    handed_in(folder / "ben" / ".ipynb_checkpoints", rate=notebook(RIGHT))
    handed_in(folder / "ben" / "homework", rate=notebook("raise ValueError('\\x1b[31m\\x07red')", WRONG))
    (folder / "cem").mkdir()
    (folder / "cem" / "rate.docx").write_text("")
    file = folder / "marks.csv"
    for _again in range(2):  # its own file isn't handed in
        arguments = [
            "grade",
            str(folder),
            "--csv",
            str(file),
            "--course",
            str(course),
            "--seed",
            "5",
            "--memory",
            "2GB",
        ]
        assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "ben/homework/rate.ipynb  cnn.learning_rate  fail" in shown and "\x1b" not in shown and "\x07" not in shown
    assert re.search(r"=ann/rate.ipynb +1 +1", shown)
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["submission"] for row in rows] == ["'=ann/rate.ipynb", "ben/homework/rate.ipynb", "cem/rate.docx"]
    assert [(row["verdict"], row["points"]) for row in rows] == [
        ("pass", "1.0"),
        ("fail", "0.0"),
        ("not reached", "0.0"),
    ]
    assert "cell 2 raised ValueError" in rows[1]["reason"] and file.stat().st_mode & 0o077 == 0


def test_an_interrupted_grading_leaves_nothing(tmp_path, course, sandbox):
    folder = handed_in(tmp_path / "class", rate=notebook("print(1)", "import time\ntime.sleep(1000)"))
    folders = set(Path("/tmp").glob("hpclab-grade-*"))
    command = [sys.executable, "-m", "hpclab", "grade", str(folder), "--course", str(course)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 200
        while not (kernels := ours("ipykernel_launcher")) and time.monotonic() < deadline:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        assert "interrupted" in running.communicate(timeout=200)[1]
    assert running.returncode == 130 and kernels
    assert ours("ipykernel_launcher") == []
    assert set(Path("/tmp").glob("hpclab-grade-*")) <= folders


def test_without_bubblewrap_it_refuses_unless_trusted(tmp_path, course, monkeypatch, capsys):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "bwrap" else which(name))
    monkeypatch.setenv("HPCLAB_PATIENCE", "20")
    folder = handed_in(tmp_path / "class", rate=notebook("import os\nos.fork() or os.setsid()", RIGHT))
    assert cli.main(["grade", str(folder), "--course", str(course)]) == 1
    told = capsys.readouterr().err
    assert "bubblewrap is missing; apt install bubblewrap" in told and "--trust" in told
    helped = notebook("from mine import scaled_lr", "import subprocess\nkept = subprocess.Popen(['sleep', '1000'])")
    ann = handed_in(tmp_path / "trusted" / "ann" / "week 1", rate=helped)
    (ann / "mine.py").write_text(RIGHT)
    found = graded(tmp_path / "trusted", course, trust=True)
    assert found["rate"][0] == "pass", found
    assert ours("sleep") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": "none"}, r"folder \(=.*none\) isn't a folder"),
        ({"folder": "empty"}, "holds nothing to grade"),
        ({"inconclusive": 2.0}, r"inconclusive \(=2\) must be from 0 to 1"),
        ({"time_s": 0.0}, r"time_s \(=0\) and memory"),
        ({"course": "empty"}, r"course \(=.*empty\) has no notebook with a cell that calls hpclab.check"),
    ],
)
def test_what_can_not_be_graded_says_why(tmp_path, course, settings, message):
    handed_in(tmp_path / "class", rate=notebook(RIGHT))
    (tmp_path / "empty").mkdir()
    given = {"folder": "class", "course": str(course)} | settings
    with pytest.raises(ValueError, match=message):
        grading.grade(given.pop("folder"), **given)


@pytest.mark.parametrize("variable", ["HPCLAB_PATIENCE", "HPCLAB_LANG"])
def test_what_would_fail_all_students_is_the_teachers_to_mend(tmp_path, course, monkeypatch, variable):
    folder = handed_in(tmp_path / "class", rate=notebook(RIGHT))
    other = handed_in(tmp_path / "other", rate=notebook(check="hpclab.check('cnn.of_mine', 1)"))
    with pytest.raises(
        ValueError, match=r"rate.ipynb checks 'cnn.of_mine', which isn't an exercise; .* cnn.learning_rate"
    ):
        grading.grade(folder, course=other, trust=True)
    monkeypatch.setenv(variable, "soon")
    with pytest.raises(ValueError, match=rf"{variable} \(=soon\)"):
        grading.grade(folder, course=course, trust=True)


def test_every_notebook_of_the_course_has_checks_that_are_found():
    """Each exercise is checked by one notebook, and its answer is read from the check cell."""
    from hpclab.course import checks

    steps = [step for one in submissions.assignments(ROOT / "notebooks") for step in one.checks.values()]
    assert sorted(step.exercise for step in steps) == checks.ids()
    assert {step.answer for step in steps} >= {"largest_gang", "(pack, unpack)"}
    assert {step.points for step in steps if ".quiz_" in step.exercise} == {1}
    assert {step.points for step in steps if step.exercise in ("start.gang", "cnn.order")} == {2}


def test_points_weigh_as_the_courses_own_check_says(tmp_path, course):
    file = course / "rate.ipynb"
    file.write_text(file.read_text().replace('"points": 1', '"points": 3'))
    folder = handed_in(tmp_path / "class", ann=notebook(RIGHT), ben=notebook(WRONG))
    rows = grading.grade(folder, course=course, trust=True)
    assert [(row["points"], row["of"]) for row in rows] == [(3, 3), (0, 3)]
    assert [(row["points"], row["of"]) for row in grading.totals(rows)] == [(3, 3), (0, 3)]


def test_a_renamed_notebook_is_known_by_its_cells(tmp_path):
    course = submissions.assignments(ROOT / "notebooks")
    path = tmp_path / "ann.ipynb"
    shutil.copy(ROOT / "notebooks" / "03_cnn.ipynb", path)
    assert submissions.began_as(path, submissions.read(path), course).stem == "03_cnn"
    with pytest.raises(Unreadable, match="isn't one of the course's notebooks"):
        submissions.began_as(path, nbformat.reads(notebook(check=None), 4), course)


def cells(*codes) -> dict:
    """A notebook of cells of code, each given with its id, and with the course's metadata if it is the check."""
    new = nbformat.v4.new_code_cell
    made = [
        new(code, id=f"cell-{n}", metadata={"nbgrader": {"grade_id": name}}) for n, (name, code) in enumerate(codes)
    ]
    return nbformat.v4.new_notebook(cells=made)


def plan(course, *codes) -> list[tuple]:
    (one,) = submissions.assignments(course)
    steps = submissions.steps(cells(*codes), one)
    return [(step.cell, step.code, step.answer, step.copies, step.changed) for step in steps]


def test_the_last_copy_of_a_check_counts_and_gives_way_to_the_courses(course):
    ours = (1, False)
    assert plan(course, ("rate-check", CHECK), ("", "x = 1")) == [(1, "", "scaled_lr", *ours), (2, "x = 1", "", *ours)]
    assert plan(course, ("", "x = 1")) == [(1, "x = 1", "", *ours), (2, "", "scaled_lr", *ours)]
    # Copied with its id, typed anew with another, moved to the front: the last one's place counts.
    for first, second in (("rate-check", "rate-check"), ("", "rate-check"), ("rate-check", ""), ("", "")):
        steps = plan(course, (first, CHECK), ("", "x = 1"), (second, CHECK), ("", "x = 2"))
        assert [step[:3] for step in steps if step[1] or step[2]] == [
            (2, "x = 1", ""),
            (3, "", "scaled_lr"),
            (4, "x = 2", ""),
        ]
        assert [step[3:] for step in steps if step[2] and step[0] == 3] == [(2, False)]
    # What a student wrote into it is run, and said; what it asks for is the course's.
    (own, check) = plan(course, ("rate-check", f"{WRONG}\nhpclab.check('cnn.learning_rate', lambda *given: 1)"))
    assert own[1].startswith("def scaled_lr") and "check" not in own[1] and check == (1, "", "scaled_lr", 1, True)
    assert plan(course, ("rate-check", "print('pass')"))[0][1] == "print('pass')"
    assert plan(course, ("rate-check", f"{CHECK}  # mine"))[0] == (1, "", "scaled_lr", 1, False)
    for odd in ("check\0", f"check({'-' * 15_000}1)", f"check{'.a' * 9_000}", "%%time\ncheck", f"#{'check' * 10_000}"):
        assert plan(course, ("", odd))[0][1] == odd


def test_a_notebook_under_anothers_name_is_known_by_its_checks(tmp_path):
    course = submissions.assignments(ROOT / "notebooks")
    path = Path(shutil.copy(ROOT / "notebooks" / "03_cnn.ipynb", tmp_path / "05_dask.ipynb"))
    assert submissions.began_as(path, submissions.read(path), course).stem == "03_cnn"
    assert submissions.began_as(path, cells(("", "1")), course).stem == "05_dask"


def test_no_cell_of_the_marks_begins_a_formula_and_no_two_names_become_one(tmp_path):
    names = [
        "=1",
        " @a",
        "a;=1",
        "a\n;\t+1",
        "\t-1",
        "＝1",
        "a\udcff",
        "a\udcfe",
        "a\\udcff",
        "a\x1b[1m",
        "n" * 300,
        "n" * 301,
    ]
    rows = [
        {"submission": grading._name(name), "exercise": "e", "verdict": "fail", "points": 0.5, "of": 1}
        for name in names
    ]
    grading.write(
        [row | {"reason": f"=1; {name}".replace("\udcff", "")} for row, name in zip(rows, names, strict=True)][:6],
        tmp_path / "m.csv",
    )
    with (tmp_path / "m.csv").open(newline="", encoding="utf-8") as file:
        values = [value for row in csv.reader(file) for value in row]
    assert len(values) == 7 * 6 and not [
        part for value in values for part in value.split(";") if part.lstrip()[:1] in "=+-@＝"
    ]
    assert len(grading.totals(rows)) == len(names) and all(row["submission"].isprintable() for row in rows)


@pytest.fixture
def deep(tmp_path):
    """A folder in which folders lie deeper than Python's stack, and in the end than any path may be."""
    made = handed_in(tmp_path / "class" / "deep", rate=notebook(RIGHT))
    for _level in range(1500):
        os.mkdir("in")
        os.chdir("in")
    os.chdir(tmp_path)
    os.rename("in", made / "in")
    yield made
    subprocess.run(["rm", "-r", made / "in"], check=True)  # pytest couldn't


def test_a_students_folder_is_found_however_deep_and_large_it_is(tmp_path, course, deep):
    (deep / "photos").mkdir()
    for number in range(submissions.MOST_BESIDE[0]):
        (deep / "photos" / f"{number}.png").touch()
    found = list(submissions.handed_in(tmp_path / "class", submissions.assignments(course)))
    assert [name for name, _path in found] == ["deep/rate.ipynb"]
    with (tmp_path / "tar").open("w+b") as archive:
        left = submissions.beside(found[0][1], tmp_path / "class", archive)
        with tarfile.open(fileobj=archive) as tar:
            names = tar.getnames()
    assert left[0] == "photos/999.png" and left[1].startswith("in/in") and len(left) == 2
    assert "rate.ipynb" in names and len(names) == submissions.MOST_BESIDE[0]
    with pytest.raises(Unreadable, match=r"it can't be read \(File name too long"):
        submissions.read(deep / left[1])


def test_no_notebook_is_given_what_lies_beside_anothers(tmp_path):
    """Where the first folder is a week's or a course's, and a student's only the next."""
    for name in ("week/ann/hw/rate", "week/bob/rate", "cem/rate", "cem/later/more"):
        handed_in(tmp_path / Path(name).parent, **{Path(name).name: notebook(RIGHT)})
    for name in ("week/ann/data.csv", "week/ann/lib/a.py", "week/bob/b.py", "week/all.csv", "cem/later/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name, wanted in {
        "week/ann/hw/rate.ipynb": ["ann/data.csv", "ann/hw/rate.ipynb", "ann/lib/a.py"],
        "week/bob/rate.ipynb": ["bob/b.py", "bob/rate.ipynb"],
        "cem/rate.ipynb": ["later/c.py", "later/more.ipynb", "rate.ipynb"],
        "cem/later/more.ipynb": ["later/c.py", "later/more.ipynb"],
    }.items():
        with tempfile.TemporaryFile() as archive:
            assert submissions.beside(tmp_path / name, tmp_path, archive) == []
            with tarfile.open(fileobj=archive) as tar:
                assert sorted(tar.getnames()) == wanted, name


def test_no_link_leads_from_one_students_folder_to_anothers(tmp_path):
    """As when somebody puts one where a folder was when the class's notebooks were looked for."""
    bob = handed_in(tmp_path / "bob", rate=notebook(RIGHT))
    (bob / "torch.py").touch()
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "week").symlink_to(bob)
    path = tmp_path / "ann" / "week" / "rate.ipynb"
    with pytest.raises(Unreadable, match=r"it can't be read \(Not a directory"):
        submissions.read(path, tmp_path)
    with pytest.raises(Unreadable, match="its folder can't be read"):
        submissions.hiding(path, tmp_path)
    assert submissions.read(bob / "rate.ipynb", tmp_path)["cells"]
    assert submissions.hiding(bob / "rate.ipynb", tmp_path) == ["torch.py"]


@pytest.mark.parametrize("kind", ["RLIMIT_FSIZE", "RLIMIT_NOFILE"])
def test_what_the_graders_machine_lacks_is_no_students_fault(tmp_path, course, kind):
    import resource

    folder = handed_in(tmp_path / "class", a="{}", b=notebook(RIGHT))
    before = resource.getrlimit(getattr(resource, kind))

    def lower(row):
        """After the first notebook: as good as no room for a file, and no descriptor more."""
        os.close(free := os.open(os.devnull, os.O_RDONLY))
        resource.setrlimit(getattr(resource, kind), (free, before[1]))

    try:
        with pytest.raises(OSError, match=r"b.ipynb can't be graded here, and no student is to blame"):
            grading.grade(folder, course=course, trust=True, told=lower)
    finally:
        resource.setrlimit(getattr(resource, kind), before)


def test_what_only_a_student_can_have_put_among_the_sockets_counts_as_too_much(tmp_path):
    folder = tmp_path / "sockets"
    folder.mkdir()
    kernel = _sandbox.Kernel(None, None, folder, 10**9, home=str(folder / "home"))
    (folder / "home").mkdir()
    (folder / "kernel.json").write_text("{}")
    assert kernel.stray() == 2
    (folder / "more").mkdir()
    assert kernel.stray() == float("inf")
    shutil.rmtree(folder)
    assert kernel.stray() == float("inf")


def test_a_place_too_long_for_a_socket_is_named(tmp_path, course, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as where there is no /tmp
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 80)))
    with pytest.raises(OSError, match=r"TMPDIR \(=.*x\) has \d+ bytes"):
        grading.grade(handed_in(tmp_path / "class", rate=notebook(RIGHT)), course=course, trust=True)


def test_what_students_hand_in_beside_a_notebook_is_there_and_nothing_else_is(
    tmp_path, course, sandbox, monkeypatch, caplog
):
    """And what is odd about one submission is no reason to stop the class."""
    monkeypatch.setenv("HPCLAB_PATIENCE", "10")
    folder = tmp_path / "class"
    (tmp_path / "secret").write_text("marks")
    ann = handed_in(folder / "ann" / "homework", rate=notebook(HELPED)).parent
    for name, text in {
        "homework/mymodel.py": RIGHT,
        "homework/sub/größe.csv": "1,2",
        "up.txt": "3",
        ".netrc": "4",
    }.items():
        (ann / name).parent.mkdir(exist_ok=True)
        (ann / name).write_text(text)
    (ann / "homework" / "link.txt").symlink_to(tmp_path / "secret")
    (ann / "homework" / "all").symlink_to(tmp_path)
    os.mkfifo(ann / "homework" / "pipe")
    bob = handed_in(folder / "bob", rate=notebook(f"{RIGHT} * __import__('torch').ones(1)"))
    (bob / "torch.py").write_text("raise ImportError('not the real one')")
    with (bob / "film.avi").open("wb") as large:
        large.truncate(submissions.LARGEST + 1)
    odd = json.loads(notebook(RIGHT, "x = 'HALF'\nraise ValueError('\\ud800 \\n \\udc80')", f"{WRONG}\n{CHECK}"))
    for cell in odd["cells"]:
        del cell["outputs"], cell["execution_count"]
    strange = handed_in(folder / "\udcff\n=1")
    (strange / "rate.ipynb").write_bytes(b"\xef\xbb\xbf" + json.dumps(odd).replace("HALF", "\\ud800").encode())
    handed_in(folder / "forges", rate=notebook(RIGHT, "get_ipython().user_expressions = lambda *given: ['x']"))
    garbage = "get_ipython().kernel.iopub_socket.send_multipart([b'<IDS|MSG>', b'a', b'b', b'c', b'd', b'e'])"
    handed_in(folder, sends=notebook(RIGHT, "ls = !ls\nassert not ls, ls", garbage, "import time\ntime.sleep(9)"))
    (folder / "empty").mkdir()
    handed_in(folder / "none", rate="")
    rows = {row["submission"]: row for row in grading.grade(folder, course=course, time_s=120)}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "ann/homework/rate.ipynb": "pass",
        "bob/rate.ipynb": "fail",
        "empty": "not reached",
        "forges/rate.ipynb": "fail",
        "none/rate.ipynb": "not reached",
        "sends.ipynb": "not reached",
        "\\udcff\\n=1/rate.ipynb": "fail",
    }, rows
    for name, says in {
        "ann/homework/rate.ipynb": "One large step",
        "bob/rate.ipynb": "(torch.py beside the notebook has a module's name, and may hide it; film.avi wasn't copied",
        "empty": "not graded: its folder holds no file",
        "forges/rate.ipynb": "Its kernel gave no verdict: does the notebook change the checks?",
        "none/rate.ipynb": "not graded: it is empty",
        "sends.ipynb": "not graded: ValueError: Invalid Signature",
        "\\udcff\\n=1/rate.ipynb": "(the last of 2 copies of this check counts",
    }.items():
        assert rows[name]["reason"].startswith(says), rows[name]
    assert "raised" not in rows["ann/homework/rate.ipynb"]["reason"]
    assert "JSON" not in caplog.text  # where nbformat would quote what is in a notebook
    assert (tmp_path / "secret").read_text() == "marks" and (ann / "up.txt").read_text() == "3"


HELPED = """
import os
from mymodel import scaled_lr
assert open("sub/größe.csv").read() == "1,2" and sorted(os.listdir()) == ["mymodel.py", "rate.ipynb", "sub"]
assert not {"mymodel.py", "link.txt", "secret", ".netrc"} & set(os.listdir("..")) and os.path.exists("../up.txt")
for file in ("../up.txt", "mymodel.py", "rate.ipynb"):  # they are the student's own
    with open(file, "a") as opened:
        opened.write(" ")
import fcntl, stat
private = {os.stat(folder).st_dev for folder in (os.environ["HOME"], "/tmp", "/dev/shm")}
for number in map(int, os.listdir("/proc/self/fd")):
    try:
        status, flags = os.fstat(number), fcntl.fcntl(number, fcntl.F_GETFL)
    except OSError:  # the listing's own
        continue
    read_only = flags & os.O_ACCMODE == os.O_RDONLY and not os.access(f"/proc/self/fd/{number}", os.W_OK)
    assert read_only or not stat.S_ISREG(status.st_mode) or status.st_dev in private, number
"""


LOOK = """
import os, pwd, sites_own
assert os.getuid() == pwd.getpwnam("student").pw_uid
for folder in [{places}, "/etc", "/etc/ssl", "/home", "/var", "/usr", "/proc", "/dev", "/sys", "/run", "/tmp"]:
    os.listdir(folder)
for file in ("/etc/passwd", "/etc/group", "/etc/hosts", "/etc/nsswitch.conf"):
    assert open(file).read(), file
closed = []
for top, inner, files in os.walk("/"):
    closed += [top] * (not os.access(top, os.R_OK | os.X_OK))
    inner[:] = [name for name in inner if not os.path.ismount(os.path.join(top, name))]
print(closed)
"""


def test_no_folder_of_the_sandbox_is_closed_to_whom_it_is_for(tmp_path, sandbox, monkeypatch):
    """Also not above packages in /tmp, which a site's PYTHONPATH names, and whatever the teacher's umask is."""
    there = tmp_path / "site" / "site-packages"
    there.mkdir(parents=True)
    (there / "sites_own.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{there}")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(there)])
    umask = os.umask(0o077)
    try:
        with _sandbox._folder() as folder:
            line = [*_sandbox.wrapped(folder, []), sys.executable, "-c", LOOK.format(places=repr(str(there)))]
            done = subprocess.run(line, capture_output=True, text=True, env=_sandbox._environment(_sandbox.HOME))
    finally:
        os.umask(umask)
    assert done.stdout == "[]\n", done.stderr


def test_a_right_answer_to_queues_passes_in_the_sandbox(tmp_path, sandbox):
    """Which has no address but the loopback's. One of its two exercises: both ask the same Slurm."""
    require(not slurm.missing(), f"{', '.join(slurm.missing())}: {slurm.install_line()}")
    cells = build.solution(ROOT / "notebooks" / "source" / "06_queues.py").cells
    mine = [cell for cell in cells if cell.id in ("array-answer", "array-check")]
    course = handed_in(tmp_path / "course", q=nbformat.writes(nbformat.v4.new_notebook(cells=mine)))
    found = graded(course, course)["q"]
    assert found[:2] == ("pass", 2), found
    assert not found[2].startswith("("), "nothing is to be said of the check"


def test_an_ordinary_user_has_a_sandbox_too(tmp_path, monkeypatch):
    """What root's sandbox is by privilege, another user's is by a namespace of users: the same line, run as nobody."""
    if os.getuid() != 0:
        pytest.skip("needs root, to be another user")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    try_it = [*nobody, "bwrap", "--unshare-user", "--ro-bind", "/", "/", "true"]
    if subprocess.run(try_it, capture_output=True).returncode:
        pytest.skip("needs user namespaces for ordinary users")
    with _sandbox._folder() as folder:
        os.chown(folder, 65534, 65534)
        monkeypatch.setattr(os, "getuid", lambda: 65534)
        monkeypatch.setattr(_sandbox, "_seen", list)
        line = [*nobody, *_sandbox.wrapped(folder, []), "sh", "-c"]
        done = subprocess.run([*line, "id -un; ls /home; ls /proc | grep -c '^[0-9]'"], capture_output=True, text=True)
        outside = subprocess.run([*line, f"ls {ROOT}"], capture_output=True, text=True)
    assert done.stdout.split()[:2] == ["student", "student"] and int(done.stdout.split()[2]) < 10, done
    assert outside.returncode != 0
