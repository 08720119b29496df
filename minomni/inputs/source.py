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


MOST_PARTS = 1_000
PAGE_BEGINS_STREAM = 2  # a flag of an Ogg page
FLAC_HEADER = b"fLaC\0\0\0\x22"  # the marker and the type and length of the block that must follow it


class _Part(io.RawIOBase):
    """Bytes begin ... end of a seekable stream, as a stream of their own."""

    def __init__(self, stream, begin: int, end: int):
        self.stream, self.begin, self.end, self.place = stream, begin, end, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.end - self.begin}[whence]
        self.place = max(0, base + offset)
        return self.place

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), max(0, self.end - self.begin - self.place))
        self.stream.seek(self.begin + self.place)
        content = self.stream.read(wanted)
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


def is_ogg(stream) -> bool:
    """Whether a stream begins as Ogg files do."""
    stream.seek(0)
    return stream.read(4) == b"OggS"


def parts_of_stream(stream, name: str) -> list:
    """Streams [at least 1] of an Ogg or FLAC file that begins anew midway (`cat a b`, radio): [stream] for others.

    Decoders play the first part alone, or stumble where the rate changes.
    """
    stream.seek(0)
    head = stream.read(len(FLAC_HEADER))
    if head[:4] == b"OggS":
        begins = _ogg_begins(stream)
    elif head == FLAC_HEADER:
        begins = _places(stream, FLAC_HEADER)
    else:
        begins = [0]
    if len(begins) > MOST_PARTS:
        raise UserError(f"{name}: begins anew {len(begins)} times; at most {MOST_PARTS} parts are read, split it")
    if len(begins) < 2:
        return [stream]
    ends = begins[1:] + [stream.seek(0, io.SEEK_END)]
    return [_Part(stream, begin, end) for begin, end in zip(begins, ends)]


def _ogg_begins(stream) -> list[int]:
    """Where the parts of a chained Ogg file begin: at pages that begin a stream and follow one that does not."""
    begins, place, was_begin = [], 0, False
    while True:
        stream.seek(place)
        page = stream.read(27)
        if len(page) < 27 or page[:4] != b"OggS":
            return begins
        is_begin = bool(page[5] & PAGE_BEGINS_STREAM)
        if is_begin and not was_begin:  # several streams side by side all begin before the first other page
            begins.append(place)
        was_begin = is_begin
        lengths = stream.read(page[26])
        place += 27 + len(lengths) + sum(lengths)


def _places(stream, pattern: bytes) -> list[int]:
    """Where a pattern occurs in a stream."""
    places, read, kept = [], 0, b""
    stream.seek(0)
    while block := stream.read(1 << 20):
        window = kept + block
        at = window.find(pattern)
        while at >= 0:
            places.append(read - len(kept) + at)
            at = window.find(pattern, at + 1)
        read += len(block)
        kept = window[-(len(pattern) - 1) :]
    return places


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
