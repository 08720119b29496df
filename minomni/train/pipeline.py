"""The school's timetable: which stages there are, in the paper's order, and how long each runs at
each size.
"""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from minomni import config as sizes
from minomni import paths
from minomni.checkpoint import weights
from minomni.checkpoint.hf_config import read_json, write_json
from minomni.data.corpus import FIRST_VOICE, corpus, make_voices
from minomni.data.vocabulary import english, world_tokenizer
from minomni.devices import device_of
from minomni.errors import UserError
from minomni.omni import Omni
from minomni.train.checkpoint import (
    check_run_config,
    clear_home,
    delete_stage,
    load_stages,
    make_home,
)
from minomni.train.loop import Stage, train
from minomni.train.recipes import recipe_of
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

WORKERS = {"cpu": 2, "cuda": 6}  # stages at a time: one alone leaves most of a GPU idle
TRAINED = "trained.json"  # beside the weights: size, seed, command, seconds, config, commit
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

# Seconds and last losses of these recipes, and where. Filled by hand from log.jsonl: losses of the
# model that is shipped, seconds of today's code. A stage that nobody has measured is not in it.
MEASURED = {
    "tiny": "two cores, two stages at a time",
    "small": "one H100 and 16 cores, up to five stages at a time",
}
EXPECTED = {
    "tiny": {
        "codec": (160, "ctc 0.028  mel 0.366  even 0.007"),
        "vocoder": (224, "mel 1.013  stft 1.629"),
        "dit": (441, "flow 0.592"),
        "language": (453, "text 0.158  moments 0.348"),
        "audio_align": (146, "ctc 0.105  plain 0.125"),
        "vision_align": (150, "cells 0.339  plain 0.067"),
        "thinker1": (18, "text 0.092"),
        "thinker2": (246, "text 0.088  moments 0.348"),
        "thinker3": (78, "text 0.912"),
        "chat": (342, "text 0.116  moments 0.349"),
        "talker": (576, "codes 0.724  place 0.022  word 0.011"),
        "dpo": (130, "dpo 0.015  better 0.204  codes 0.771"),
        "speakers": (32, "codes 0.621"),
    },
    "small": {
        "codec": (108, "ctc 0.120  mel 0.388"),
        "vocoder": (213, "mel 0.749  stft 1.350"),
        "dit": (226, "flow 0.474"),
        "language": (155, "text 0.835"),
        "audio_align": (118, "ctc 1.086"),
        "vision_align": (105, "cells 0.320"),
        "thinker1": (36, "text 0.259"),
        "thinker2": (65, "text 0.522"),
        "thinker3": (38, "text 1.785"),
        "chat": (90, "text 0.542"),
        "talker": (258, "codes 1.810"),
    },
}


def stage_table(size: str) -> str:
    """The stages as a table: what learns and what is locked meanwhile, how long and from what, what
    is to be expected.

    Raises UserError for an unknown size.
    """
    rows = [
        (
            "stage",
            "steps",
            "rows a step",
            "rate",
            "seconds*",
            "loss at the end*",
            "learns",
            "locked",
            "data",
        )
    ]
    for name, stage in STAGES.items():
        recipe = recipe_of(name, size)
        seconds, loss = EXPECTED.get(size, {}).get(name, ("-", "-"))
        used = {
            part
            for need in stage.needs
            for part in STAGES[need].learns
            if not part.startswith(stage.learns)
        }
        locked = sorted(
            part for part in used if not part.startswith(tuple(used - {part}))
        )  # the whole says its parts
        numbers = recipe.steps, recipe.batch * recipe.accumulate, f"{recipe.lr:.0e}", seconds
        rows.append(
            (name, *map(str, numbers), loss, in_short(stage.learns), in_short(locked), stage.data)
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"* measured on {MEASURED[size]}; - where nobody has measured it",
            "",
            *(f"{name:<10}{stage.about}" for name, stage in STAGES.items()),
        ]
    )


def in_short(prefixes) -> str:
    """Parameter name prefixes as a reader wants them: without the parts of a name that repeat the
    module's.
    """
    return (
        ", ".join(p.removeprefix("token2wav.code2wav_").removesuffix(".") for p in prefixes) or "-"
    )


def prepare_run(home: Path, resume: bool, fresh: bool, stage: str | None = None) -> None:
    """Make room for a run, or for one stage of it.

    Raises UserError where earlier work would be lost, or mixed up, without being asked.
    """
    folder = home / "stages"
    make_home(folder)
    if fresh and stage:
        delete_stage(folder, stage)
    elif fresh:
        clear_home(folder)
    left = (
        [*folder.glob(f"{stage}.safetensors"), *folder.glob(f"{stage}.resume.pt")]
        if stage
        else folder.glob("*")
    )
    if any(left) and not resume:
        what = f"stage {stage} of an earlier run" if stage else "an earlier run"
        raise UserError(f"{folder} holds {what}; --resume goes on with it, --fresh throws it away")
    make_home(folder)


def export_model(size: str, home: Path, seed: int) -> None:
    """Put what all stages learnt into one model folder, in the release's layout, with tokenizer and
    voices.

    Its trained.json says how it came to be.
    """
    torch.manual_seed(seed)
    omni = Omni(sizes.size(size))
    load_stages(omni, home / "stages", list(STAGES))
    tokens = omni.config.thinker.tokens
    omni.tokenizer = world_tokenizer(tokens)
    omni.voices = make_voices(
        corpus("speaking", home.parent / "corpus", english(tokens)),
        tokens.tts_text_pad + FIRST_VOICE,
    )
    weights.save(omni, home / "model")
    made = {"size": size, "seed": seed, "command": f"python -m minomni train {size} --seed {seed}"}
    made |= {
        "seconds": round(elapsed_s(home)),
        "config": config_hash(omni.config),
        "commit": commit(),
    }
    write_json(home / "model" / TRAINED, made)


def elapsed_s(home: Path, more: float = 0.0) -> float:
    """Seconds that all calls together have trained in this folder, after adding some."""
    file = home / "stages" / "seconds.json"
    total = read_json(file, optional=True).get("seconds", 0.0) + more
    write_json(file, {"seconds": total})
    return total


def config_hash(config: sizes.OmniConfig) -> str:
    """Stands for all sizes of a model: another config, another fingerprint."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:12]


def commit() -> str:
    """The commit of the code that runs, or 'unknown' where there is no git."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=paths.PACKAGE,
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


def make_stage(name: str, size: str, home: Path, seed: int, device: str = "cpu") -> Stage:
    """A stage ready to run: the model as its predecessors left it, on its device.

    Raises UserError for an unknown stage or size, a device that is not there, a predecessor that
    has not finished.
    """
    recipe = recipe_of(name, size)
    torch.manual_seed(seed)
    omni = Omni(sizes.size(size))
    load_stages(omni, home / "stages", list(STAGES[name].needs))
    stage = STAGES[name](omni.to(device_of(device)), recipe, home.parent / "corpus", seed)
    stage.setup()
    return stage


def run_stage(
    name: str, size: str, home: Path, seed: int, resume: bool, device: str = "cpu", slot: int = 0
) -> None:
    """Run one stage in this process, on one thread: two stages share two cores better than one
    stage uses both.

    Raises UserError for what make_stage() and train() refuse, and where the folder holds a run of other
    sizes.
    """
    folder = home / "stages"
    check_run_config(folder, sizes.size(size))
    if resume and (folder / f"{name}.safetensors").exists():
        print(f"stage {name} is finished; --stage {name} --fresh starts it over")
        return
    torch.set_num_threads(1)
    train(make_stage(name, size, home, seed, device), folder, resume, slot=slot)


def critical_path_s(name: str, size: str) -> float:
    """Seconds from a stage's start to the end of the last that waits for it; the longest way goes
    first.

    As measured; a stage that nobody has measured counts by its steps.
    """
    seconds, _ = EXPECTED.get(size, {}).get(name, (recipe_of(name, size).steps / 4, ""))
    return seconds + max(
        (critical_path_s(other, size) for other, stage in STAGES.items() if name in stage.needs),
        default=0,
    )


def start_next(
    order: list[str], done: set[str], running: dict[str, int], lanes: int
) -> tuple[str, int] | None:
    """The stage that starts now and its lane, or None while there is none; running: stages with
    their lanes.

    As long as others are waited for, a stage that nobody waits for keeps to a spare lane, number
    `lanes`.
    """
    awaited = {need for stage in STAGES.values() for need in stage.needs}
    left = [name for name in order if name not in done and name not in running]
    free = [lane for lane in range(lanes + 1) if lane not in running.values()]
    for name in left:
        spare = name not in awaited and not awaited.isdisjoint(left)
        mine = [lane for lane in free if (lane == lanes) == spare]
        if mine and done.issuperset(STAGES[name].needs):
            return name, mine[0]
    return None


def run_all(size: str, home: Path, seed: int, device: str = "cpu") -> None:
    """Run every unfinished stage as soon as what it needs is there, LANES at a time; each in a
    process of its own.

    One more has the lowest priority: it learns in what the others leave of the cores. A stage that
    fails ends the run with its message; what is finished stays, and the next run goes on from
    there.
    """
    done = {name for name in STAGES if (home / "stages" / f"{name}.safetensors").exists()}
    running: dict[str, int] = {}
    processes: dict[str, subprocess.Popen] = {}
    for name in (
        "listening",
        "speaking",
    ):  # once, by all cores, before two stages miss the same recordings
        corpus(name, home.parent / "corpus", english(sizes.size(size).thinker.tokens))
    order = sorted(STAGES, key=lambda name: -critical_path_s(name, size))
    command = [
        sys.executable,
        "-m",
        "minomni",
        "train",
        size,
        "--resume",
        "--home",
        str(home.resolve()),
        "--seed",
        str(seed),
    ]
    lanes = WORKERS.get(device, WORKERS["cpu"])
    while len(done) < len(STAGES):
        while start := start_next(order, done, running, lanes):
            name, lane = start
            running[name] = lane
            options = ["--stage", name, "--slot", str(lane), "--device", device]
            processes[name] = subprocess.Popen([*command, *options], cwd=paths.PACKAGE.parent)
            if lane == lanes and hasattr(os, "setpriority"):  # not on Windows
                os.setpriority(os.PRIO_PROCESS, processes[name].pid, 19)
        time.sleep(0.2)
        for name in [name for name in running if processes[name].poll() is not None]:
            del running[name]
            if processes[name].returncode:
                for other in running:
                    processes[other].terminate()
                raise UserError(
                    f"stage {name} stopped with exit code {processes[name].returncode}; its message stands above"
                )
            done.add(name)
