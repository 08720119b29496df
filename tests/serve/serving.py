"""A server in a thread of the test, and what its tests share."""

import asyncio
import base64
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed")
pytest.importorskip("uvicorn", reason="the server's packages are not installed")
pytest.importorskip("websockets", reason="the server's packages are not installed")
pytest.importorskip("python_multipart", reason="the server's packages are not installed")

from websockets.sync.client import ClientConnection, connect

from minomni.chat.reply import ReplyDone
from minomni.chat.session import Session
from minomni.serve.app import serving
from minomni.serve.settings import Settings
from minomni.serve.worker import Client, Task, one_step

SAMPLES = Path(__file__).parents[2] / "data_samples"
RATE = 24_000  # Hz of the API
SECONDS = 300  # of patience with a slow machine


class Running:
    """A server that runs, and its address."""

    def __init__(self, app, port: int):
        self.app = app
        self.server = app.state.server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"


@contextmanager
def running(omni, **settings):
    """Serve a model at a free port of this machine."""
    with serving(omni, "tiny", Settings(port=0, **settings)) as (app, port):
        yield Running(app, port)


class Gate:
    """A step that keeps the worker until it is opened: what is asked meanwhile begins together."""

    def __init__(self, worker):
        self.opened = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.task = Task(one_step(self.opened.wait), self.loop)
        worker.add(Client(worker), self.task)

    def open(self) -> None:
        self.opened.set()
        self.loop.close()

    def steps_after(self, steps: list[Task]) -> list[Task]:
        """Of the tasks of all steps, those after the gate was opened, without its own."""
        after = steps[steps.index(self.task) :]
        return [task for task in after if task is not self.task]


def keep_first_answers(monkeypatch, count: int = 1) -> None:
    """The first answers last until they are cancelled, however fast they are made: a test that
    cancels or interrupts an answer never comes too late.
    """
    respond_steps = Session.respond_steps
    answers = []

    def kept(session, *arguments, **options):
        steps = respond_steps(session, *arguments, **options)
        answers.append(steps)
        return steps if len(answers) > count else without_end(steps)

    monkeypatch.setattr(Session, "respond_steps", kept)


def without_end(steps):
    """The steps of an answer up to its last event, and then empty ones."""
    for event in steps:
        if isinstance(event, ReplyDone):
            break
        yield event
    while True:
        time.sleep(0.001)
        yield None


def base64_of(name: str) -> str:
    return base64.b64encode((SAMPLES / name).read_bytes()).decode()


def connect_to(server: Running, **options) -> ClientConnection:
    """A client of /v1/realtime that is as patient as the tests."""
    address = f"ws://127.0.0.1:{server.port}/v1/realtime"
    return connect(address, open_timeout=SECONDS, **options)


def wait_until(condition) -> None:
    """Wait for something that happens soon."""
    for _ in range(SECONDS * 20):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def spoken(name: str = "question.wav") -> bytes:
    """A recording as pcm16 at 24 kHz."""
    import numpy as np
    import soundfile
    import soxr

    wave, rate = soundfile.read(SAMPLES / name, dtype="float32")
    wave = soxr.resample(wave, rate, RATE)
    return np.rint(np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes()
