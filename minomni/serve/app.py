"""The application: routes, the model, and the server process."""

import asyncio
import logging
import mimetypes
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from minomni import paths
from minomni.errors import UserError, quote, shorten
from minomni.serve.access import Access
from minomni.serve.chat import chat_completions, speech, transcriptions
from minomni.serve.errors import ApiError, of_user_error
from minomni.serve.realtime import realtime
from minomni.serve.settings import Settings
from minomni.serve.worker import Client, Worker

if TYPE_CHECKING:
    from minomni.omni import Omni

Result = TypeVar("Result")
STATIC = Path(__file__).parent / "static"
SAMPLES = ("scene.png", "color.png", "digit.png")  # images that the page offers
PING_S = 20.0  # between two signs of life on a WebSocket
STOP_S = 3  # seconds that connections have to end when the server stops
# Lines that uvicorn logs for a request that is refused, broken or not read. They say nothing that
# helps, and anyone who reaches the port could fill the log with them.
OUTSIDERS_LINES = (
    "ASGI callable returned without completing handshake.",  # a WebSocket refused with a status
    "ASGI callable returned without completing response.",  # a client that does not read
    "Invalid HTTP request received.",
    "Invalid UTF-8 sequence received from client.",
    "Unsupported upgrade request.",
)


class Server:
    """What all requests share: the model, its worker, and the clients that it has now."""

    def __init__(self, omni: "Omni", model_name: str, settings: Settings):
        self.omni = omni
        self.model_name = model_name
        self.settings = settings
        self.worker = Worker()
        # A pool and not a semaphore: a request that is given up frees its place when its thread
        # ends, not before.
        self.decoders = ThreadPoolExecutor(settings.decoders, "minomni-decoder")
        self.clients: set[Client] = set()
        self.trained_here = omni.config.trained_here

    async def decode(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call a function that decodes media in a thread of its own.

        It does not hold up the worker's steps. At most Settings.decoders such calls run at once,
        which bounds the memory that decoded media take; others wait for their turn.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.decoders, function, *arguments)

    def take_client(self) -> Client:
        """A new client of the worker. Raises ApiError 429 where all sessions are in use."""
        limit = self.settings.sessions
        if len(self.clients) >= limit:
            raise ApiError(429, f"all {limit} sessions are in use", code="rate_limit_exceeded")
        client = Client(self.worker)
        self.clients.add(client)
        return client

    def give_back(self, client: Client) -> None:
        """End the work of a client and free its session."""
        client.close()
        self.clients.discard(client)

    def cancel_all(self) -> None:
        """End the work of all clients, which then get the end of their answers."""
        for client in self.clients:
            client.close()

    def check_model(self, name: object) -> None:
        """Raise ApiError 404 for the name of another model; none means this one."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"there is no model {quote(name)}, only {self.model_name}",
                "model",
                "model_not_found",
            )

    def describe(self) -> dict:
        """The model as an object of the API. Voices and the like are for the page."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "minomni",
            "voices": list(self.omni.voices),
            "speech": self.omni.token2wav is not None and bool(self.omni.voices),
            "trained_here": self.trained_here,
        }


def create_app(omni: "Omni", model_name: str, settings: Settings) -> Starlette:
    """The ASGI application for a loaded model."""
    server = Server(omni, model_name, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.worker.start()
        yield
        server.decoders.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(server.worker.stop)

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/audio/speech", speech, methods=["POST"]),
            Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
            WebSocketRoute("/v1/realtime", realtime),
            *static_routes(),
        ],
        middleware=[Middleware(Access, settings=settings)],
        exception_handlers={
            ApiError: api_error,
            UserError: user_error,
            HTTPException: http_error,
            ClientDisconnect: client_disconnect,
        },
        lifespan=lifespan,
    )
    app.state.server = server
    return app


async def health(request: Request) -> Response:
    """GET /health."""
    server: Server = request.app.state.server
    return JSONResponse(
        {
            "status": "ok",
            "model": server.model_name,
            "sessions": len(server.clients),
            "max_sessions": server.settings.sessions,
        }
    )


async def models(request: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [request.app.state.server.describe()]})


async def model(request: Request) -> Response:
    """GET /v1/models/NAME."""
    server: Server = request.app.state.server
    server.check_model(request.path_params["name"])
    return JSONResponse(server.describe())


def static_routes() -> list[Route]:
    """A route for each file of the page. The files are read once: no request opens a path."""
    routes = []
    files = {path.name: path for path in sorted(STATIC.iterdir()) if path.is_file()}
    for name in SAMPLES:
        files[name] = paths.data_samples() / name
    for name, path in files.items():
        if path.is_file():
            address = "/" if name == "index.html" else f"/static/{name}"
            routes.append(Route(address, static_file(path)))
    return routes


def static_file(path: Path):
    """An endpoint that answers with one file."""
    content = path.read_bytes()
    media_type = mimetypes.guess_type(path.name)[0]
    if path.suffix == ".js":  # some systems have no type for it
        media_type = "text/javascript"

    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return endpoint


# ----------------------------------------------------------------------------------------- errors


async def api_error(request: Request | WebSocket, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def user_error(request: Request | WebSocket, error: Exception) -> Response:
    return of_user_error(error).response()


async def http_error(request: Request | WebSocket, error: Exception) -> Response:
    """Unknown addresses, wrong methods and broken forms."""
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, shorten(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def client_disconnect(request: Request | WebSocket, error: Exception) -> Response:
    """A client that left while its request was read: no one reads this answer."""
    return Response(status_code=400)


# ---------------------------------------------------------------------------------------- process


class Process(uvicorn.Server):
    """uvicorn with this application. When it is to stop, it ends all answers first."""

    def __init__(self, app: Starlette, settings: Settings):
        self.application = app
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            ws="websockets-sansio",
            ws_max_size=settings.frame_bytes,
            ws_ping_interval=PING_S,
            ws_ping_timeout=PING_S,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=STOP_S,
            server_header=False,
        )
        logging.getLogger("uvicorn.error").addFilter(worth_logging)
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.application.state.server.cancel_all()
        await super().shutdown(sockets)


def worth_logging(record: logging.LogRecord) -> bool:
    """Whether a record of uvicorn is about the server, and not about what a client sent."""
    return record.msg not in OUTSIDERS_LINES


def serve(omni: "Omni", model_name: str, settings: Settings) -> None:
    """Serve a model until Ctrl-C. Raises UserError where the address is taken."""
    settings.check()
    listener = listen(settings)
    port = listener.getsockname()[1]
    process = Process(create_app(omni, model_name, settings), settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"minomni serves {model_name} at http://{host}:{port} (Ctrl-C stops it)", flush=True)
    with suppress(KeyboardInterrupt), listener:
        process.run(sockets=[listener])


@contextmanager
def serving(omni: "Omni", model_name: str, settings: Settings) -> Iterator[tuple[Starlette, int]]:
    """Serve a model in a thread -> the application and its port. It stops at the end of the block.

    Raises UserError where the address is taken.
    """
    app = create_app(omni, model_name, settings)
    process = Process(app, settings)
    with listen(settings) as listener:
        thread = threading.Thread(target=process.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield app, listener.getsockname()[1]
        finally:
            process.should_exit = True
            thread.join(timeout=20)


def listen(settings: Settings) -> socket.socket:
    """A socket at the server's address. Raises UserError where there is none."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=128)
    except OSError as error:
        raise UserError(
            f"{settings.host}:{settings.port}: cannot be served ({os.strerror(error.errno or 0)}); "
            f"give another --port, or 0 for any"
        ) from None
