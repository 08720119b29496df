"""What every file of a model folder must be before it is read: there, a regular file, of a
believable size, itself.

A device, a pipe or a file of /proc may have no end; a git-LFS pointer stands for a file that was
never fetched.
"""

import json
import os
import stat
from pathlib import Path

from minomni.errors import UserError, shorten

# bytes; the release's tokenizer.json has 7 million. Python needs up to 25 times as much for it
MOST_JSON = 32_000_000
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def quote(value: object, room: int = 80) -> str:
    """A value for an error message: its repr on one line, at most `room` characters."""
    if (
        isinstance(value, (list, tuple, dict)) and len(value) > room
    ):  # do not spell a million entries
        return f"a {type(value).__name__} of {len(value)} entries"
    return shorten(repr(value[: 2 * room] if isinstance(value, str) else value), room)


def where(path: Path) -> str:
    """A path for an error message: on one line, its begin and its end if it is long."""
    return shorten(path, 160)


def check_file(path: Path, largest: int | None = None, advice: str = "copy it again") -> None:
    """Raise UserError unless `path` is an ordinary file with something in it.

    largest: bytes that it may have; advice: what to do where it is missing.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a path with NUL in it
        if os.path.islink(
            path
        ):  # False for a name that is too long, where path.is_symlink() raises
            goal = shorten(os.readlink(path), 80)
            raise UserError(
                f"{where(path)}: is a link to {goal}, which is not there; {advice}"
            ) from None
        raise UserError(f"{where(path)}: cannot be read ({reason(error)}); {advice}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{where(path)}: is no ordinary file; {advice}")
    if not found.st_size:
        raise UserError(f"{where(path)}: is empty; {advice}")
    if largest is not None and found.st_size > largest:
        raise UserError(
            f"{where(path)}: has {found.st_size:,} bytes, expected at most {largest:,}; this is not the "
            f"file that a model folder holds under this name"
        )
    try:
        pointer = is_pointer(path)
    except OSError as error:
        raise UserError(f"{where(path)}: cannot be read ({reason(error)}); {advice}") from None
    if pointer:
        raise UserError(
            f"{where(path)}: is a git-LFS pointer, which stands for the file; run git lfs pull in its "
            f"folder"
        )


def is_pointer(path: Path) -> bool:
    """Whether git-LFS has left a pointer in place of the file. Raises OSError."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def reason(error: Exception) -> str:
    """Why the system refuses a file, without the path, which may be long."""
    return getattr(error, "strerror", None) or quote(str(error))[1:-1]


def read_object(path: Path, advice: str = "copy it again", largest: int = MOST_JSON) -> dict:
    """The JSON object in a file. Raises UserError for anything else."""
    check_file(path, largest, advice)
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(largest).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{where(path)}: cannot be read ({reason(error)}); {advice}") from None
    except RecursionError:
        raise UserError(f"{where(path)}: not valid JSON (nested too deeply); {advice}") from None
    except ValueError as error:
        raise UserError(
            f"{where(path)}: not valid JSON ({quote(str(error))[1:-1]}); {advice}"
        ) from None
    if not isinstance(data, dict):
        raise UserError(
            f"{where(path)}: holds a {type(data).__name__}, not an object with settings; {advice}"
        )
    return data
