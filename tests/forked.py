"""Programs in processes of their own that need not import PyTorch again: they are forked from one
server that has imported it. A start costs milliseconds instead of seconds of a processor.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# What a training imports; PyTorch imports its compiler with the first optimizer.
PRELOAD = ["torch", "torch._dynamo", "torch.distributed.fsdp", "minomni.train.pipeline"]
IS_SAFE = sys.platform == "linux"  # forks of PyTorch are not on macOS, Windows has none


def start(code: str, arguments: list[str], cwd: Path, environment: dict[str, str]):
    """Run Python code with arguments in another process -> what offers poll(), kill(),
    communicate() and returncode.
    """
    if IS_SAFE:
        return Forked(code, arguments, cwd, environment)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Forked:
    """The part of subprocess.Popen that the tests use, for a forked process."""

    def __init__(self, code: str, arguments: list[str], cwd: Path, environment: dict[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        folder = Path(tempfile.mkdtemp())
        self.files = [folder / "stdout", folder / "stderr"]
        given = (code, arguments, str(cwd), environment, self.files)
        self.process = context.Process(target=run, args=given)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        """The exit code, None while the process runs."""
        return self.process.exitcode

    def kill(self) -> None:
        """End the process by SIGKILL."""
        self.process.kill()

    def communicate(self) -> tuple[str, str]:
        """Wait for the end -> stdout, stderr."""
        self.process.join()
        out, errors = (file.read_text(encoding="utf-8") for file in self.files)
        return out, errors


def run(
    code: str, arguments: list[str], cwd: str, environment: dict[str, str], files: list[Path]
) -> None:
    """The child: run code as `python -c` does."""
    for descriptor, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
