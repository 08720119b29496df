"""Events on their way to the client of a WebSocket."""

import asyncio
import json
from typing import Any

from starlette.websockets import WebSocket

from minomni.serve.errors import ApiError
from minomni.serve.realtime_objects import new_id

MAX_PENDING = 16 * 2**20  # characters of events that a client has not read
MAX_EVENT_ID = 512  # characters


class Outbox:
    """Sends events in order. A client that does not read them is dropped."""

    def __init__(self, websocket: WebSocket, send_s: float):
        self.websocket = websocket
        self.send_s = send_s  # seconds that a client may take to read an event
        self.events: asyncio.Queue[str | None] = asyncio.Queue()
        self.pending = 0  # characters in the queue
        self.sending: asyncio.Future[None] | None = None
        self.last_item: str | None = None  # of the conversation

    def start(self) -> "asyncio.Future[None]":
        """Begin to send -> a future that ends with close(), or where the client does not read."""
        self.sending = asyncio.ensure_future(self.send_all())
        return self.sending

    def send(self, kind: str, **fields: Any) -> None:
        """Queue an event."""
        text = json.dumps({"type": kind, "event_id": new_id("event"), **fields})
        self.pending += len(text)
        self.events.put_nowait(text)
        if self.pending > MAX_PENDING and self.sending is not None:
            self.sending.cancel()

    def send_added(self, item: dict) -> str | None:
        """Tell the client of the newest item of the conversation -> the id of the one before it."""
        previous = self.last_item
        self.last_item = item["id"]
        self.send("conversation.item.added", item=item, previous_item_id=previous)
        return previous

    def send_error(self, error: ApiError, event: object = None) -> None:
        """Tell the client that one of its events failed."""
        fields = error.body()["error"]
        event_id = event.get("event_id") if isinstance(event, dict) else None
        if not isinstance(event_id, str) or len(event_id) > MAX_EVENT_ID:
            event_id = None
        self.send("error", error={**fields, "event_id": event_id})

    def close(self) -> None:
        """Send what is queued, and no more."""
        self.events.put_nowait(None)

    async def send_all(self) -> None:
        """Send the queued events. Raises TimeoutError where the client does not read them."""
        while (text := await self.events.get()) is not None:
            await asyncio.wait_for(self.websocket.send_text(text), self.send_s)
            self.pending -= len(text)
