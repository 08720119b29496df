"""How long a training step of tiny takes by one process and by several, which torchrun starts.

Every process has one thread. A step has the same rows with any number of processes, and trains on
the committed recordings. This file is also the program of the processes:

    torchrun --nproc-per-node 2 -m minomni.eval.process_scaling STAGE HOME DEVICE
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from minomni import paths
from minomni.data import text_to_speech
from minomni.errors import UserError, shorten
from minomni.train import distributed, pipeline, processes, run_settings
from minomni.train.loop import train
from minomni.train.recipes import recipe_of

SIZE = "tiny"
STAGES = ("codec", "vocoder", "language")  # they need no other stage
STEPS = 24  # timed in eight parts, the first of which is left out
PROCESSES = (1, 2)


class Row(NamedTuple):
    """A measurement of one stage."""

    stage: str
    processes: int
    rows: int  # of a step, of all processes together
    step_ms: float  # median
    speed_up: float  # over the first number of processes


def measure(
    counts: Sequence[int] = PROCESSES,
    device: str = "cpu",
    stages: Sequence[str] = STAGES,
    steps: int = STEPS,
) -> list[Row]:
    """Train some steps of each stage by each number of processes. Raises UserError where the
    processes fail, and for a number that is given twice.
    """
    if len(set(counts)) < len(counts):
        given = shorten(",".join(map(str, counts)), 100)
        raise UserError(f"--processes {given} has a number twice; give each number once")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages:
            times = []
            for count in counts:
                home = Path(folder) / f"{stage}-{count}"
                rows_per_step = prepare(stage, home, steps)
                run_processes(stage, home, device, count)
                times.append(median_ms(home / "stages/log.jsonl"))
                speed_up = times[0] / times[-1]
                rows.append(Row(stage, count, rows_per_step, times[-1], speed_up))
    return rows


def prepare(stage: str, home: Path, steps: int) -> int:
    """Make the folder of a run, with its settings -> rows of a step."""
    pipeline.prepare_run(home, resume=False, fresh=False)
    run_settings.record_settings(home, {stage: {"steps": steps}})
    recipe = recipe_of(stage, SIZE, run_settings.read_settings(home))
    return recipe.batch * recipe.accumulate


def run_processes(stage: str, home: Path, device: str, count: int) -> None:
    """Train a stage by processes of torchrun. Raises UserError with the end of what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), "-m", "minomni.eval.process_scaling"]
    command += [stage, str(home), device]
    environment = {**paths.environment(), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("minomni: ")]
        reason = lines[0] if lines else ended.stderr[-300:]
        raise UserError(f"{count} processes on {device} failed: {shorten(reason, 300)}")


def median_ms(log: Path) -> float:
    """Milliseconds of a step: the median of a log without its first line, in which caches fill."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    times = [entry["ms"] for entry in entries if "ms" in entry]
    return float(statistics.median(times[1:]))


def markdown(rows: list[Row]) -> str:
    """The measurements as a table."""
    lines = [
        "| stage | processes | rows a step | a step, ms | speed-up |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.stage} | {row.processes} | {row.rows} | {row.step_ms:.0f} | "
            f"{row.speed_up:.2f} |"
        )
    return "\n".join(lines)


def train_here(name: str, home: Path, device: str) -> None:
    """What each process does: train a stage, without writing samples of what it can do."""
    text_to_speech.available = lambda: False  # the committed recordings: nothing to synthesize
    torch.set_num_threads(1)
    with processes.process_group(device):
        with distributed.first_goes_first():
            stage = pipeline.make_stage(name, SIZE, home, 0, device)
        stage.preview_text = lambda: ""  # type: ignore[method-assign]
        stage.preview_audio = lambda: None  # type: ignore[method-assign]
        train(stage, home / "stages", progress=False)


if __name__ == "__main__":
    try:
        train_here(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    except UserError as error:
        sys.exit(f"minomni: {error}")
