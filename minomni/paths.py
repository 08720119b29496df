"""Where the files beside the code lie: sample data and weights, and the folder of runs.

In a checkout both are folders of the repository. An installed package carries data_samples/ inside itself, and runs
are made in the current directory.
"""

from pathlib import Path

from minomni.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The root of the repository that this package lies in, or None where it is installed elsewhere."""
    root = PACKAGE.parent
    return root if (root / "data_samples").is_dir() else None


def data_samples() -> Path:
    """The folder of sample recordings, questions, words and weights. Raises UserError where there is none."""
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / "data_samples").is_dir():
            return parent / "data_samples"
    raise UserError(
        f"no folder data_samples in {PACKAGE} or beside it; install minomni again, or run it in a checkout"
    )


def runs() -> Path:
    """The folder of training runs, reports and answers; it need not exist yet."""
    return (checkout() or Path.cwd()) / "runs"
