"""Folders outside the code: sample data with weights, and training runs.

In a checkout both are folders of the repository. An installed package contains data_samples/, and
runs are written to the current directory.
"""

import os
from pathlib import Path

from minomni.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The root of the repository, or None for a package that is installed elsewhere."""
    root = PACKAGE.parent
    return root if (root / "data_samples").is_dir() else None


def data_samples() -> Path:
    """The folder of sample recordings, questions, words and weights. Raises UserError where it is
    missing.
    """
    for parent in (PACKAGE, PACKAGE.parent):
        folder = parent / "data_samples"
        if folder.is_dir():
            return folder
    raise UserError(
        f"no folder data_samples in {PACKAGE} or beside it; install minomni again, or run it in a "
        f"checkout"
    )


def runs() -> Path:
    """The folder of training runs, reports and answers, which may not exist yet."""
    root = checkout() or Path.cwd()
    return root / "runs"


def environment() -> dict[str, str]:
    """The environment variables of a new process, which finds this package in any folder."""
    before = os.environ.get("PYTHONPATH")
    path = str(PACKAGE.parent)
    if before:  # an empty entry would be the current folder
        path += os.pathsep + before
    return {**os.environ, "PYTHONPATH": path}
