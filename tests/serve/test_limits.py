"""Clients that are not allowed to ask, ask for too much, or send what no one expects."""

import asyncio
import copy
import json
import random
import socket

import httpx
import pytest
from serving import SECONDS, base64_of, connect_to, running, wait_until
from starlette.routing import Route
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from minomni.errors import UserError
from minomni.serve import access
from minomni.serve.access import LimitedBody
from minomni.serve.errors import ApiError
from minomni.serve.response import Stream
from minomni.serve.settings import Settings

TOKEN = "correct-horse-battery"
SAY = {"messages": [{"role": "user", "content": "say the red circle"}]}


@pytest.fixture(scope="module")
def server(untrained):
    with running(untrained, body_bytes=2**20, sessions=24) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(untrained):
    with running(untrained, token=TOKEN) as made:
        yield made


def post(server, body: object, path: str = "/v1/chat/completions", **options) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=SECONDS, **options)


def ask(server, **fields) -> httpx.Response:
    return post(server, {**SAY, **fields})


def answers(server) -> bool:
    return ask(server).status_code == 200


# ---------------------------------------------------------------------------------------- access


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "a b", "[::2]"])
def test_foreign_host(server, host):
    assert ask_with(server, {"Host": host}) == 400
    assert upgrade(server, host) == 400


def test_own_host(server):
    assert upgrade(server, f"127.0.0.1:{server.port}") == 101


def upgrade(server, host: str) -> int:
    """The status of a WebSocket that is asked for by this name; a client would set its own."""
    lines = [
        "GET /v1/realtime HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version: 13",
    ]
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(connection.recv(1024).split()[1])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/audio/speech"])
@pytest.mark.parametrize("body", ["", "{", "no json", "[1]", '{"messages": [}', "[" * 100_000])
def test_a_body_that_is_no_json_object(server, path, body):
    """It is refused in the form of OpenAI's errors."""
    answer = httpx.post(f"{server.url}{path}", content=body, timeout=SECONDS)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "not JSON" in error["message"] or "not a JSON object" in error["message"]
    assert (error["param"], error["code"]) == (None, "invalid_value")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_foreign_origin(server, origin):
    assert ask_with(server, {"Origin": origin}) == 403
    with pytest.raises(InvalidStatus) as refused, connect_to(server, origin=origin):
        pass
    assert refused.value.response.status_code == 403


def ask_with(server, headers: dict) -> int:
    url = f"{server.url}/v1/models"
    return httpx.get(url, headers=headers, timeout=SECONDS).status_code


def test_own_origin(server):
    assert ask_with(server, {"Origin": server.url}) == 200
    with connect_to(server, origin=server.url) as websocket:
        assert json.loads(websocket.recv())["type"] == "session.created"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_requests_that_a_browser_calls_foreign(server, site):
    """An image or a script of another page has no Origin. Browsers tell in this header."""
    assert ask_with(server, {"Sec-Fetch-Site": site}) == 403
    assert ask_with(server, {"Sec-Fetch-Site": "same-origin"}) == 200
    linked = httpx.get(server.url, headers={"Sec-Fetch-Site": site}, timeout=SECONDS)
    assert linked.status_code == 200  # the page may be linked to


def test_token(guarded):
    assert ask_with(guarded, {}) == 401
    assert ask_with(guarded, {"Authorization": "Bearer wrong"}) == 401
    assert ask_with(guarded, {"Authorization": "Bearer ü".encode()}) == 401
    assert ask_with(guarded, {"Authorization": f"Bearer {TOKEN}"}) == 200
    page = httpx.get(guarded.url, timeout=SECONDS)
    assert page.status_code == 200  # it asks for the token
    with pytest.raises(InvalidStatus) as refused, connect_to(guarded):
        pass
    assert refused.value.response.status_code == 401
    protocols = ["realtime", f"openai-insecure-api-key.{TOKEN}"]
    with connect_to(guarded, subprotocols=protocols) as websocket:
        assert websocket.subprotocol == "realtime"


def test_tokens_are_compared_in_constant_time(guarded, monkeypatch):
    """How long a comparison takes must not tell how many characters are right."""
    compared = []
    compare = access.hmac.compare_digest

    def recorded(given, expected):
        compared.append((given, expected))
        return compare(given, expected)

    monkeypatch.setattr(access.hmac, "compare_digest", recorded)
    for given in ("wrong", TOKEN):
        ask_with(guarded, {"Authorization": f"Bearer {given}"})
    pairs = [(given.encode(), TOKEN.encode()) for given in ("wrong", TOKEN)]
    assert [pair for pair in compared if TOKEN.encode() in pair] == pairs


def test_the_host_name_of_a_proxy(untrained):
    with running(untrained, token=TOKEN, names=("talk.example",)) as made:
        headers = {"Host": "talk.example", "Authorization": f"Bearer {TOKEN}"}
        assert ask_with(made, headers) == 200
        assert ask_with(made, {**headers, "Origin": "https://talk.example"}) == 200
        assert ask_with(made, {**headers, "Origin": "https://evil.example"}) == 403
        assert ask_with(made, {**headers, "Host": "evil.example"}) == 400


def test_other_machines_need_a_token():
    with pytest.raises(UserError, match="MINOMNI_TOKEN"):
        Settings(host="0.0.0.0").check()
    with pytest.raises(UserError, match="token"):
        Settings(token="short").check()
    with pytest.raises(UserError, match="MINOMNI_TOKEN"):
        Settings(names=("talk.example",)).check()
    with pytest.raises(UserError, match="without https"):
        Settings(token=TOKEN, names=("https://talk.example",)).check()
    Settings(host="0.0.0.0", token=TOKEN).check()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/static/page.js", 200),
        ("/health", 200),
        ("/nothing", 404),
        ("/v1/models", 403),
    ],
)
def test_headers(server, path, status):
    """Of all answers, refusals too."""
    foreign = {"Origin": "https://evil.example"} if status == 403 else {}
    answer = httpx.get(f"{server.url}{path}", headers=foreign, timeout=SECONDS)
    assert answer.status_code == status
    policy = answer.headers["content-security-policy"].split("; ")
    nothing = ("default-src", "base-uri", "form-action", "frame-ancestors")
    assert {f"{name} 'none'" for name in nothing} <= set(policy)
    assert "script-src 'self'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "microphone=(self), camera=(self)" in answer.headers["permissions-policy"]
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2f..%2f__main__.py",
        "//etc/passwd",
        "/static/",
        "/nothing",
    ],
)
def test_paths(server, path):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert b" 404 " in raw.recv(1024).split(b"\r\n")[0]


def test_methods(server):
    answer = httpx.get(f"{server.url}/v1/chat/completions", timeout=SECONDS)
    assert answer.status_code == 405
    assert answer.json()["error"]["type"] == "invalid_request_error"


# ---------------------------------------------------------------------------------------- limits


def test_large_bodies(server):
    assert post(server, {"messages": "x" * 2**20}).status_code == 413

    def parts():
        for _ in range(20):
            yield b"x" * 2**16

    answer = httpx.post(f"{server.url}/v1/chat/completions", content=parts(), timeout=SECONDS)
    assert answer.status_code == 413
    assert answers(server)


def test_a_body_above_32_mib(guarded):
    """The limit of a server without other settings: refused before the body is there."""
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {TOKEN}",
        f"Content-Length: {32 * 2**20 + 1}",
    ]
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=SECONDS) as raw:
        raw.sendall("\r\n".join([*lines, "", ""]).encode())
        assert b" 413 " in raw.recv(1024).split(b"\r\n")[0]


def test_large_frames(server):
    def send_and_receive():  # the server may close before all of the message is sent
        websocket.send("x" * (2**20 + 1))
        websocket.recv(timeout=SECONDS)

    with connect_to(server) as websocket:
        websocket.recv()
        with pytest.raises(ConnectionClosedError) as closed:
            send_and_receive()
    assert closed.value.rcvd.code == 1009
    assert answers(server)


def test_sessions(untrained):
    with running(untrained, sessions=2) as limited:
        with connect_to(limited) as first, connect_to(limited) as second:
            first.recv()
            second.recv()
            answer = ask(limited)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            with pytest.raises(InvalidStatus) as refused, connect_to(limited):
                pass
            assert refused.value.response.status_code == 429
        wait_until(lambda: not limited.server.clients)
        assert answers(limited)


def test_a_slow_reader_is_dropped(untrained):
    """It asks for an answer, and never reads."""
    taken = []

    async def endless():
        while True:
            yield b"x" * 2**16

    async def endpoint(request):
        server = request.app.state.server
        taken.append(server.take_client())
        return Stream(endless(), server, taken[0], "text/plain")

    with running(untrained, send_s=0.5) as limited:
        limited.app.router.routes.append(Route("/endless", endpoint))
        with socket.create_connection(("127.0.0.1", limited.port)) as raw:
            raw.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_until(lambda: taken)
            wait_until(lambda: not limited.server.clients)
        assert answers(limited)


def test_a_body_that_does_not_arrive(untrained):
    """A client that sends a part of its request does not keep its session."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"
    with running(untrained, body_s=0.5) as limited:
        with socket.create_connection(("127.0.0.1", limited.port), timeout=SECONDS) as raw:
            raw.sendall(head + b"{")
            assert b" 408 " in raw.recv(1024).split(b"\r\n")[0]
        wait_until(lambda: not limited.server.clients)
        wait_until(lambda: answers(limited))


def test_a_body_that_arrives_slowly():
    """A byte now and then does not give a client more time."""

    async def byte():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def read_all():
        body = LimitedBody(byte, Settings(body_s=0.1))
        while True:
            await body.receive()

    with pytest.raises(ApiError) as slow:
        asyncio.run(asyncio.wait_for(read_all(), SECONDS))
    assert slow.value.status == 408


# ------------------------------------------------------------------------------------------- fuzz

LEAVES = [None, True, -1, 0, 1e308, "", "user", "data:,", "\ud800", "x" * 300, 10**30, [], {}]
KEYS = ["role", "content", "type", "text", "image_url", "url", "audio", "voice", "\ud800"]
CONTENT = [
    {"type": "text", "text": "say the red circle"},
    {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64_of('color.png')}", "min_pixels": 784},
        "max_pixels": 4000,
    },
    {
        "type": "input_audio",
        "input_audio": {"data": base64_of("question.wav"), "format": "wav"},
        "audio_start": 0.1,
        "audio_end": 1,
    },
    {
        "type": "video",
        "video": [f"data:image/png;base64,{base64_of('color.png')}"] * 2,
        "sample_fps": 2,
        "total_pixels": 9000,
        "resized_height": 28,
        "resized_width": 56,
    },
]
VALID = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": CONTENT}],
        "modalities": ["text", "audio"],
        "audio": {"voice": "Ann", "format": "wav"},
        "max_tokens": 1,
        "temperature": 0.5,
        "stream_options": {"include_usage": True},
        "mm_processor_kwargs": {"fps": 1, "min_pixels": 784, "max_pixels": 4000},
    },
    "/v1/audio/speech": {
        "model": "tiny",
        "input": "say the red circle",
        "voice": "Ann",
        "response_format": "pcm",
    },
}
EVENTS = [
    {"type": "session.update", "session": {"type": "realtime", "audio": {"output": {}}}},
    {"type": "input_audio_buffer.append", "audio": "AAAA" * 100},
    {"type": "input_audio_buffer.commit"},
    {"type": "input_audio_buffer.clear"},
    {"type": "input_video_frame.append", "image": base64_of("color.png")},
    {
        "type": "conversation.item.create",
        "item": {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "say the red circle"}],
        },
    },
    {"type": "conversation.item.truncate", "item_id": "x", "audio_end_ms": 5},
    {"type": "response.create", "response": {"max_output_tokens": 1, "metadata": {"a": "b"}}},
    {"type": "response.cancel"},
]


def junk(chooser: random.Random, depth: int = 0) -> object:
    """A random JSON value."""
    if depth > 3 or chooser.random() < 0.4:
        return chooser.choice(LEAVES)
    if chooser.random() < 0.5:
        return [junk(chooser, depth + 1) for _ in range(chooser.randrange(4))]
    return {chooser.choice(KEYS): junk(chooser, depth + 1) for _ in range(chooser.randrange(4))}


def mutated(valid: dict, chooser: random.Random) -> dict:
    """A valid object in which one value, at any depth, is another one or missing."""
    changed = copy.deepcopy(valid)
    parent = changed
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = chooser.choice(keys)
        child = parent[key]
        if isinstance(child, dict | list) and child and chooser.random() < 0.7:
            parent = child
            continue
        if chooser.random() < 0.2:
            del parent[key]
        else:
            parent[key] = junk(chooser)
        return changed


def faults(caplog) -> list[str]:
    """Errors that the server did not expect."""
    return [record.getMessage() for record in caplog.records if record.name == "minomni.serve"]


@pytest.mark.slow
def test_a_thousand_random_requests(server, caplog):
    """Each gets a status below 500, no step fails unexpectedly, and the server still answers."""
    chooser = random.Random(0)
    statuses = set()
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        assert all(client.post(path, json=body).status_code == 200 for path, body in VALID.items())
        for number in range(1000):
            path = chooser.choice(list(VALID))
            if number % 10 == 0:
                content = chooser.randbytes(chooser.randrange(200))
            elif number % 10 == 1:
                content = json.dumps({key: junk(chooser) for key in KEYS}).encode()
            else:
                content = json.dumps(mutated(VALID[path], chooser)).encode()
            answer = client.post(path, content=content)
            statuses.add(answer.status_code)
            assert answer.status_code < 500, content[:500]
    assert {200, 400, 404} <= statuses
    assert faults(caplog) == []
    assert answers(server)
    wait_until(lambda: not server.server.clients)


@pytest.mark.slow
def test_random_events(server, caplog):
    """Whatever is sent, the conversation goes on, or is closed by the server in order."""
    chooser = random.Random(0)
    for _ in range(10):
        with connect_to(server, max_size=None) as websocket:
            for _ in range(50):
                event = chooser.choice(EVENTS)
                if chooser.random() < 0.7:
                    event = mutated(event, chooser)
                websocket.send(json.dumps(event))
            websocket.send(json.dumps({"type": "the.end", "event_id": "end"}))
            last = None
            while last != "end":
                event = json.loads(websocket.recv(timeout=SECONDS))
                last = event.get("error", {}).get("event_id")
    assert faults(caplog) == []
    assert answers(server)
    wait_until(lambda: not server.server.clients)


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b"])
def test_half_a_surrogate_pair(server, text):
    """JSON can hold one, Unicode text cannot."""
    bodies = [
        {"messages": [{"role": "user", "content": text}]},
        {"messages": [{"role": text, "content": "x"}]},
        {**SAY, text: 1},
        {**SAY, "model": text},
        {**SAY, "modalities": ["text", "audio"], "audio": {"voice": text}},
        {**SAY, "seed": text},
    ]
    for body in bodies:
        content = json.dumps(body).encode()
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, timeout=SECONDS)
        assert answer.status_code in (400, 404), body
