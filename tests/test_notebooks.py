"""The notebook pipeline on a small source, then the course's notebooks: their rules, both builds executed."""

import ast
import json
import os
import re
import time
from pathlib import Path
from string import Formatter

import nbformat
import psutil
import pytest
from conftest import Footprint
from nbclient import NotebookClient
from pipeline import IN_BROWSER, build, with_stubs

import hpclab
from hpclab.course import logbook, slug

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "notebooks" / "source").glob("*.py"))
EDITIONS = [(path, "en") for path in SOURCES] + [
    (path, "zh") for path in SOURCES if (path.parent / "zh" / f"{path.stem}.md").exists()
]

every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
every_edition = pytest.mark.parametrize(
    ("path", "language"), EDITIONS, ids=[f"{p.stem}-{lang}" for p, lang in EDITIONS]
)

MEASURING = ("01_one_process", "05_dask")
"""Notebooks with a check that measures."""

SOURCE = """\
# %% [markdown] id="objectives"
# # Gangs
# - Find the largest gang.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = "small"

# %% id="gang" exercise=true
largest = ...
### BEGIN SOLUTION
largest = hpclab.machine.fits()
### END SOLUTION

# %% id="gang-check" points=2
hpclab.check("start.gang", largest)

# %% id="half" exercise=true
def half(x):
    ...
    ### BEGIN SOLUTION
    return x / 2
    ### END SOLUTION


print(half(4))
"""
CHINESE = """\
<!-- cell: objectives  english: c7beee7c -->

# 进程组
- 找出最大的进程组。
"""


@pytest.fixture
def course(tmp_path):
    """A folder with one source and its translation, built."""
    (tmp_path / "source" / "zh").mkdir(parents=True)
    (tmp_path / "source" / "00_gang.py").write_text(SOURCE)
    (tmp_path / "source" / "zh" / "00_gang.md").write_text(CHINESE, "utf-8")
    assert build.main([], tmp_path) == 0
    return tmp_path


def cells(notebook) -> dict:
    return {cell.id: cell for cell in notebook.cells}


def test_ids_tags_and_kernel_reach_the_notebook(course):
    notebook = nbformat.read(course / "00_gang.ipynb", 4)
    nbformat.validate(notebook)
    assert list(cells(notebook)) == ["objectives", "parameters", "gang", "gang-check", "half"]
    assert cells(notebook)["parameters"].metadata == {"tags": ["parameters"]}
    assert (notebook.metadata.kernelspec.name, notebook.nbformat_minor) == ("python3", 5)
    assert "jupytext" not in (course / "00_gang.ipynb").read_text()


def test_notebooks_lead_back_to_the_index_and_on_to_the_next(course):
    """In the order of the files, in the reader's language where there is one; the index leads on by its own tables."""
    title = '# %% [markdown] id="title"\n# # {}\n'
    (course / "source" / "00_index.py").write_text(title.format("The course"))
    (course / "source" / "01_more.py").write_text(title.format("More: and more"))
    assert build.main([], course) == 0
    gang, index, more = (nbformat.read(course / f"{name}.ipynb", 4) for name in ("00_gang", "00_index", "01_more"))
    assert "onward" not in cells(index)
    assert cells(more)["onward"].source == "[All notebooks](00_index.ipynb)"
    on = "[More: and more]({}01_more.ipynb)"
    assert gang.cells[-1].source == f"[All notebooks](00_index.ipynb) · Next in order: {on.format('')}"
    chinese = nbformat.read(course / "zh" / "00_gang.ipynb", 4).cells[-1].source
    assert chinese == f"[全部 Notebook](../00_index.ipynb) · 按顺序的下一个: {on.format('../')}"


def test_every_link_between_notebooks_leads_somewhere():
    built = build.build()
    for path, text in built.items():
        for target in re.findall(r"\]\(([^):#]*\.ipynb)", text):
            assert (path.parent / target).resolve() in built, f"{path.name} links to {target}"


def test_students_get_the_stub_and_tests_get_the_solution(course):
    student = cells(nbformat.read(course / "00_gang.ipynb", 4))
    assert student["gang"].source == "largest = ..."
    assert student["half"].source == "def half(x):\n    ...\n\n\nprint(half(4))"
    assert "largest = hpclab.machine.fits()" in cells(build.solution(course / "source" / "00_gang.py"))["gang"].source


def test_exercises_and_checks_carry_nbgraders_metadata(course):
    """As its schema, version 3, has it; nbgrader 0.9.6 itself released and graded this notebook."""
    student = cells(nbformat.read(course / "00_gang.ipynb", 4))
    flags = {"schema_version": 3, "task": False}
    assert student["gang"].metadata["nbgrader"] == {
        "grade_id": "gang", "grade": False, "solution": True, "locked": False, **flags
    }  # fmt: skip
    assert student["gang-check"].metadata["nbgrader"] == {
        "grade_id": "gang-check", "grade": True, "solution": False, "locked": True, "points": 2, **flags
    }  # fmt: skip
    assert "nbgrader" not in student["objectives"].metadata


def test_the_chinese_edition_has_chinese_prose_and_the_same_code(course):
    english, chinese = (cells(nbformat.read(course / name, 4)) for name in ("00_gang.ipynb", "zh/00_gang.ipynb"))
    assert chinese["objectives"].source == "# 进程组\n- 找出最大的进程组。"
    assert {**chinese, "objectives": None} == {**english, "objectives": None}
    assert "machine.fits()" in cells(build.solution(course / "source" / "00_gang.py", "zh"))["gang"].source


def test_the_build_is_the_same_to_the_byte(course):
    before = {path: path.read_bytes() for path in course.rglob("*.ipynb")}
    assert len(before) == 2
    build.main([], course)
    assert before == {path: path.read_bytes() for path in course.rglob("*.ipynb")}


def test_check_names_each_notebook_that_differs_and_writes_nothing(course, capsys):
    assert build.main(["--check"], course) == 0
    (course / "00_gang.ipynb").write_text("{}")
    (course / "zh" / "00_gang.ipynb").unlink()
    (course / "07_left.ipynb").write_text("{}")
    capsys.readouterr()
    assert build.main(["--check"], course) == 1
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert named == ["00_gang.ipynb", "07_left.ipynb", str(Path("zh", "00_gang.ipynb"))]
    assert (course / "00_gang.ipynb").read_text() == "{}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (' id="parameters"', "", r"cell 2 \('import hpclab'\): it has no id"),
        ('id="half"', 'id="gang"', r"cell 5 .*'gang'\) is there twice"),
        ('id="half"', 'id="the half"', "must be 1 to 64 of letters"),
        ("points=2", "point=2", "unknown options .point.*use exercise, id, points, tags"),
        ('"gang-check" points=2', '"gang-check"', "a cell with points=..., and no other"),
        ('check("start.gang", largest)', "exercises", "a cell with points=..., and no other"),
        ('id="gang" exercise=true', 'id="gang"', "a cell with exercise=true, and no other"),
        ("### END SOLUTION\n\n# %%", "# %%", "BEGIN SOLUTION.*in turn"),
        ("### END SOLUTION", "## END SOLUTION", "BEGIN SOLUTION.*in turn"),
        ("# %% [markdown] id", "# %% [markdown] points=1 id", "exercises and checks are code"),
    ],
)
def test_a_source_that_breaks_a_rule_is_refused(course, old, new, message):
    assert old in SOURCE
    (course / "source" / "00_gang.py").write_text(SOURCE.replace(old, new))
    with pytest.raises(build.SourceError, match="00_gang.py, " + message if message.startswith("cell") else message):
        build.build(course)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("c7beee7c", "00000000", "cells stale: objectives"),
        ("cell: objectives", "cell: aims", "cells missing: objectives; unknown: aims"),
        ("english:", "", "must read 'ID english: HASH'"),
        ("<!-- cell", "Hello <!-- cell", "belongs to no cell"),
        ("- 找", "<!-- cell: objectives  english: c7beee7c -->\n- 找", "with each id once"),
    ],
)
def test_a_translation_that_does_not_fit_is_refused(course, old, new, message):
    assert old in CHINESE
    (course / "source" / "zh" / "00_gang.md").write_text(CHINESE.replace(old, new), "utf-8")
    with pytest.raises(build.SourceError, match=f"00_gang.md.* {message}"):
        build.build(course)


def test_stale_lists_what_to_translate_ready_to_paste(course, capsys):
    assert build.main(["--stale"], course) == 0
    (course / "source" / "zh" / "00_gang.md").write_text("")
    capsys.readouterr()
    assert build.main(["--stale"], course) == 1
    told = capsys.readouterr().out
    assert "00_gang.md: missing: objectives" in told
    assert "<!-- cell: objectives  english: c7beee7c -->\n\n# Gangs\n- Find the largest gang." in told


def messages() -> set[str]:
    """Every message that the package gives to `_(...)`."""
    calls = [
        (path, node)
        for path in (ROOT / "hpclab").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_"
    ]
    for path, call in calls:
        assert isinstance(call.args[0], ast.Constant), f"{path.name}:{call.lineno}: _(...) takes a literal"
    return {call.args[0].value for _, call in calls}


def test_the_chinese_catalogue_holds_every_message_and_no_other():
    catalogue = json.loads((ROOT / "hpclab" / "zh.json").read_text("utf-8"))
    missing, old = messages() - catalogue.keys(), catalogue.keys() - messages()
    assert not missing, json.dumps(dict.fromkeys(sorted(missing), ""), indent=1)
    assert not old
    fields = {text: {tuple(field[1:]) for field in Formatter().parse(text) if field[1] is not None}
              for text in [*catalogue, *catalogue.values()]}  # fmt: skip
    assert [english for english, chinese in catalogue.items() if fields[english] != fields[chinese]] == []


def test_language_follows_the_setting_then_the_folder(monkeypatch, tmp_path):
    from hpclab.language import language, translate

    monkeypatch.delenv("HPCLAB_LANG", raising=False)
    (tmp_path / "zh").mkdir()
    monkeypatch.chdir(tmp_path)
    assert language() == "en"
    monkeypatch.chdir(tmp_path / "zh")
    assert language() == "zh"
    assert translate("no such message, {name}", name="x") == "no such message, x"
    monkeypatch.setenv("HPCLAB_LANG", "en")
    assert language() == "en"
    monkeypatch.setenv("HPCLAB_LANG", "fr")
    with pytest.raises(ValueError, match=r"HPCLAB_LANG \(=fr\).*en, zh"):
        language()


def test_the_size_of_a_notebook_is_its_environments(monkeypatch):
    monkeypatch.delenv("HPCLAB_SIZE", raising=False)
    assert hpclab.size() == "class"
    monkeypatch.setenv("HPCLAB_SIZE", "small")
    assert hpclab.size() == "small"
    monkeypatch.setenv("HPCLAB_SIZE", "smal")
    with pytest.raises(ValueError, match=r"HPCLAB_SIZE \(=smal\) isn't a size; use one of small, class, cluster"):
        hpclab.size()


def test_no_notebook_differs_from_its_source():
    assert build.drift() == []


@every_edition
def test_a_notebook_is_small_portable_and_self_contained(path, language):
    notebook = build.student(path, language)
    text = nbformat.writes(notebook)
    sources = "\n".join(cell.source for cell in notebook.cells)
    assert len(text.encode()) < 200_000
    assert not re.findall(r"[!%]\s*(?:pip|conda|mamba)\b.*", sources)
    assert not re.findall(r"(?<![\w.~:/])/(?:home|root|tmp|usr|opt|mnt|work|scratch|Users)\b.*|\b[A-Z]:\\.*", sources)


@every_source
def test_a_notebook_keeps_its_logic_in_the_package(path):
    """Without the solutions, which are the reader's logic, and the quizzes' and predictions' cells, which have none."""
    cells = [cell for cell in build.student(path).cells if cell.cell_type == "code" and "quiz" not in cell.id]
    code = [cell.source for cell in cells if not re.match(r"hpclab\.(predict|came)\(", cell.source)]
    lines = [line for line in "\n".join(code).splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 120


@every_source
def test_each_predict_takes_an_answer_and_shows_it_beside_what_came(path):
    """Nobody's answer is written there yet, and nothing says *Predict* without taking one."""
    predicted, came, asked = [], [], []
    for cell in build.student(path).cells:
        if cell.cell_type == "markdown":
            asked += re.findall(r"\*\*Predict\*\*|^## Predict$", cell.source, re.MULTILINE)
        elif stub := re.fullmatch(r'hpclab\.predict\("(\S+)", \.\.\.(?:, ".+"|, among=.+)?\)', cell.source):
            predicted.append(stub[1])
        elif shown := re.search(r'^hpclab\.came\(\s*"(\S+)"', cell.source, re.MULTILINE):
            assert shown[1] in predicted
            came.append(shown[1])
    assert predicted == came and len(set(came)) == len(came)
    assert all(name.startswith(f"{slug(path.stem)}.") for name in came)
    elsewhere = {"00_start": 1, "17_capstone": 1}  # a slider; a book of its own
    assert len(asked) == len(predicted) + elsewhere.get(path.stem, 0)


def test_no_cell_of_scaling_has_three_functions_that_are_new():
    """Of hpclab, beyond those of the notebooks that it requires."""
    call = r"\b(hpclab|scaling|laws|plots|forecast|timeline|daint|diagrams|ratios|widgets)\.(\w+)\("
    called = {}
    for stem in ("00_start", "03_cnn", "04_scaling"):
        cells = build.solution(ROOT / "notebooks" / "source" / f"{stem}.py").cells
        called[stem] = [{*re.findall(call, cell.source)} for cell in cells if cell.cell_type == "code"]
    known = {function for stem in ("00_start", "03_cnn") for cell in called[stem] for function in cell}
    assert ("hpclab", "train") in known
    for cell in called["04_scaling"]:
        assert len(cell - known) < 3, cell - known
        known |= cell


@every_source
def test_the_first_cell_says_what_a_reader_needs_to_know(path):
    first = build.student(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    for word in ("objectives", "minutes", "needs"):
        assert re.search(rf"\b{word}\b", first.source, re.IGNORECASE), word


@pytest.mark.parametrize("path", [path for path, language in EDITIONS if language == "zh"], ids=lambda path: path.stem)
def test_the_editions_differ_in_prose_only(path):
    english, chinese = build.student(path).cells, build.student(path, "zh").cells
    assert [cell for cell in english if cell.cell_type == "code"] == [
        cell for cell in chinese if cell.cell_type == "code"
    ]
    prose = [cell for cell in chinese if cell.cell_type == "markdown"]
    assert [cell.id for cell in prose if not re.search("[\u4e00-\u9fff]", cell.source)] == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_index_says_what_the_notebooks_say(language):
    """Every other notebook is there once, in the path it belongs to, with its own title, minutes and needs."""
    index = build.student(ROOT / "notebooks" / "source" / "00_index.py", language)
    folder = ROOT / "notebooks" / ("zh" if language == "zh" else "")
    listed = {}
    for cell in index.cells:
        for title, link, minutes, needs in re.findall(r"\| \[(.+)\]\((\S+)\) \| (\d+) \| (.+) \|", cell.source):
            path = (folder / link).resolve()
            assert path.stem not in listed
            listed[path.stem] = cell.id
            first = nbformat.read(path, 4).cells[0].source
            said = dict(re.findall(r"^\| (minutes|用时|needs|需要) \| (.*) \|$", first, re.MULTILINE))
            said = {{"用时": "minutes", "需要": "needs"}.get(name, name): text for name, text in said.items()}
            assert first.startswith(f"# {title}\n"), link
            assert re.search(r"\d+", said["minutes"])[0] == minutes, link
            english = {
                "个 CPU": "CPU",
                "没有 rank": "no rank",
                "个 rank": "rank",
                "、": ", ",
                "装有 Slurm 程序的 Linux": "Linux with Slurm's programs",
            }
            for word, meaning in english.items() if language == "zh" else ():
                needs, said["needs"] = needs.replace(word, meaning), said["needs"].replace(word, meaning)
            assert [part for part in needs.split(", ") if part not in said["needs"]] == [], link
    rest = [path.stem for path in SOURCES if path.stem != "00_index"]
    expected = {
        stem: "short" if slug(stem) in logbook.SHORT else "day" if slug(stem) in logbook.DAY else "term"
        for stem in rest
    }
    assert listed == expected


def test_the_path_of_90_minutes_takes_no_longer():
    """What it leaves out for later is headed so, in the notebooks whose first number of minutes is without it."""
    minutes, exercises = 0, []
    for path in SOURCES:
        if slug(path.stem) in logbook.SHORT:
            first, *cells = (cell.source for cell in build.student(path).cells if cell.cell_type == "markdown")
            said = re.search(r"^\| minutes \| (\d+) (.*) \|$", first, re.MULTILINE)
            later = [cell for cell in cells if re.search(r"^##+ For later: ", cell, re.MULTILINE)]
            assert bool(later) == ("with the parts *for later*" in said[2])
            minutes += int(said[1])
            after = "\n".join(cell.source for cell in build.student(path).cells).partition("## For later: ")[2]
            exercises += re.findall(r'hpclab\.check\("(\S+)"', after)
    assert 0 < minutes <= 90
    assert sorted(exercises) == sorted(logbook.LATER)


def test_text_names_no_notebook_that_is_not_there():
    """In prose: "the notebook *cnn*", "the notebooks *start* and **cnn**"."""
    texts = [path for folder in ("docs", "notebooks", "notebooks/source/zh") for path in (ROOT / folder).glob("*.md")]
    sources = "\n".join(path.read_text("utf-8") for path in [*SOURCES, *texts, *ROOT.glob("README*.md")])
    prose = re.sub(r"\n# ?", " ", sources)
    name = r"\*{1,2}[a-z][a-z-]*\*{1,2}"
    lists = re.findall(rf"(?:[Nn]otebooks?|笔记本) ({name}(?:(?:, | and |、| 和 ){name})*)", prose)
    named = {slug for found in lists for slug in re.findall(r"[a-z][a-z-]*[a-z]", found)} - {"and"}
    assert {"cnn", "faults", "scaling"} <= named <= {slug(path.stem) for path in SOURCES}


@every_source
def test_a_notebook_requires_only_those_before_it(path):
    order = [slug(other.stem) for other in SOURCES]
    [needed] = re.findall(r"^\| prerequisites \| (.*) \|$", build.student(path).cells[0].source, re.MULTILINE)
    for name in re.findall(r"\*([a-z-]+)\*", needed):
        assert order.index(name) < order.index(slug(path.stem))


@every_edition
def test_links_between_notebooks_lead_somewhere(path, language):
    folder = ROOT / "notebooks" / ("zh" if language == "zh" else "")
    prose = "\n".join(cell.source for cell in build.student(path, language).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", prose) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []


def execute(notebook, folder, tell, label) -> dict[str, str]:
    """Run a notebook in a fresh kernel, tell time and memory; what each check shows, by cell id."""
    folder.mkdir(parents=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("HPCLAB_LANG", "NBGRADER_EXECUTION")}
    environment = {"HPCLAB_SIZE": "small"} | environment | {"PYTHONPATH": str(ROOT)}  # this tree, whatever is installed
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    start = time.perf_counter()
    with Footprint(lambda: getattr(client.km, "provisioner", None) and client.km.provisioner.pid) as footprint:
        client.execute(env=environment)
    tell("measured", f"{label}: {time.perf_counter() - start:.0f} s, peak {footprint.peak / 1e6:.0f} MB")
    assert footprint.peak < 2**31  # 2 GB, as a container counts them
    _, left = psutil.wait_procs(footprint.seen, timeout=10)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
    checks = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    return {cell.id: "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs) for cell in checks}


def test_a_footprint_of_what_has_not_started_is_not_this_process():
    with Footprint(lambda: None) as footprint:
        time.sleep(2)
    assert (footprint.seen, footprint.peak) == (set(), 0)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.alone] * (path.stem in MEASURING))
        for path in SOURCES
        if f"{path.stem}.ipynb" not in IN_BROWSER
    ],
)
def test_solutions_pass_and_stubs_do_not(path, tmp_path, record_property):
    """In English; other editions differ in prose only. The others run in a browser, in test_browser."""
    for turn in range(3):  # a check that measures may have nothing to say while the machine has other things to do
        shown = execute(with_stubs(path), tmp_path / str(turn) / "notebooks", record_property, path.stem)
        if not any('data-status="inconclusive"' in html for html in shown.values()):
            break
    expected = {cell_id: "fail" if cell_id.startswith("stub-") else "pass" for cell_id in shown}
    assert {cell_id: re.findall('data-status="(.*?)"', html) for cell_id, html in shown.items()} == {
        cell_id: [status] for cell_id, status in expected.items()
    }
