"""Many clients at once: nothing is lost, turns are fair, and everything is freed after them.

Steps are counted, not timed: the tests hold on any machine.
"""

import base64
import concurrent.futures
import gc
import json
import logging
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager

import httpx
import pytest
import torch
from serving import SECONDS, Gate, base64_of, connect_to, running, spoken, wait_until

from minomni.chat.reply import ReplyDone, TextChunk
from minomni.chat.session import Session
from minomni.serve import chat, realtime
from minomni.serve.worker import Task

CLIENTS = 20
SHORT_LIVED = ("Conversation", "Task", "Session", "KVCache")  # kinds of objects of one client
SAY = {"messages": [{"role": "user", "content": "say the red circle"}], "max_tokens": 40}
SPEECH = {**SAY, "modalities": ["text", "audio"], "stream": True}


@pytest.fixture
def server(untrained):
    with running(untrained, sessions=CLIENTS) as made:
        yield made


@pytest.fixture
def steps(monkeypatch):
    """The tasks whose steps are computed, in order; cancelled ones are not computed any more."""
    computed: list[Task] = []
    run_step = Task.run_step

    def recorded(task):
        if not task.cancelled:
            computed.append(task)
        return run_step(task)

    monkeypatch.setattr(Task, "run_step", recorded)
    return computed


def ask(server, body: dict) -> list[dict]:
    """The events of a streamed answer, without what differs between answers."""
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=SECONDS) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    for event in events:
        for choice in event["choices"]:
            audio = choice["delta"].get("audio", {})
            audio.pop("id", None)
            audio.pop("expires_at", None)
    return [event["choices"] for event in events]


@pytest.mark.slow
def test_twenty_clients(server, steps):
    """All get the answer that a client alone gets, and their steps alternate."""
    alone = ask(server, SPEECH)
    wait_until(lambda: not server.server.clients)
    worker = server.server.worker
    gate = Gate(worker)
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask, server, SPEECH) for _ in range(CLIENTS)]
        wait_until(lambda: len(worker.turns) == CLIENTS)
        gate.open()
        for answer in asked:
            assert answer.result() == alone

    steps = gate.steps_after(steps)
    found = Counter(steps)
    assert len(found) == CLIENTS
    assert len(set(found.values())) == 1  # of equal answers
    last_step = {task: number for number, task in enumerate(steps)}
    until_the_first_ends = steps[: min(last_step.values()) + 1]
    counts = Counter(until_the_first_ends)
    assert len(counts) == CLIENTS
    assert min(counts.values()) > 20
    assert max(counts.values()) <= 2 * min(counts.values())


@pytest.mark.slow
def test_a_short_answer_does_not_wait_for_long_ones(server, steps):
    """It takes turns with nineteen long ones, and needs only its own steps times twenty."""
    worker = server.server.worker
    gate = Gate(worker)
    short = {**SAY, "max_tokens": 2, "stream": True}
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask, server, SPEECH) for _ in range(CLIENTS - 1)]
        wait_until(lambda: len(worker.turns) == CLIENTS - 1)
        asked.append(pool.submit(ask, server, short))
        wait_until(lambda: len(worker.turns) == CLIENTS)
        gate.open()
        for answer in asked:
            answer.result()
    steps = gate.steps_after(steps)
    counts = Counter(steps)
    shortest = min(counts, key=counts.__getitem__)
    last = max(number for number, task in enumerate(steps) if task is shortest)
    assert last < CLIENTS * counts[shortest]


# ------------------------------------------------------------------------------------------- media


def test_media_are_decoded_a_few_at_a_time(untrained, monkeypatch):
    """Five requests, two threads: three requests wait, and the server still answers others."""
    opened = threading.Event()
    asked = []
    begun = []  # names of the threads
    prepare = untrained.prepare

    def kept(*arguments):
        begun.append(threading.current_thread().name)
        assert opened.wait(SECONDS)
        return prepare(*arguments)

    monkeypatch.setattr(untrained, "prepare", kept)
    with (
        running(untrained, decoders=2) as server,
        concurrent.futures.ThreadPoolExecutor(5) as pool,
    ):
        decode = server.server.decode

        async def counted(*arguments):
            asked.append(arguments)
            return await decode(*arguments)

        monkeypatch.setattr(server.server, "decode", counted)
        answers = [pool.submit(ask, server, {**SAY, "stream": True}) for _ in range(5)]
        try:
            wait_until(lambda: len(asked) == 5 and len(begun) == 2)
            health = httpx.get(f"{server.url}/health", timeout=SECONDS).json()
            assert health["sessions"] == 5
        finally:
            opened.set()
        for answer in answers:
            assert answer.result()
    assert len(begun) == 5
    assert len(set(begun)) == 2


def test_images_of_a_conversation_are_decoded_there_too(server, monkeypatch):
    """A camera frame and an image of an item."""
    threads = []
    read_image = realtime.read_image

    def recorded(source, size):
        threads.append(threading.current_thread().name)
        return read_image(source, size)

    monkeypatch.setattr(realtime, "read_image", recorded)
    data = base64_of("color.png")
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{data}"}
    item = {"type": "message", "role": "user", "content": [image]}
    events = (
        {"type": "input_video_frame.append", "image": data},
        {"type": "conversation.item.create", "item": item},
    )
    with connect_to(server) as websocket:
        for event in events:
            websocket.send(json.dumps(event))
        while json.loads(websocket.recv(timeout=SECONDS))["type"] != "conversation.item.done":
            pass
    assert len(threads) == 2
    assert all(name.startswith("minomni-decoder") for name in threads)


# -------------------------------------------------------------------------------------------- left


def endless_steps(omni, inputs, voice, options, ids):
    """An answer without end, instead of chat.answer_steps()."""
    while True:
        time.sleep(0.001)
        yield TextChunk("x", 0.0)


@pytest.fixture
def endless(monkeypatch):
    monkeypatch.setattr(chat, "answer_steps", endless_steps)


@pytest.fixture
def steps_when_freed(server, steps, monkeypatch):
    """How many steps had begun when the server gave a client back."""
    counts: list[int] = []
    give_back = server.server.give_back

    def recorded(client):
        give_back(client)
        counts.append(len(steps))

    monkeypatch.setattr(server.server, "give_back", recorded)
    return counts


def assert_stopped(server, steps, counts):
    """No step has begun after the client was given back, and its task is closed."""
    wait_until(lambda: counts)
    wait_until(lambda: not server.server.worker.turns)
    # A step that had begun before is in both counts, or in the second one only.
    assert len(steps) <= counts[0] + 1
    assert not server.server.clients


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(server, steps, endless, steps_when_freed, stream):
    body = json.dumps({**SAY, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f"{head}\r\n\r\n".encode() + body)
        wait_until(lambda: len(steps) > 20)
    assert_stopped(server, steps, steps_when_freed)


def test_a_conversation_that_is_left(server, steps, steps_when_freed, monkeypatch):
    def endless_reply(session, *arguments, **options):
        return endless_steps(*[None] * 5)

    monkeypatch.setattr(Session, "respond_steps", endless_reply)
    with connect_to(server) as websocket:
        item = {"type": "message", "role": "user"}
        item["content"] = [{"type": "input_text", "text": "say the red circle"}]
        websocket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        websocket.send(json.dumps({"type": "response.create"}))
        wait_until(lambda: len(steps) > 20)
    assert_stopped(server, steps, steps_when_freed)


@pytest.fixture
def gushing(monkeypatch):
    """Answers that go on without end and faster than anyone reads, once this event is set. They
    keep their caches.
    """
    opened = threading.Event()

    def wrap(function):
        def made(*arguments, **options):
            steps = function(*arguments, **options)
            for event in steps:
                if isinstance(event, ReplyDone):
                    break
                yield event
            assert opened.wait(SECONDS)
            while True:
                time.sleep(0.001)
                yield TextChunk("x" * 10_000, 0.0)

        return made

    monkeypatch.setattr(chat, "answer_steps", wrap(chat.answer_steps))
    monkeypatch.setattr(Session, "respond_steps", wrap(Session.respond_steps))
    yield opened
    opened.set()


@contextmanager
def patient_for_half_a_second(model, caplog):
    """A server that logs nothing, though clients do not read."""
    with running(model, send_s=0.5) as server:
        logger = logging.getLogger("uvicorn.error")
        logger.addHandler(caplog.handler)  # its records do not reach the root logger
        yield server
        logger.removeHandler(caplog.handler)
    assert caplog.records == []


@contextmanager
def slow_reader(server):
    """A connection whose receive buffer is small."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", server.port))
        yield raw


def assert_dropped(server, gushing):
    """The client holds a cache until its answer is sent, and nothing when it does not read it."""
    wait_until(lambda: held()["KVCache"])
    gushing.set()
    wait_until(lambda: not server.server.clients and not server.server.worker.turns)
    wait_until(lambda: not any(held()[kind] for kind in SHORT_LIVED))


def test_a_slow_reader_of_a_chat(untrained, gushing, caplog):
    body = json.dumps({**SAY, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    with patient_for_half_a_second(untrained, caplog) as server:
        with slow_reader(server) as raw:
            raw.sendall(f"{head}\r\n\r\n".encode() + body)
            assert_dropped(server, gushing)
        assert httpx.get(f"{server.url}/health", timeout=SECONDS).json()["sessions"] == 0


def test_a_slow_reader_of_a_conversation(untrained, gushing, caplog):
    with patient_for_half_a_second(untrained, caplog) as server:
        with (
            slow_reader(server) as raw,
            connect_to(server, sock=raw, max_queue=1, close_timeout=0.1) as websocket,
        ):
            content = [{"type": "input_text", "text": "say the red circle"}]
            item = {"type": "message", "role": "user", "content": content}
            websocket.send(json.dumps({"type": "conversation.item.create", "item": item}))
            websocket.send(json.dumps({"type": "response.create"}))
            assert_dropped(server, gushing)
        with connect_to(server) as websocket:
            assert json.loads(websocket.recv(timeout=SECONDS))["type"] == "session.created"


# ------------------------------------------------------------------------------------------ memory


def held() -> Counter:
    """Objects of the server, sessions and caches that exist, and the bytes of all tensors."""
    gc.collect()
    kinds = ("minomni.serve", "minomni.chat", "minomni.kv_cache", "minomni.token2wav.streaming")
    counts: Counter = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if str(kind.__module__).startswith(kinds):
            counts[kind.__name__] += 1
        if kind is torch.Tensor and thing.layout is torch.strided:
            counts["bytes"] += thing.nbytes
    return counts


def converse(server) -> None:
    """A conversation of a spoken and a typed question, and a third one that is left."""
    with connect_to(server, max_size=None) as websocket:

        def send(kind, **fields):
            websocket.send(json.dumps({"type": kind, **fields}))

        def until_done():
            while json.loads(websocket.recv(timeout=SECONDS))["type"] != "response.done":
                pass

        detection = {"audio": {"input": {"turn_detection": None}}}
        send("session.update", session={"max_output_tokens": 8, **detection})
        send("input_audio_buffer.append", audio=base64.b64encode(spoken()).decode())
        send("input_audio_buffer.commit")
        send("response.create")
        until_done()
        content = [{"type": "input_text", "text": "say the red circle"}]
        for _ in range(2):
            item = {"type": "message", "role": "user", "content": content}
            send("conversation.item.create", item=item)
            send("response.create")
            if _ == 0:
                until_done()


@pytest.mark.slow
def test_everything_is_freed(server):
    """After twenty clients at once and one that left, as much is held as before them."""

    def some_of_each():
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            talked = [pool.submit(converse, server) for _ in range(3)]
            asked = [pool.submit(ask, server, SPEECH) for _ in range(CLIENTS - 3)]
            for job in asked + talked:
                job.result()
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=SPEECH, timeout=SECONDS) as answer:
            next(answer.iter_bytes())
        wait_until(lambda: not server.server.clients and not server.server.worker.turns)

    some_of_each()  # makes what stays: tables and the like
    wait_until(lambda: not any(held()[kind] for kind in SHORT_LIVED))
    before = held()
    some_of_each()
    wait_until(lambda: held() <= before)
