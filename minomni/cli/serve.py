"""The command serve."""

import argparse
import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from minomni.cli.options import (
    add_cuda,
    add_device,
    add_model,
    add_parts,
    add_quantize,
    load_parts,
    whole_number,
)
from minomni.errors import UserError

if TYPE_CHECKING:
    from minomni.cli.options import Parser


def add_serve(commands: "argparse._SubParsersAction[Parser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="open a page to talk to the model, and the API of OpenAI's clients",
        description="Serves a page with a microphone at http://HOST:PORT, /v1/chat/completions, "
        "/v1/audio/speech, /v1/audio/transcriptions, /v1/realtime and /v1/models. Other machines "
        "reach it only with --host, which needs a token in the environment variable MINOMNI_TOKEN.",
    )
    add_model(serve)
    add_quantize(serve)
    add_parts(serve)
    add_cuda(serve)
    add_device(serve)
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)"
    )
    serve.add_argument(
        "--port", type=whole_number(0, 65_536), default=8000, help="port (default 8000; 0 for any)"
    )
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name that requests may give, such as that of a proxy with https in front",
    )
    serve.add_argument(
        "--sessions",
        type=whole_number(1, 10_001),
        default=32,
        help="requests and conversations at once; others are told to try later (default 32)",
    )


def import_server(module: str) -> ModuleType:
    """A module of the server. Raises UserError where its packages are not installed."""
    try:
        return import_module(f"minomni.serve.{module}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"the server needs {error.name}, which is not installed; run: "
            f"pip install -r requirements-serve.txt"
        ) from None


def run_serve(arguments: argparse.Namespace) -> None:
    """Serve the page and the API until Ctrl-C."""
    app = import_server("app")
    settings = app.Settings(
        host=arguments.host,
        port=arguments.port,
        names=tuple(arguments.allow_host),
        token=os.environ.get("MINOMNI_TOKEN") or None,
        sessions=arguments.sessions,
    )
    settings.check()
    omni = load_parts(arguments)
    app.serve(omni, Path(arguments.model).resolve().name, settings)
