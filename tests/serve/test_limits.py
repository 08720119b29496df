"""Clients that leave, do not read, ask for too much or are not allowed to ask."""

import concurrent.futures
import json
import random
import socket
import time

import httpx
import pytest
from serving import running
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import minomni
from minomni.errors import UserError
from minomni.serve.settings import Settings

TOKEN = "correct-horse-battery"
SAY = {"messages": [{"role": "user", "content": "say the red circle"}]}
SECONDS = 120


@pytest.fixture(scope="module")
def omni(tiny_folder):
    return minomni.load(tiny_folder)


@pytest.fixture(scope="module")
def server(omni):
    with running(omni, body_bytes=2**20, sessions=24) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(omni):
    with running(omni, token=TOKEN) as made:
        yield made


@pytest.fixture
def limited(omni):
    with running(omni, sessions=2, send_s=0.5) as made:
        yield made


def wait_until(condition) -> None:
    """Wait for something that happens soon."""
    for _ in range(SECONDS * 20):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def post(server, body: object, path: str = "/v1/chat/completions", **options) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=SECONDS, **options)


def ask(server, **fields) -> httpx.Response:
    return post(server, {**SAY, **fields})


def answers(server) -> bool:
    return ask(server).status_code == 200


def realtime(server, **options):
    return connect(f"ws://127.0.0.1:{server.port}/v1/realtime", **options)


# ---------------------------------------------------------------------------------------- access


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "a b", "[::2]"])
def test_foreign_host(server, host):
    assert ask_with(server, {"Host": host}) == 400


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_foreign_origin(server, origin):
    assert ask_with(server, {"Origin": origin}) == 403
    with pytest.raises(InvalidStatus) as refused, realtime(server, origin=origin):
        pass
    assert refused.value.response.status_code == 403


def ask_with(server, headers: dict) -> int:
    return httpx.get(f"{server.url}/v1/models", headers=headers).status_code


def test_own_origin(server):
    assert ask_with(server, {"Origin": server.url}) == 200
    with realtime(server, origin=server.url) as websocket:
        assert json.loads(websocket.recv())["type"] == "session.created"


def test_token(guarded):
    assert ask_with(guarded, {}) == 401
    assert ask_with(guarded, {"Authorization": "Bearer wrong"}) == 401
    assert ask_with(guarded, {"Authorization": "Bearer ü".encode()}) == 401
    assert ask_with(guarded, {"Authorization": f"Bearer {TOKEN}"}) == 200
    assert httpx.get(guarded.url).status_code == 200  # the page asks for the token
    with pytest.raises(InvalidStatus) as refused, realtime(guarded):
        pass
    assert refused.value.response.status_code == 401
    protocols = ["realtime", f"openai-insecure-api-key.{TOKEN}"]
    with realtime(guarded, subprotocols=protocols) as websocket:
        assert websocket.subprotocol == "realtime"


def test_other_machines_need_a_token():
    with pytest.raises(UserError, match="MINOMNI_TOKEN"):
        Settings(host="0.0.0.0").check()
    with pytest.raises(UserError, match="token"):
        Settings(token="short").check()
    Settings(host="0.0.0.0", token=TOKEN).check()


def test_headers(server):
    headers = httpx.get(server.url).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "microphone=(self)" in headers["permissions-policy"]
    assert "access-control-allow-origin" not in headers


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
    answer = httpx.get(f"{server.url}/v1/chat/completions")
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


def test_large_frames(server):
    from websockets.exceptions import ConnectionClosedError

    with realtime(server) as websocket:
        websocket.recv()
        websocket.send("x" * (2**20 + 1))
        with pytest.raises(ConnectionClosedError) as closed:
            websocket.recv(timeout=SECONDS)
    assert closed.value.rcvd.code == 1009
    assert answers(server)


def test_slots(limited):
    with realtime(limited) as first, realtime(limited) as second:
        first.recv()
        second.recv()
        answer = ask(limited)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        with pytest.raises(InvalidStatus) as refused, realtime(limited):
            pass
        assert refused.value.response.status_code == 429
    wait_until(lambda: limited.server.slots.used == 0)
    assert answers(limited)


def test_a_client_that_leaves(limited):
    """Its work ends: the worker stands still, although the answer is far from its end."""
    body = {**SAY, "max_tokens": 1900, "repetition_penalty": 1.3, "stream": True}
    with httpx.stream("POST", f"{limited.url}/v1/chat/completions", json=body) as answer:
        next(answer.iter_bytes())
        (client,) = limited.server.clients
    wait_until(lambda: limited.server.slots.used == 0)
    wait_until(lambda: not client.tasks)
    steps = limited.server.worker.steps
    time.sleep(0.2)
    assert limited.server.worker.steps == steps


def test_work_is_cancelled_before_the_next_step(omni):
    """Of a task that is cancelled, no further step is computed."""
    import asyncio

    from minomni.serve.worker import Client, Worker

    computed = []
    closed = []

    def steps():
        try:
            for number in range(1_000_000):
                computed.append(number)
                yield number
        finally:
            closed.append(True)

    async def run():
        worker = Worker()
        worker.start()
        client = Client(worker)
        task = client.submit(steps())
        async for number in task:
            if number == 3:
                break
        client.close()
        seen = len(computed)
        async for _ in task:
            pass
        worker.stop()
        return seen

    seen = asyncio.run(run())
    assert closed == [True]
    assert len(computed) <= seen + 1


def test_clients_take_turns():
    """Two long tasks and a short one: steps alternate, and the short one is done early."""
    import asyncio

    from minomni.serve.worker import Client, Worker

    order = []

    def steps(name: str, count: int):
        for _ in range(count):
            order.append(name)
            yield name

    async def run():
        worker = Worker()
        tasks = [
            Client(worker).submit(steps(name, count)) for name, count in (("a", 50), ("b", 50))
        ]
        tasks.append(Client(worker).submit(steps("c", 5)))
        worker.start()
        for task in tasks:
            async for _ in task:
                pass
        worker.stop()

    asyncio.run(run())
    assert order[:15] == ["a", "b", "c"] * 5
    assert order[15:] == ["a", "b"] * 45


def test_a_slow_reader_is_dropped(limited):
    """It asks for an answer, and never reads."""

    async def endless():
        while True:
            yield b"x" * 2**16

    from starlette.routing import Route

    from minomni.serve.response import Stream

    async def endpoint(request):
        return Stream(endless(), limited.server, limited.server.take_client(), "text/plain")

    limited.app.router.routes.append(Route("/endless", endpoint))
    with socket.create_connection(("127.0.0.1", limited.port)) as raw:
        raw.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: limited.server.slots.used == 1)
        wait_until(lambda: limited.server.slots.used == 0)
    assert answers(limited)


def test_twenty_clients(server):
    """All are answered, and all the same."""
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda _: ask(server), range(20)))
    assert {answer.status_code for answer in found} == {200}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in found}) == 1
    wait_until(lambda: server.server.slots.used == 0)
    assert not server.server.clients
    assert not server.server.worker.turns


# ------------------------------------------------------------------------------------------- fuzz


def junk(random: random.Random, depth: int = 0) -> object:
    """A random JSON value."""
    leaves = [None, True, -1, 0, 1e308, "", "user", "data:,", "\ud800", "x" * 300, 10**30]
    if depth > 3 or random.random() < 0.4:
        return random.choice(leaves)
    if random.random() < 0.5:
        return [junk(random, depth + 1) for _ in range(random.randrange(4))]
    keys = ["role", "content", "type", "text", "image_url", "url", "audio", "voice", "x"]
    return {random.choice(keys): junk(random, depth + 1) for _ in range(random.randrange(4))}


def test_a_thousand_random_requests(server):
    """Each gets a status below 500 or none, and the server still answers."""
    chooser = random.Random(0)
    keys = ["messages", "modalities", "audio", "stream", "seed", "temperature", "n", "input"]
    paths = ["/v1/chat/completions", "/v1/audio/speech", "/v1/audio/transcriptions"]
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        for number in range(1000):
            path = paths[number % 3]
            if number % 5 == 0:
                content = chooser.randbytes(chooser.randrange(200))
            else:
                body = {key: junk(chooser) for key in chooser.sample(keys, 4)}
                content = json.dumps(body).encode()
            answer = client.post(path, content=content)
            assert answer.status_code < 500, content
    assert answers(server)
