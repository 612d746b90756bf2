"""The house's order: who may import whom, and that importing the package costs nothing."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hpclab"
LAYERS = (
    "_arguments _dask _namesakes _private language live machine pages rows sites tables",
    "data figures laws models plots ratios",
    "queues views",
    "gangs slurm",
    "checkpoint cluster forecast network timeline",
    "scaling training",
    "racing study",
    "course doctor",
    "cli",
)
RANK_OF = {noun: layer for layer, nouns in enumerate(LAYERS) for noun in nouns.split()}


def module(path: Path) -> str:
    """Dotted name below hpclab of a file; a package's is its folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in PACKAGE.rglob("*.py")}
NOUNS = {name.split(".")[0] for name in MODULES if name} - {"__main__"}
KIT = sorted(NOUNS - {"course", "doctor", "cli"})  # doctor also says whether the course can be graded here
assert {"gangs.rank", "course.checks.cnn", "machine"} < MODULES.keys() and len(KIT) > 20


def named(dotted: str) -> str:
    """The module of hpclab that a dotted name lies in, or "" for none below hpclab itself."""
    parts = dotted.removeprefix("hpclab").strip(".").split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in MODULES), "")


def imports(source: str) -> set[str]:
    """Modules of hpclab that a file imports: at its top, in functions, for type checkers, or by a name in a string."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "import from hpclab by its whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            said = re.findall(r"\bhpclab(?:\.\w+)+", node.value)
            names |= {name for name in said if name.removeprefix("hpclab.") in MODULES}  # others tell of a function
    return {named(name) for name in names if name.startswith("hpclab.")} - {""}


IMPORTS = {name: imports(path.read_text("utf-8")) - {name} for name, path in MODULES.items()}


def test_every_import_goes_down_the_layers():
    assert RANK_OF.keys() == NOUNS
    for name, below in IMPORTS.items():
        if name in ("", "__main__"):
            continue
        layer = RANK_OF[name.split(".")[0]]
        wrong = [other for other in below if RANK_OF[other.split(".")[0]] > layer]
        assert not wrong, f"{name} imports {wrong}, of a layer above its own"


def test_the_kit_never_imports_the_course():
    """Read in its files; and seen when all of it is loaded, however a string that names a module came to be."""
    files = sorted(name for name in MODULES if name.split(".")[0] in KIT)
    named = {other.split(".")[0]: name for name in files for other in IMPORTS[name]}
    assert "machine" in named and not {"course", "doctor"} & named.keys(), named
    code = f"import sys; from importlib import import_module as i; [i('hpclab.' + name) for name in {files}]\n"
    code += "print(*(name for name in sys.modules if name.startswith('hpclab.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "hpclab.gangs.rank" in loaded, done.stderr
    assert not [name for name in loaded if name.startswith(("hpclab.course", "hpclab.doctor"))]


def test_the_files_have_no_cycle():
    left = {name: set(below) for name, below in IMPORTS.items()}
    while free := {name for name, below in left.items() if not below & left.keys()}:
        left = {name: below for name, below in left.items() if name not in free}
    assert not left


@pytest.mark.parametrize(
    "source",
    [
        "import hpclab.cli",
        "import hpclab.cli as command",
        "from hpclab import machine, cli",
        "from hpclab.cli import main",
        "def f():\n    from hpclab import cli",
        "if TYPE_CHECKING:\n    from hpclab.cli import main",
        "else_ = import_module('hpclab.cli')",
        "run(['-c', f'import hpclab.cli; {x}'])",
    ],
)
def test_no_import_is_missed(source):
    assert "cli" in imports(source)


TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}


def private(names: Iterable[str]) -> set[str]:
    return {name for name in names if re.fullmatch(r"_[a-zA-Z]\w*", name) and not name.endswith("__")}


def made(tree: ast.Module) -> set[str]:
    """Private names that a module gives to something: functions, classes, variables, and attributes of objects."""
    nodes = list(ast.walk(tree))
    names = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    names |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    return private(names)


def borrowed(tree: ast.Module) -> set[str]:
    """Private names that a module imports from hpclab's, or reads from objects other than its own `self`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hpclab"):
            names |= {alias.name for alias in node.names if named(f"{node.module}.{alias.name}") == named(node.module)}
        elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            names.add(node.attr)
    return private(names)


def test_private_names_stay_in_their_module():
    makers = {name: made(tree) for name, tree in TREES.items()}
    assert "_context" in makers["gangs.rank"]
    for name, tree in TREES.items():
        for attribute in borrowed(tree) - makers[name]:
            owners = [other for other, names in makers.items() if attribute in names]
            assert not owners, f"{name} uses {attribute}, which is private to {owners}"


@pytest.mark.parametrize(
    "source",
    ["from hpclab.machine import _a", "from hpclab import machine\nmachine._a()", "def f(x):\n    return x._a"],
)
def test_a_borrowed_private_name_is_found(source):
    assert borrowed(ast.parse(source)) == {"_a"}


def processes(path: Path) -> set[str]:
    """Where a file of gangs/ runs, as its first line begins: "Kernel: ...", or "Worker and kernel: ..."."""
    said = re.match(r'"""((?:Kernel|Scheduler|Worker|Host|Rank|All)[a-z ]*): ', path.read_text("utf-8"))
    return set(said[1].lower().split()) - {"and", "processes"} if said else set()


def test_each_file_of_gangs_says_where_it_runs_and_so_does_the_page():
    page = (PACKAGE.parent / "docs" / "inside.md").read_text("utf-8")
    rows = re.findall(r"^\| \*\*(.*?)\*\*.*\| (`.*`) \|$", page, re.MULTILINE)
    listed = {
        file: set(re.findall(r"\w+", process)) - {"and"}
        for process, files in rows
        for file in re.findall(r"\w+\.py", files)
    }
    files = [path for path in (PACKAGE / "gangs").glob("*.py") if path.stem != "__init__"]
    assert len(files) > 10
    assert listed == {path.name: processes(path) for path in files}


def test_no_function_is_longer_than_a_page():
    """50 lines of code, without its docstring, comments and empty lines."""
    long = {}
    for name, path in MODULES.items():
        for function in ast.walk(TREES[name]):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                first = function.body[bool(ast.get_docstring(function)) :] or function.body
                lines = path.read_text("utf-8").splitlines()[first[0].lineno - 1 : function.end_lineno]
                if (count := sum(not re.match(r"\s*(#|$)", line) for line in lines)) > 50:
                    long[f"{name}.{function.name}"] = count
    assert len(TREES) > 60 and not long


def test_import_loads_neither_torch_nor_dask():
    light = "machine, hpclab.slurm, hpclab.course.check, hpclab.language, hpclab.laws, hpclab.forecast"
    code = f"import sys, hpclab, hpclab.{light}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hpclab.machine" in loaded
    assert not {"torch", "dask", "distributed", "matplotlib", "IPython"} & set(loaded)


def test_training_loads_nothing_that_draws():
    """matplotlib takes half a second, and writes a list of fonts into the user's home."""
    code = "import sys, hpclab.training.start; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hpclab.gangs.launch" in loaded and "matplotlib" not in loaded


@pytest.mark.parametrize(
    "folder", [name for name in ("gangs", "training", "models") if MODULES[name].stem == "__init__"]
)
def test_a_folder_that_ranks_import_loads_nothing_heavy(folder):
    code = f"import sys, hpclab.{folder}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert f"hpclab.{folder}" in loaded
    assert not {"torch", "dask", "distributed", "numpy", "cloudpickle", "IPython"} & set(loaded)


def test_public_names_of_0_1_0_are_there():
    """By the paths that they had; what went on purpose is listed here, and in CHANGELOG.md."""
    gone = {"hpclab.laws fit_gustafson", "hpclab.views follow", "hpclab.views queue"}
    listed = json.loads(Path(__file__).with_name("public_0.1.0.json").read_text("utf-8"))
    names = [f"hpclab.{module}".rstrip(".") + f" {name}" for module, there in listed.items() for name in there]
    code = "import sys; from importlib import import_module as i; names = sys.stdin.read().split('\\n')\n"
    code += "print([n for n in names if not hasattr(i(n.split()[0]), n.split()[1])])"
    done = subprocess.run([sys.executable, "-c", code], input="\n".join(names), capture_output=True, text=True)
    assert len(names) > 250
    assert done.stdout.strip() == str(sorted(gone)), done.stderr


def test_every_public_name_resolves():
    """In a fresh process, where importing one name's module must not hide another name."""
    odd = "[n for n in h.__all__ if not getattr(h, n)], [n for n in h._HOME if not callable(getattr(h, n))]"
    code = f"import hpclab as h; print({odd})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
