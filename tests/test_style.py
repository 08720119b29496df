"""Formatting, lint and types of the checkout, as the style job of CI checks them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKED = ["minomni", "tests", "run.py"]


def run_tool(*arguments: str) -> None:
    """Run a tool of requirements-dev.txt in the checkout; its report is the failure's message."""
    pytest.importorskip(arguments[0], reason=f"needs {arguments[0]} of requirements-dev.txt")
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"[-4000:]


def test_lint():
    run_tool("ruff", "check", "--output-format", "concise", *CHECKED)


def test_format():
    run_tool("ruff", "format", "--check", *CHECKED)


@pytest.mark.slow
def test_types():
    run_tool("mypy")
