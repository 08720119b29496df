"""Events on their way to a client that does not read them."""

import asyncio

import pytest
import serving  # noqa: F401  (skips where the server's packages are missing)

from minomni.serve import outbox
from minomni.serve.errors import bad_request


class Socket:
    """The sending half of a WebSocket; one that is stuck takes an event and never returns."""

    def __init__(self, stuck: bool = False):
        self.stuck = stuck
        self.texts = []

    async def send_text(self, text: str) -> None:
        self.texts.append(text)
        if self.stuck:
            await asyncio.Event().wait()


def test_events_are_sent_in_order():
    async def run():
        socket = Socket()
        made = outbox.Outbox(socket, 10)
        sending = made.start()
        for number in range(100):
            made.send("count", number=number)
        made.close()
        await sending
        return socket.texts, made.pending

    texts, pending = asyncio.run(run())
    assert [f'"number": {number}}}' in text for number, text in enumerate(texts)] == [True] * 100
    assert pending == 0


def test_a_client_that_does_not_read_in_time_is_dropped():
    async def run():
        made = outbox.Outbox(Socket(stuck=True), 0.01)
        sending = made.start()
        made.send("hello")
        await sending

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_a_client_that_reads_too_little_is_dropped(monkeypatch):
    monkeypatch.setattr(outbox, "MAX_PENDING", 10_000)

    async def run():
        made = outbox.Outbox(Socket(stuck=True), 1e9)
        sending = made.start()
        count = 0
        while not sending.cancelling():
            made.send("hello", text="x" * 1000)
            count += 1
        await sending
        return count

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())


@pytest.mark.parametrize("event_id", [3, ["x"], "x" * 10_000, None])
def test_only_a_short_name_of_an_event_is_repeated(event_id):
    async def run():
        socket = Socket()
        made = outbox.Outbox(socket, 10)
        made.send_error(bad_request("wrong"), {"event_id": event_id})
        made.close()
        await made.start()
        return socket.texts

    (text,) = asyncio.run(run())
    assert '"event_id": null' in text
