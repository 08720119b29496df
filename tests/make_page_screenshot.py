"""Make the screenshot of the README: PYTHONPATH=tests/serve:. python tests/make_page_screenshot.py

Serves tiny and asks in headless Chromium: a typed request, and a spoken question about a picture.
The screenshot is taken while the end of the second answer is played: all words are there, and the
waveform still moves. It needs Chromium, and playwright of requirements-dev.txt.
"""

import io
from pathlib import Path

from measure_page import FLAGS
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from serving import RATE, SAMPLES, running
from test_page import (
    ANSWER,
    PATIENCE_MS,
    QUIET_MICROPHONE,
    find_browser,
    speak,
    wait,
    wait_for_player,
)

import minomni

SCREENSHOT = Path(__file__).parents[1] / "notebooks" / "serve_page.png"
SIZE = {"width": 1280, "height": 910}
LAST_MS = 700  # of the answer, still to be played


def converse(page: Page) -> None:
    """Ask twice -> the end of the second answer is being played."""
    page.get_by_role("button", name="say the red circle is above the blue square").click()
    wait_for_player(page, "ended")
    page.set_input_files("#picture", SAMPLES / "scene.png")
    page.locator("#preview").wait_for()
    page.get_by_role("button", name="Hold to talk").focus()
    page.keyboard.down(" ")
    wait(page, "window.minomni.state.heldAt > 0")
    speak(page, "question.wav")
    page.keyboard.up(" ")
    page.locator("#log li.model", has_text=ANSWER).wait_for()
    wait(page, "window.minomni.state.answer?.kept")
    chunks = "window.minomni.state.answer.chunks.reduce((sum, chunk) => sum + chunk.length, 0)"
    played_ms = "performance.now() - answer.askedAt - answer.firstMs"
    length_ms = page.evaluate(chunks) * 1000 / RATE
    wait(
        page,
        f"((answer) => answer.firstMs && {played_ms} > {length_ms - LAST_MS})"
        "(window.minomni.state.answer)",
    )


def main() -> None:
    with running(minomni.load("tiny")) as server, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=list(FLAGS))
        context = browser.new_context(permissions=["microphone"], viewport=SIZE)
        context.add_init_script(QUIET_MICROPHONE)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(server.url)
        wait(page, "document.querySelector('#status').textContent.includes('ready')")
        converse(page)
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        browser.close()
    shot.save(SCREENSHOT, optimize=True)
    print(f"{SCREENSHOT}: {SCREENSHOT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
