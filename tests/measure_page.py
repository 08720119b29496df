"""First sound of the page, on a machine that does nothing else.

    PYTHONPATH=tests/serve:. python tests/measure_page.py

Serves tiny, holds the button of the page in headless Chromium while a recording is spoken, and
prints the page's own time from the end of the question to the first sample played: the median and
the times of five questions. It needs Chromium, and playwright of requirements-dev.txt.
"""

from statistics import median

from playwright.sync_api import Page, sync_playwright
from serving import running
from test_page import PATIENCE_MS, QUIET_MICROPHONE, WISH, find_browser, speak, wait

import minomni

ROUNDS = 5
FLAGS = ("--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required")


def question(page: Page) -> float:
    """Speak the recording with the button held -> ms until the page plays its answer."""
    page.evaluate("() => { window.minomni.latency = null; window.minomni.state.heldAt = 0; }")
    page.keyboard.down(" ")
    wait(page, "window.minomni.state.heldAt > 0")
    speak(page, WISH)
    page.keyboard.up(" ")
    wait(page, "window.minomni.latency && !window.minomni.state.answer")
    return sum(page.evaluate("window.minomni.latency"))


def main() -> None:
    with running(minomni.load("tiny")) as server, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=list(FLAGS))
        context = browser.new_context(permissions=["microphone"])
        context.add_init_script(QUIET_MICROPHONE)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(server.url)
        wait(page, "document.querySelector('#status').textContent.includes('ready')")
        page.get_by_role("button", name="Hold to talk").focus()
        question(page)  # warms up
        times = [question(page) for _ in range(ROUNDS)]
        browser.close()
    print(f"first sound of the page: {median(times):.0f} ms", [round(time) for time in times])


if __name__ == "__main__":
    main()
