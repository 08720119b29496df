"""The page in a real browser, with a recording as its microphone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import SAMPLES, load_tiny, running

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 120_000  # ms of patience with a slow machine
ANSWER = "the red circle is left of the black square"
PICTURES = os.environ.get("MINOMNI_SCREENSHOTS")  # a folder; by default none are kept


def find_browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and os.environ.get("CI") and shutil.which("apt-get") and os.geteuid() == 0:
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        subprocess.run(install, capture_output=True)
        found = shutil.which("chromium")
    return found or pytest.skip(f"no Chromium here: none of {', '.join(BROWSERS)} is on the PATH")


@pytest.fixture(scope="module")
def microphone(tmp_path_factory) -> Path:
    """A recording that the browser repeats: a question, then silence."""
    import numpy as np
    import soundfile

    wave, rate = soundfile.read(SAMPLES / "question.wav", dtype="float32")
    path = tmp_path_factory.mktemp("microphone") / "question.wav"
    silence = np.zeros(4 * rate, np.float32)
    soundfile.write(path, np.concatenate((silence[:rate], wave, silence)), rate)
    return path


@pytest.fixture(scope="module")
def server():
    with running(load_tiny()) as made:
        yield made


@pytest.fixture(scope="module")
def browser(microphone):
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--autoplay-policy=no-user-gesture-required",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
    ]
    with sync_api.sync_playwright() as play:
        made = play.chromium.launch(executable_path=find_browser(), args=flags)
        yield made
        made.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(permissions=["microphone", "camera"])
    made = context.new_page()
    made.set_default_timeout(SECONDS)
    made.problems = []
    made.on("console", lambda message: note(made, message))
    made.on("pageerror", lambda error: made.problems.append(str(error)))
    made.goto(server.url)
    wait(made, "document.querySelector('#status').textContent.includes('ready')")
    yield made
    assert made.problems == []
    context.close()


def wait(page, condition: str) -> None:
    """Wait for a condition. playwright's own wait needs eval, which the page forbids."""
    for _ in range(SECONDS // 100):
        if page.evaluate(f"() => {condition}"):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not so: {condition}: {page.locator('#log').inner_text()}")


def note(page, message):
    if message.type in ("error", "warning"):
        page.problems.append(message.text)


def shot(page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/{name}.png", full_page=True)


def ended(page) -> dict:
    """Wait until an answer was played to its end -> the player's last message."""
    wait(page, "window.minomni.played.some((m) => m.kind === 'ended')")
    return page.evaluate("window.minomni.played.findLast((m) => m.kind === 'ended')")


def test_typed_example_is_answered_with_sound(page):
    page.get_by_role("button", name="where is the red circle").click()
    page.get_by_text(ANSWER).wait_for()
    assert ended(page)["played"] > 24_000
    latency = page.evaluate("window.minomni.latency")
    assert len(latency) == 4
    assert page.get_by_role("link", name="as wav").count() == 1
    for width, height, scheme, name in (
        (1280, 900, "light", "light"),
        (820, 1100, "dark", "dark"),
        (390, 844, "light", "phone"),
    ):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": height})
        overflow = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert not page.evaluate(overflow), name
        shot(page, name)


def test_open_microphone_hears_answers_and_is_interrupted(page):
    """The recording repeats: the next question interrupts the answer, or follows it.

    The words are not compared: the browser's filters change what the model hears.
    """
    page.set_input_files("#picture", SAMPLES / "scene.png")
    page.locator("#preview").wait_for()
    page.get_by_role("button", name="Open microphone").click()
    wait(page, "document.querySelectorAll('#log li.model').length >= 2")
    wait(page, "window.minomni.played.some((m) => m.kind === 'first')")
    shot(page, "open")
    page.get_by_role("button", name="Open microphone").click()
    assert page.evaluate("window.minomni.errors") == []


def test_push_to_talk(page):
    page.set_input_files("#picture", SAMPLES / "scene.png")
    hold = page.get_by_role("button", name="Hold to talk")
    hold.focus()
    page.keyboard.down(" ")
    page.wait_for_timeout(6_000)  # the recording lasts as long, and begins somewhere
    page.keyboard.up(" ")
    wait(page, "window.minomni.played.some((m) => m.kind === 'first')")
    page.get_by_role("button", name="Stop").click()
    wait(page, "window.minomni.played.some((m) => m.kind === 'stopped')")
    assert page.locator("#log li.model.cut").count() == 1
    assert page.evaluate("window.minomni.errors") == []


def test_everything_has_a_name(page):
    """Each control has a name for screen readers, and the keyboard reaches it."""
    unnamed = """() => [...document.querySelectorAll('button, input, select, canvas')]
        .filter((e) => !(e.textContent.trim() || e.labels?.length || e.ariaLabel)).length"""
    assert page.evaluate(unnamed) == 0
    page.keyboard.press("Tab")
    reached = set()
    for _ in range(14):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert {"text", "send", "hold", "open", "camera", "voice"} <= reached
