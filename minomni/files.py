"""Writing files so that a crash leaves the old one or the new one, never half of either."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Callable

from minomni.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a temporary file beside `path`, then rename it into place.

    The data is on the disk before the name is: without that a power failure can leave the new name with nothing in
    it, and a network disk can say that it is full only after the old file is gone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def growing_wav(path: Path, sample_rate: int) -> Iterator:
    """A 16-bit wav file to write to, piece by piece, and removed where the pieces break off.

    Raises UserError where it cannot be written.
    """
    import soundfile

    try:
        file = open(path, "wb")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        with file, soundfile.SoundFile(file, "w", sample_rate, 1, "PCM_16", format="WAV") as wav:
            yield wav
    except BaseException:
        path.unlink(missing_ok=True)
        raise
