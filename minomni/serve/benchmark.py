"""Speed of the server, as its clients see it: requests per second, and the time to first audio."""

import base64
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr
from websockets.sync.client import ClientConnection, connect

from minomni import paths
from minomni.errors import UserError
from minomni.eval.benchmark_utils import Rows
from minomni.serve.app import serving
from minomni.serve.audio import WIRE_RATE, pcm16
from minomni.serve.settings import Settings

if TYPE_CHECKING:
    from minomni.omni import Omni

CLIENTS = (1, 4, 16)  # at once
REQUESTS = 3  # of each client
ROUNDS = 5  # spoken questions
RECORDING = "wish.wav"  # a spoken request that needs no image
CHUNK_S = 0.04  # of a microphone
SILENCE_S = 1.5  # after the speech, with an open microphone
TIMEOUT_S = 600
MESSAGES = [{"role": "user", "content": "say the red circle is above the blue square"}]
TEXT = {"messages": MESSAGES}
SPEECH = {"messages": MESSAGES, "modalities": ["text", "audio"], "stream": True}


def measure(omni: "Omni") -> Rows:
    """Serve a model on this machine and measure it. Raises UserError for one without speech."""
    if omni.token2wav is None or not omni.voices:
        raise UserError("the model answers without speech; there is no first audio to wait for")
    settings = Settings(port=0, sessions=2 * max(CLIENTS))
    with serving(omni, "model", settings) as (_, port):
        post(port, SPEECH)  # warms up
        rows: Rows = {}
        for count in CLIENTS:
            rate, _ = load(port, TEXT, count)
            rows[f"text_requests_per_s_{count}"] = (rate, f"text answers, {clients(count)}")
        for count in CLIENTS:
            rate, first_s = load(port, SPEECH, count)
            rows[f"speech_requests_per_s_{count}"] = (rate, f"spoken answers, {clients(count)}")
            rows[f"first_audio_ms_{count}"] = (
                1e3 * first_s,
                f"from a typed question to the first audio, {clients(count)}",
            )
        held = [spoken_question(port, open_microphone=False) for _ in range(ROUNDS)]
        detected = [spoken_question(port, open_microphone=True) for _ in range(ROUNDS)]
    rows["spoken_first_audio_ms"] = (
        1e3 * median(held),
        "from the end of a spoken question to the first audio, hold to talk",
    )
    rows["open_first_audio_ms"] = (
        1e3 * median(detected),
        "the same with an open microphone, which waits for a pause of 500 ms",
    )
    return rows


def clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


def load(port: int, body: dict, count: int) -> tuple[float, float]:
    """Requests of `count` clients at once -> requests per second, and the median time to the first
    audio in seconds (0 without audio).
    """

    def client(_: int) -> list[float]:
        return [post(port, body) for _ in range(REQUESTS)]

    begin = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        times = [first_s for found in pool.map(client, range(count)) for first_s in found]
    return count * REQUESTS / (time.perf_counter() - begin), median(times)


def post(port: int, body: dict) -> float:
    """Read a whole answer -> seconds to its first audio, 0 without audio."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    begin = time.perf_counter()
    first_s = 0.0
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise UserError(f"the server answered with status {answer.status}")
    for line in answer:
        if not first_s and b'"data"' in line:
            first_s = time.perf_counter() - begin
    connection.close()
    return first_s


def spoken_question(port: int, open_microphone: bool) -> float:
    """Speak a recording at the speed of speech -> seconds from its end to the first audio."""
    detection = {"type": "server_vad"} if open_microphone else None
    session = {"type": "realtime", "audio": {"input": {"turn_detection": detection}}}
    address = f"ws://127.0.0.1:{port}/v1/realtime"
    with (
        connect(address, max_size=None, compression=None, open_timeout=TIMEOUT_S) as websocket,
        ThreadPoolExecutor(1) as pool,
    ):
        send(websocket, "session.update", session=session)
        end = pool.submit(ask, websocket, open_microphone)
        for text in websocket:
            now = time.perf_counter()
            kind = json.loads(text)["type"]
            if kind == "response.output_audio.delta":
                return now - end.result()
            if kind in ("error", "response.done"):
                raise UserError(f"a spoken question ended with {kind} and without audio")
    raise UserError("the server closed the conversation")


def ask(websocket: ClientConnection, open_microphone: bool) -> float:
    """Speak the recording -> the time of its end."""
    wave, rate = soundfile.read(paths.data_samples() / RECORDING, dtype="float32")
    speak(websocket, soxr.resample(wave, rate, WIRE_RATE))
    end = time.perf_counter()
    if open_microphone:
        speak(websocket, np.zeros(int(SILENCE_S * WIRE_RATE), np.float32))
    else:
        send(websocket, "input_audio_buffer.commit")
        send(websocket, "response.create")
    return end


def speak(websocket: ClientConnection, wave: np.ndarray) -> None:
    """Send a waveform [samples] at WIRE_RATE, each chunk at its time."""
    chunk = int(CHUNK_S * WIRE_RATE)
    begin = time.perf_counter()
    for start in range(0, len(wave), chunk):
        end_s = (start + chunk) / WIRE_RATE
        time.sleep(max(0.0, begin + end_s - time.perf_counter()))
        audio = base64.b64encode(pcm16(wave[start : start + chunk])).decode()
        send(websocket, "input_audio_buffer.append", audio=audio)


def send(websocket: ClientConnection, kind: str, **fields: object) -> None:
    """Send an event."""
    websocket.send(json.dumps({"type": kind, **fields}))
