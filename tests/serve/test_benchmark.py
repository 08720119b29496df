"""bench serve: what it asks, how often, and how its numbers follow from its clock.

The clock is one that counts, so that nothing here depends on the speed of the machine.
"""

import base64
import threading
from collections import Counter
from itertools import count
from types import SimpleNamespace

import pytest
import refresh_readme
import serving  # noqa: F401  (skips where the server's packages are missing)
import soundfile

from minomni import paths
from minomni.errors import UserError
from minomni.serve import benchmark, chat
from minomni.serve.realtime import HANDLERS, Conversation

PORT = 0  # of no server


class Clock:
    """In place of `time` in the benchmark: each look at it is a second later, and no one sleeps."""

    def __init__(self):
        self.perf_counter = count().__next__

    def sleep(self, seconds: float) -> None:
        pass


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(benchmark, "time", Clock())


def test_requests_per_second(clock, monkeypatch):
    """Two looks at the clock, one second apart: all requests were answered in one second."""
    clients = Counter()
    times = iter([5.0, 1.0, 2.0] * 4)
    together = threading.Barrier(4)  # all clients ask at once, or none goes on

    def post(port, body):
        if not clients[threading.get_ident()]:
            together.wait(serving.SECONDS)
        clients[threading.get_ident()] += 1
        return next(times)

    monkeypatch.setattr(benchmark, "post", post)
    rate, first_s = benchmark.load(PORT, benchmark.SPEECH, 4)
    assert rate == 4 * benchmark.REQUESTS
    assert first_s == 2.0
    assert list(clients.values()) == 4 * [benchmark.REQUESTS]


@pytest.fixture
def handled(monkeypatch):
    """What the server gets: requests of each kind, and the events and samples of conversations."""
    counts = Counter()
    begin = chat.Answer.begin

    async def recorded_begin(answer, client):
        counts["speech" if answer.request.speech else "text"] += 1
        return await begin(answer, client)

    def recorded(kind, handler):
        async def handle(conversation, event):
            counts[kind] += 1
            audio = event.get("audio", "")
            counts["samples"] += len(base64.b64decode(audio)) // 2
            return await handler(conversation, event)

        return handle

    monkeypatch.setattr(chat.Answer, "begin", recorded_begin)
    for kind, handler in list(HANDLERS.items()):
        monkeypatch.setitem(HANDLERS, kind, recorded(kind, handler))
    return counts


@pytest.fixture
def ended(monkeypatch):
    """The conversations that are over."""
    over = []
    run = Conversation.run

    async def recorded(conversation):
        try:
            await run(conversation)
        finally:
            over.append(conversation)

    monkeypatch.setattr(Conversation, "run", recorded)
    return over


@pytest.mark.slow
def test_what_is_measured(trained, clock, handled, ended, monkeypatch):
    """Every number is there and positive, and stands for as many requests as it says."""
    monkeypatch.setattr(benchmark, "CLIENTS", (1, 2))
    monkeypatch.setattr(benchmark, "REQUESTS", 2)
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    rows = benchmark.measure(trained)
    assert all(value > 0 for value, _ in rows.values())
    assert handled["text"] == 2 * (1 + 2)
    assert handled["speech"] == 2 * (1 + 2) + 1  # one warms up

    # One question with the button held, one with an open microphone.
    recording = soundfile.info(paths.data_samples() / benchmark.RECORDING)
    spoken = recording.frames * benchmark.WIRE_RATE / recording.samplerate
    assert handled["session.update"] == 2
    assert handled["input_audio_buffer.commit"] == handled["response.create"] == 1
    assert handled["samples"] > 1.9 * spoken
    serving.wait_until(lambda: len(ended) == 2)
    assert not any(conversation.server.clients for conversation in ended)


def test_the_documents_show_what_is_measured(trained, monkeypatch):
    """Their rows are rows of the benchmark."""
    monkeypatch.setattr(benchmark, "load", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(benchmark, "post", lambda *_: 1.0)
    monkeypatch.setattr(benchmark, "spoken_question", lambda *_, **__: 1.0)
    assert set(refresh_readme.serving_keys()) <= set(benchmark.measure(trained))
    assert refresh_readme.CLIENTS == benchmark.CLIENTS


def test_a_model_without_speech():
    with pytest.raises(UserError, match="without speech"):
        benchmark.measure(SimpleNamespace(token2wav=None))


def test_an_answer_without_audio(untrained, monkeypatch):
    """It has no first audio: an error, and no number."""
    with serving.running(untrained) as server:
        monkeypatch.setattr(benchmark, "speak", lambda *_: None)
        with pytest.raises(UserError, match="error"):
            benchmark.spoken_question(server.port, open_microphone=False)
