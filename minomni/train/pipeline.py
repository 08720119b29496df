"""The stages in the paper's order, and a run of one of them: folders, setup, training, export."""

import hashlib
import os
import subprocess
import time
from collections.abc import Iterable
from math import ceil
from pathlib import Path
from typing import Any

import torch

from minomni import paths
from minomni.checkpoint import saving
from minomni.checkpoint.hf_config import read_json, write_json
from minomni.checkpoint.saving import HISTORY_FILE
from minomni.config import SIZES, OmniConfig
from minomni.data.corpus import FIRST_VOICE_OFFSET, corpus, voices_of_corpus
from minomni.data.vocabulary import english, world_tokenizer
from minomni.devices import device_of
from minomni.errors import UserError
from minomni.omni import Omni
from minomni.train import processes
from minomni.train.loop import Stage, format_losses, run_setup, train
from minomni.train.measurements import measured, write_summary
from minomni.train.recipes import (
    BUDGETS,
    Settings,
    budget_settings,
    check_settings,
    format_settings,
    merge_settings,
    recipe_of,
)
from minomni.train.run_folder import (
    check_run_config,
    clear_stages_folder,
    delete_stage,
    has_begun,
    is_finished,
    load_stages,
    log,
    make_stages_folder,
)
from minomni.train.stages.audio_align import AudioAlignStage
from minomni.train.stages.codec import CodecStage
from minomni.train.stages.dit import DiTStage
from minomni.train.stages.dpo import DPOStage
from minomni.train.stages.speakers import SpeakersStage
from minomni.train.stages.talker import TalkerStage
from minomni.train.stages.thinker import (
    ChatStage,
    LanguageStage,
    Thinker1Stage,
    Thinker2Stage,
    Thinker3Stage,
)
from minomni.train.stages.vision_align import VisionAlignStage
from minomni.train.stages.vocoder import VocoderStage

SETTINGS = "settings.json"  # beside the stages: what --set changed
SECONDS = "seconds.json"  # beside the stages: how long all calls together have trained
LOADER_WORKERS = {"cuda": 2}  # processes per stage; on a CPU training itself takes all cores
STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        CodecStage,
        VocoderStage,
        DiTStage,
        LanguageStage,
        AudioAlignStage,
        VisionAlignStage,
        Thinker1Stage,
        Thinker2Stage,
        Thinker3Stage,
        ChatStage,
        TalkerStage,
        DPOStage,
        SpeakersStage,
    )
}
COLUMNS = (
    "stage",
    "steps",
    "rows/step",
    "lr",
    "steps*",
    "seconds*",
    "final loss*",
    "trains",
    "frozen",
    "data",
)


def cache_of(home: Path) -> Path:
    """The folder in which a run caches its corpora and what is computed from them."""
    return home / "corpus"


# ----------------------------------------------------------------------------------------------
# the table of stages


def stage_table(size: str) -> str:
    """The stages as a table: parameters that train and that stay frozen, time, data, final losses.

    Time and losses are those of the measured steps. Raises UserError for an unknown size.
    """
    measurements = measured(size)
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name, stage in STAGES.items():
        measured_steps, seconds, losses = "-", "-", "-"
        if name in measurements:
            measured_steps = str(measurements[name].step)
            seconds = f"{measurements[name].seconds:g}"
            losses = format_losses(measurements[name].losses)
        recipe = recipe_of(name, size)
        row = (
            name,
            str(recipe.steps),
            str(recipe.batch * recipe.accumulate),
            f"{recipe.lr:.0e}",
            measured_steps,
            seconds,
            losses,
            short_names(stage.trainable),
            short_names(frozen_parts(stage)),
            stage.data,
        )
        rows.append(row)

    hardware = " and ".join(sorted({row.hardware for row in measurements.values()}))
    notes = [f"{name:<14}{stage.description}" for name, stage in STAGES.items()]
    footnote = f"* measured on {hardware or 'no machine yet'}; - not measured"
    return "\n".join([*align_columns(rows), "", footnote, "", *notes])


def align_columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines whose columns begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def frozen_parts(stage: type[Stage]) -> list[str]:
    """Prefixes of the parameters that earlier stages trained, and that this one uses unchanged."""
    used: set[str] = set()
    for need in stage.needs:
        used.update(part for part in STAGES[need].trainable if not part.startswith(stage.trainable))
    # A prefix such as "thinker." covers the longer ones that begin with it.
    return sorted(part for part in used if not part.startswith(tuple(used - {part})))


def short_names(prefixes: Iterable[str]) -> str:
    """Parameter name prefixes without what repeats the module's name; "-" for none."""
    names = [p.removeprefix("token2wav.code2wav_").removesuffix(".") for p in prefixes]
    return ", ".join(names) or "-"


# ----------------------------------------------------------------------------------------------
# the folder of a run


def prepare_run(home: Path, resume: bool, fresh: bool, stage: str | None = None) -> None:
    """Make the folder of a run, or of one stage of it.

    Raises UserError where earlier work would be lost or mixed with new work without being asked.
    """
    folder = home / "stages"
    make_stages_folder(folder)
    if fresh and stage:
        delete_stage(folder, stage)
        forget_settings(folder, stage)
    elif fresh:
        clear_stages_folder(folder)

    begun = has_begun(folder, stage) if stage else any(folder.glob("*"))
    if begun and not resume:
        what = f"stage {stage} of an earlier run" if stage else "an earlier run"
        raise UserError(f"{folder} holds {what}; --resume continues it, --fresh deletes it")


def read_settings(home: Path) -> Settings:
    """What --set changed in the recipes of a run. Raises UserError for a damaged file."""
    path = home / "stages" / SETTINGS
    return check_settings(read_json(path, True, "--fresh deletes the run"), str(path))


def record_settings(home: Path, given: Settings) -> None:
    """Note in the folder of a run what --set changes; the processes of its stages read it there.

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


def split_settings(size: str, home: Path, settings: Settings, world: int) -> Settings:
    """Settings in which each step of a stage has a batch for each of `world` processes, and as many
    rows as before, rounded up. Stages that have begun go on as they are.
    """
    recorded = read_settings(home)
    split = dict(settings)
    for name in STAGES:
        before = recorded.get(name, {})
        if has_begun(home / "stages", name):
            if "accumulate" in before and settings.get(name, {}).items() <= before.items():
                split[name] = before
            continue
        recipe = recipe_of(name, size, merge_settings(recorded, settings))
        if recipe.accumulate % world:
            fields = {
                "batch": ceil(recipe.batch / world),
                "accumulate": recipe.accumulate * world,
            }
            split[name] = before | settings.get(name, {}) | fields
    return split


def forget_settings(folder: Path, stage: str) -> None:
    """Remove one stage from the noted settings."""
    recorded = read_json(folder / SETTINGS, True, "--fresh deletes the run")
    if recorded.pop(stage, None) is not None:
        write_json(folder / SETTINGS, recorded)


def elapsed_s(home: Path) -> float:
    """Seconds that all calls together have trained in this folder."""
    recorded = read_json(home / "stages" / SECONDS, True, "--fresh deletes the run")
    return recorded.get("seconds", 0.0)


def add_elapsed(home: Path, seconds: float) -> float:
    """Add the seconds of one call to those of the run -> their sum."""
    total = elapsed_s(home) + seconds
    write_json(home / "stages" / SECONDS, {"seconds": total})
    return total


# ----------------------------------------------------------------------------------------------
# one stage


def make_stage(
    name: str, size: str, home: Path, seed: int, device: str = "cpu", cache: Path | None = None
) -> Stage:
    """A stage ready to train: the model as its predecessors left it, on its device, after setup().

    cache: folder of the corpora, by default the run's own.
    Raises UserError for an unknown stage or size, a device that is not there, a predecessor that
    has not finished.
    """
    recipe = recipe_of(name, size, read_settings(home))
    torch.manual_seed(seed)
    omni = Omni(SIZES[size])
    load_stages(omni, home / "stages", list(STAGES[name].needs))
    omni = omni.to(device_of(device))
    stage = STAGES[name](omni, recipe, cache or cache_of(home), seed)
    run_setup(stage)
    return stage


def run_stage(
    name: str,
    size: str,
    home: Path,
    seed: int,
    resume: bool,
    device: str = "cpu",
    progress: bool = True,
) -> None:
    """Run one stage in this process, on one thread: two stages share two cores better than one
    stage uses both.

    Raises UserError for what make_stage() and train() refuse, and where the folder holds a run of
    another size.
    """
    folder = home / "stages"
    with processes.first_goes_first():
        check_run_config(folder, SIZES[size])
        if resume and is_finished(folder, name):
            if processes.is_first():
                print(f"stage {name} is finished; --stage {name} --fresh starts it over")
            return

    torch.set_num_threads(1)
    with processes.first_goes_first():
        stage = make_stage(name, size, home, seed, device)
    log_event(stage, folder, "setup", stage.setup_s or 0.0)
    began = time.perf_counter()
    train(stage, folder, resume, workers=LOADER_WORKERS.get(device, 0), progress=progress)
    log_event(stage, folder, "train", time.perf_counter() - began)


def log_event(stage: Stage, folder: Path, event: str, seconds: float) -> None:
    """Append to log.jsonl how long setup or training took."""
    if not processes.is_first():
        return
    on_gpu = stage.device.type == "cuda"
    hardware = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores"
    entry = {
        "stage": stage.name,
        "event": event,
        "seconds": round(seconds, 2),
        "hardware": hardware,
    }
    log(folder, entry)


# ----------------------------------------------------------------------------------------------
# the finished model


def export_model(size: str, home: Path, seed: int) -> None:
    """Write what all stages have learned as one model folder, in the release's layout, with
    tokenizer and voices.

    Its trained.json says how it was made; log.jsonl beside it has the seconds and final losses.
    """
    torch.manual_seed(seed)
    omni = Omni(SIZES[size])
    load_stages(omni, home / "stages", list(STAGES))
    tokens = omni.config.thinker.tokens
    omni.tokenizer = world_tokenizer(tokens)
    speech = corpus("speaking", cache_of(home), english(tokens))
    omni.voices = voices_of_corpus(speech, tokens.tts_text_pad + FIRST_VOICE_OFFSET)
    saving.save(omni, home / "model")

    command = training_command(size, seed, read_settings(home))
    write_history(home / "model", omni, size, seed, elapsed_s(home), command=command)
    write_summary(home / "stages" / "log.jsonl", home / "log.jsonl")


def write_history(
    model: Path, omni: Omni, size: str, seed: int, seconds: float, **details: Any
) -> None:
    """Write trained.json into a model folder: how the model was made. details: further entries."""
    history = {
        "size": size,
        "seed": seed,
        **details,
        "seconds": round(seconds),
        "config": config_hash(omni.config),
        "commit": commit(),
    }
    write_json(model / HISTORY_FILE, history)


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
    """A fingerprint of all sizes of a model."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:12]


def commit() -> str:
    """The commit of the running code, or 'unknown' without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=paths.PACKAGE, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return answer.stdout.strip() or "unknown"
