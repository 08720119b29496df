"""Writing files so that a crash leaves the old file or the new one, never half of either.

Only regular files are replaced. Devices, pipes and terminals are opened and written to. Symbolic
links are followed and kept. Errors of the operating system become one line of UserError.
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

from minomni.errors import UserError, short_path

MAX_LINKS = 40  # length of a chain of symbolic links, as in Linux
UNKNOWN_SIZE = 0xFFFF_FFFF  # in the header of a wav file of unknown length


class WriteError(UserError):
    """A file cannot be written: missing folder, no permission, full disk or a name too long."""


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a temporary file next to `path`, then rename it to `path`. Creates
    missing parent folders.

    The data is flushed to disk before the rename. Without that, a power failure can leave the new
    name with an empty file, and a network disk can report that it is full only after the old file
    is gone. If `path` is not a regular file, the complete content is written into it instead.
    Raises WriteError.
    """
    with writing(path):
        target = resolved(Path(path))
        if is_stream(target):
            # Some writers seek back to fill in a size, which a pipe cannot do.
            content = io.BytesIO()
            write(content)
            with open(target, "wb") as file:
                file.write(content.getbuffer())
            return

        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = sibling_path(target, "part")
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            # Keep the permissions: a private file stays private.
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def growing_wav(path: str | Path, sample_rate: int) -> Iterator["GrowingWav"]:
    """A 16-bit mono wav file that is written in pieces. Its folder must exist.

    The file grows at its final path, so that it can be played meanwhile. If writing stops early,
    the file that was there before is restored: until the end it is kept as NAME.*.old in the same
    folder. Samples for a device or a pipe are written as they come. Raises WriteError.
    """
    with writing(path):
        target = resolved(Path(path))
        to_stream = is_stream(target)
        # Move the old file out of the way.
        old = None
        if target.exists() and not to_stream:
            old = sibling_path(target, "old")
            os.replace(target, old)
    try:
        with writing(path):
            file = open(target, "wb")  # noqa: SIM115 closed below
            if old:
                target.chmod(stat.S_IMODE(old.stat().st_mode))
        try:
            wav = GrowingWav(path, file, sample_rate, has_length=not to_stream)
            yield wav
            wav.flush()
        finally:
            # close() repeats a write error that flush() has already reported.
            with suppress(OSError):
                file.close()
    except BaseException:
        # Restore the old file, or leave none.
        if old:
            os.replace(old, target)
        elif not to_stream and target.is_file():
            target.unlink()
        raise
    if old:
        old.unlink(missing_ok=True)


class GrowingWav:
    """A 16-bit mono wav file that is written in pieces.

    has_length: flush() updates the number of samples in the header, so that the file can be read
    from then on. Without it the header says that the length is unknown, for files in which one
    cannot seek back.
    """

    def __init__(self, path: str | Path, file: BinaryIO, sample_rate: int, has_length: bool):
        self.path = path
        self.file = file
        self.sample_rate = sample_rate
        self.has_length = has_length
        self.bytes = 0  # of samples
        with writing(path):
            file.write(self.header())

    def header(self) -> bytes:
        """The 44 bytes before the samples."""
        riff_size = UNKNOWN_SIZE
        data_size = UNKNOWN_SIZE
        if self.has_length:
            data_size = min(self.bytes, UNKNOWN_SIZE - 36)
            riff_size = data_size + 36

        # Chunk size, PCM, 1 channel, rate, bytes per second, bytes per sample, bits per sample.
        bytes_per_second = 2 * self.sample_rate
        fmt = struct.pack("<IHHIIHH", 16, 1, 1, self.sample_rate, bytes_per_second, 2, 16)
        riff = b"RIFF" + struct.pack("<I", riff_size) + b"WAVE"
        data = b"data" + struct.pack("<I", data_size)
        return riff + b"fmt " + fmt + data

    def write(self, samples) -> None:
        """Append samples, a float array [n] in [-1, 1]. Raises WriteError."""
        import soundfile

        encoded = io.BytesIO()
        soundfile.write(encoded, samples, self.sample_rate, "PCM_16", endian="LITTLE", format="RAW")
        with writing(self.path):
            self.file.write(encoded.getbuffer())
        self.bytes += len(encoded.getbuffer())

    def flush(self) -> None:
        """Make everything written so far visible to readers. Raises WriteError."""
        with writing(self.path):
            if self.has_length:
                self.file.seek(0)
                self.file.write(self.header())
                self.file.seek(0, io.SEEK_END)
            self.file.flush()


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn errors of writing a file into one line of WriteError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        cause = cause_of(error, path)
        if cause is None:
            raise
        raise WriteError(f"{short_path(path)}: cannot be written ({cause})") from None


def cause_of(error: Exception, path: str | Path) -> str | None:
    """Why a file cannot be opened or written; None where the error is about something else.

    torch.save() hides a full disk behind an error of its own, which has the OSError as context. An
    impossible path is found by checking the path, as its ValueError may also come from the content.
    """
    if not can_be_path(path):
        return "its name cannot be a file's"
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, FileExistsError):  # from creating the parent folders
        return f"{short_path(cause.filename)} is not a folder"
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    return None


def require_possible(path: str | Path) -> None:
    """Raise WriteError where no file or folder of a name can be made: the name is too long, or a
    file lies where a folder should be. For the time before long work, of which nothing would be
    kept.
    """
    with writing(path):
        existing = Path(path).absolute()
        with suppress(FileNotFoundError):
            os.lstat(existing)
        missing: list[str] = []
        while not os.path.lexists(existing):
            missing.insert(0, existing.name)
            existing = existing.parent
        for name in missing:
            with suppress(FileNotFoundError):
                os.lstat(existing / name)


def can_be_path(path: str | Path) -> bool:
    """Whether the system can encode a path: no NUL and no lone surrogate."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeError:
        return False


def open_regular(path: str | Path, what: str) -> BinaryIO:
    """Open a regular file for reading. what: a description of the file for messages.

    Raises UserError where there is no such file: for a folder, for a device or a pipe, which might
    block or never end, and for files in /proc and /sys.
    """
    name = short_path(path)
    try:
        file = open(path, "rb", opener=open_without_blocking)  # noqa: SIM115 the caller closes it
    except FileNotFoundError:
        raise UserError(f"{name}: no such file or folder, where {what} should be") from None
    except IsADirectoryError:
        raise UserError(f"{name}: is a folder, where {what} should be") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be opened ({cause_of(error, path) or error})") from None
    is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    in_system_folder = Path(path).resolve().parts[1:2] in (("proc",), ("sys",))
    if not is_regular or in_system_folder:
        file.close()
        raise UserError(f"{name}: is a device, a pipe or the system's own; copy {what} to a file")
    return file


def open_without_blocking(path: str, flags: int) -> int:
    """os.open() that does not wait for the writer of a pipe; Windows has no such flag."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def resolved(path: Path) -> Path:
    """The path with symbolic links followed, so that the links themselves are kept.

    A link in /proc to an open file, such as the target of /dev/stdout, is left as it is, since only
    opening it reaches that file. Raises WriteError for a folder, a disk and a write-protected file.
    """
    name = short_path(path)
    links = 0
    while path.is_symlink() and not path.parent.resolve().is_relative_to("/proc"):
        links += 1
        if links > MAX_LINKS:
            raise WriteError(f"{name}: cannot be written (its symbolic links form a circle)")
        path = path.parent / os.readlink(path)
    if path.is_dir():
        raise WriteError(f"{name}: is a folder; give the name of a file")
    if path.is_block_device():
        raise WriteError(f"{name}: is a disk; give the name of a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise WriteError(f"{name}: cannot be written (it is write-protected)")
    return path


def is_stream(path: Path) -> bool:
    """Whether a path names a device, a pipe, a terminal, or an open file such as /dev/stdout."""
    try:
        if not path.exists() or path.is_dir():
            return False
        parent = path.parent.resolve()
        return not path.is_file() or parent == Path("/dev") or parent.is_relative_to("/proc")
    except (OSError, ValueError):  # the name is too long or contains NUL
        return False


def sibling_path(path: Path, suffix: str) -> Path:
    """A new file name in the same folder. A long name is cut, as names have at most 255 bytes."""
    return path.with_name(f"{path.name[:50]}.{secrets.token_hex(4)}.{suffix}")
