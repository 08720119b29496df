"""A server in a thread of the test, and what its tests share."""

import base64
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed")
pytest.importorskip("uvicorn", reason="the server's packages are not installed")

import uvicorn

import minomni
from minomni.serve.app import create_app, listen
from minomni.serve.settings import Settings

SAMPLES = Path(__file__).parents[2] / "data_samples"


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
    made = Settings(port=0, **settings)
    app = create_app(omni, "tiny", made)
    listener = listen(made)
    config = uvicorn.Config(
        app,
        log_level="warning",
        ws="websockets-sansio",
        ws_max_size=made.frame_bytes,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Running(app, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()


def base64_of(name: str) -> str:
    return base64.b64encode((SAMPLES / name).read_bytes()).decode()


def load_tiny():
    return minomni.load("tiny")
