"""Writing files so that a crash leaves the old one or the new one, never half of either.

Only regular files are ever replaced. A device, a pipe or a terminal is opened and written to. A
link stays, and what it points to is written. Errors of the operating system become one line of
UserError.
"""

import io
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from minomni.errors import UserError, shorten

SHOWN = 200  # characters of a path in a message
MOST_LINKS = 40  # that lead from one to the next, as in Linux
UNKNOWN_SIZE = 0xFFFF_FFFF  # in the header of a wav whose end is not known yet


class WriteError(UserError):
    """A file cannot be written: no such folder, no permission, a full disk, a name that is too
    long.
    """


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a temporary file beside `path`, then rename it into place. Makes the
    folders above it.

    The data is on the disk before the name is: without that a power failure can leave the new name
    with nothing in it, and a network disk can say that it is full only after the old file is gone.
    What is no regular file is written to instead, once all is there. Raises WriteError.
    """
    with writing(path):
        target = resolved(Path(path))
        if is_stream(target):
            content = io.BytesIO()  # some writers go back to fill in a size, which a pipe cannot
            write(content)
            with open(target, "wb") as file:
                file.write(content.getbuffer())
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = beside(target, "part")
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))  # a private file stays private
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def growing_wav(path: str | Path, sample_rate: int) -> Iterator["GrowingWav"]:
    """A 16-bit mono wav file to write to, piece by piece. Its folder has to be there.

    The file grows at its place, so that it can be played meanwhile. Where the pieces break off,
    what was there before is put back: an old file waits beside, as NAME.*.old, until the new one is
    complete. Into a device or a pipe the samples are written as they come. Raises WriteError.
    """
    with writing(path):
        target = resolved(Path(path))
        stream = is_stream(target)
        old = beside(target, "old") if target.exists() and not stream else None
        if old:
            os.replace(target, old)
    try:
        with writing(path):
            file = open(target, "wb")
            if old:
                target.chmod(stat.S_IMODE(old.stat().st_mode))
        try:
            wav = GrowingWav(path, file, sample_rate, has_length=not stream)
            yield wav
            wav.flush()
        finally:
            with suppress(OSError):  # what cannot be written was told by flush()
                file.close()
    except BaseException:
        if old:
            os.replace(old, target)
        elif not stream and target.is_file():
            target.unlink()
        raise
    if old:
        old.unlink(missing_ok=True)


class GrowingWav:
    """A 16-bit mono wav file that is written piece by piece.

    has_length: flush() writes into the header how many samples there are, so that the file can be
    read from then on. Without it the header says that the length is unknown, as it has to where one
    cannot go back.
    """

    def __init__(self, path: str | Path, file: BinaryIO, sample_rate: int, has_length: bool):
        self.path, self.file, self.sample_rate, self.has_length = (
            path,
            file,
            sample_rate,
            has_length,
        )
        self.bytes = 0
        with writing(path):
            file.write(self.header())

    def header(self) -> bytes:
        """The 44 bytes before the samples."""
        length = min(self.bytes, UNKNOWN_SIZE - 36) if self.has_length else UNKNOWN_SIZE
        whole = length + 36 if self.has_length else UNKNOWN_SIZE
        sound = struct.pack(
            "<IHHIIHH", 16, 1, 1, self.sample_rate, 2 * self.sample_rate, 2, 16
        )  # PCM, mono, 16 bits
        return (
            b"RIFF"
            + struct.pack("<I", whole)
            + b"WAVEfmt "
            + sound
            + b"data"
            + struct.pack("<I", length)
        )

    def write(self, samples) -> None:
        """Append samples, a float array [n] in [-1, 1]. Raises WriteError."""
        import soundfile

        piece = io.BytesIO()
        soundfile.write(piece, samples, self.sample_rate, "PCM_16", endian="LITTLE", format="RAW")
        with writing(self.path):
            self.file.write(piece.getbuffer())
        self.bytes += len(piece.getbuffer())

    def flush(self) -> None:
        """Hand on all that was written. Raises WriteError."""
        with writing(self.path):
            if self.has_length:
                self.file.seek(0)
                self.file.write(self.header())
                self.file.seek(0, io.SEEK_END)
            self.file.flush()


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What goes wrong while a file is written becomes one line that names it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        cause = cause_of(error, path)
        if cause is None:
            raise
        raise WriteError(f"{shorten(path, SHOWN)}: cannot be written ({cause})") from None


def cause_of(error: Exception, path: str | Path) -> str | None:
    """Why a file cannot be opened or written; None where the error is about something else.

    torch.save hides a full disk behind an error of its own. A path that cannot be one is found by
    looking at it: the ValueError that it raises may also come from the content.
    """
    if not can_be_path(path):
        return "its name cannot be a file's"
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, FileExistsError):  # while the folders above were made
        return f"{shorten(cause.filename, SHOWN)} is no folder"
    return cause.strerror or str(cause) if isinstance(cause, OSError) else None


def can_be_path(path: str | Path) -> bool:
    """Whether the system can encode a path: no null character, no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeError:
        return False


def open_regular(path: str | Path, what: str) -> BinaryIO:
    """A regular file, opened to be read. what: what it is to a person.

    Raises UserError where there is none: for a folder, for a device or a pipe, which might never
    end or never begin, and for files of /proc and /sys.
    """
    shown = shorten(path, SHOWN)
    try:
        file = open(
            path,
            "rb",
            opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)),
        )
    except FileNotFoundError:
        raise UserError(f"{shown}: no such file or folder, where {what} should be") from None
    except IsADirectoryError:
        raise UserError(f"{shown}: is a folder, where {what} should be") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: cannot be opened ({cause_of(error, path) or error})") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or Path(path).resolve().parts[1:2] in (
        ("proc",),
        ("sys",),
    ):
        file.close()
        raise UserError(f"{shown}: is a device, a pipe or the system's own; copy {what} to a file")
    return file


def resolved(path: Path) -> Path:
    """The place that a path stands for: links are followed, so that they stay.

    A link of /proc to an open file (/dev/stdout leads to one) is left as it is: only opening it
    gives that file. Raises WriteError for a folder, a disk, and a file that may not be written to.
    """
    shown, links = shorten(path, SHOWN), 0
    while path.is_symlink() and not path.parent.resolve().is_relative_to("/proc"):
        links += 1
        if links > MOST_LINKS:
            raise WriteError(f"{shown}: cannot be written (its link leads round in a circle)")
        path = path.parent / os.readlink(path)
    if path.is_dir():
        raise WriteError(f"{shown}: is a folder; give the name of a file")
    if path.is_block_device():
        raise WriteError(f"{shown}: is a disk; give the name of a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise WriteError(f"{shown}: cannot be written (it is write-protected)")
    return path


def is_stream(path: Path) -> bool:
    """Whether a path is there and no regular file of its own: a device, a pipe, a terminal, an open
    file of /proc.
    """
    return path.exists() and (not path.is_file() or path.parent.resolve().is_relative_to("/proc"))


def beside(path: Path, suffix: str) -> Path:
    """A new name in the same folder; of a long name only the beginning, since a name has at most
    255 bytes.
    """
    return path.with_name(f"{path.name[:50]}.{secrets.token_hex(4)}.{suffix}")
