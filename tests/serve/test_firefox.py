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


# What the browser itself can do, asked by a click as browsers want it, without the page's code.
# A browser without an audio device neither begins nor says so.
PROBE = """(() => {
  const within = (promise) => Promise.race([
    promise.then(() => true, () => false),
    new Promise((resolve) => setTimeout(resolve, 10000, false)),
  ]);
  const ask = async () => {
    const audio = within(new AudioContext().resume());
    const microphone = within(
      (async () => {
        const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
        stream.getTracks().forEach((track) => track.stop());
      })(),
    );
    window.probed = { audio: await audio, microphone: await microphone };
  };
  document.querySelector("h1").addEventListener("click", ask, { once: true });
})()"""


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


def probe(page) -> dict:
    """Whether the browser plays audio, and whether it has a microphone."""
    page.evaluate(PROBE)
    page.press("document.querySelector('h1')")
    page.release()
    wait(page, "window.probed !== undefined")
    return page.evaluate("window.probed")


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
    has_audio = probe(page)["audio"]
    page.press(EXAMPLE)
    page.release()
    wait(page, f"{reports('ended')}.length === 1" if has_audio else MUTE)
    assert page.evaluate(f"{ANSWER}.querySelector('span').textContent") == SENTENCE
    assert page.errors == []
    errors = page.evaluate("window.minomni.errors")
    if not has_audio:
        (error,) = errors
        assert error.startswith("no audio")
        return
    assert errors == []
    (ended,) = page.evaluate(reports("ended"))
    assert ended["played"] > RATE
    assert len(page.evaluate("window.minomni.latency")) == 4


def test_the_microphone_is_heard(page, monkeypatch):
    """While the button is held, audio reaches the server. The page says where none can."""
    heard = []
    append = HANDLERS["input_audio_buffer.append"]

    async def recorded(conversation, event):
        heard.append(event["audio"])
        await append(conversation, event)

    monkeypatch.setitem(HANDLERS, "input_audio_buffer.append", recorded)
    can_hear = all(probe(page).values())
    page.press(HOLD)
    for _ in range(SECONDS * 5):
        if len(heard) > 10 or page.evaluate("window.minomni.errors"):
            break
        time.sleep(0.2)
    page.release()
    errors = page.evaluate("window.minomni.errors")
    if not can_hear:
        (error,) = errors
        assert error.startswith("no microphone")
        return
    assert errors == []
    assert len(heard) > 10
