"""Errors of the API, in OpenAI's form."""

import logging
import traceback

from starlette.responses import JSONResponse

from minomni.errors import OutOfMemory

log = logging.getLogger("minomni.serve")
OUT_OF_MEMORY = "out_of_memory"
RETRY_AFTER_S = 2
LOGGED_FRAMES = 8  # the innermost ones of an error


class ApiError(Exception):
    """An error that a client gets: an HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> JSONResponse:
        """The error as a response; 429 says when to try again, and a lack of memory not to."""
        headers = {}
        if self.status == 429:
            headers["Retry-After"] = str(RETRY_AFTER_S)
        if self.code == OUT_OF_MEMORY:
            headers["x-should-retry"] = "false"  # OpenAI's clients obey it
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A request that cannot be answered as it is."""
    return ApiError(400, message, param, "invalid_value")


def of_user_error(error: Exception) -> ApiError:
    """A UserError of the model as an error of the API."""
    message = str(error)
    if isinstance(error, OutOfMemory):
        return ApiError(503, message, None, OUT_OF_MEMORY)
    code = "context_length_exceeded" if "context" in message else "invalid_value"
    return ApiError(400, message, None, code)


def log_unexpected(where: str, error: Exception) -> None:
    """Log the type and the place of an error, without its message, which may quote a user."""
    frames = traceback.extract_tb(error.__traceback__)[-LOGGED_FRAMES:]
    lines = [f"{frame.filename}:{frame.lineno}" for frame in frames]
    log.error("%s in %s (%s)", type(error).__name__, where, ", ".join(lines))


INTERNAL = ApiError(500, "the server failed to answer; its log says where")
