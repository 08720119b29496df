"""What --set changes in the recipes of a run, noted in the folder of the run.

The processes of its stages read it there.
"""

from math import ceil
from pathlib import Path

from minomni.checkpoint.hf_config import read_json, write_json
from minomni.errors import UserError
from minomni.train.recipes import (
    Settings,
    check_settings,
    format_settings,
    merge_settings,
    recipe_of,
)
from minomni.train.run_folder import has_begun
from minomni.train.stage_table import STAGES

SETTINGS = "settings.json"  # beside the stages: what --set changed, as it was given
SPLIT = "split.json"  # beside it: the batches of stages that several processes have begun


def read_settings(home: Path) -> Settings:
    """What changes in the recipes of a run: by --set, and by the split over processes.

    Raises UserError for a damaged file.
    """
    return merge_settings(read_file(home, SETTINGS), read_file(home, SPLIT))


def read_file(home: Path, name: str) -> Settings:
    """The settings in one of the two files. Raises UserError for a damaged one."""
    path = home / "stages" / name
    return check_settings(read_json(path, True, "--fresh deletes the run"), str(path))


def record_settings(home: Path, given: Settings) -> None:
    """Note in the folder of a run what --set changes.

    Without --set the noted settings stay. Raises UserError where a stage has begun with others.
    """
    if not given:
        return
    recorded = read_file(home, SETTINGS)
    for stage, fields in given.items():
        before = recorded.get(stage, {})
        if fields != before and has_begun(home / "stages", stage):
            raise UserError(
                f"{home}: stage {stage} has begun with {format_settings(before)} and cannot go on "
                f"with {format_settings(fields)}; leave out --set {stage}.*, or use --fresh"
            )
    write_json(home / "stages" / SETTINGS, recorded | given)


def record_split(size: str, home: Path, world: int) -> None:
    """Note how the rows of a step are divided into a batch for each of `world` processes, as many
    rows as the recipe has, rounded up. Stages that have begun go on as they are.

    It is kept apart from the settings, which the same command gives again with --resume.
    """
    settings = read_file(home, SETTINGS)
    before = read_file(home, SPLIT)
    split = dict(before)
    for name in STAGES:
        if has_begun(home / "stages", name):
            continue
        split.pop(name, None)
        recipe = recipe_of(name, size, settings)
        if recipe.accumulate % world:
            batch = ceil(recipe.batch / world)
            split[name] = {"batch": batch, "accumulate": recipe.accumulate * world}
    if split != before:
        write_json(home / "stages" / SPLIT, split)


def forget_settings(folder: Path, stage: str) -> None:
    """Remove one stage from the noted settings."""
    for name in (SETTINGS, SPLIT):
        recorded = read_json(folder / name, True, "--fresh deletes the run")
        if recorded.pop(stage, None) is not None:
            write_json(folder / name, recorded)
