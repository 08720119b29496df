"""The page in a real browser, with recordings as its microphone."""

import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from serving import RATE, SAMPLES, base64_of, keep_first_answers, running, spoken, wait_until

from minomni.serve import realtime

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE_MS = 120_000  # with a slow machine
ANSWER = "the red circle is left of the black square"
# Two spoken requests, and the sentences that they ask for.
WISH = "wish.wav"
WISHED = "the yellow square is left of the yellow cross"
OTHER_WISH = "speech/02.flac"
OTHER_WISHED = "a red circle and a yellow circle"
TOKEN = "correct-horse-battery"
HOST_NAME = "talk.example"  # which the browser finds on this machine
PICTURES = os.environ.get("MINOMNI_SCREENSHOTS")  # a folder; by default none are kept
# A microphone that is silent until speak(samples) is called: what is said, and when, does not
# depend on the speed of the machine.
QUIET_MICROPHONE = """
const getUserMedia = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
navigator.mediaDevices.getUserMedia = async (constraints) => {
  if (constraints.video) return getUserMedia(constraints);
  const context = new AudioContext({ sampleRate: 24000 });
  await context.resume();
  const microphone = context.createMediaStreamDestination();
  const silence = new ConstantSourceNode(context, { offset: 0 });
  silence.connect(microphone);
  silence.start();
  window.speak = (base64) => new Promise((resolve) => {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const samples = Float32Array.from(new Int16Array(bytes.buffer), (value) => value / 32768);
    const buffer = new AudioBuffer({ length: samples.length, sampleRate: 24000 });
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.onended = resolve;
    source.connect(microphone);
    source.start();
  });
  return microphone.stream;
};
"""
# An audio device that begins after the answer is complete.
SLOW_LOUDSPEAKER = """
window.AudioContext = class extends AudioContext {
  constructor(options) {
    super(options);
    this.suspend();
  }
  async resume() {
    while (!window.minomni.state.answer?.done) {
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    await super.resume();
  }
};
"""
# A microphone whose last samples come late after the button was let go.
SLOW_CAPTURE = """
const post = MessagePort.prototype.postMessage;
MessagePort.prototype.postMessage = function (message, ...rest) {
  const send = () => post.call(this, message, ...rest);
  if (message?.active === false) setTimeout(send, 700);
  else send();
};
addEventListener("keyup", () => { window.releasedAt ??= performance.now(); }, true);
"""
# What WebKit says where there is neither microphone nor camera.
NO_DEVICES = """
navigator.mediaDevices.getUserMedia = async () => {
  throw new OverconstrainedError("", "Invalid constraint");
};
"""
# A player of its own: chunks of several lengths that are there in time, and others that are late.
PLAY = """async (late) => {
  const { Player } = await import('/static/audio.js');
  const reports = [];
  const reported = async (kind) => {
    while (!reports.some((report) => report.kind === kind)) {
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  };
  const player = await Player.open((report) => reports.push(report));
  await player.resume();
  player.send({ kind: 'begin', item: 'x' });
  for (const length of [1, 127, 128, 129, 1919, 4800]) {
    player.send({ kind: 'chunk', item: 'x', samples: new Float32Array(length) });
  }
  if (late) {
    await reported('first');
    const end = player.context.currentTime + 1;
    while (player.context.currentTime < end) {
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    player.send({ kind: 'chunk', item: 'x', samples: new Float32Array(100) });
  }
  player.send({ kind: 'complete', item: 'x' });
  await reported('ended');
  return reports.at(-1);
}"""
# Times of the steps of an answer in seconds, its first sample after 200 ms -> what the page shows.
LATENCY = """async () => {
  const { showLatency } = await import('/static/view.js');
  const parts = showLatency({ prefill: 0.02, code: 0.05, mel: 0.1, audio: 0.12 }, 200);
  const widths = [...document.querySelectorAll('#bar i')].map((bar) => bar.style.width);
  const text = document.querySelector('#latency').innerText;
  return { parts: parts.map(Math.round), widths, text };
}"""
# What the two pictures of the audio show, from now on, each state once. A slow test process misses
# none of them.
RECORD_PICTURES = """() => {
  const canvases = ['wave', 'mel'].map((id) => document.getElementById(id));
  window.pictures = canvases.map(() => new Set());
  setInterval(() => {
    canvases.forEach((canvas, i) => window.pictures[i].add(canvas.toDataURL()));
  }, 50);
}"""
# A file that is dropped onto the page.
DROP = """(content) => {
  const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], 'scene.png', { type: 'image/png' }));
  document.body.dispatchEvent(
    new DragEvent('drop', { dataTransfer, bubbles: true, cancelable: true }));
}"""


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
    """A recording that the browser repeats: a request between silences. The second one is long, so
    that the answer of a slow machine is not interrupted by the request's return.
    """
    wave, rate = soundfile.read(SAMPLES / WISH, dtype="float32")
    path = tmp_path_factory.mktemp("microphone") / "microphone.wav"
    before, after = np.zeros(3 * rate, np.float32), np.zeros(60 * rate, np.float32)
    soundfile.write(path, np.concatenate((before, wave, after)), rate)
    return path


@pytest.fixture(scope="module")
def browser(microphone):
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--autoplay-policy=no-user-gesture-required",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
        f"--host-resolver-rules=MAP {HOST_NAME} 127.0.0.1",
    ]
    with sync_api.sync_playwright() as play:
        made = play.chromium.launch(executable_path=find_browser(), args=flags, timeout=PATIENCE_MS)
        yield made
        made.close()


@pytest.fixture
def context(browser):
    made = browser.new_context(permissions=["microphone", "camera"])
    yield made
    made.close()


@pytest.fixture
def page(context, server):
    made = context.new_page()
    made.set_default_timeout(PATIENCE_MS)
    problems = []
    made.on("console", lambda message: note(problems, message))
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.goto(server.url)
    wait(made, "document.querySelector('#status').textContent.includes('ready')")
    yield made
    assert problems == []
    assert made.evaluate("window.minomni.errors") == []


@pytest.fixture
def quiet_page(context, request):
    context.add_init_script(QUIET_MICROPHONE)
    return request.getfixturevalue("page")


@pytest.fixture
def slow_page(context, request):
    context.add_init_script(SLOW_LOUDSPEAKER)
    return request.getfixturevalue("page")


def note(problems: list, message) -> None:
    if message.type in ("error", "warning"):
        problems.append(message.text)


def wait(page, condition: str) -> None:
    """Wait for a condition. playwright's own wait needs eval, which the page forbids."""
    for _ in range(PATIENCE_MS // 100):
        if page.evaluate(f"() => {condition}"):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not so: {condition}: {page.locator('#log').inner_text()}")


def shot(page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/{name}.png", full_page=True)


def speak(page, name: str) -> None:
    """Say a recording to its end."""
    page.evaluate("(audio) => window.speak(audio)", base64.b64encode(spoken(name)).decode())


def wait_for_player(page, kind: str, count: int = 1) -> dict:
    """Wait until the player has reported something so often -> its last report."""
    wait(page, f"window.minomni.played.filter((m) => m.kind === '{kind}').length >= {count}")
    return page.evaluate(f"window.minomni.played.findLast((m) => m.kind === '{kind}')")


def answers(page) -> list[str]:
    """The words of the answers."""
    return page.locator("#log li.model span").all_inner_texts()


def test_a_typed_example_is_answered_with_audio(page):
    page.get_by_role("button", name="where is the red circle").click()
    page.get_by_text(ANSWER).wait_for()
    ended = wait_for_player(page, "ended")
    assert ended["played"] > RATE
    assert len(page.evaluate("window.minomni.latency")) == 4
    bar = page.locator("#latency").inner_text()
    names = ("prefill", "first code", "first mel", "first audio, sent and played")
    assert all(name in bar for name in names)
    assert page.get_by_role("link", name="as wav").count() == 1
    said = page.locator("#log li").all_text_contents()  # what a screen reader says
    assert said[:2] == ["You: ", "You: where is the red circle"]
    assert said[2].startswith(f"Answer: {ANSWER}")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width, height in ((1280, 900), (820, 1100), (390, 844)):
            page.set_viewport_size({"width": width, "height": height})
            overflow = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
            assert not page.evaluate(overflow), (scheme, width)
            shot(page, f"{scheme}_{width}")


def test_the_pictures_of_the_audio_move(page):
    """Waveform and mel spectrogram, while an answer is played."""
    page.evaluate(RECORD_PICTURES)
    page.get_by_role("button", name="say the red circle is above the blue square").click()
    wait_for_player(page, "ended")
    assert min(page.evaluate("window.pictures.map((seen) => seen.size)")) >= 3


def test_a_device_that_begins_after_the_answer_plays_it(slow_page):
    """The page does not claim that there is no audio: its fixture looks at the errors."""
    slow_page.get_by_role("button", name="where is the red circle").click()
    ended = wait_for_player(slow_page, "ended")
    assert ended["played"] > RATE
    assert ended["gaps"] == 0
    assert answers(slow_page) == [ANSWER]


def test_chunks_are_played_without_gaps(page):
    """Chunks that are there in time follow each other at once. A late one leaves a gap, which is
    counted.
    """
    in_time = page.evaluate(PLAY, False)
    assert (in_time["played"], in_time["gaps"]) == (7104, 0)
    late = page.evaluate(PLAY, True)
    assert late["played"] == 7204
    assert late["gaps"] > 0


def test_the_bar_of_the_latency(page):
    """Each part ends where the one after it begins, and the last one at the first sample played."""
    shown = page.evaluate(LATENCY)
    assert shown["parts"] == [20, 30, 50, 100]
    assert shown["widths"] == ["10%", "15%", "25%", "50%"]
    assert shown["text"].startswith("200 ms: prefill 20")


def test_the_parts_of_the_bar_are_those_of_notebook_12():
    """It has one name more, of the first token, which the page counts to the first code."""
    view = (Path(realtime.__file__).parent / "static/view.js").read_text(encoding="utf-8")
    parts = json.loads(re.search(r"const PARTS = (\[.*?\]);", view, re.DOTALL)[1])
    path = SAMPLES.parent / "notebooks/12_streaming.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    (source,) = [source for source in sources if 'names = {"prefill"' in source]
    names = ast.literal_eval(re.search(r"names = (\{.*?\})", source, re.DOTALL)[1])
    assert names.pop("text") == "first token"
    assert [part.partition(",")[0] for part in parts] == list(names.values())


def test_the_wav_that_is_kept(page):
    """It is readable, and holds the audio that was played."""
    page.get_by_role("button", name="say the red circle is above the blue square").click()
    ended = wait_for_player(page, "ended")
    with page.expect_download() as download:
        page.get_by_role("link", name="as wav").click()
    wave, rate = soundfile.read(download.value.path())
    assert rate == RATE
    assert len(wave) == ended["played"]
    assert np.abs(wave).max() > 0.03


def test_open_microphone_is_interrupted(quiet_page, monkeypatch):
    """A second request while the answer to the first one is played: it stops, and each answer has
    the words of its own request.
    """
    keep_first_answers(monkeypatch)
    page = quiet_page
    page.get_by_role("button", name="Open microphone").click()
    wait(page, "window.minomni.state.open")
    speak(page, WISH)
    page.locator("#log li.model", has_text=WISHED).wait_for()
    wait_for_player(page, "first")
    speak(page, OTHER_WISH)
    wait_for_player(page, "first", 2)
    wait_for_player(page, "ended")
    page.get_by_role("button", name="Open microphone").click()
    wait(page, "!window.minomni.state.open")

    assert answers(page) == [WISHED, OTHER_WISHED]
    stopped = page.evaluate("window.minomni.played.filter((m) => m.kind === 'stopped')")
    assert len(stopped) == 1
    assert stopped[0]["played"] > 0
    assert page.locator("#log li.model.cut").count() == 1
    assert page.locator("#log li.user").count() == 2


def test_push_to_talk(quiet_page):
    page = quiet_page
    page.set_input_files("#picture", SAMPLES / "scene.png")
    page.locator("#preview").wait_for()
    page.get_by_role("button", name="Hold to talk").focus()
    page.keyboard.down(" ")
    wait(page, "window.minomni.state.heldAt > 0")
    speak(page, "question.wav")
    page.keyboard.up(" ")
    page.get_by_text(ANSWER).wait_for()
    wait_for_player(page, "ended")
    assert answers(page) == [ANSWER]


def test_each_answer_has_the_chosen_voice(quiet_page, monkeypatch):
    """Of a typed, of a held and of an open-microphone question, and of one after a new choice."""
    voices = []
    answer = realtime.Answer

    def recorded(text, voice, *further):
        voices.append(voice)
        return answer(text, voice, *further)

    monkeypatch.setattr(realtime, "Answer", recorded)
    page = quiet_page
    page.select_option("#voice", "Karl")
    page.get_by_label("Your question").fill("say the digit is three")
    page.keyboard.press("Enter")
    wait_for_player(page, "ended")

    page.get_by_role("button", name="Hold to talk").focus()
    page.keyboard.down(" ")
    wait(page, "window.minomni.state.heldAt > 0")
    speak(page, WISH)
    page.keyboard.up(" ")
    wait_for_player(page, "ended", 2)

    page.get_by_role("button", name="Open microphone").click()
    wait(page, "window.minomni.state.open")
    speak(page, WISH)
    wait_for_player(page, "ended", 3)
    page.select_option("#voice", "Fiona")
    speak(page, WISH)
    wait_for_player(page, "ended", 4)
    assert voices == ["Karl", "Karl", "Karl", "Fiona"]


def test_the_latency_begins_when_the_button_is_let_go(quiet_page):
    """And not when the last samples have arrived."""
    page = quiet_page
    page.evaluate(f"() => {{ {SLOW_CAPTURE} }}")
    page.get_by_role("button", name="Hold to talk").focus()
    page.keyboard.down(" ")
    wait(page, "window.minomni.state.heldAt > 0")
    speak(page, WISH)
    page.keyboard.up(" ")
    asked = "[...window.minomni.state.asked.values(), window.minomni.state.answer].find(Boolean)"
    wait(page, f"{asked} !== undefined")
    late_ms = page.evaluate(f"{asked}.askedAt - window.releasedAt")
    wait_for_player(page, "ended")
    assert 0 <= late_ms < 350


def test_the_first_sound_is_measured(quiet_page):
    """tests/measure_page.py finds its times and gaps, and what tests/refresh_readme.py takes."""
    import measure_page
    from refresh_readme import PAGE_KEYS

    page = quiet_page
    page.get_by_role("button", name="Hold to talk").focus()
    answers = [measure_page.question(page) for _ in range(2)]
    assert all(0 < answer.first_ms < PATIENCE_MS for answer in answers)
    assert all(answer.samples > RATE for answer in answers)
    played = [(900, 12_000, 0), (400, 24_000, 3), (500, 24_000, 0)]
    found = measure_page.summary([measure_page.Played(*answer) for answer in played])
    assert [found[key] for key in PAGE_KEYS] == [3, 500, 400, 900, 2.5, 1, 16]
    assert found["gaps"] == [0, 3, 0]


def test_the_readmes_screenshot(quiet_page):
    """tests/make_page_screenshot.py shows a spoken answer that is complete and still moves."""
    import make_page_screenshot

    page = quiet_page
    make_page_screenshot.converse(page)
    assert answers(page) == ["the red circle is above the blue square", ANSWER]
    assert page.get_by_role("link", name="as wav").count() == 2
    assert len(page.evaluate("window.minomni.latency")) == 4
    assert page.evaluate("window.minomni.state.answer.playing")
    wait_for_player(page, "ended", 2)


def test_missing_devices_are_named(context, server):
    """By what is missing, whatever the browser calls it."""
    context.add_init_script(NO_DEVICES)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(server.url)
    wait(page, "document.querySelector('#status').textContent.includes('ready')")
    page.get_by_role("button", name="Open microphone").click()
    page.get_by_role("button", name="Camera").click()
    page.get_by_text("no microphone: none was found").wait_for()
    page.get_by_text("no camera: none was found").wait_for()
    page.close()


def test_the_camera_sends_frames(quiet_page, monkeypatch):
    """While the user speaks, and not before."""
    sizes = []
    read_image = realtime.read_image

    def recorded(*arguments):
        image = read_image(*arguments)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(realtime, "read_image", recorded)
    page = quiet_page
    page.get_by_role("button", name="Camera").click()
    page.locator("#view").wait_for()
    assert page.locator("#camera").get_attribute("aria-pressed") == "true"
    wait(page, "document.querySelector('#view').videoWidth === 320")
    assert sizes == []
    page.get_by_role("button", name="Hold to talk").focus()
    page.keyboard.down(" ")
    wait(page, "window.minomni.state.heldAt > 0")
    speak(page, "question.wav")
    wait_until(lambda: len(sizes) >= 2)
    page.keyboard.up(" ")
    wait_for_player(page, "ended")
    assert set(sizes) == {(320, 240)}

    camera = page.evaluate_handle("window.minomni.state.camera.getTracks()[0]")
    page.get_by_role("button", name="Camera").click()
    assert page.locator("#view").is_hidden()
    assert camera.evaluate("(track) => track.readyState") == "ended"


def test_a_typed_question_about_what_the_camera_sees(page, monkeypatch):
    """It comes with the current frame, unless a picture was chosen. The page tells what the camera
    may see.
    """
    parts = []
    item_action = realtime.Conversation.item_action

    async def recorded(conversation, part):
        parts.append(part)
        return await item_action(conversation, part)

    monkeypatch.setattr(realtime.Conversation, "item_action", recorded)
    assert "colored shapes drawn flat on a plain background" in page.locator("#about").inner_text()
    page.get_by_role("button", name="Camera").click()
    page.locator("#view").wait_for()
    wait(page, "document.querySelector('#view').videoWidth === 320")
    question = page.get_by_label("Your question")
    question.fill("what color is the circle")
    page.keyboard.press("Enter")
    wait_for_player(page, "ended")
    assert [part["type"] for part in parts] == ["input_image", "input_text"]
    assert parts[0]["image_url"].startswith("data:image/jpeg;base64,")
    frame = base64.b64decode(parts[0]["image_url"].partition(",")[2])
    assert Image.open(io.BytesIO(frame)).size == (320, 240)

    page.set_input_files("#picture", SAMPLES / "scene.png")
    page.locator("#preview").wait_for()
    question.fill("where is the red circle")
    page.keyboard.press("Enter")
    wait_for_player(page, "ended", 2)
    assert answers(page)[-1] == ANSWER
    page.get_by_role("button", name="Camera").click()
    question.fill("say the digit is three")
    page.keyboard.press("Enter")
    wait_for_player(page, "ended", 3)
    kinds = [part["type"] for part in parts[2:]]
    assert kinds == ["input_image", "input_text", "input_text"]
    assert parts[2]["image_url"].startswith("data:image/png;base64,")


def test_a_dropped_picture(page):
    """It is shown, and the next question is about it."""
    page.evaluate(DROP, base64_of("scene.png"))
    page.locator("#preview").wait_for()
    assert page.locator("#preview").get_attribute("src").startswith("data:image/png;base64,")
    page.get_by_label("Your question").fill("where is the red circle")
    page.keyboard.press("Enter")
    page.get_by_text(ANSWER).wait_for()
    assert page.locator("#picked").is_hidden()
    wait_for_player(page, "ended")


def test_a_large_photo_fits_into_a_message(page, tmp_path):
    """Noise is as large as a photo can be."""
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    photo = tmp_path / "photo.png"
    Image.fromarray(noise).save(photo)
    assert photo.stat().st_size > 3 * 2**20
    page.set_input_files("#picture", photo)
    wait(page, "document.querySelector('#preview').naturalWidth === 1024")
    sent = page.evaluate("window.minomni.state.picture")
    assert sent.startswith("data:image/jpeg;base64,")
    assert len(sent) < 700_000
    page.get_by_label("Your question").fill("how many shapes are there")
    page.keyboard.press("Enter")
    wait_for_player(page, "ended")


def test_a_picture_is_asked_about_again(page):
    """A click on it in the conversation makes it the picture of the next question."""
    page.get_by_role("button", name="what color is the circle").click()
    wait_for_player(page, "ended")
    page.locator("#log").get_by_role("button", name="ask about it again").click()
    page.locator("#preview").wait_for()
    page.get_by_label("Your question").fill("how many shapes are there")
    page.keyboard.press("Enter")
    wait_for_player(page, "ended", 2)
    assert answers(page) == ["the circle is yellow", "there are three shapes"]
    assert page.locator("#log").get_by_role("button", name="ask about it again").count() == 2
    assert page.locator("#picked").is_hidden()


def test_the_token(context, trained):
    """The page asks for the server's token, and again after a wrong one, which it says."""
    with running(trained, token=TOKEN) as guarded:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(guarded.url)
        page.get_by_label("asks for its token").fill("wrong")
        assert page.locator("#wrong").is_hidden()
        page.get_by_role("button", name="Connect").click()
        page.locator("#wrong").wait_for()
        assert page.locator("#wrong").inner_text() == "This is not the server's token."
        page.get_by_label("asks for its token").fill(TOKEN)
        page.get_by_role("button", name="Connect").click()
        wait(page, "document.querySelector('#status').textContent.includes('ready')")
        assert page.locator("#ask").is_hidden()
        page.close()


def test_a_page_without_https(context, trained):
    """Browsers then give it no microphone, no camera and no player. It says why, and answers in
    words.
    """
    why = "browsers allow it on https and on localhost only"
    with running(trained, token=TOKEN, names=(HOST_NAME,)) as remote:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"http://{HOST_NAME}:{remote.port}")
        page.get_by_label("asks for its token").fill(TOKEN)
        page.get_by_role("button", name="Connect").click()
        wait(page, "document.querySelector('#status').textContent.includes('ready')")
        page.get_by_role("button", name="where is the red circle").click()
        page.get_by_text(ANSWER).wait_for()
        wait(page, "!window.minomni.state.answer")
        page.get_by_role("button", name="Open microphone").click()
        page.get_by_role("button", name="Camera").click()
        messages = [f"no {name}: {why}" for name in ("audio", "microphone", "camera")]
        for message in messages:
            page.get_by_text(message).wait_for()
        assert len(page.evaluate("window.minomni.errors")) == len(messages)
        page.close()


def test_a_server_without_a_free_session(context, trained):
    """The page says so, and that it is disconnected where the connection is lost later."""
    with running(trained, sessions=1) as full:
        context.set_default_timeout(PATIENCE_MS)
        first = context.new_page()
        first.goto(full.url)
        wait(first, "document.querySelector('#status').textContent.includes('ready')")
        second = context.new_page()
        second.goto(full.url)
        second.get_by_text("all sessions of the server are in use; reload").wait_for()
        first.evaluate("window.minomni.state.socket.close()")
        first.get_by_text("disconnected; reload the page to begin again").wait_for()
        second.close()
        first.close()


def test_stop(page, monkeypatch):
    """By the button and by a key. The server is told how much was heard."""
    keep_first_answers(monkeypatch, 2)
    truncated = []
    truncate = realtime.HANDLERS["conversation.item.truncate"]

    async def recorded(conversation, event):
        truncated.append(event["audio_end_ms"])
        await truncate(conversation, event)

    monkeypatch.setitem(realtime.HANDLERS, "conversation.item.truncate", recorded)
    stops = (page.get_by_role("button", name="Stop").click, lambda: page.keyboard.press("Escape"))
    for count, stop in enumerate(stops, 1):
        page.get_by_role("button", name="say the red circle is above the blue square").click()
        wait_for_player(page, "first", count)
        stop()
        played = wait_for_player(page, "stopped", count)["played"]
        wait_until(lambda count=count: len(truncated) == count)
        assert truncated[-1] == played * 1000 // RATE > 0
        assert page.locator("#log li.model.cut").count() == count
    page.get_by_role("button", name="where is the red circle").click()
    wait_for_player(page, "ended")
    assert len(answers(page)) == 3


def test_a_question_while_the_answer_plays(page, monkeypatch):
    keep_first_answers(monkeypatch)
    page.get_by_role("button", name="say the red circle is above the blue square").click()
    wait_for_player(page, "first")
    page.get_by_role("button", name="where is the red circle").click()
    wait_for_player(page, "stopped")
    wait_for_player(page, "ended")
    assert answers(page)[-1] == ANSWER
    assert page.evaluate("window.minomni.errors") == []


def test_two_questions_at_once(page):
    """The second one replaces the first one, whether or not its answer has begun."""
    page.evaluate(
        """() => {
            const [first, second] = document.querySelectorAll('#list button');
            first.click();
            second.click();
        }"""
    )
    page.get_by_text(ANSWER).wait_for()
    wait_for_player(page, "ended")
    assert answers(page)[-1] == ANSWER


def test_the_browsers_own_microphone(page):
    """Through the filters of the browser: a request is answered with its own words."""
    page.get_by_role("button", name="Open microphone").click()
    page.locator("#log li.model", has_text=WISHED).first.wait_for()
    wait_for_player(page, "first")
    shot(page, "open")
    page.get_by_role("button", name="Open microphone").click()
    wait(page, "!window.minomni.state.open")


def test_everything_has_a_name(page):
    """Each control has a name for screen readers, and the keyboard reaches it."""
    unnamed = """() => [...document.querySelectorAll('button, input, select, canvas')]
        .filter((e) => !(e.textContent.trim() || e.labels?.length || e.ariaLabel)).length"""
    assert page.evaluate(unnamed) == 0
    # What changes is said without being looked for.
    assert page.get_by_role("log", name="What was said").get_attribute("aria-live") == "polite"
    assert page.get_by_role("status").inner_text() == "tiny is ready"
    page.keyboard.press("Tab")
    reached = set()
    for _ in range(14):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert {"text", "send", "hold", "open", "camera", "voice"} <= reached
