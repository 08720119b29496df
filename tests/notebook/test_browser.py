"""What only a browser sees: notebooks in JupyterLab run without an error, and their figures follow
sliders and buttons.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[2]
FIRST = (
    "06_tmrope",
    "01_log_mel",
    "12_streaming",
)  # what is touched most; others stand in for missing ones
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
)
BUTTON = ".widget-toggle-buttons button"
CONTROL = f":is(.widget-slider .noUi-handle, {BUTTON})"
SESSION = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session"
IDLE = f"() => {SESSION}?.kernel?.status === 'idle'"
ORDER = "command => window.jupyterapp.commands.execute(command)"
COUNTS = """() => window.jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model)
              .filter(cell => cell.type === 'code').map(cell => cell.executionCount)"""
LISTEN = """window.played = []; const start = AudioBufferSourceNode.prototype.start;
            AudioBufferSourceNode.prototype.start = function (when) {
                const loudest = Math.max(...this.buffer.getChannelData(0).map(Math.abs));
                window.played.push([when, this.buffer.duration, loudest]);
                return start.call(this, when); };"""


def chosen() -> list[str]:
    """Three notebooks with something to drag or to choose."""
    moving = [
        path.stem
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        if "explore(" in path.read_text(encoding="utf-8")
    ]
    return sorted(moving, key=lambda name: name not in FIRST)[: len(FIRST)]


def find_browser() -> str:
    """The path of a Chromium; on a machine of continuous integration it is installed if there is
    none.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and os.environ.get("CI") and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"],
            capture_output=True,
        )
        found = shutil.which("chromium")
    return found or pytest.skip(f"no Chromium here: none of {', '.join(BROWSERS)} is on the PATH")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a reader works with, since JupyterLab saves what it runs."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("minomni", "notebooks", "data_samples"):
        shutil.copytree(
            ROOT / folder,
            copy / folder,
            ignore=shutil.ignore_patterns("__pycache__", "*checkpoints"),
        )
    return copy


@pytest.fixture(scope="module")
def lab(checkout, tmp_path_factory):
    """lab(folder): the address of a JupyterLab that was started there."""
    started = []

    def start(folder: str) -> str:
        settings = tmp_path_factory.mktemp("jupyter")
        (settings / "labconfig").mkdir()
        news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
        (settings / "labconfig" / "page_config.json").write_text(json.dumps(news))
        places = (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "JUPYTERLAB_WORKSPACES_DIR",
            "JUPYTERLAB_SETTINGS_DIR",
            "IPYTHONDIR",
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--ip=127.0.0.1",
            f"--port={port}",
            "--allow-root",
            "--IdentityProvider.token=",
            "--LabApp.expose_app_in_browser=True",
        ]
        log = (settings / "log").open("w")
        started.append(
            subprocess.Popen(
                command,
                cwd=checkout / folder,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", **dict.fromkeys(places, str(settings))},
            )
        )
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):  # at least 150 s: a busy machine is slow to start it
            try:
                return urlopen(f"{address}/api", timeout=5) and address
            except URLError:
                time.sleep(0.25)
        pytest.fail(f"JupyterLab did not start:\n{(settings / 'log').read_text()}")

    yield start
    for server in started:
        server.terminate()
    for server in started:
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here")
    path = find_browser()
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def addresses(lab):
    """Where each notebook is opened: in a server of the root, the last one in a server of
    notebooks/.
    """
    *most, last = chosen()
    root = lab(".")
    return {name: f"{root}/lab/tree/notebooks/{name}.ipynb?reset" for name in most} | {
        last: f"{lab('notebooks')}/lab/tree/{last}.ipynb?reset"
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen())
def test_a_reader_runs_a_notebook_and_uses_its_controls(name, browser, addresses, tmp_path):
    """No cell fails, nothing complains in the page, and the figure under the first slider or button
    becomes another one.
    """
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(150_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.add_init_script(LISTEN)
    page.goto(addresses[name])
    page.wait_for_function(IDLE)
    page.evaluate(ORDER, "notebook:clear-all-cell-outputs")
    page.evaluate(
        ORDER, "notebook:run-all-cells"
    )  # comes back when the last cell is done, or one has failed
    counts = page.evaluate(COUNTS)
    assert counts == list(range(1, len(counts) + 1))
    control = page.locator(CONTROL).first
    figure = page.locator(f".jp-OutputArea-output:has({CONTROL}) img").first
    control.scroll_into_view_if_needed()
    figure.wait_for()
    before = figure.get_attribute("src")
    page.screenshot(path=tmp_path / f"{name}_before.png")
    if page.locator(".widget-slider").count():
        control.focus()
        control.press("ArrowRight")
    else:
        page.locator(f"{BUTTON}:not(.mod-active)").first.click()
    page.wait_for_function(
        "([image, old]) => image.isConnected === false || image.src !== old",
        arg=[figure.element_handle(), before],
    )
    figure.wait_for()
    assert figure.get_attribute("src") != before
    page.screenshot(path=tmp_path / f"{name}_after.png")
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    if "minomni.notebook.player" in (ROOT / "notebooks" / f"{name}.ipynb").read_text(
        encoding="utf-8"
    ):
        check_what_is_played(page)
        page.screenshot(path=tmp_path / f"{name}_heard.png")
    assert errors == []
    page.close()


def check_what_is_played(page) -> None:
    """The reply came in several audible pieces, none of them before the previous one was over."""
    line = page.locator(".minomni-player")
    line.scroll_into_view_if_needed()
    page.get_by_text("heard while they were made").wait_for()
    begins, seconds, loudness = zip(*page.evaluate("window.played"))
    waits = [later - begin - length for begin, length, later in zip(begins, seconds, begins[1:])]
    assert len(waits) > 0
    assert min(waits) > -1e-3
    assert max(loudness) > 0.05
    assert f"{sum(seconds):.1f} s, heard" in line.inner_text()
    assert f"gaps: {sum(wait > 1e-3 for wait in waits)}" in line.inner_text()
