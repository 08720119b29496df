"""Sources of media: paths, bytes and open files to a seekable stream; errors to one line."""

import base64
import io
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import UnidentifiedImageError
from torch import Tensor

from minomni.errors import UserError, shorten

MAX_NAME_LENGTH = 120  # characters of a path in a message
MAX_REASON_LENGTH = 160  # characters of a library's error message
# Options of av.open(): a playlist or a list of files may name others, which are never opened.
NO_OTHER_FILES = {"protocol_whitelist": "none"}
DATA_URI = re.compile("data:", re.IGNORECASE)
FILE_URI = re.compile("file:/", re.IGNORECASE)
WEB_ADDRESS = re.compile("[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_uri(text: str) -> bool:
    """Whether a string is a data: URI, a file: URI or a web address instead of a plain path."""
    return any(pattern.match(text) for pattern in (DATA_URI, FILE_URI, WEB_ADDRESS))


@contextmanager
def open_source(source: Any, name: str) -> Iterator[Any]:
    """A seekable binary stream of a path, a file:// or data: URI, bytes, or an open file.

    A dictionary of Hugging Face datasets, {"bytes", "path"}, is accepted too. The stream is at its
    beginning; a file that the caller opened stays open. Raises UserError for sources that are
    missing or no regular file. Nothing is ever downloaded.
    """
    if isinstance(source, dict) and ("bytes" in source or "path" in source):
        source = _source_of_dict(source, name)
    if isinstance(source, os.PathLike):
        source = os.fsdecode(source)
    if isinstance(source, str) and DATA_URI.match(source):
        source = _bytes_of_data_uri(source, name)
    if isinstance(source, memoryview):
        source = _bytes_of_view(source, name)

    if isinstance(source, (bytes, bytearray)):
        yield io.BytesIO(source)
    elif isinstance(source, str):
        with _open_file(source, name) as stream:
            yield stream
    elif hasattr(source, "read") and hasattr(source, "seek"):
        _rewind(source, name)
        yield _CallersFile(source, name)
    else:
        kind = shorten(type(source).__name__)
        raise UserError(f"{name}: a {kind} cannot be read; give a path, bytes or an array")


class _CallersFile:
    """An open file of the caller, whose class may raise anything: it becomes one UserError."""

    def __init__(self, stream: Any, name: str):
        self.stream = stream
        self.source_name = name
        self.name = getattr(stream, "name", "<none>")  # ffmpeg looks at its ending

    def read(self, size: int = -1) -> bytes:
        return self._call(self.stream.read, size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._call(self.stream.seek, offset, whence)

    def tell(self) -> int:
        return self._call(self.stream.tell)

    def _call(self, method: Callable, *arguments: int) -> Any:
        try:
            return method(*arguments)
        except Exception as error:
            raise UserError(
                f"{self.source_name}: an open file that cannot be read ({first_line(error)}); give "
                f"its bytes"
            ) from None


def _source_of_dict(source: dict, name: str) -> Any:
    """The bytes of a dictionary, or else its path."""
    content = source.get("bytes")
    if content is None:
        content = source.get("path")
    if content is None:
        raise UserError(
            f"{name}: a dictionary whose bytes and path are both empty; give one of them"
        )
    return content


def _bytes_of_view(view: memoryview, name: str) -> bytes:
    """The bytes in a view, which may be strided."""
    try:
        return view.tobytes()
    except ValueError:
        raise UserError(
            f"{name}: a memoryview that was released; give the bytes themselves"
        ) from None


def _open_file(spelling: str, name: str) -> IO[bytes]:
    """A path or a file:// URI -> its open file."""
    is_file_uri = FILE_URI.match(spelling)
    if not is_file_uri and WEB_ADDRESS.match(spelling):
        raise UserError(f"{name}: no such file; web addresses are not fetched, download it")
    try:
        path = _path_of_uri(spelling) if is_file_uri else Path(spelling)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name}: not a file, but a {_kind_of(status.st_mode)}")
        if status.st_size == 0:  # includes /proc/kmsg, where reading would block
            return io.BytesIO()
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be opened ({first_line(error)})") from None


def _kind_of(mode: int) -> str:
    """The name of a kind of file that is not regular."""
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _path_of_uri(uri: str) -> Path:
    """file:///a%20b -> /a b. URIs written by hand, such as file:///a b or file://a, also work."""
    rest = re.sub("^file:(//(localhost(?=/))?)?", "", uri, flags=re.IGNORECASE)
    if os.name == "nt":
        rest = re.sub("^/(?=[A-Za-z]:)", "", rest)
    decoded = Path(unquote(rest, errors="surrogateescape"))
    literal = Path(rest)
    if not decoded.exists() and literal.exists():
        return literal
    return decoded


def _bytes_of_data_uri(uri: str, name: str) -> bytes:
    """data:[type][;base64],content -> the bytes."""
    header, comma, content = uri.partition(",")
    if not comma:
        raise UserError(f"{name}: a data: URI without a comma; expected data:TYPE;base64,CONTENT")
    if not header.lower().rstrip().endswith(";base64"):
        return unquote_to_bytes(content)
    try:
        return decode_base64(unquote(content))
    except ValueError:
        raise UserError(
            f"{name}: a data: URI whose base64 is broken; encode the file again"
        ) from None


def decode_base64(text: str) -> bytes:
    """Base64 in the standard or the URL alphabet, with or without padding -> the bytes.

    Raises ValueError for other strings.
    """
    text = re.sub(r"\s", "", text).rstrip("=")
    text = text.replace("-", "+").replace("_", "/")
    padding = "=" * (-len(text) % 4)
    return base64.b64decode(text + padding, validate=True)


def _rewind(stream: Any, name: str) -> None:
    """Seek to the beginning of a caller's stream. Raises UserError if it cannot be read."""
    try:
        getattr(stream, "name", None)  # decoders read it
        if hasattr(stream, "fileno"):
            _require_regular(stream, name)
        stream.seek(0)
        content = stream.read(1)
        stream.seek(0)
    except UserError:
        raise
    except Exception as error:  # any class may stand for a file
        raise UserError(
            f"{name}: an open file that cannot be read from its beginning ({first_line(error)}); "
            f"give its bytes"
        ) from None
    if not isinstance(content, bytes):
        raise UserError(f"{name}: a file opened as text; open it with mode 'rb'")


def _require_regular(stream: Any, name: str) -> None:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError, TypeError, AttributeError):
        return  # BytesIO, files in a tar archive and the like; closed files are refused later
    if not stat.S_ISREG(mode):
        raise UserError(f"{name}: an open {_kind_of(mode)}; give a file, or the bytes read from it")


def shape_of(source: Any, name: str) -> tuple[int, ...]:
    """The shape of an array or tensor. Raises UserError for nested tensors, which have none."""
    if isinstance(source, Tensor) and source.is_nested:
        raise UserError(f"{name}: a nested tensor; expected one array, give each of its tensors")
    return tuple(source.shape)


def to_numpy(source: Any, name: str) -> np.ndarray:
    """An array, tensor or list of numbers -> array of the same shape, in numpy's types.

    bfloat16 and float16 tensors become float32. Values are copied only where needed, but check the
    shape before anything is computed from a huge array. Raises UserError for tensors without values
    (meta), and for sources that are not arrays of numbers.
    """
    try:
        array = _numpy(source) if isinstance(source, Tensor) else np.asarray(source)
    except Exception as error:  # meta, sparse and quantized tensors, ragged lists: many kinds
        kind = shorten(type(source).__name__)
        raise UserError(
            f"{name}: a {kind} whose values cannot be read ({first_line(error)})"
        ) from None
    if array.dtype.kind not in "iufb":
        raise UserError(
            f"{name}: values of type {shorten(array.dtype, 60)}; expected numbers, float or integer"
        )
    return array


def _numpy(tensor: Tensor) -> np.ndarray:
    """The values of a tensor; floats of less than 32 bits become float32."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().numpy()


@contextmanager
def one_line_errors(name: str, what: str) -> Iterator[None]:
    """Turn the errors of a decoder into one UserError: the file, what is wrong, and the reason."""
    import av

    decoder_errors = (
        av.error.FFmpegError,
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        ArithmeticError,
        MemoryError,
        struct.error,
    )
    try:
        yield
    except UserError:
        raise
    except decoder_errors as error:
        raise UserError(f"{name}: {what} ({first_line(error)})") from None


def name_of(source: Any, kind: str) -> str:
    """The name of a source in a message: its path, shortened to one line, or "the KIND given"."""
    if isinstance(source, dict):
        source = source.get("path")
    if isinstance(source, os.PathLike):
        source = str(source)
    try:
        if hasattr(source, "read"):  # an open file
            source = getattr(source, "name", None)
    except Exception:  # a property of the caller's own class may raise anything
        source = None
    if not isinstance(source, str) or DATA_URI.match(source):
        return f"the {kind} given"
    return shorten(source, MAX_NAME_LENGTH) or "an empty path"


def first_line(error: Exception) -> str:
    """The first line of a library's error message, without numbers and addresses."""
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    line = lines[0] if lines else type(error).__name__
    return shorten(line, MAX_REASON_LENGTH)
