"""Four commands, for a machine that has Python 3.11 or newer and nothing else:

    python run.py          install, train the tiny model once, answer the sample questions, score it
    python run.py hear     install, answer them with the trained weights of data_samples/tiny
    python run.py serve    install, open a page to talk to the model; takes the options of
                           `minomni serve`
    python run.py test     install, run all tests and notebooks

Each command creates .venv here and installs into it once. With --here it uses the running Python
instead (Colab) and installs only the packages that are missing. This file needs the standard
library alone, because it runs before anything is installed.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
DONE = VENV / ".ok"  # the digest of each set of requirements that is fully installed
NEEDS = [ROOT / "requirements.txt"]
SERVE_NEEDS = [*NEEDS, ROOT / "requirements-serve.txt"]
TEST_NEEDS = [
    ROOT / f"requirements{kind}.txt" for kind in ("", "-dev", "-quantize", "-serve", "-tune")
]
EPILOG = """options of serve, given after it: --port, --model, --device, --host and more. After its
installation, .venv/bin/python -m minomni serve --help lists them."""
# Two processes, whole files each: the cells of a notebook run in order, in one kernel.
PYTEST = ["-m", "pytest", "-n", "2", "--dist", "loadfile"]
NBVAL = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "600"]


def main() -> int:
    """Install, run the command, and return its exit code."""
    if sys.version_info < (3, 11):
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"run.py: needs Python 3.11 or newer; this is {version}")
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --he would be --here, and not an option of `minomni serve`
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["hear", "serve", "test"],
        help="what to do (default: train, then answer)",
    )
    parser.add_argument("--here", action="store_true", help="use this Python, make no .venv")
    arguments, rest = parser.parse_known_args()
    if rest and arguments.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    needs = {"serve": SERVE_NEEDS, "test": TEST_NEEDS}.get(arguments.command, NEEDS)
    python = install_here(needs) if arguments.here else install_in_venv(needs)
    if arguments.command == "serve":
        return serve(python, rest)
    commands = {"test": test, "hear": hear, None: demo}
    return commands[arguments.command](python)


def demo(python: str) -> int:
    """Train the tiny model unless that is done, then answer the sample questions -> exit code.

    An unfinished run is resumed. A model that has just been trained is also scored.
    """
    commands = [["chat", "--samples"]]
    if not (ROOT / "runs" / "tiny" / "model").exists():
        commands = [["train", "tiny", "--resume"], *commands, ["report"]]
    for command in commands:
        code = call(python, "-m", "minomni", *command)
        if code:
            return code
    return 0


def hear(python: str) -> int:
    """Answer the sample questions with the trained weights of the repository -> exit code."""
    weights = os.path.join("data_samples", "tiny")
    return call(python, "-m", "minomni", "chat", "--samples", "--model", weights)


def serve(python: str, options: list[str]) -> int:
    """Serve the model until Ctrl-C -> exit code.

    Ctrl-C reaches the server, too. It is waited for, as it ends its answers first.
    """
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return call(python, "-m", "minomni", "serve", *options)
    finally:
        signal.signal(signal.SIGINT, before)


def test(python: str) -> int:
    """Run everything in one pytest call -> exit code.

    One thread per process makes the numbers repeat on any machine.
    """
    return call(python, *PYTEST, *NBVAL, "tests", "notebooks", OMP_NUM_THREADS="1")


def install_in_venv(needs: list[Path]) -> str:
    """Create .venv and install into it, unless that was done before -> path of its Python."""
    python = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    if DONE.exists() and Path(python).exists() and digest(needs) in DONE.read_text().split():
        return python
    print("setting up .venv (once, a few minutes)", flush=True)
    if Path(sys.prefix).resolve() != VENV:  # a Python cannot replace itself on Windows
        create_venv()
    options = []
    for file in needs:
        options += ["-r", str(file)]
    pip(python, options)
    DONE.write_text(f"{digest(NEEDS)}\n{digest(needs)}\n")
    return python


def create_venv() -> None:
    """Create .venv, or stop with advice where this Python lacks the modules for that."""
    try:
        venv.create(VENV, with_pip=True)
    except (subprocess.CalledProcessError, ImportError):
        sys.exit(
            "run.py: this Python cannot create a virtual environment with pip (on Debian and "
            "Ubuntu: install python3-venv); or use --here to install into it directly"
        )


def install_here(needs: list[Path]) -> str:
    """Install into the running Python what is missing in any version -> path of that Python.

    Packages that are present keep their version: Colab's own torch stays.
    """
    missing = [pin for pin in pins(needs) if not has(pin.split("==")[0])]
    if missing:
        pip(sys.executable, missing)
    return sys.executable


def pins(needs: list[Path]) -> list[str]:
    """The lines name==version of requirements files, without comments and options."""
    pins = []
    for file in needs:
        for line in file.read_text(encoding="utf-8").splitlines():
            pin = line.split("#")[0].strip()
            if pin and not pin.startswith("-"):
                pins.append(pin)
    return pins


def has(package: str) -> bool:
    """Whether the running Python has some version of a package."""
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def pip(python: str, arguments: list[str]) -> None:
    """Run pip install, or stop with pip's exit code."""
    options = ["--disable-pip-version-check", "--quiet"]
    code = call(python, "-m", "pip", "install", *options, *arguments)
    if code:
        sys.exit(code)


def digest(needs: list[Path]) -> str:
    """A hash of the requirements and the Python version: when one changes, pip runs again."""
    text = "".join(file.read_text(encoding="utf-8") for file in needs)
    return hashlib.sha256(f"{sys.version_info[:3]} {sys.platform} {text}".encode()).hexdigest()


def call(python: str, *arguments: str, **environment: str) -> int:
    """Run Python in the root of the repository -> exit code."""
    environment = {**os.environ, "PYTHONUTF8": "1", **environment}
    return subprocess.call([python, *arguments], cwd=ROOT, env=environment)


def end_children_on_termination() -> None:
    """Let SIGTERM raise SystemExit, on which subprocess.call() ends the process that it waits for.
    A server would outlive this process otherwise, and keep its port.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


if __name__ == "__main__":
    end_children_on_termination()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
