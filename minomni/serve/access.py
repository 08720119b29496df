"""Who may ask, and how much: host, origin, token and sizes of every request, before any route.

Browsers let any page open a WebSocket to any server and send simple requests to it. The Host and
Origin headers, which a page cannot change, tell such requests apart. There are no CORS headers.
"""

import asyncio
import hmac
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minomni.serve.errors import INTERNAL, ApiError, log_unexpected
from minomni.serve.settings import Settings

HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
# Browsers cannot set headers of a WebSocket; OpenAI's clients put the key into the subprotocols.
KEY_PROTOCOL = "openai-insecure-api-key."
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; media-src 'self' blob:; worker-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self), camera=(self), geolocation=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Access:
    """Middleware that refuses requests, limits bodies and adds the security headers.

    Errors that no one expects end here, too: the server process would log their messages, which may
    quote what a user wrote.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"].endswith("response.start"):
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            await self.answer(scope, receive, send_with_headers)
        except Exception as error:
            log_unexpected("a request", error)
            if not started:
                await INTERNAL.response()(scope, receive, send_with_headers)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer a request, unless it must not be answered."""
        error = self.refusal(scope)
        if error is not None:
            await error.response()(scope, receive, send)
            return
        if scope["type"] == "http":
            receive = LimitedBody(receive, self.settings).receive
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> ApiError | None:
        """The error of a request that may not be answered."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        match = HOST.fullmatch(host)
        if match is None or not self.settings.allows_host(match["name"].strip("[]").lower()):
            return ApiError(400, "this server does not go by that host name", code="invalid_host")

        # Only pages of this server may ask from a browser.
        origin = headers.get("origin")
        same_origin = origin in (None, f"http://{host}", f"https://{host}")
        is_api = scope["path"].startswith("/v1/")
        cross_site = is_api and headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if not same_origin or cross_site:
            return ApiError(403, "pages of other sites may not use it", code="invalid_origin")

        if is_api and not self.has_token(headers):
            return ApiError(
                401, "give the server's token as Authorization: Bearer", code="invalid_api_key"
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.settings.body_bytes:
            return too_large(self.settings)
        return None

    def has_token(self, headers: Headers) -> bool:
        """Whether a request gives the server's token, compared in constant time."""
        if self.settings.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = ""
        for protocol in headers.get("sec-websocket-protocol", "").split(","):
            if protocol.strip().startswith(KEY_PROTOCOL):
                given = protocol.strip().removeprefix(KEY_PROTOCOL)
        return hmac.compare_digest(given.encode(), self.settings.token.encode())


class LimitedBody:
    """The body of a request, up to a size and within a time."""

    def __init__(self, receive: Receive, settings: Settings):
        self.original = receive
        self.settings = settings
        self.deadline = asyncio.get_running_loop().time() + settings.body_s
        self.size = 0
        self.complete = False

    async def receive(self) -> Message:
        """The next part of the body. Raises ApiError for a body that is too large or too slow."""
        if self.complete:  # what follows is the end of the connection, however long it takes
            return await self.original()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.original()
        except TimeoutError:
            raise ApiError(408, "the request took too long to arrive") from None
        self.size += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self.size > self.settings.body_bytes:
            raise too_large(self.settings)
        return message


def too_large(settings: Settings) -> ApiError:
    limit = settings.body_bytes / 2**20
    return ApiError(413, f"a request may have {limit:.0f} MiB", code="request_too_large")
