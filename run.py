"""Three commands, for a machine that has Python 3.11 or newer and nothing else:

    python run.py          set up, train the tiny model once, answer data_samples/ in text and speech, score the model
    python run.py hear     set up, answer them with the small model that comes with the project; trains nothing
    python run.py test     set up, run all tests and notebooks

All make .venv here and pip install into it once. With --here they use the Python that runs them
instead (Colab) and install only what it lacks. Standard library alone: this file runs before
anything is installed.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
DONE = VENV / ".ok"  # a digest for each set of requirements that is fully installed
NEEDS = [ROOT / "requirements.txt"]
TEST_NEEDS = [ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
# Two processes, each with whole files: a notebook's cells are run in order, in one kernel.
PYTEST = [
    "-m",
    "pytest",
    "-n",
    "2",
    "--dist",
    "loadfile",
    "--nbval-lax",
    "--nbval-current-env",
    "--nbval-cell-timeout",
    "600",
    "tests",
    "notebooks",
]


def main() -> int:
    """Set up, run the command, and hand its exit code on."""
    if sys.version_info < (3, 11):  # noqa: UP036 (an old Python must be told, not crash)
        sys.exit("run.py: needs Python 3.11 or newer; this is %d.%d" % sys.version_info[:2])  # noqa: UP031
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["hear", "test"],
        help="what to do (default: train, then answer)",
    )
    parser.add_argument("--here", action="store_true", help="use this Python, make no .venv")
    arguments = parser.parse_args()
    needs = TEST_NEEDS if arguments.command == "test" else NEEDS
    python = install_here(needs) if arguments.here else install_in_venv(needs)
    return {"test": test, "hear": hear, None: demo}[arguments.command](python)


def demo(python: str) -> int:
    """Train the tiny model unless that is done (an unfinished run goes on), then answer the sample
    questions.

    A model that has just been trained is also scored.
    """
    trained_before = (ROOT / "runs" / "tiny" / "model").exists()
    lessons = [] if trained_before else [("train", "tiny", "--resume")]
    for command in (*lessons, ("chat", "--samples"), *[("report",) for _ in lessons]):
        code = call(python, "-m", "minomni", *command)
        if code:
            return code
    return 0


def hear(python: str) -> int:
    """Answer the sample questions with the model that was trained elsewhere and comes along."""
    return call(
        python,
        "-m",
        "minomni",
        "chat",
        "--samples",
        "--model",
        os.path.join("data_samples", "tiny"),
    )


def test(python: str) -> int:
    """One pytest call, so that its last line sums up everything. One thread, so that numbers repeat
    on any machine.
    """
    return call(python, *PYTEST, OMP_NUM_THREADS="1")


def install_in_venv(needs: list[Path]) -> str:
    """Make .venv and install into it, unless that was done before -> its Python."""
    python = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    done = DONE.read_text().split() if DONE.exists() and Path(python).exists() else []
    if digest(needs) in done:
        return python
    print("setting up .venv (once, a few minutes)", flush=True)
    if Path(sys.prefix).resolve() != VENV:  # a Python cannot replace itself on Windows
        try:
            venv.create(VENV, with_pip=True)
        except (subprocess.CalledProcessError, ImportError):
            sys.exit(
                "run.py: this Python cannot make a virtual environment with pip (on Debian and Ubuntu: install "
                "python3-venv); or use --here to install into it directly"
            )
    pip(python, [option for file in needs for option in ("-r", str(file))])
    DONE.write_text(f"{digest(NEEDS)}\n{digest(needs)}\n")  # what was there before is replaced
    return python


def install_here(needs: list[Path]) -> str:
    """Install into the running Python what it has in no version at all -> its path. Colab's own
    torch stays.
    """
    lines = [
        line.split("#")[0].strip()
        for file in needs
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    missing = [
        line for line in lines if line and not line.startswith("-") and not has(line.split("==")[0])
    ]
    if missing:
        pip(sys.executable, missing)
    return sys.executable


def has(package: str) -> bool:
    """Whether the running Python has some version of a package."""
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def pip(python: str, what: list[str]) -> None:
    """pip install, or stop with pip's exit code."""
    code = call(python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *what)
    if code:
        sys.exit(code)


def digest(needs: list[Path]) -> str:
    """Stands for the requirements and the Python they were installed for: when one changes, pip
    runs again.
    """
    text = "".join(file.read_text(encoding="utf-8") for file in needs)
    return hashlib.sha256(f"{sys.version_info[:3]} {sys.platform} {text}".encode()).hexdigest()


def call(python: str, *arguments: str, **environment: str) -> int:
    """Run Python in the repository's root -> exit code."""
    return subprocess.call(
        [python, *arguments], cwd=ROOT, env={**os.environ, "PYTHONUTF8": "1", **environment}
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
