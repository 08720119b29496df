"""The structure of audio and video files: whether a file is complete, and where parts begin.

PyAV and soundfile do the decoding. This module holds only the checks that they lack: they play the
rest of a truncated file, and read the first of several concatenated streams.
"""

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

from minomni.errors import UserError
from minomni.inputs.source import NO_OTHER_FILES, one_line_errors

# Boxes of an mp4 with next to no content, or chunks before the samples of a wav or the frames of an
# avi.
MAX_CHUNKS = 10_000
SMALL_BOX = 32  # bytes: the boxes of a video of many fragments are larger on average
MP4_BEGINS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
MP4_CONTENT = (b"moov", b"mdat", b"moof")
# Bytes. Writers that do not know the length yet put a length from here on.
UNKNOWN = 2_000_000_000
MOST_BYTES = 1 << 60  # of a file; what says more means "unknown"
W64_BEGINS = bytes.fromhex("72696666 2e91cf11 a5d628db")  # the first 12 bytes of names
ASF_BEGINS = bytes.fromhex("3026b275 8e66cf11 a6d900aa")
ASF_DATA = bytes.fromhex("3626b275 8e66cf11 a6d900aa")
ASF_DATA_HEAD = 50  # bytes
FLV_METADATA = 4096  # bytes in which a program writes the metadata of an flv
FLV_SIZE = b"\0\x08filesize\0"
MAX_ZEROS = 64 << 20  # bytes in a row between two frames: a disk that was full leaves such files


class Watched:
    """A stream for a decoder, which ends where it cannot be read or where only zeros are left.

    Decoders search zeros for the next frame, byte by byte. The caller sets zeros to 0 after each
    frame: frames of silence or black may be zeros themselves. The error is kept, since decoders
    print or drop what is raised while they read.
    """

    def __init__(self, stream: Any, name: str):
        self.stream = stream
        self.source_name = name
        self.name = str(getattr(stream, "name", "<none>"))  # ffmpeg looks at its ending
        self.zeros = 0  # bytes in a row since the last frame
        self.error: Exception | None = None

    def read(self, size: int) -> bytes:
        if self.error is not None:
            return b""
        try:
            content = self.stream.read(size)
        except Exception as error:
            self.error = error
            return b""
        is_zeros = content == bytes(len(content))
        self.zeros = self.zeros + len(content) if is_zeros else 0
        if self.zeros > MAX_ZEROS:
            self.error = UserError(
                f"{self.source_name}: holds more than {MAX_ZEROS >> 20} MB of zeros in a row; copy "
                f"it again"
            )
            return b""
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self.stream.seek(offset, whence)
        except Exception as error:
            self.error = self.error or error
            return -1

    def tell(self) -> int:
        return self.stream.tell()

    def require_read(self) -> None:
        """Raise the error that ended the stream, if one did."""
        if self.error is not None:
            raise self.error


@contextmanager
def open_container(
    stream: Any, name: str, options: dict[str, str] | None = None
) -> Iterator[tuple[Any, Watched]]:
    """The PyAV container in a stream, from its beginning, and the stream as it is watched."""
    import av

    stream.seek(0)
    watched = Watched(stream, name)
    options = (options or {}) | NO_OTHER_FILES
    try:
        # With the mode given: that of an open file may be "a+b" or a number.
        with av.open(watched, mode="r", options=options) as container:
            yield container, watched
    except Exception:
        watched.require_read()  # the cause of whatever the decoder says
        raise
    watched.require_read()


def best_track(container: Any, kind: str) -> Any:
    """The track of a kind ("video" or "audio") that players show or play; None if there is none.

    ffmpeg's choice: not a cover or a thumbnail, and of several the one that is marked as default.
    """
    tracks = getattr(container.streams, kind)
    return container.streams.best(kind) or (tracks[0] if tracks else None)


def require_whole(stream: Any, name: str) -> None:
    """Raise UserError if a file is shorter than its own header says: decoders would play the rest.

    Known for mp4 and mov, wav, w64, caf, avi, aiff, au, mkv and webm, asf and flv. The others (mp3,
    aac, ogg, ts) state no length. In wav and similar formats, a length of 0 or beyond 2 GB means
    "unknown": recorders and pipes write the header first. Also raises UserError for headers that
    are followed by zeros or by countless empty parts: decoders read those for minutes.
    """
    with one_line_errors(name, "its header cannot be read"):
        end = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        needed = _stated_size(stream, end, name)
        stream.seek(0)
    if needed > end:
        raise UserError(
            f"{name}: cut short, {end} of at least {needed} bytes are there; copy it again"
        )


def _stated_size(stream: Any, end: int, name: str) -> int:
    """The least number of bytes that the header of a file of `end` bytes states; 0 if unknown."""
    head = stream.read(12)
    if head[4:8] in MP4_BEGINS:
        return _end_of_mp4(stream, end, name)
    if head[:4] in (b"RIFF", b"RF64"):
        return _end_of_chunks(stream, end, "<", name)
    if head[:4] == b"FORM":
        return _end_of_chunks(stream, end, ">", name)
    if head[:4] == b".snd":
        return _end_of_au(head)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _end_of_matroska(stream)
    if head[:4] == b"caff":
        return _end_of_caf(stream, end)
    if head == W64_BEGINS:
        return _end_of_w64(stream)
    if head == ASF_BEGINS:
        return _end_of_asf(stream)
    if head[:3] == b"FLV":
        return _end_of_flv(stream)
    return 0


def _end_of_mp4(stream: Any, end: int, name: str) -> int:
    """Where the boxes of an mp4 end.

    Bytes behind the last box (of a camera, of a tag) are not a box and do not count.
    """
    offset = 0
    count = 0
    seen: set[bytes] = set()
    while offset + 16 <= end:
        stream.seek(offset)
        size, kind, long_size = struct.unpack(">I4sQ", stream.read(16))
        if size == 0:  # reaches to the end
            return end
        if size == 1:
            size = long_size
        size = max(8, size)
        is_complete = {b"moov", b"mdat"} <= seen
        if offset + size > end and kind not in MP4_CONTENT and is_complete:
            return end

        seen.add(kind)
        offset += size
        count += 1
        if count > MAX_CHUNKS and offset < SMALL_BOX * count:
            raise UserError(f"{name}: its first {count} boxes hold next to nothing; copy it again")
    if {b"moov", b"mdat"} <= seen:
        return offset
    return max(offset, end + 8)  # at least the header of the missing box


def _end_of_chunks(stream: Any, end: int, order: str, name: str) -> int:
    """Where the samples of a wav, avi or aiff end: its chunk data, LIST movi or SSND.

    order: of bytes, as struct writes it. Raises UserError if zeros come before that chunk, as in a
    file of which only the beginning was copied.
    """
    stream.seek(8)
    content = "images" if stream.read(4) == b"AVI " else "audio"
    offset = 12
    count = 0
    long_size = UNKNOWN
    while offset + 12 <= end:
        stream.seek(offset)
        kind, size, inner = struct.unpack(f"{order}4sI4s", stream.read(12))
        if kind == bytes(4):
            raise UserError(f"{name}: holds zeros where its {content} should begin; copy it again")
        count += 1
        if count > MAX_CHUNKS:
            raise UserError(
                f"{name}: more than {MAX_CHUNKS} chunks come before its {content}; convert it again"
            )

        # RF64 stores long sizes in a chunk ds64, and 0xffffffff in the chunks themselves.
        if kind == b"ds64" and offset + 24 <= end:
            stream.seek(offset + 16)
            long_size = struct.unpack("<Q", stream.read(8))[0]
        if kind == b"data" and size == 0xFFFFFFFF:
            size = long_size
        if kind in (b"data", b"SSND") or (kind == b"LIST" and inner == b"movi"):
            return 0 if size >= UNKNOWN else offset + 8 + size
        offset += 8 + size + size % 2
    return 0


PCM_FORMATS = (1, 3)  # format tags of wav: integers, floats
EXTENSIBLE = 0xFFFE  # a format tag: the real one follows


def pcm_samples(stream: Any) -> tuple[int, int] | None:
    """Samples per channel of an uncompressed wav, and their rate in Hz, by its header.

    None for other files, and for a file of fewer bytes than its header says.
    """
    end = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(12)
    if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
        return None
    offset = 12
    long_size = 0
    rate = 0
    frame_bytes = 0  # of one sample of all channels
    for _ in range(MAX_CHUNKS):
        stream.seek(offset)
        header = stream.read(8)
        if len(header) < 8:
            return None
        kind, size = struct.unpack("<4sI", header)
        if kind == b"data":
            if size == 0xFFFFFFFF and long_size:
                size = long_size
            is_complete = offset + 8 + size <= end
            if not is_complete or not rate or not frame_bytes:
                return None
            return size // frame_bytes, rate

        content = stream.read(min(size, 40))
        if kind == b"ds64" and len(content) >= 16:
            long_size = struct.unpack("<Q", content[8:16])[0]
        if kind == b"fmt " and len(content) >= 16:
            tag, channels, rate, _, align, bits = struct.unpack("<HHIIHH", content[:16])
            if tag == EXTENSIBLE and len(content) >= 26:
                tag = struct.unpack("<H", content[24:26])[0]
            if tag not in PCM_FORMATS:
                return None
            frame_bytes = max(align, channels * ((bits + 7) // 8))
        offset += 8 + size + size % 2
    return None


def _end_of_au(head: bytes) -> int:
    """Where the samples of an au file end."""
    if len(head) < 12:
        return 12
    header, size = struct.unpack(">II", head[4:12])
    return 0 if size >= UNKNOWN else header + size


def _end_of_matroska(stream: Any) -> int:
    """Where the only segment of an mkv or webm ends.

    An element is an id, a size and content, all of variable length.
    """
    stream.seek(4)
    header_size, _ = _matroska_size(stream)
    stream.seek(header_size, io.SEEK_CUR)
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    size, unknown = _matroska_size(stream)
    return 0 if unknown else stream.tell() + size


def _end_of_caf(stream: Any, end: int) -> int:
    """Where the samples of a caf end, a chunk of which the size may be -1 for "unknown"."""
    offset = 8
    for _ in range(MAX_CHUNKS):
        if offset + 12 > end:
            return 0
        stream.seek(offset)
        kind, size = struct.unpack(">4sq", stream.read(12))
        if size < 0:
            return 0
        offset += 12 + size
        if kind == b"data":
            return offset
    return 0


def _end_of_w64(stream: Any) -> int:
    """The size of a w64, which follows the 16 bytes of its first name."""
    stream.seek(16)
    return _known(stream.read(8))


def _end_of_asf(stream: Any) -> int:
    """Where the packets of an asf, wma or wmv end, an object after that of the header."""
    stream.seek(16)
    header = _known(stream.read(8))
    stream.seek(header)
    name = stream.read(16)
    size = _known(stream.read(8))
    is_data = bool(header) and name[:12] == ASF_DATA
    # A broadcast states the head of the object alone.
    return header + size if is_data and size > ASF_DATA_HEAD else 0


def _end_of_flv(stream: Any) -> int:
    """The size of an flv by its metadata, where a program wrote it: a float after its name."""
    stream.seek(0)
    head = stream.read(FLV_METADATA)
    begin = head.find(FLV_SIZE) + len(FLV_SIZE)
    content = head[begin : begin + 8]
    if begin < len(FLV_SIZE) or len(content) < 8:
        return 0
    size = struct.unpack(">d", content)[0]
    return int(size) if 0 < size < MOST_BYTES else 0


def _known(content: bytes) -> int:
    """A size of eight bytes, little-endian; 0 where it is cut or means "unknown"."""
    size = int.from_bytes(content, "little")
    return size if len(content) == 8 and size < MOST_BYTES else 0


def _matroska_size(stream: Any) -> tuple[int, bool]:
    """A size of 1 to 8 bytes, and whether it means "unknown".

    The leading zero bits of the first byte tell the number of bytes that follow it.
    """
    first = stream.read(1)
    if not first or not first[0]:
        return 0, True
    more = 8 - first[0].bit_length()
    rest = stream.read(more)
    if len(rest) < more:
        return 0, True
    marker = 1 << (7 * more + 7)
    value = int.from_bytes(first + rest, "big") - marker
    return value, value == marker - 1


# Seconds by which the time has to fall for a new recording to begin.
FELL_BACK = 1.0  # from any time to any other
FELL_TO_BEGIN = 0.1  # enough if it falls to the first time of the current recording
# Frames by which it has to fall, too. In avi files, the times of frames of h264 are in the order of
# storage, in which a frame lies before the B-frames, up to 16, that are shown before it.
FELL_BACK_FRAMES = 17


class RisingTimes:
    """Repairs the times of one track where a new recording begins midway, as in `cat a.ts b.ts`.

    Its times fall by more than FELL_BACK and FELL_BACK_FRAMES, or by more than FELL_TO_BEGIN to the
    first time of the current recording; the new recording is appended to the one before.
    shifts: seconds to add to the times of each recording, as found for another track of the same
    file. The tracks stay together with it, and FELL_BACK is enough. None: they are found from the
    times.
    """

    def __init__(self, shifts: Sequence[float] | None = None):
        self.is_known = shifts is not None
        self.shifts = [0.0] if shifts is None else list(shifts)
        self.part = 0  # index of the current recording
        self.first = inf  # smallest stored time in the current recording
        self.latest = -inf  # largest stored time in the current recording

    def repair(self, time: float, step: float = 0.0) -> float:
        """A stored time in seconds -> the time since the beginning of the first recording.

        step: seconds from the last frame of a recording to the first of the next one.
        """
        if time <= self.first + step / 2:  # frames that are out of order come later
            fall = FELL_TO_BEGIN
        elif self.is_known:  # a track of audio, which is in order
            fall = FELL_BACK
        else:
            fall = max(FELL_BACK, FELL_BACK_FRAMES * step)
        if time < self.latest - fall:
            if not self.is_known:
                self.shifts.append(self.shifts[-1] + self.latest + step - time)
            # Another track began anew less often: what it cannot place overlaps, and is dropped.
            self.part = min(self.part + 1, len(self.shifts) - 1)
            self.first = self.latest = time
        self.first = min(self.first, time)
        self.latest = max(self.latest, time)
        return time + self.shifts[self.part]


MAX_PARTS = 1_000
PAGE_BEGINS_STREAM = 2  # a flag of an Ogg page
# The marker of FLAC, and the type and length of the block that must follow it.
FLAC_HEADER = b"fLaC\0\0\0\x22"


class _Part(io.RawIOBase):
    """The bytes from begin to end of a seekable stream, as a stream of their own."""

    def __init__(self, stream: Any, begin: int, end: int):
        self.stream = stream
        self.begin = begin
        self.end = end
        self.offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        size = self.end - self.begin
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.offset, io.SEEK_END: size}[whence]
        self.offset = max(0, base + offset)
        return self.offset

    def readinto(self, buffer: Any) -> int:
        remaining = max(0, self.end - self.begin - self.offset)
        self.stream.seek(self.begin + self.offset)
        content = self.stream.read(min(len(buffer), remaining))
        buffer[: len(content)] = content
        self.offset += len(content)
        return len(content)


def is_ogg(stream: Any) -> bool:
    """Whether a stream begins like an Ogg file."""
    stream.seek(0)
    return stream.read(4) == b"OggS"


def parts_of_stream(stream: Any, name: str) -> list:
    """The parts of an Ogg or FLAC file in which new recordings begin midway (`cat a b`, radio).

    Each part is a stream; other files are one part, [stream]. Decoders play only the first part, or
    fail where the rate changes.
    """
    stream.seek(0)
    head = stream.read(len(FLAC_HEADER))
    if head[:4] == b"OggS":
        begins = _ogg_begins(stream)
    elif head == FLAC_HEADER:
        begins = _find_all(stream, FLAC_HEADER, name)
    else:
        begins = [0]
    if len(begins) > MAX_PARTS:
        raise UserError(
            f"{name}: begins anew {len(begins)} times; expected at most {MAX_PARTS} parts, split it"
        )
    if len(begins) < 2:
        return [stream]
    ends = begins[1:] + [stream.seek(0, io.SEEK_END)]
    return [_Part(stream, begin, end) for begin, end in zip(begins, ends, strict=True)]


def _ogg_begins(stream: Any) -> list[int]:
    """Where the parts of a chained Ogg file begin.

    A part begins at a page that begins a stream and follows a page that does not: the streams of
    one part all begin before the first other page.
    """
    begins: list[int] = []
    offset = 0
    was_begin = False
    while True:
        stream.seek(offset)
        page = stream.read(27)
        if len(page) < 27 or page[:4] != b"OggS":
            return begins
        is_begin = bool(page[5] & PAGE_BEGINS_STREAM)
        if is_begin and not was_begin:
            begins.append(offset)
        was_begin = is_begin
        lengths = stream.read(page[26])
        offset += 27 + len(lengths) + sum(lengths)


def _find_all(stream: Any, pattern: bytes, name: str) -> list[int]:
    """The offsets at which a pattern occurs in a stream."""
    offsets: list[int] = []
    read = 0  # bytes before the block
    kept = b""  # the end of the block before, where an occurrence may begin
    stream.seek(0)
    watched = Watched(stream, name)
    while block := watched.read(1 << 20):
        window = kept + block
        index = window.find(pattern)
        while index >= 0:
            offsets.append(read - len(kept) + index)
            index = window.find(pattern, index + 1)
        read += len(block)
        kept = window[-(len(pattern) - 1) :]
    watched.require_read()
    return offsets
