"""Checks of every file of a model folder before it is read: present, regular, of a plausible size.

A device, a pipe or a file of /proc may have no end; a git-LFS pointer stands for a file that was
never downloaded.
"""

import json
import os
import stat
from pathlib import Path

from minomni.errors import UserError, quote_json, short_path, shorten

# Bytes. The release's tokenizer.json has 7 million; parsing needs up to 25 times a file's size.
MAX_JSON_BYTES = 32_000_000
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(path: Path, largest: int | None = None, advice: str = "copy it again") -> None:
    """Raise UserError unless `path` is a regular file that neither empty nor a git-LFS pointer.

    largest: most bytes that it may have; advice: what to do where it is missing.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a path with NUL in it
        if os.path.islink(path):  # path.is_symlink() would raise for a name that is too long
            target = shorten(os.readlink(path), 80)
            problem = f"is a link to {target}, which is not there"
        else:
            problem = f"cannot be read ({os_reason(error)})"
        raise UserError(f"{short_path(path)}: {problem}; {advice}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{short_path(path)}: is not a regular file; {advice}")
    if not status.st_size:
        raise UserError(f"{short_path(path)}: is empty; {advice}")
    if largest is not None and status.st_size > largest:
        raise UserError(
            f"{short_path(path)}: has {status.st_size:,} bytes, expected at most {largest:,}; "
            f"this is not the file that a model folder holds under this name"
        )
    try:
        pointer = is_pointer(path)
    except OSError as error:
        raise UserError(
            f"{short_path(path)}: cannot be read ({os_reason(error)}); {advice}"
        ) from None
    if pointer:
        raise UserError(
            f"{short_path(path)}: is a git-LFS pointer, which stands for the file; run git lfs "
            f"pull in its folder"
        )


def is_pointer(path: Path) -> bool:
    """Whether a file is a git-LFS pointer to content that was not downloaded. Raises OSError."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def os_reason(error: Exception) -> str:
    """The system's reason for a failure, without the path, which may be long."""
    return getattr(error, "strerror", None) or quote_json(str(error))[1:-1]


def read_json_object(
    path: Path, advice: str = "copy it again", largest: int = MAX_JSON_BYTES
) -> dict:
    """The JSON object in a file. Raises UserError for anything else."""
    check_file(path, largest, advice)
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(largest).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"{short_path(path)}: cannot be read ({os_reason(error)}); {advice}"
        ) from None
    except RecursionError:
        raise UserError(
            f"{short_path(path)}: not valid JSON (nested too deeply); {advice}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{short_path(path)}: not valid JSON ({quote_json(str(error))[1:-1]}); {advice}"
        ) from None
    if not isinstance(data, dict):
        raise UserError(
            f"{short_path(path)}: holds a {type(data).__name__}, not an object with settings; "
            f"{advice}"
        )
    return data
