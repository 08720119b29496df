"""First sound of the page, on a machine that does nothing else.

    PYTHONPATH=tests/serve:. python tests/measure_page.py --json page.json

Serves tiny, holds the button of the page in headless Chromium while a recording is spoken, and
prints the page's own time from the end of the question to the first sample played: the median and
the times of ten questions. It also prints the gaps of their answers: silence that the player plays
because the next chunk is late, in whole blocks of 128 samples. --json writes all that to a file
which tests/refresh_readme.py --page takes. It needs Chromium, and playwright of
requirements-dev.txt.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import NamedTuple

from playwright.sync_api import Page, sync_playwright
from serving import RATE, running
from test_page import PATIENCE_MS, QUIET_MICROPHONE, WISH, find_browser, speak, wait

import minomni

ROUNDS = 10
BLOCK = 128  # samples that a browser plays at once
FLAGS = ("--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required")


class Played(NamedTuple):
    """How one answer was played."""

    first_ms: float  # from the end of the question to its first sample
    samples: int
    gaps: int  # blocks without samples, or without enough


def question(page: Page) -> Played:
    """Speak the recording with the button held, and hear the answer to its end."""
    page.evaluate(
        """() => {
            window.minomni.latency = null;
            window.minomni.state.heldAt = 0;
            window.minomni.played.length = 0;
        }"""
    )
    page.keyboard.down(" ")
    wait(page, "window.minomni.state.heldAt > 0")
    speak(page, WISH)
    page.keyboard.up(" ")
    wait(page, "window.minomni.latency && !window.minomni.state.answer")
    ended = page.evaluate("window.minomni.played.find((report) => report.kind === 'ended')")
    first_ms = sum(page.evaluate("window.minomni.latency"))
    return Played(first_ms, ended["played"], ended["gaps"])


def summary(answers: list[Played]) -> dict:
    """The numbers of the documents, and those of each answer."""
    times = [answer.first_ms for answer in answers]
    gaps = [answer.gaps for answer in answers]
    return {
        "questions": len(answers),
        "median_ms": median(times),
        "least_ms": min(times),
        "most_ms": max(times),
        "speech_s": sum(answer.samples for answer in answers) / RATE,
        "answers_with_gaps": sum(count > 0 for count in gaps),
        "gaps_ms": 1000 * BLOCK * sum(gaps) / RATE,
        "first_ms": times,
        "gaps": gaps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the first sound of the page.")
    parser.add_argument("--json", type=Path, help="a file for the results")
    arguments = parser.parse_args()
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
        found = summary([question(page) for _ in range(ROUNDS)])
        browser.close()
    times = [round(time) for time in found["first_ms"]]
    print(f"first sound of the page: {found['median_ms']:.0f} ms", times)
    print(
        f"gaps: {found['gaps_ms']:.0f} ms in {found['answers_with_gaps']} answers, of "
        f"{found['speech_s']:.0f} s of speech in all"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
