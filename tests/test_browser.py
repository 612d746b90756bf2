"""The notebooks in JupyterLab in a real browser, from top to bottom, as a reader runs them; screenshots are kept."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import Footprint, no_rank_left, require
from pipeline import IN_BROWSER, build, with_stubs

from hpclab.course import logbook

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # a cell out of sight is in the page too
}
AXE = {"resultTypes": ["violations"], "rules": {"scrollable-region-focusable": {"enabled": False}}}
DRAWN = """async () => {
  await Promise.allSettled([...document.images].map(image => image.decode()));
  await new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)));
}"""
"""Returns when the page is drawn as it is now, with all its pictures."""
SHOTS = Path(__file__).parents[1] / "results" / "browser"
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folder in which JupyterLab is started; the course is in ``course``."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def server(home):
    """A JupyterLab, as `hpclab lab` opens it on a fresh course with Binder's settings."""
    require(CHROMIUM is not None, "chromium")
    for name, settings in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    places = {"JUPYTERLAB_SETTINGS_DIR": home / "settings", "JUPYTER_CONFIG_DIR": home, "JUPYTER_RUNTIME_DIR": home}
    env = os.environ | {name: str(path) for name, path in places.items()} | {"HPCLAB_SIZE": "small"}
    command = [
        sys.executable,
        "-m",
        "hpclab",
        "lab",
        "--folder",
        "course",
        "--no-browser",
        "--allow-root",
        "--port",
        "0",
    ]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=home, stdout=log, stderr=log, env=env)
    try:
        yield server
    finally:
        server.terminate()
        server.wait(30)
    assert no_rank_left()


@pytest.fixture(scope="module")
def lab(home, server):
    """Address of that JupyterLab, up to the notebook's name, and its token."""
    return opened(server, home / "log")


def opened(server, log):
    for _ in range(600):
        if found := re.search(r"(http://127\.0\.0\.1:\d+/lab/tree/)00_index.ipynb\?(token=\w+)", log.read_text()):
            return found.groups()
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def browser(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, lab):
    """A page of its own for each test; with it go the kernels that it started, and all that they have started."""
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    yield page
    page.close()
    for session in ask(lab, "GET", "sessions"):
        ask(lab, "DELETE", f"sessions/{session['id']}")
    assert no_rank_left(60)


def ask(lab, method, resource):
    """What the server's interface answers, as JSON; None if it says nothing."""
    address = f"{lab[0].removesuffix('lab/tree/')}api/{resource}?{lab[1]}"
    with urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=60) as answer:
        return json.loads(answer.read() or "null")


def open_notebook(page, lab, name):
    page.goto("{0}{2}?reset&{1}".format(*lab, name))  # without the notebooks that were open before
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
    # Run before its kernel is there, a notebook asks for one.
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)


def choose(page, menu, item):
    """Choose from JupyterLab's main menu."""
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$")).click()


def wait_for(page, condition, name):
    """Wait for a condition, a JavaScript expression; what the page showed instead is kept."""
    try:
        page.wait_for_function(f"() => {condition}", timeout=900_000)  # patience for a loaded machine
    except Exception:
        shoot(page, f"failed-{name}")
        raise


def shoot(page, name):
    """Keep a screenshot of the whole notebook."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.set_viewport_size({"width": 1100, "height": 1000})
    scroller = page.locator(".jp-WindowedPanel-outer").first
    height = scroller.evaluate("e => e.scrollHeight")
    page.set_viewport_size({"width": 1100, "height": min(height + 150, 12_000)})
    scroller.evaluate("e => e.scrollTo(0, 0)")
    page.evaluate(DRAWN)
    page.screenshot(path=SHOTS / f"{name.replace('/', '-')}.png")


def check_accessible(page):
    """No serious violation in what cells show, by axe's rules; JupyterLab's own frame around it isn't ours.

    Nor are the handles of ipywidgets' sliders, which have no name: the label beside them is all that it offers. The box
    that scrolls a wide output is JupyterLab's too.
    """
    ours = {"include": [[".jp-OutputArea-output"]], "exclude": [[".noUi-handle"]]}
    found = Axe().run(page, context=ours, options=AXE).response
    serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
    assert [(one["id"], node["html"]) for one in serious for node in one["nodes"]] == []


def run_all(page, name):
    choose(page, "Run", "Run All Cells")
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
    wait_for(page, f"{prompts}.every(prompt => /\\[\\d+\\]/.test(prompt.innerText))", name)


@pytest.mark.parametrize("name", IN_BROWSER[1:])
def test_notebook_runs_from_top_to_bottom(page, lab, home, server, name, record_property):
    """With its solutions, and before each what students find in its place; start in English has the race button."""
    source = Path(build.HERE, "source", Path(name).stem + ".py")
    nbformat.write(with_stubs(source, "zh" if name.startswith("zh/") else "en"), home / "course" / name)
    with Footprint(lambda: server.pid) as footprint:
        open_notebook(page, lab, name)
        run_all(page, name)
    told = f"{name}: peak {footprint.peak / 1e6:.0f} MB of JupyterLab, kernel, cluster and ranks together"
    record_property("measured", told)
    if "start" in name:
        assert footprint.peak < 1e9, "Binder guarantees 1 GB, and kills at 2"
    look_at(page, name)
    assert page.locator(".hpclab-result[data-status=pass]").count() == len(checks(name))
    if "scaling" in name:
        move_a_slider(page)
    if "cnn" in name:
        chosen = page.locator(".widget-dropdown select").evaluate("box => box.selectedOptions[0]?.innerText")
        chosen = chosen.replace("\xa0", " ")  # as ipywidgets has it
        assert chosen == "this machine's network"
        assert page.locator("td", has_text=f"2 ranks, 128 a step, {chosen}").count() == 1


def look_at(page, name):
    """What a notebook shows that a reader has run and not solved."""
    shoot(page, name)
    check_accessible(page)
    outputs = page.locator(".jp-OutputArea-output")
    assert outputs.get_by_text("Traceback (most recent call last)").count() == 0
    assert outputs.get_by_text("Error displaying widget").count() == 0
    assert outputs.locator("img").count() >= 1
    told = page.locator(".hpclab-result[data-status=fail]").all_inner_texts()
    assert len(told) == len(checks(name)) >= 1, "an unsolved exercise reports, and passes not yet"
    assert all(bool(re.search("[\u4e00-\u9fff]", text)) == name.startswith("zh/") for text in told)
    if "start" in name:
        assert page.locator(".widget-slider").count() == 1
        assert outputs.locator("table").count() >= 2


def checks(name):
    cells = nbformat.read(build.HERE / name, 4).cells
    return [cell for cell in cells if cell.metadata.get("nbgrader", {}).get("grade")]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_index_shows_what_is_done_and_leads_on(page, lab, home, language):
    """An exercise that passed in another notebook counts; a link in the output opens the next notebook."""
    from playwright.sync_api import expect

    for log in (home / "course").rglob(logbook.LOG):
        log.unlink()
    own = "def largest_gang(cpus, memory):\n"
    own += "    return max(0, min(cpus, (memory - machine.BASE_MEMORY) // machine.RANK_MEMORY))\n"
    lines = f"import hpclab\nfrom hpclab import machine\n{own}hpclab.check('start.gang', largest_gang)"
    write_notebook(home, "solved.ipynb", [lines])
    open_notebook(page, lab, "solved.ipynb")
    choose(page, "Run", "Run All Cells")
    wait_for(page, "document.querySelector('.hpclab-result[data-status=pass]')", "solved")
    name = "zh/00_index.ipynb" if language == "zh" else "00_index.ipynb"
    open_notebook(page, lab, name)
    assert page.locator(".jp-Dialog, .Toastify__toast").count() == 0, "nothing lies over the index"
    assert page.locator(".lm-MenuBar-itemLabel", has_text="Nbgrader").count() == 0
    choose(page, "Run", "Run All Cells")
    shown = page.locator(".hpclab-progress")
    expect(shown).to_contain_text("已完成 1 个" if language == "zh" else "1 of", timeout=60_000)
    wait_for(page, "document.querySelectorAll('.jp-OutputArea-output table').length >= 3", name)
    shoot(page, name)
    shown.get_by_role("link", name="CNN: the same loss, sooner").first.click()
    page.wait_for_url("**/03_cnn.ipynb*", timeout=60_000)
    assert page.url.split("?")[0] == f"{lab[0]}03_cnn.ipynb"


def test_without_the_token_nobody_gets_in(lab):
    with pytest.raises(urllib.error.HTTPError, match="403") as refused:
        ask((lab[0], ""), "GET", "contents")
    refused.value.close()
    assert ask(lab, "GET", "contents")["type"] == "directory"


def move_a_slider(page):
    """The explorer answers the keyboard: its figure and its table are others, in the same place."""
    from playwright.sync_api import expect

    cell = page.locator(".jp-CodeCell", has=page.locator(".widget-slider"))
    image, table = cell.locator("img"), cell.locator("table")
    before, told = image.get_attribute("src"), table.inner_text()
    handle = cell.get_by_role("slider").first
    handle.focus()
    for _ in range(10):
        handle.press("ArrowRight")
    expect(image).not_to_have_attribute("src", before)
    expect(table).not_to_have_text(told, use_inner_text=True)
    assert image.count() == table.count() == 1
    shoot(page, "explorer-moved")


RACED = """[...document.querySelectorAll('.jp-RenderedHTMLCommon p')]
    .filter(told => told.innerText.includes('One race is one measurement'))"""


def test_the_race_button_replaces_the_race(page, lab, home):
    """The reader predicts, presses, kills a rank of the last racer, and finds the new race where the old one was."""
    from playwright.sync_api import expect

    open_notebook(page, lab, "00_start.ipynb")
    page.locator(".jp-CodeCell").last.click()
    choose(page, "Run", "Run All Above Selected Cell")
    wait_for(page, f"{RACED}.length === 1", "first-race")
    assert page.get_by_text("You predicted").count() == 0, "nobody has"
    look_at(page, "00_start.ipynb")
    page.locator(".jp-CodeCell").last.click()
    before = race_outputs(page)
    kill = page.locator("button", has_text="Kill a rank")
    expect(kill).to_be_disabled()
    page.get_by_role("slider").focus()
    page.keyboard.press("ArrowRight")
    page.locator("button", has_text="Race").click()
    last_racer = "[...document.querySelectorAll('figcaption')].some(told => told.textContent.includes('2 ranks: '))"
    wait_for(page, f"!{last_racer}", "second-race")
    wait_for(page, last_racer, "second-race")
    kill.click()
    wait_for(page, "document.body.innerText.includes('you wrote 1.1 times as fast')", "second-race")
    after = race_outputs(page)
    assert len(after) == len(before) == 1
    assert after != before
    assert any('"restart"' in rows.read_text() for rows in (home / "course").rglob("*race*/rows.jsonl"))
    shoot(page, "00_start-pressed")
    stop_a_race_twice(page)
    open_again(page)


def stop_a_race_twice(page):
    """The kernel is free meanwhile, and each race ends."""
    from playwright.sync_api import expect

    race, stop = (page.locator("button", has_text=text) for text in ("Race again", "Stop"))
    for _ in range(2):
        race.click()
        expect(page.get_by_text("The race is on; the picture grows below")).to_be_visible(timeout=60_000)
        expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
        stop.click()
        expect(page.get_by_text("Stopped. Press the button to race again.")).to_be_visible(timeout=60_000)
    assert no_rank_left()


def open_again(page):
    """A notebook that was saved shows its controls, and no error in their place."""
    with page.expect_response(lambda answer: answer.request.method == "PUT" and "/api/contents/" in answer.url):
        choose(page, "File", "Save Notebook")
    page.reload()
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
    page.locator("button", has_text="Race again").wait_for(timeout=60_000)
    assert page.get_by_text("Error displaying widget").count() == 0
    shoot(page, "00_start-reopened")


def race_outputs(page):
    return page.locator(".jp-RenderedHTMLCommon p", has_text="One race is one measurement").all_inner_texts()


def write_notebook(home, name, sources):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nbformat.write(notebook, home / "course" / name)


GANG = [
    """
import time, hpclab
def work(slow=0.02):
    import torch, torch.distributed as dist
    for step in range(100_000):
        dist.all_reduce(torch.ones(1))
        time.sleep(slow)
        hpclab.report(step=step, loss=1 / (1 + step), samples=64, step_s=slow, compute_s=slow / 4, wait_s=slow * 3 / 4)
        if step % 20 == 0:
            print("step", step)
        if hpclab.should_stop():
            return step
client = hpclab.connect(workers=2)
""",
    "run = hpclab.launch(client, work, ranks=2)\nrun",
    "run.result()",
]


@pytest.fixture
def gang(page, lab, home, request):
    """A notebook whose last cell waits for a gang that is shown live in the cell before."""
    write_notebook(home, f"{request.node.name}.ipynb", GANG)
    open_notebook(page, lab, f"{request.node.name}.ipynb")
    choose(page, "Run", "Run All Cells")
    wait_for(page, "/talking and waiting/.test(document.body.innerText)", "gang")
    wait_for(page, "/step [1-9]/.test(document.body.innerText)", "gang")
    assert page.locator(".jp-CodeCell .jp-InputPrompt").last.inner_text().strip() == "[*]:", "the cell waits"
    return page


def test_stop_while_a_cell_waits(gang):
    shoot(gang, "gang-live")
    check_accessible(gang)
    gang.locator(".widget-button", has_text="Stop").click()
    wait_for(gang, "/: stopped/.test(document.body.innerText)", "gang-stopped")
    shoot(gang, "gang-stopped")
    assert no_rank_left()
    assert gang.locator(".widget-button").count() == 0, "an ordinary output takes the controls' place"
    first, second = re.fullmatch(r"\[(\d+), (\d+)\]", gang.locator(".jp-OutputArea-output").last.inner_text()).groups()
    assert first == second


def test_kill_a_rank_while_a_cell_waits(gang):
    gang.locator(".widget-dropdown select").select_option("1")
    gang.locator(".widget-button", has_text="Kill this rank").click()
    wait_for(gang, "/: failed/.test(document.body.innerText)", "gang-killed")
    view = gang.locator(".jp-OutputArea-output", has_text=": failed")
    view.get_by_text("RankError: rank 1 of 2").wait_for(timeout=60_000)
    shoot(gang, "gang-killed")
    assert no_rank_left()
    error = gang.locator(".jp-OutputArea-output", has_text="Traceback (most recent call last)").inner_text()
    assert re.search("rank 1 of 2 on .* was killed by SIGKILL, on request", error)


def test_a_kernel_restarted_in_mid_run_leaves_what_was_seen(gang, lab):
    """Its ranks end; the notebook says when the run was seen, also when it is opened again, and runs anew."""
    choose(gang, "Kernel", "Restart Kernel…")
    gang.get_by_role("button", name="Confirm Kernel Restart").click()
    assert no_rank_left(60)
    seen = gang.locator(".jp-OutputArea-output", has_text="If the kernel has stopped since then")
    assert "talking and waiting" in seen.inner_text()
    shoot(gang, "gang-restarted")
    with gang.expect_response(lambda answer: answer.request.method == "PUT" and "/api/contents/" in answer.url):
        choose(gang, "File", "Save Notebook")
    gang.reload()
    gang.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
    assert "talking and waiting" in seen.inner_text()
    shoot(gang, "gang-reopened")


RANKS = [
    "import hpclab\nclient = hpclab.connect(workers=2)\ngang = hpclab.gang(client, ranks=4, oversubscribe=True)",
    """
%%ranks
!echo {ranks} ranks of a gang
torch.manual_seed(rank)
parts = list(torch.randn(8).round(decimals=2).split(2))
total = torch.cat(parts)
dist.all_reduce(total)  # what we shall find
right, left = (rank + 1) % ranks, (rank - 1) % ranks
def shift(outgoing):
    incoming = torch.empty_like(outgoing)
    sent = dist.isend(outgoing, right)
    dist.recv(incoming, left)
    sent.wait()
    return incoming
print(ranks, "ranks in a ring")
parts
""",
    """
%%ranks
for step in range(ranks - 1):
    arrived = shift(parts[(rank - step) % ranks])
    parts[(rank - step - 1) % ranks] += arrived
print("rank", rank, "has the sum of part", (rank + 1) % ranks)
""",
    """
%%ranks
for step in range(ranks - 1):
    parts[(rank - step) % ranks] = shift(parts[(rank + 1 - step) % ranks])
torch.allclose(torch.cat(parts), total), torch.cat(parts)
""",
    """
%%ranks
print("all receive, and none has sent")
dist.recv(torch.empty(2), left)
""",
    """
%%ranks
print("still here:", shift(torch.tensor([float(rank)])).item() == left)
torch.allclose(torch.cat(parts), total)
""",
]


def test_a_ring_by_hand_and_a_deadlock_that_is_interrupted(page, lab, home):
    write_notebook(home, "ranks.ipynb", [source.strip() for source in RANKS])
    open_notebook(page, lab, "ranks.ipynb")
    choose(page, "Run", "Run All Cells")
    wait_for(page, "/ranks 0-3. all receive/.test(document.body.innerText)", "ranks")
    outputs = page.locator(".jp-OutputArea-output")
    assert outputs.get_by_text("4 ranks of a gang").count() == 1
    assert outputs.get_by_text("[ranks 0-3] 4 ranks in a ring").count() == 1
    assert outputs.get_by_text("[ranks 0-3] (True, tensor(").count() == 1
    choose(page, "Kernel", "Interrupt Kernel")
    wait_for(page, "/CellInterrupt: the ranks keep their variables/.test(document.body.innerText)", "ranks-interrupted")
    told = outputs.last.inner_text().splitlines()
    assert re.fullmatch(r"\[ranks 0-3\] was in <ranks cell 5>, line 3: dist.recv\(torch.empty\(2\), left\)", told[1])
    assert len(told) == 2, "one error, and no wall"
    page.locator(".jp-CodeCell").last.click()
    page.keyboard.press("Shift+Enter")
    wait_for(page, "/ranks 0-3. still here: True/.test(document.body.innerText)", "ranks-after")
    wait_for(page, "/ranks 0-3. True/.test(document.body.innerText)", "ranks-after")
    shoot(page, "ranks")


PLAY = """
import hpclab
client = hpclab.connect(workers=2)
client
---
play = hpclab.playground.Playground(client, hpclab.models.CNN, "fashion_mnist", steps=2000)
play
---
import gc, comm, matplotlib.figure
from IPython.display import HTML
def held():
    gc.collect()
    figures = [one for one in gc.get_objects() if issubclass(type(one), matplotlib.figure.Figure)]
    return len(comm.get_comm_manager().comms), len(figures)
before = held()
for number in range(50):
    play.place.update(HTML(play.page(play.run.rows)))
all(now <= then for now, then in zip(held(), before))  # what still drew the run may end meanwhile
---
client.close()
"""


def test_the_playground_and_the_card_answer_the_keyboard(page, lab, home):
    """A slider relaunches the gang while the run of before goes on; Stop ends it; the card follows its control.

    And 50 updates leave no comm, no figure and no second picture behind.
    """
    from playwright.sync_api import expect

    name = "playground.ipynb"
    write_notebook(home, name, [source.strip() for source in PLAY.split("---")])
    open_notebook(page, lab, name)
    card, play, many, close = (page.locator(".jp-Notebook .jp-CodeCell").nth(number) for number in range(4))
    run_cell(page, card)
    expect(card.get_by_text("2 workers (this machine)")).to_be_visible(timeout=60_000)
    expect(card.get_by_role("link", name="dashboard")).to_be_visible()
    run_cell(page, play)
    table = play.locator("table")
    expect(table).to_contain_text("2 ranks, 128 a step", timeout=60_000)
    handle = play.get_by_role("slider").nth(1)
    handle.focus()
    handle.press("ArrowRight")
    expect(table).to_contain_text("2 ranks, 256 a step", timeout=60_000)
    expect(table).to_contain_text("before: 2 ranks, 128 a step")
    shoot(page, "playground")
    check_accessible(page)
    play.get_by_role("button", name="Stop").click()
    expect(play.get_by_role("button", name="Stop")).to_be_disabled()
    assert no_rank_left()
    run_cell(page, many)
    expect(many.locator(".jp-OutputArea-output")).to_have_text("True", timeout=300_000)
    assert play.locator("img").count() == 1
    size = card.get_by_role("spinbutton")
    size.fill("3")
    size.press("Enter")
    expect(card.get_by_text("3 workers (this machine)")).to_be_visible(timeout=60_000)
    shoot(page, "card")
    run_cell(page, close)
    expect(close.locator(".jp-InputPrompt")).to_contain_text("[4]", timeout=60_000)


def run_cell(page, cell):
    cell.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
