"""Runs all stages of a size, several at a time, each in a process of its own."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from graphlib import TopologicalSorter
from pathlib import Path

from minomni import paths
from minomni.config import SIZES
from minomni.data.corpus import corpus
from minomni.data.vocabulary import english
from minomni.errors import UserError
from minomni.train.measured_runs import measured
from minomni.train.pipeline import cache_of
from minomni.train.recipes import recipe_of
from minomni.train.run_folder import is_finished
from minomni.train.stage_table import STAGES

WORKERS = {"cpu": 2, "cuda": 6}  # stages at a time: one alone leaves most of a GPU idle
STEP_S = 0.25  # a guess, for stages that were not measured


def run_all(size: str, home: Path, seed: int, device: str = "cpu") -> None:
    """Run every unfinished stage once the stages that it needs have finished, WORKERS at a time.

    Of the stages that can start, the one with the longest critical path goes first. A stage that
    fails ends the others and the run, with its message; what is finished stays, and --resume
    continues from there.
    """
    # Once, with all cores, before two stages synthesize the same recordings.
    for name in ("listening", "speaking"):
        corpus(name, cache_of(home), english(SIZES[size].thinker.tokens))

    workers = WORKERS.get(device, WORKERS["cpu"])
    sorter = unfinished_stages(home / "stages")
    ready: list[str] = []
    running: dict[Future, str] = {}
    processes: list[subprocess.Popen] = []
    with (
        exit_on_sigterm() as held,
        ThreadPoolExecutor(workers) as pool,
        terminated_at_exit(processes),  # before the pool waits for them
    ):
        while sorter.is_active():
            ready += sorter.get_ready()
            ready.sort(key=lambda name: critical_path_s(name, size))
            while ready and len(running) < workers:
                name = ready.pop()
                with held():
                    process = start_stage(name, size, home, seed, device)
                    processes.append(process)
                running[pool.submit(process.wait)] = name
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                check_exit(name, future.result())
                sorter.done(name)


@contextmanager
def terminated_at_exit(processes: list[subprocess.Popen]) -> Iterator[None]:
    """End the processes that still run when the block is left: by an error, Ctrl-C or SIGTERM."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()


@contextmanager
def exit_on_sigterm() -> Iterator[Callable[[], AbstractContextManager]]:
    """Raise SystemExit where SIGTERM would end this process at once and leave its children.

    -> held(), a context that the signal does not interrupt: it takes effect at its end.
    """
    is_held = False
    has_come = False

    def exit_now(*_: object) -> None:
        nonlocal has_come
        has_come = True
        if not is_held:
            sys.exit(128 + signal.SIGTERM)

    @contextmanager
    def held() -> Iterator[None]:
        nonlocal is_held
        is_held = True
        try:
            yield
        finally:
            is_held = False
        if has_come:
            sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, exit_now)
    try:
        yield held
    finally:
        signal.signal(signal.SIGTERM, before)


def unfinished_stages(folder: Path) -> TopologicalSorter:
    """The stages that have not finished, with those of them that each needs."""
    left = [name for name in STAGES if not is_finished(folder, name)]
    sorter: TopologicalSorter = TopologicalSorter()
    for name in left:
        sorter.add(name, *(need for need in STAGES[name].needs if need in left))
    sorter.prepare()
    return sorter


def start_stage(name: str, size: str, home: Path, seed: int, device: str) -> subprocess.Popen:
    """A process that trains one stage. It finds the settings of the run in the run's folder."""
    run = ["train", size, "--home", str(home.resolve()), "--seed", str(seed), "--device", device]
    stage = ["--stage", name, "--resume", "--no-progress"]
    command = [sys.executable, "-m", "minomni", *run, *stage]
    return subprocess.Popen(command, cwd=paths.PACKAGE.parent)


def check_exit(name: str, code: int) -> None:
    """Raises UserError where the process of a stage has failed."""
    if code:
        raise UserError(f"stage {name} stopped with exit code {code}; see its message above")


def critical_path_s(name: str, size: str) -> float:
    """Seconds from a stage's start to the end of the last stage that depends on it.

    By the recipe's steps and the measured pace; an unmeasured stage has a guessed one.
    """
    measurements = measured(size)
    step_s = STEP_S
    if name in measurements:
        step_s = measurements[name].seconds / measurements[name].step
    seconds = recipe_of(name, size).steps * step_s
    after = [critical_path_s(other, size) for other in STAGES if name in STAGES[other].needs]
    return seconds + max(after, default=0.0)
