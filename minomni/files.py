"""Writing files so that a crash leaves the old one or the new one, never half of either."""

import os
from pathlib import Path
from typing import BinaryIO, Callable


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
