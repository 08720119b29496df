"""The stages of a run start in a sensible order, several at a time, and fail together."""

import heapq
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from threading import Event

import pytest

from minomni.errors import UserError
from minomni.train import measured_runs, recipes, stage_pool
from minomni.train.stage_table import STAGES

SECONDS = {
    name: row.seconds / row.step * recipes.recipe_of(name, "tiny").steps
    for name, row in measured_runs.measured("tiny").items()
}


def test_the_longest_path_goes_first():
    """By hand: dpo and then speakers wait for chat. A stage has a longer path than its users."""
    path = stage_pool.critical_path_s("chat", "tiny")
    assert path == pytest.approx(SECONDS["chat"] + SECONDS["dpo"] + SECONDS["speakers"])
    for name, stage in STAGES.items():
        for need in stage.needs:
            before = stage_pool.critical_path_s(need, "tiny")
            assert before > stage_pool.critical_path_s(name, "tiny")
    assert "dpo" not in measured_runs.measured("small")
    assert stage_pool.critical_path_s("dpo", "small") == (80 + 40) * stage_pool.STEP_S


class Process:
    """Stands in for the process of a stage; it ends when it is told how."""

    def __init__(self, name: str):
        self.name = name
        self.code: int | None = None
        self.ended = Event()

    def end(self, code: int) -> None:
        self.code = code
        self.ended.set()

    def wait(self) -> int:
        assert self.ended.wait(60)
        return self.code

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.end(-15)


class Clock:
    """Starts processes, and lets the one end whose measured seconds are over first."""

    def __init__(self, broken: str | None):
        self.broken = broken
        self.now = 0.0
        self.started: list[Process] = []
        self.running: list[tuple[float, str]] = []
        self.most = 0  # that ran at a time

    def start(self, name, *_):
        self.started.append(Process(name))
        heapq.heappush(self.running, (self.now + SECONDS[name], name))
        self.most = max(self.most, len(self.running))
        return self.started[-1]

    def wait(self, futures, return_when):
        self.now, name = heapq.heappop(self.running)
        if self.broken in self.names():
            name = self.broken
        process = next(process for process in self.started if process.name == name)
        process.end(code=int(name == self.broken))
        ended = [future for future in futures if futures[future] == name]
        return wait(ended, timeout=60)

    def names(self) -> list[str]:
        return [process.name for process in self.started]


@pytest.fixture
def clock(monkeypatch):
    """A Clock instead of subprocess; a call makes it."""

    def make(broken: str | None = None) -> Clock:
        made = Clock(broken)
        monkeypatch.setattr(stage_pool, "start_stage", made.start)
        monkeypatch.setattr(stage_pool, "wait", made.wait)
        monkeypatch.setattr(stage_pool, "corpus", lambda *_: None)
        return made

    return make


def test_all_stages_run_two_at_a_time(clock, tmp_path):
    """Every stage once, after those it needs, in little more time than no order can go below."""
    run = clock()
    stage_pool.run_all("tiny", tmp_path, seed=0)
    begun = run.names()
    assert sorted(begun) == sorted(STAGES)
    assert begun[0] == "language"
    for name, stage in STAGES.items():
        assert all(begun.index(need) < begun.index(name) for need in stage.needs)
    assert run.most == 2
    longest = max(stage_pool.critical_path_s(name, "tiny") for name in STAGES)
    bound = max(longest, sum(SECONDS.values()) / 2)
    assert bound <= run.now <= 1.05 * bound
    assert all(process.code == 0 for process in run.started)


def test_finished_stages_are_left_out(clock, tmp_path):
    (tmp_path / "stages").mkdir()
    for name in ("language", "codec"):
        (tmp_path / "stages" / f"{name}.safetensors").write_bytes(b"x")
    run = clock()
    stage_pool.run_all("tiny", tmp_path, seed=0)
    assert sorted(run.names()) == sorted(set(STAGES) - {"language", "codec"})


def test_a_stage_that_fails_ends_the_others(clock, tmp_path):
    run = clock(broken="language")
    with pytest.raises(UserError, match="language stopped with exit code 1; see its message"):
        stage_pool.run_all("tiny", tmp_path, seed=0)
    assert run.names()[0] == "language"
    assert [process.code for process in run.started] == [1, -15]


TERMINATED = """
import subprocess, sys
from pathlib import Path
from minomni.train import stage_pool

def start(*_):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(process.pid, flush=True)
    return process

stage_pool.start_stage = start
stage_pool.corpus = lambda *_: None
stage_pool.run_all("tiny", Path(sys.argv[1]), seed=0)
"""


def ends(pid: int) -> bool:
    """Whether a process is gone within a minute: it was told to end, and takes a moment."""
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_sigterm_ends_the_stages_too(tmp_path):
    """What a job scheduler and `kill` send; nothing goes on training."""
    command = [sys.executable, "-c", TERMINATED, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        stages = [int(run.stdout.readline()) for _ in range(2)]
        run.terminate()
        assert run.wait(60) == 128 + signal.SIGTERM
    assert all(ends(stage) for stage in stages)


def test_sigterm_while_a_stage_is_started_takes_effect_afterwards():
    """Otherwise it would be started, and not be known to those who end it."""
    started = []

    def start_two() -> None:
        with stage_pool.exit_on_sigterm() as held:
            with held():
                signal.raise_signal(signal.SIGTERM)
                started.append("stage")
            started.append("another")

    with pytest.raises(SystemExit) as ended:
        start_two()
    assert ended.value.code == 128 + signal.SIGTERM
    assert started == ["stage"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stage_is_started_by_the_command_line(monkeypatch, tmp_path):
    """With options that the command line knows, and those of this run."""
    from minomni.__main__ import parser

    commands = []
    monkeypatch.setattr(stage_pool.subprocess, "Popen", lambda line, cwd: commands.append(line))
    stage_pool.start_stage("dit", "small", tmp_path, 7, "cuda")
    ((_, dash_m, package, *line),) = commands
    assert (dash_m, package) == ("-m", "minomni")
    given = parser().parse_args(line)
    assert (given.command, given.size, given.stage) == ("train", "small", "dit")
    assert (given.home, given.seed, given.device) == (tmp_path, 7, "cuda")
    assert given.resume
    assert given.no_progress
    assert recipes.recipe_of(given.stage, given.size)
