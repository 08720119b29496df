"""What --set changes in the recipes of a run, noted in the folder of the run.

The processes of its stages read it there.
"""

from pathlib import Path

from minomni.checkpoint.hf_config import read_json, write_json
from minomni.errors import UserError
from minomni.train.recipes import (
    Settings,
    check_settings,
    format_settings,
)
from minomni.train.run_folder import has_begun

SETTINGS = "settings.json"  # beside the stages: what --set changed, as it was given


def read_settings(home: Path) -> Settings:
    """What --set changes in the recipes of a run. Raises UserError for a damaged file."""
    path = home / "stages" / SETTINGS
    return check_settings(read_json(path, True, "--fresh deletes the run"), str(path))


def record_settings(home: Path, given: Settings) -> None:
    """Note in the folder of a run what --set changes.

    Without --set the noted settings stay. Raises UserError where a stage has begun with others.
    """
    if not given:
        return
    recorded = read_settings(home)
    for stage, fields in given.items():
        before = recorded.get(stage, {})
        if fields != before and has_begun(home / "stages", stage):
            raise UserError(
                f"{home}: stage {stage} has begun with {format_settings(before)} and cannot go on "
                f"with {format_settings(fields)}; leave out --set {stage}.*, or use --fresh"
            )
    write_json(home / "stages" / SETTINGS, recorded | given)


def forget_settings(folder: Path, stage: str) -> None:
    """Remove one stage from the noted settings."""
    recorded = read_json(folder / SETTINGS, True, "--fresh deletes the run")
    if recorded.pop(stage, None) is not None:
        write_json(folder / SETTINGS, recorded)
