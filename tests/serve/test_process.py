"""The command: it prints its address and ends cleanly on Ctrl-C, also while it answers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import SECONDS
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

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


@pytest.fixture
def process(request, tiny_folder):
    program = ["-c", ENDLESS] if request.param == "endless" else request.param.split()
    command = [sys.executable, *program, "serve", "--model", str(tiny_folder), "--port", "0"]
    made = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    yield made
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


@pytest.mark.parametrize("process", ["-m minomni"], indirect=True)
def test_control_c(process):
    url = address_of(process)
    assert httpx.get(f"{url}/health", timeout=SECONDS).json()["status"] == "ok"
    assert interrupt(process) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize("process", ["endless"], indirect=True)
def test_control_c_during_answers(process):
    """The answers end with an error, the conversation is closed, and nothing is printed."""
    url = address_of(process)
    address = url.replace("http", "ws")
    body = {"messages": [{"role": "user", "content": "say the red circle"}], "stream": True}
    with (
        connect(f"{address}/v1/realtime", open_timeout=SECONDS) as websocket,
        httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=SECONDS) as answer,
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
