"""The command: it prints its address and ends cleanly on Ctrl-C, also while it answers. What
outsiders send is not logged.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from serving import SECONDS
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from minomni.serve.app import OUTSIDERS_LINES

ROOT = Path(__file__).parents[2]
# The command, with an answer that has no end, and as much time to stop as a slow machine needs.
ENDLESS = """
import sys, time
from minomni import __main__
from minomni.chat.reply import TextChunk
from minomni.serve import app, chat

def endless_steps(*_):
    while True:
        time.sleep(0.001)
        yield TextChunk("x", 0.0)

chat.answer_steps = endless_steps
app.STOP_S = 300
sys.exit(__main__.main())
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process"),
]
TOKEN = "correct-horse-battery"


@contextmanager
def started(program: list[str], folder: Path, *options: str, **environment: str):
    """The command, until the end of the block."""
    command = [sys.executable, *program, "serve", "--model", str(folder), "--port", "0", *options]
    made = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield made
    finally:
        made.kill()
        made.wait()


def address_of(process) -> str:
    line = process.stdout.readline()
    assert line.startswith("minomni serves ")
    return line.split(" at ")[1].split()[0]


def interrupt(process) -> tuple[str, str]:
    """Press Ctrl-C -> the rest of the output, and the errors."""
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=SECONDS)


def test_control_c(tiny_folder, tmp_path):
    """The address is the only line. No browser is opened."""
    opened = tmp_path / "opened"
    browser = f"{shlex.join(['touch', str(opened)])} %s"
    with started(["-m", "minomni"], tiny_folder, BROWSER=browser) as process:
        url = address_of(process)
        assert httpx.get(f"{url}/health", timeout=SECONDS).json()["status"] == "ok"
        assert interrupt(process) == ("", "")
        assert process.returncode == 0
    assert not opened.exists()


def test_control_c_during_answers(tiny_folder):
    """The answers end with an error, the conversation is closed, and nothing is printed."""
    body = {"messages": [{"role": "user", "content": "say the red circle"}], "stream": True}
    with started(["-c", ENDLESS], tiny_folder) as process:
        url = address_of(process)
        address = url.replace("http", "ws")
        with (
            connect(f"{address}/v1/realtime", open_timeout=SECONDS) as websocket,
            httpx.stream(
                "POST", f"{url}/v1/chat/completions", json=body, timeout=SECONDS
            ) as answer,
        ):
            assert json.loads(websocket.recv())["type"] == "session.created"
            chunks = answer.iter_text()
            first = next(chunks)
            output = interrupt(process)
            rest = first + "".join(chunks)
            with pytest.raises(ConnectionClosed):
                websocket.recv(timeout=SECONDS)
        assert rest.endswith("data: [DONE]\n\n")
        assert "the server stops" in rest
        assert output == ("", "")
        assert process.returncode == 0


def test_what_outsiders_send_is_not_logged(tiny_folder):
    """WebSockets that are refused, one that is not Unicode, and requests that are no HTTP."""
    options = ("--sessions", "1")
    with started(["-m", "minomni"], tiny_folder, *options, MINOMNI_TOKEN=TOKEN) as process:
        url = address_of(process)
        port = int(url.rpartition(":")[2])
        assert refusal(url) == 401
        assert refusal(url, token=TOKEN, origin="https://evil.example") == 403
        assert refusal(url, "/nothing", token=TOKEN) == 403
        assert refusal(url, "/v1/realtime?model=other", token=TOKEN) == 404
        with connected(url, "/v1/realtime", TOKEN) as websocket:
            websocket.recv()
            assert refusal(url, token=TOKEN) == 429
            websocket.send(b"\xff", text=True)
            with pytest.raises(ConnectionClosed):
                websocket.recv(timeout=SECONDS)
        assert raw_answer(port, b"no http\r\n\r\n").startswith(b"HTTP/1.1 400")
        upgrade = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close, upgrade\r\nUpgrade: x"
        assert raw_answer(port, upgrade + b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert interrupt(process) == ("", "")


def connected(url: str, path: str, token: str | None, origin: str | None = None):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    address = url.replace("http", "ws") + path
    return connect(address, additional_headers=headers, origin=origin, open_timeout=SECONDS)


def refusal(url: str, path: str = "/v1/realtime", **options) -> int:
    """The status with which a WebSocket is refused."""
    options = {"token": None, **options}
    with pytest.raises(InvalidStatus) as refused, connected(url, path, **options):
        pass
    return refused.value.response.status_code


def raw_answer(port: int, request: bytes) -> bytes:
    """The begin of the answer to bytes that need not be a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as raw:
        raw.sendall(request)
        return raw.recv(1024)


def test_the_lines_that_are_left_out_are_those_of_uvicorn():
    """Another version of it may word them otherwise, and the log could be filled again."""
    folder = Path(uvicorn.__file__).parent
    source = "".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    assert [line for line in OUTSIDERS_LINES if line not in source] == []
