"""How a model was made: the seconds, the command and the commit, for its trained.json."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from minomni import paths
from minomni.checkpoint.hf_config import read_json, write_json
from minomni.checkpoint.saving import PROVENANCE_FILE
from minomni.config import OmniConfig
from minomni.omni import Omni
from minomni.train.recipes import BUDGETS, Settings, budget_settings, merge_settings

SECONDS = "seconds.json"  # beside the stages: how long all calls together have trained


def elapsed_s(home: Path) -> float:
    """Seconds that all calls together have trained in this folder."""
    recorded = read_json(home / "stages" / SECONDS, True, "--fresh deletes the run")
    return recorded.get("seconds", 0.0)


def add_elapsed(home: Path, seconds: float) -> float:
    """Add the seconds of one call to those of the run -> their sum."""
    total = elapsed_s(home) + seconds
    write_json(home / "stages" / SECONDS, {"seconds": total})
    return total


def write_provenance(
    model: Path, omni: Omni, size: str, seed: int, seconds: float, **details: Any
) -> None:
    """Write trained.json into a model folder: how the model was made. details: further entries."""
    facts = {
        "size": size,
        "seed": seed,
        **details,
        "seconds": round(seconds),
        "config": config_hash(omni.config),
        "commit": commit(),
    }
    write_json(model / PROVENANCE_FILE, facts)


def training_command(size: str, seed: int, settings: Settings) -> str:
    """The command line that repeats a run."""
    words = ["python", "-m", "minomni", "train", size, "--seed", str(seed)]
    left = settings
    for budget in BUDGETS.get(size, {}):
        of_budget = budget_settings(budget, size)
        if of_budget and merge_settings(settings, of_budget) == settings:
            words += ["--budget", budget]
            left = without_settings(settings, of_budget)
    for stage, fields in left.items():
        for field, value in fields.items():
            words += ["--set", f"{stage}.{field}={value:g}"]
    return " ".join(words)


def without_settings(settings: Settings, removed: Settings) -> Settings:
    """Settings without the fields that `removed` sets."""
    left: Settings = {}
    for stage, fields in settings.items():
        names = fields.keys() - removed.get(stage, {}).keys()
        left[stage] = {name: fields[name] for name in sorted(names)}
    return left


def config_hash(config: OmniConfig) -> str:
    """A digest of all sizes of a model."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:12]


def commit() -> str:
    """The commit of the running code, or 'unknown' without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=paths.PACKAGE, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return answer.stdout.strip() or "unknown"
