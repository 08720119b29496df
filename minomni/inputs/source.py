"""Where media come from: paths, bytes and open files to a seekable stream, and decoders' complaints
to one line.
"""

import base64
import io
import os
import re
import stat
import struct
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import UnidentifiedImageError
from torch import Tensor

from minomni.errors import UserError, shorten

LONGEST_NAME = 120  # characters of a path in a message
LONGEST_REASON = 160  # characters of a library's complaint
DATA_URI, FILE_URI = (re.compile(start, re.IGNORECASE) for start in ("data:", "file:/"))
ADDRESS = re.compile("[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_uri(text: str) -> bool:
    """Whether a text is a data: URI, a file: URI or a web address, and no plain path."""
    return any(kind.match(text) for kind in (DATA_URI, FILE_URI, ADDRESS))


@contextmanager
def open_source(source, name: str):
    """A seekable binary stream of a path, a file:// or data: URI, bytes, or a file that is open
    already.

    A dictionary of Hugging Face datasets, {"bytes", "path"}, is taken too. The stream stands at its
    beginning; what the caller opened stays open. Raises UserError for what is not there or no
    regular file; nothing is ever fetched.
    """
    if isinstance(source, dict) and ("bytes" in source or "path" in source):
        content = source.get("bytes")
        source = source.get("path") if content is None else content
        if source is None:
            raise UserError(
                f"{name}: a dictionary whose bytes and path are both empty; give one of them"
            )
    if isinstance(source, os.PathLike):
        source = os.fspath(source) if isinstance(os.fspath(source), str) else os.fsdecode(source)
    if isinstance(source, str) and DATA_URI.match(source):
        source = _data_of_uri(source, name)
    if isinstance(source, memoryview):
        source = _bytes_of_view(source, name)
    if isinstance(source, (bytes, bytearray)):
        yield io.BytesIO(source)
    elif isinstance(source, str):
        with _open_file(source, name) as stream:
            yield stream
    elif hasattr(source, "read") and hasattr(source, "seek"):
        _rewind(source, name)
        yield source
    else:
        raise UserError(
            f"{name}: a {shorten(type(source).__name__)} cannot be read; give a path, bytes or an array"
        )


def _bytes_of_view(view: memoryview, name: str) -> bytes:
    """The bytes in a view, which may skip some of its buffer's."""
    try:
        return view.tobytes()
    except ValueError:
        raise UserError(
            f"{name}: a memoryview that was released; give the bytes themselves"
        ) from None


def _open_file(spelling: str, name: str):
    """A path or a file:// URI -> its open file."""
    is_file_uri = FILE_URI.match(spelling)
    if not is_file_uri and ADDRESS.match(spelling):
        raise UserError(f"{name}: no such file; web addresses are not fetched, download it")
    try:
        path = _path_of_uri(spelling) if is_file_uri else Path(spelling)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name}: not a file, but a {_kind_of(status.st_mode)}")
        if status.st_size == 0:  # /proc/kmsg too, which would be waited for
            return io.BytesIO()
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be opened ({first_line(error)})") from None


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _path_of_uri(uri: str) -> Path:
    """file:///a%20b -> /a b. What people write by hand, as file:///a b or file://a, is taken as it
    stands.
    """
    rest = re.sub("^file:(//(localhost(?=/))?)?", "", uri, flags=re.IGNORECASE)
    if os.name == "nt":
        rest = re.sub("^/(?=[A-Za-z]:)", "", rest)
    decoded = Path(unquote(rest, errors="surrogateescape"))
    return decoded if decoded.exists() or not Path(rest).exists() else Path(rest)


def _data_of_uri(uri: str, name: str) -> bytes:
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
    """Base64 of either alphabet, the usual one or that for URLs, with or without padding -> the
    bytes.

    Raises ValueError for what is none.
    """
    text = re.sub(r"\s", "", text).rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _rewind(stream, name: str) -> None:
    """Put a caller's stream to its beginning, or say why it cannot be read."""
    try:
        getattr(stream, "name", None)  # decoders look at it
        if hasattr(stream, "fileno"):
            _require_regular(stream, name)
        stream.seek(0)
        content = stream.read(1)
        stream.seek(0)
    except UserError:
        raise
    except Exception as error:  # any class may stand for a file
        raise UserError(
            f"{name}: an open file that cannot be read from its beginning ({first_line(error)}); give its "
            f"bytes"
        ) from None
    if not isinstance(content, bytes):
        raise UserError(f"{name}: a file opened as text; open it with mode 'rb'")


def _require_regular(stream, name: str) -> None:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (
        OSError,
        ValueError,
        TypeError,
    ):  # BytesIO and its like have no number; closed files are told later
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{name}: an open {_kind_of(mode)}; give a file, or the bytes read from it")


def array_of(source, name: str) -> np.ndarray:
    """An array, tensor or list of numbers -> array of the same shape, in numpy's types (bfloat16 as
    float32).

    Nothing is copied where it need not be: look at the shape before anything is computed from a
    huge one. Raises UserError for tensors that hold no values (meta), and for what is no array of
    numbers.
    """
    try:
        if isinstance(source, Tensor):
            source = source.detach().cpu()
            source = (
                source.float()
                if source.is_floating_point() and source.element_size() < 4
                else source
            )
            source = source.resolve_conj().resolve_neg().numpy()
        array = np.asarray(source)
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


@contextmanager
def complaints(name: str, what: str):
    """What a decoder raises becomes one line that names the file."""
    import av

    try:
        yield
    except UserError:
        raise
    except (
        av.error.FFmpegError,
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        ArithmeticError,
        MemoryError,
        struct.error,
    ) as error:
        raise UserError(f"{name}: {what} ({first_line(error)})") from None


def name_of(source, kind: str) -> str:
    """What to call a source in a message: its path, on one line and shortened, or "the KIND given"."""
    if isinstance(source, dict):
        source = source.get("path")
    if isinstance(source, os.PathLike):
        source = str(source)
    try:
        source = (
            getattr(source, "name", None) if hasattr(source, "read") else source
        )  # an open file
    except Exception:  # a property of the caller's own class may raise anything
        source = None
    if not isinstance(source, str):
        return f"the {kind} given"
    if DATA_URI.match(source):
        return f"the {kind} given"
    return shorten(source, LONGEST_NAME) or "an empty path"


def first_line(error: Exception) -> str:
    """The first line of a library's complaint, without numbers and addresses that mean nothing to a
    reader.
    """
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return shorten(lines[0] if lines else type(error).__name__, LONGEST_REASON)
