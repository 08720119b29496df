"""The page in Firefox: words, audio, and the microphone."""

import os
import time
from pathlib import Path

import pytest
from firefox import Firefox
from serving import RATE, SECONDS

from minomni.serve.realtime import HANDLERS

pytestmark = pytest.mark.slow
SENTENCE = "the red circle is above the blue square"
EXAMPLE = "document.querySelector('#list button')"  # which asks for it
ANSWER = "document.querySelector('#log li.model')"
MUTE = "window.minomni.state.mute"
HOLD = "document.querySelector('#hold')"
PICTURES = os.environ.get("MINOMNI_SCREENSHOTS")  # a folder; by default none are kept


@pytest.fixture
def page(request, server, tmp_path):
    browser = Firefox(tmp_path)
    try:
        browser.goto(server.url)
        wait(browser, "document.querySelector('#status').textContent.includes('ready')")
        yield browser
        if PICTURES:
            Path(PICTURES, f"{request.node.name}.png").write_bytes(browser.picture())
    finally:
        browser.close()


def wait(page, condition: str) -> None:
    """Wait for a condition."""
    for _ in range(SECONDS * 5):
        if page.evaluate(condition):
            return
        time.sleep(0.2)
    shown = page.evaluate("document.body.innerText")
    raise AssertionError(f"not so: {condition}: {shown}: {page.errors}")


def reports(kind: str) -> str:
    """The reports of the player of one kind."""
    return f"window.minomni.played.filter((m) => m.kind === '{kind}')"


def test_an_answer_is_shown_and_played(page):
    """Without an audio device the words come alone, and the page says so."""
    page.press(EXAMPLE)
    page.release()
    wait(
        page,
        f"{reports('ended')}.length === 1 || ({MUTE} && !{ANSWER}?.ariaBusy && {ANSWER} !== null)",
    )
    assert page.evaluate(f"{ANSWER}.querySelector('span').textContent") == SENTENCE
    if page.evaluate(MUTE):
        (error,) = page.evaluate("window.minomni.errors")
        assert error.startswith("no audio")
        pytest.skip("this browser has no audio device: words only")
    (ended,) = page.evaluate(reports("ended"))
    assert ended["played"] > RATE
    assert len(page.evaluate("window.minomni.latency")) == 4
    assert page.evaluate("window.minomni.errors") == []
    assert page.errors == []


def test_the_microphone_is_heard(page, monkeypatch):
    """While the button is held, audio reaches the server."""
    heard = []
    append = HANDLERS["input_audio_buffer.append"]

    async def recorded(conversation, event):
        heard.append(event["audio"])
        await append(conversation, event)

    monkeypatch.setitem(HANDLERS, "input_audio_buffer.append", recorded)
    page.press(HOLD)
    for _ in range(SECONDS * 5):
        if len(heard) > 10 or page.evaluate("window.minomni.errors"):
            break
        time.sleep(0.2)
    page.release()
    errors = page.evaluate("window.minomni.errors")
    if any(error.startswith("no microphone") for error in errors):
        pytest.skip("this browser has no microphone or no audio device")
    assert errors == []
    assert len(heard) > 10
