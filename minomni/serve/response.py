"""Responses that end when their client goes away or stops reading."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minomni.serve.errors import ApiError
from minomni.serve.worker import Client

if TYPE_CHECKING:
    from minomni.serve.app import Server

Endpoint = Callable[[Request], Awaitable[Response]]
ClientEndpoint = Callable[[Request, "Server", Client], Awaitable[Response]]


class Stream(Response):
    """A response in chunks. When the client leaves, or takes longer than Settings.send_s to read a
    chunk, its work is cancelled before the next step.
    """

    def __init__(
        self, chunks: AsyncGenerator[bytes], server: "Server", client: Client, media_type: str
    ):
        super().__init__(media_type=media_type)
        self.chunks = chunks
        self.server = server
        self.client = client
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self.send_all(send))
        leaving = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            leaving.cancel()
            self.server.give_back(self.client)
            with suppress(asyncio.CancelledError, TimeoutError, ApiError, OSError):
                await sending

    async def send_all(self, send: Send) -> None:
        """Send the chunks one by one. Raises TimeoutError for a client that does not read."""
        seconds = self.server.settings.send_s
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self.chunks):
            async for chunk in self.chunks:
                part = {"type": "http.response.body", "body": chunk, "more_body": True}
                await asyncio.wait_for(send(part), seconds)
        end = {"type": "http.response.body", "body": b"", "more_body": False}
        await asyncio.wait_for(send(end), seconds)


async def disconnected(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def until_disconnect(request: Request, client: Client) -> AsyncIterator[None]:
    """Cancel the work of a client that leaves before its answer."""

    async def watch() -> None:
        await disconnected(request.receive)
        client.close()

    watching = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watching.cancel()


def with_client(endpoint: ClientEndpoint) -> Endpoint:
    """Take a client of the worker before the body is read, and give it back after the answer.

    The endpoint raises ApiError 429 where all clients are taken.
    """

    @wraps(endpoint)
    async def run(request: Request) -> Response:
        server: Server = request.app.state.server
        client = server.take_client()
        is_stream = False
        try:
            response = await endpoint(request, server, client)
            is_stream = isinstance(response, Stream)  # it gives the client back at its own end
            return response
        finally:
            if not is_stream:
                server.give_back(client)

    return run
