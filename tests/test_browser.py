"""The notebooks in JupyterLab in a real browser, from top to bottom, as a reader runs them; screenshots are kept."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import no_rank_left, require

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # a cell out of sight is in the page too
}
SHOTS = Path(__file__).parents[1] / "results" / "browser"
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address, up to the notebook's name, and token of a JupyterLab that `hpclab lab` opened on a fresh course."""
    require(CHROMIUM is not None, "chromium")
    home = tmp_path_factory.mktemp("lab")
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
        yield opened(server, home / "log")
    finally:
        server.terminate()
        server.wait(30)
    assert no_rank_left()


def opened(server, log):
    for _ in range(600):
        if found := re.search(r"(http://127\.0\.0\.1:\d+/lab/tree/)00_start.ipynb\?(token=\w+)", log.read_text()):
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
def page(browser):
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    yield page
    page.close()


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
        page.wait_for_function(f"() => {condition}", timeout=180_000)
    except Exception:
        shoot(page, f"failed-{name}")
        raise


def shoot(page, name):
    """Keep a screenshot of the whole notebook."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    scroller = page.locator(".jp-WindowedPanel-outer").first
    height = scroller.evaluate("e => e.scrollHeight")
    page.set_viewport_size({"width": 1100, "height": min(height + 150, 12_000)})
    scroller.evaluate("e => e.scrollTo(0, 0)")
    page.wait_for_timeout(1000)
    page.screenshot(path=SHOTS / f"{name.replace('/', '-')}.png")


@pytest.mark.parametrize("name", ["00_start.ipynb", "zh/00_start.ipynb", "03_cnn.ipynb"])
def test_notebook_runs_from_top_to_bottom(page, lab, name):
    open_notebook(page, lab, name)
    choose(page, "Run", "Run All Cells")
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
    wait_for(page, f"{prompts}.every(prompt => /\\[\\d+\\]/.test(prompt.innerText))", name)
    shoot(page, name)
    outputs = page.locator(".jp-OutputArea-output")
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert outputs.get_by_text("Error displaying widget").count() == 0
    assert outputs.locator("img").count() >= 1
    assert page.locator(".hpclab-result[data-status=fail]").count() >= 1, "an unsolved exercise reports"
    if "start" in name:
        assert page.locator(".widget-slider").count() == 1
        assert outputs.locator("table").count() >= 2


def test_the_race_button_replaces_the_race(page, lab):
    """The reader predicts, presses, and finds the new race where the old one was."""
    open_notebook(page, lab, "00_start.ipynb")
    page.locator(".jp-CodeCell").last.click()
    choose(page, "Run", "Run All Above Selected Cell")
    wait_for(page, "document.body.innerText.includes('You predicted 1.0')", "first-race")
    before = race_outputs(page)
    page.get_by_role("slider").focus()
    page.keyboard.press("ArrowRight")
    page.locator("button", has_text="Race").click()
    wait_for(page, "document.body.innerText.includes('You predicted 1.1')", "second-race")
    after = race_outputs(page)
    assert len(after) == len(before) == 1
    assert after != before
    shoot(page, "00_start-pressed")


def race_outputs(page):
    return page.locator(".jp-RenderedHTMLCommon p", has_text="You predicted").all_inner_texts()
