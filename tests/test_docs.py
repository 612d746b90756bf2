"""What the pages say is there: links, commands, names, messages; and one spelling of the field's words.

Sphinx itself builds them by `make docs`, where a warning is an error.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import hpclab
from hpclab import cli

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "notebooks" / "glossary.md"
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "data").glob("*/README.md")),
    GLOSSARY,
]
NOTEBOOKS = sorted([*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks" / "zh").glob("*.ipynb")])
assert len(PAGES) > 15 and len(NOTEBOOKS) > 10
SPELLING = {
    "all-reduce": r"\ball ?reduce\b",
    "all-gather": r"\ball ?gather\b",
    "back-end": r"\bbackend\b",
    "backfill": r"\bback-fill",
    "checkpoint": r"\bcheck-?\spoint|\bcheck-point",
    "data-parallel, data parallelism": r"\bdataparallel|\bdata-parallelism\b",
    "deadlock": r"\bdead-lock",
    "hyper-parameter": r"\bhyperparameter",
    "mini-batch": r"\bminibatch(?! SGD)",
    "oversubscribe": r"\bover-subscri",
    "speed-up": r"\bspeed ?up\b(?! to\b)",
    "walltime": r"\bwall[- ]time\b",
    "world size": r"\bworld-size\b",
}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
every_notebook = pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: f"{page.parent.name}-{page.stem}")


def text(page: Path) -> str:
    """Markdown of a page with what it includes, or of a notebook's cells."""
    found = page.read_text("utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(found)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"```\{include\} (\S+)\n```", lambda match: text(page.parent / match[1]), found)


def prose(page: Path) -> str:
    """Markdown without its code, its links' addresses and what HTML comments say."""
    found = re.sub(r"^ *```.*?^ *```|<!--.*?-->", "", text(page), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "``", found)


def headings(page: Path) -> list[str]:
    found = re.sub(r"^ *```.*?^ *```", "", text(page), flags=re.DOTALL | re.MULTILINE)
    return [line.lstrip("#").strip() for line in found.splitlines() if re.match("#+ ", line)]


def anchor(heading: str) -> str:
    """As GitHub and MyST name a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links(page: Path) -> list[tuple[str, str]]:
    """File and anchor of each link within this repository."""
    found = re.sub(r"^ *```.*?^ *```|`[^`]*`", "``", text(page), flags=re.DOTALL | re.MULTILINE)
    targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", found) if "://" not in link]
    return [(file, name) for file, _, name in (target.partition("#") for target in targets)]


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    missing = []
    for file, name in links(page):
        target = page.parent / file if file else page
        known = map(anchor, headings(target)) if name and target.suffix == ".md" and target.exists() else ()
        if not target.exists() or (name and name not in known):
            missing.append(f"{file}#{name}")
    return missing


@every_page
def test_links_of_a_page_lead_somewhere(page):
    assert broken(page) == []


@every_notebook
def test_links_of_a_notebook_lead_somewhere(page):
    assert broken(page) == []


@every_notebook
def test_a_notebook_links_to_the_glossary_as_jupyterlab_names_its_headings(page):
    """JupyterLab keeps capitals and signs in a heading's name, which others drop: only some anchors are the same."""
    there = {heading.replace(" ", "-") for heading in headings(GLOSSARY)}
    named = [name for file, name in links(page) if file.endswith("glossary.md") and name]
    assert named and set(named) <= there


def terms() -> dict[str, str]:
    parts = re.split(r"^## (.*)$", GLOSSARY.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_glossary_is_sorted_and_has_each_term_once():
    found = re.findall(r"^## (.*)$", GLOSSARY.read_text("utf-8"), re.MULTILINE)
    assert len(found) >= 80
    assert found == sorted(found, key=str.lower)
    assert len(set(map(anchor, found))) == len(found)


def test_each_term_has_its_chinese_and_a_meaning_in_both_languages():
    for term, body in terms().items():
        chinese, english, explained = body.strip().split("\n\n")
        assert re.fullmatch(r"\*\*[^*]+\*\*", chinese), term
        assert re.search("[\u4e00-\u9fff]", chinese) and re.search("[\u4e00-\u9fff]", explained), term
        assert re.match(r"[A-Z].*[.?]$", english) and not re.search("[\u4e00-\u9fff]", english), term


@every_page
def test_a_page_spells_as_all_do(page):
    assert misspelt(page) == {}


@every_notebook
def test_a_notebook_spells_as_all_do(page):
    assert misspelt(page) == {}


def misspelt(page: Path) -> dict[str, list[str]]:
    """What a page has of other spellings, by the agreed one; titles of others' works, in italics, keep theirs."""
    said = re.sub(r"(?<!\*)\*[^*]+\*(?!\*)", "", prose(page))
    found = {right: re.findall(wrong, said, re.IGNORECASE) for right, wrong in SPELLING.items()}
    return {right: wrong for right, wrong in found.items() if wrong}


def test_other_spellings_are_found(tmp_path):
    (tmp_path / "page.md").write_text("The allreduce of `allreduce` gives a speedup within its wall time.\n")
    assert list(misspelt(tmp_path / "page.md")) == ["all-reduce", "speed-up", "walltime"]


def commands(page: Path) -> list[list[str]]:
    """Words of each call of make or hpclab that a page shows, without its settings."""
    shown = re.findall(r"```(?:console|bash|sh)\n(.*?)```", text(page), re.DOTALL)
    lines = [line for block in shown for line in block.splitlines()]
    lines += re.findall(r"`((?:\w+=\S+ )*(?:make|hpclab) [^`\n]+)`", text(page))
    found = []
    for line in lines:
        words = shlex.split(re.sub("<[^>]*>", "...", line), comments=True)
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        if words and words[0].split("/")[-1] in ("make", "hpclab"):
            found.append([words[0].split("/")[-1], *words[1:]])
    return found


def test_commands_of_the_pages_exist():
    chores = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    seen = set()
    for page in PAGES:
        for program, *words in commands(page):
            seen.add(program)
            if program == "make":
                assert {word for word in words if "=" not in word} <= chores, f"{page.name}: make {words}"
            else:
                assert accepted(words), f"{page.name}: hpclab {words}"
    assert seen == {"make", "hpclab"}


def accepted(words: list[str]) -> bool:
    """Whether the command takes these words; the names of its own commands in any case, without what follows."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            options, rest = cli._parser().parse_known_args(words)
        except SystemExit:
            return words[-1:] in (["data"], ["slurm"]) and "required" in said.getvalue()
    return not rest or options.command == "lab"


def test_a_command_that_is_not_there_is_found():
    assert not accepted(["teach"]) and not accepted(["scale", "--rank", "x"])
    assert accepted(["slurm", "up", "--nodes", "2"])


def listed(where: str) -> set[str]:
    return set(re.findall(rf"^   hpclab\.({where}\w+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE))


def test_the_reference_has_every_public_module_and_name():
    """What is missing here goes into docs/api.md, under the heading that fits."""
    there = [*(ROOT / "hpclab").glob("[a-z]*.py"), *(ROOT / "hpclab").glob("[a-z]*/__init__.py")]
    modules = {path.parent.name if path.stem == "__init__" else path.stem for path in there}
    assert {"gangs", "machine"} < modules
    assert listed("") == modules | hpclab._HOME.keys() | set(hpclab._MODULES)
    for name in modules:
        assert importlib.import_module(f"hpclab.{name}").__doc__
    assert not [name for name in hpclab._HOME if not getattr(hpclab, name).__doc__]


def test_programs_of_the_pages_are_python():
    programs = [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)]
    assert len(programs) > 5
    for program in programs:
        ast.parse(program)


def test_messages_under_troubleshooting_are_those_of_the_program():
    """By the longest part of each that holds no value, with the parts of long literals joined."""
    sources = [path.read_text("utf-8") for path in [*(ROOT / "hpclab").rglob("*.py"), ROOT / "Makefile"]]
    said = re.sub(r'"\s*f?"', "", "\n".join(sources))
    quoted = re.findall(r"\*\*`([^*]+)`", text(ROOT / "docs" / "troubleshooting.md"))
    others = [message for message in quoted if "bootstrapping" in message]  # Python's own
    assert len(others) == 1 and len(quoted) > 15
    for message in set(quoted) - set(others):
        flat = " ".join(message.replace("`", "").split())
        parts = re.split(r"\.\.\.|\(=[^)]*\)|\d[\d.]*(?: MiB)?|<\w+>|(?<!\w)'[^']*'|`", flat)
        longest = max((part.strip(" ,.;:()") for part in parts), key=len)
        assert len(longest) > 8 and longest in said, message


def test_the_tests_that_the_security_page_names_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text("utf-8")))
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10
    assert not [name for name in named if f"def {name}(" not in tests]


def test_what_sphinx_makes_is_not_kept():
    done = subprocess.run(
        ["git", "check-ignore", "docs/_build/index.html", "docs/generated/hpclab.laws.rst"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert len(done.stdout.split()) == 2
