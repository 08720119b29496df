"""Seconds and final losses of measured runs: one JSON line per stage.

data_samples/tiny_log.jsonl has the steps and losses of the run of the long budget whose weights are
in data_samples/tiny. That run shared its machine with other work, so seconds are its steps times
the median time of a step in a run of the quick budget that did not; a step of the vocoder with
discriminators was timed alone. small_log.jsonl is of a run on one H100. A line has the keys stage,
step, losses, seconds and hardware; unmeasured stages have none.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from minomni import paths
from minomni.files import write_atomically


@dataclass(frozen=True)
class StageResult:
    """How one stage ended."""

    stage: str
    step: int
    losses: dict[str, float]  # running means at the last step, by name
    seconds: float  # of setup and training; in tiny_log.jsonl of the steps alone
    hardware: str


@cache
def measured(size: str) -> dict[str, StageResult]:
    """The runs that ship with the package, by stage; none for a size without a file."""
    path = paths.data_samples() / f"{size}_log.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["stage"]: StageResult(**row) for row in rows}


def summarize(log: Path) -> list[StageResult]:
    """How each stage of a finished run ended, from the log.jsonl of its stages."""
    entries = read_log(log)
    seconds: dict[str, float] = {}
    last: dict[str, dict] = {}
    hardware: dict[str, str] = {}
    for entry in entries:
        name = entry["stage"]
        if "event" in entry:
            seconds[name] = seconds.get(name, 0.0) + entry["seconds"]
            hardware[name] = entry["hardware"]
        else:
            last[name] = entry

    others = ("stage", "step", "ms", "items_per_s", "sample")
    rows = []
    for name, entry in last.items():
        losses = {key: round(value, 3) for key, value in entry.items() if key not in others}
        spent = round(seconds.get(name, 0.0), 1)
        rows.append(StageResult(name, entry["step"], losses, spent, hardware.get(name, "")))
    return rows


def read_log(log: Path) -> list[dict]:
    """The entries of a log.jsonl, without lines that a full disk has cut."""
    entries = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def write_summary(log: Path, path: Path) -> None:
    """Write the measurements of a run's log as a file of the form that measured() reads."""
    rows = [] if not log.exists() else summarize(log)
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))
