"""Where media come from: paths and bytes to a seekable stream, and decoders' complaints to one line."""

import io
import struct
from contextlib import contextmanager
from pathlib import Path

from PIL import UnidentifiedImageError

from ..errors import UserError


def open_source(source, name: str):
    """A seekable binary stream of a path or of bytes."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if not isinstance(source, (str, Path)):
        raise UserError(f"{name}: a {type(source).__name__} cannot be read; give a path, bytes or an array")
    path = Path(str(source).removeprefix("file://"))
    try:
        found, readable = path.exists(), path.is_file()
        if readable:
            return open(path, "rb")
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be opened ({first_line(error)})") from None
    web = "; web addresses are not fetched, download it" if "://" in str(source) else ""
    raise UserError(f"{name}: {'not a file' if found else 'no such file'}{web}")


def require_whole(stream, name: str) -> None:
    """Raise UserError where a box of an mp4 file reaches beyond its end: decoders would just play what is left."""
    end, place = stream.seek(0, io.SEEK_END), 0
    while place + 16 <= end:
        stream.seek(place)
        size, kind, long_size = struct.unpack(">I4sQ", stream.read(16))
        if place == 0 and kind != b"ftyp" or size == 0:  # another container; or a last box of open length
            break
        place += max(8, long_size if size == 1 else size)
    stream.seek(0)
    if place > end:
        raise UserError(f"{name}: cut short, {end} of at least {place} bytes are there; copy it again")


@contextmanager
def complaints(name: str, what: str):
    """What a decoder raises becomes one line that names the file."""
    import av

    try:
        yield
    except UserError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{name}: {what} ({first_line(error)})") from None


def name_of(source, kind: str) -> str:
    """What to call a source in a message."""
    if not isinstance(source, (str, Path)):
        return f"the {kind} given"
    spelling = str(source) or "an empty path"
    return spelling if len(spelling) <= 300 else f"{spelling[:60]}..."


def first_line(error: Exception) -> str:
    """The first line of a library's complaint, without numbers and addresses that mean nothing to a reader."""
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    return (str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__])[0]
