"""Sound and film files by their own structure: whether one is whole, how long it says it is, where
parts begin.

Decoding is left to PyAV and soundfile. Here is only what they do not tell: they play what is left
of a file that was cut, and read the first of several streams that follow each other.
"""

import io
import struct

from minomni.errors import UserError
from minomni.inputs.source import complaints


def require_whole(stream, name: str) -> None:
    """Raise UserError where a file ends before what its own header announces: decoders would play
    what is left.

    Known for mp4 and mov, wav, avi, aiff, au, mkv and webm. Others (mp3, aac, ogg, ts) announce no
    length. A length of 0 or beyond 2 GB in wav and its like stands for "unknown": recorders and
    pipes write the header first. Raises UserError, too, for headers that are followed by zeros or
    by countless empty parts: decoders read those for minutes.
    """
    with complaints(name, "its header cannot be read"):
        end = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        needed = _announced(stream, end, name)
        stream.seek(0)
    if needed > end:
        raise UserError(
            f"{name}: cut short, {end} of at least {needed} bytes are there; copy it again"
        )


def _announced(stream, end: int, name: str) -> int:
    """How many bytes the header of a file of `end` bytes announces at least; 0 where that is not
    known.
    """
    head = stream.read(12)
    if head[4:8] in MP4_BEGINS:
        return _end_of_mp4(stream, end, name)
    if head[:4] in (b"RIFF", b"RF64", b"FORM"):
        return _end_of_chunks(stream, end, ">" if head[:4] == b"FORM" else "<", name)
    if head[:4] == b".snd":
        return _end_of_au(head)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _end_of_matroska(stream)
    return 0


# before the sound of a wav or the pictures of an avi; boxes of an mp4 that hold next to nothing
MOST_CHUNKS = 10_000
SMALL_BOX = 32  # bytes: in films of many fragments, boxes are larger on average
MP4_BEGINS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
MP4_CONTENT = (b"moov", b"mdat", b"moof")
UNKNOWN = 2_000_000_000  # bytes: lengths from here on are what writers put who do not know it yet


def _end_of_mp4(stream, end: int, name: str) -> int:
    """How far the boxes of an mp4 reach. Bytes behind the last one (a camera's, a tag) are no box
    and do not count.
    """
    place, seen, count = 0, set(), 0
    while place + 16 <= end:
        stream.seek(place)
        size, kind, long_size = struct.unpack(">I4sQ", stream.read(16))
        if size == 0:  # reaches to the end
            return end
        size = max(8, long_size if size == 1 else size)
        if place + size > end and kind not in MP4_CONTENT and {b"moov", b"mdat"} <= seen:
            return end
        seen.add(kind)
        place += size
        count += 1
        if count > MOST_CHUNKS and place < SMALL_BOX * count:
            raise UserError(f"{name}: its first {count} boxes hold next to nothing; copy it again")
    return (
        place if {b"moov", b"mdat"} <= seen else max(place, end + 8)
    )  # at least the header of the other one


def _end_of_chunks(stream, end: int, order: str, name: str) -> int:
    """How far the samples of a wav, avi or aiff reach: its chunk data, LIST movi or SSND.

    Raises UserError where zeros come before it, as in a file of which only the beginning was
    copied.
    """
    place, long_size, count = 12, UNKNOWN, 0
    stream.seek(8)
    content = "pictures" if stream.read(4) == b"AVI " else "sound"
    while place + 12 <= end:
        stream.seek(place)
        kind, size, inner = struct.unpack(f"{order}4sI4s", stream.read(12))
        if kind == bytes(4):
            raise UserError(f"{name}: holds zeros where its {content} should begin; copy it again")
        count += 1
        if count > MOST_CHUNKS:
            raise UserError(
                f"{name}: more than {MOST_CHUNKS} chunks come before its {content}; convert it again"
            )
        if kind == b"ds64" and place + 24 <= end:  # of RF64, whose chunk sizes are then 0xffffffff
            stream.seek(place + 16)
            long_size = struct.unpack("<Q", stream.read(8))[0]
        if kind == b"data" and size == 0xFFFFFFFF:
            size = long_size
        if kind in (b"data", b"SSND") or (kind == b"LIST" and inner == b"movi"):
            return 0 if size >= UNKNOWN else place + 8 + size
        place += 8 + size + size % 2
    return 0


PCM_FORMATS = (1, 3)  # format tags of wav: whole numbers, floats
EXTENSIBLE = 0xFFFE  # a format tag: the real one follows


def pcm_samples(stream) -> tuple[int, int] | None:
    """Samples per channel of a wav that is not compressed, and their rate in Hz, by its header.

    None for other files, and where the file holds fewer bytes than its header claims.
    """
    end = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(12)
    if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
        return None
    place, long_size, rate, frame = 12, 0, 0, 0
    for _ in range(MOST_CHUNKS):
        stream.seek(place)
        header = stream.read(8)
        if len(header) < 8:
            return None
        kind, size = struct.unpack("<4sI", header)
        if kind == b"data":
            size = long_size if size == 0xFFFFFFFF and long_size else size
            is_there = place + 8 + size <= end
            return (size // frame, rate) if is_there and rate and frame else None
        content = stream.read(min(size, 40))
        if kind == b"ds64" and len(content) >= 16:
            long_size = struct.unpack("<Q", content[8:16])[0]
        if kind == b"fmt " and len(content) >= 16:
            tag, channels, rate, _, align, bits = struct.unpack("<HHIIHH", content[:16])
            if tag == EXTENSIBLE and len(content) >= 26:
                tag = struct.unpack("<H", content[24:26])[0]
            if tag not in PCM_FORMATS:
                return None
            frame = max(align, channels * ((bits + 7) // 8))  # bytes of one sample of all channels
        place += 8 + size + size % 2
    return None


def _end_of_au(head: bytes) -> int:
    if len(head) < 12:
        return 12
    header, size = struct.unpack(">II", head[4:12])
    return 0 if size >= UNKNOWN else header + size


def _end_of_matroska(stream) -> int:
    """How far the one segment of an mkv or webm reaches: elements are an id, a size and content,
    all of any length.
    """
    stream.seek(4)
    stream.seek(_matroska_size(stream)[0], io.SEEK_CUR)
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    size, unknown = _matroska_size(stream)
    return 0 if unknown else stream.tell() + size


def _matroska_size(stream) -> tuple[int, bool]:
    """A size of 1 to 8 bytes (its leading zero bits tell how many), and whether it is the one for
    "unknown".
    """
    first = stream.read(1)
    if not first or not first[0]:
        return 0, True
    more = 8 - first[0].bit_length()
    rest = stream.read(more)
    if len(rest) < more:
        return 0, True
    value = int.from_bytes(first + rest, "big") - (1 << (7 * more + 7))
    return value, value == (1 << (7 * more + 7)) - 1


MOST_PARTS = 1_000
PAGE_BEGINS_STREAM = 2  # a flag of an Ogg page
FLAC_HEADER = (
    b"fLaC\0\0\0\x22"  # the marker and the type and length of the block that must follow it
)


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
    """Streams [at least 1] of an Ogg or FLAC file that begins anew midway (`cat a b`, radio):
    [stream] for others.

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
        raise UserError(
            f"{name}: begins anew {len(begins)} times; at most {MOST_PARTS} parts are read, split it"
        )
    if len(begins) < 2:
        return [stream]
    ends = begins[1:] + [stream.seek(0, io.SEEK_END)]
    return [_Part(stream, begin, end) for begin, end in zip(begins, ends)]


def _ogg_begins(stream) -> list[int]:
    """Where the parts of a chained Ogg file begin: at pages that begin a stream and follow one that
    does not.
    """
    begins, place, was_begin = [], 0, False
    while True:
        stream.seek(place)
        page = stream.read(27)
        if len(page) < 27 or page[:4] != b"OggS":
            return begins
        is_begin = bool(page[5] & PAGE_BEGINS_STREAM)
        if (
            is_begin and not was_begin
        ):  # several streams side by side all begin before the first other page
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
