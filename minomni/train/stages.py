"""The school's timetable: which stages there are, in the paper's order, and how long each runs at each size."""

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from .. import config as sizes
from .. import ROOT, weights
from ..config_json import read_json, write_json
from ..errors import UserError
from ..omni import Omni
from .loop import Recipe, Stage, graduate, train
from .speech import FIRST_VOICE, corpus, make_voices
from .talker_stages import DPOStage, SpeakersStage, TalkerStage
from .sense_stages import EarsStage, EyesStage
from .thinker_stages import ChatStage, LanguageStage, Thinker1Stage, Thinker2Stage, Thinker3Stage
from .vocabulary import world_tokenizer
from .voice_stages import CodecStage, DiTStage, VocoderStage

TRAINED = "trained.json"  # beside the weights: size, seed, command, seconds, config, commit
STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        CodecStage,
        VocoderStage,
        DiTStage,
        LanguageStage,
        EarsStage,
        EyesStage,
        Thinker1Stage,
        Thinker2Stage,
        Thinker3Stage,
        ChatStage,
        TalkerStage,
        DPOStage,
        SpeakersStage,
    )
}

RECIPES = {
    "tiny": {
        "codec": Recipe(steps=800, batch=16, lr=5e-3),
        "vocoder": Recipe(steps=700, batch=16, lr=5e-3),
        "dit": Recipe(steps=1500, batch=16, lr=8e-3),
        "language": Recipe(steps=500, batch=24, lr=6e-3),
        "ears": Recipe(steps=800, batch=16, lr=6e-3),
        "eyes": Recipe(steps=900, batch=32, lr=6e-3),
        "thinker1": Recipe(steps=100, batch=16, lr=3e-3),
        "thinker2": Recipe(steps=700, batch=16, lr=4e-3),
        "thinker3": Recipe(steps=40, batch=6, lr=1.5e-3),
        "chat": Recipe(steps=600, batch=16, lr=3e-3),
        "talker": Recipe(steps=800, batch=24, lr=5e-3),
        "dpo": Recipe(steps=50, batch=16, lr=2.5e-4),
        "speakers": Recipe(steps=80, batch=24, lr=5e-4),
    },
}
RECIPES["small"] = {
    name: Recipe(steps=r.steps * 20, batch=r.batch * 2, lr=r.lr / 4, warmup=300) for name, r in RECIPES["tiny"].items()
}


def timetable(size: str) -> str:
    """The stages as a table: what each needs, what it unlocks, how long it runs, what it is about."""
    rows = [f"{'stage':<10} {'steps':>6} {'batch':>5} {'rate':>7}  {'unlocks':<42} about"]
    for name, stage in STAGES.items():
        recipe = recipe_of(name, size)
        rows.append(
            f"{name:<10} {recipe.steps:>6} {recipe.batch:>5} {recipe.lr:>7.0e}  "
            f"{', '.join(stage.learns):<42} {stage.about}"
        )
    return "\n".join(rows)


def recipe_of(name: str, size: str) -> Recipe:
    """Raises UserError for an unknown stage or size."""
    if name not in STAGES:
        raise UserError(f"unknown stage {name!r}; the stages are {', '.join(STAGES)}")
    if size not in RECIPES:
        raise UserError(f"size {size!r} has no training recipe; sizes with one are {', '.join(RECIPES)}")
    return RECIPES[size][name]


def begin(home: Path, resume: bool, fresh: bool) -> None:
    """Make room for a run. Raises UserError where an earlier one would be lost, or mixed up, without being asked."""
    folder = home / "stages"
    if fresh and folder.exists():
        shutil.rmtree(folder)
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise UserError(f"{folder} holds an earlier run; --resume goes on with it, --fresh throws it away")
    folder.mkdir(parents=True, exist_ok=True)


def graduation(size: str, home: Path, seed: int) -> None:
    """Put what all stages learnt into one model folder, in the release's layout, with tokenizer and voices.

    Its trained.json says how it came to be.
    """
    torch.manual_seed(seed)
    omni = Omni(sizes.size(size))
    graduate(omni, home / "stages", list(STAGES))
    tokens = omni.config.thinker.tokens
    omni.tokenizer = world_tokenizer(tokens)
    omni.voices = make_voices(corpus("speaking", home.parent / "corpus"), tokens.tts_text_pad + FIRST_VOICE)
    weights.save(omni, home / "model")
    made = {"size": size, "seed": seed, "command": f"python -m minomni train {size} --seed {seed}"}
    made |= {"seconds": round(spent(home)), "config": fingerprint(omni.config), "commit": commit()}
    write_json(home / "model" / TRAINED, made)


def spent(home: Path, more: float = 0.0) -> float:
    """Seconds that all calls together have trained in this folder, after adding some."""
    file = home / "stages" / "seconds.json"
    total = read_json(file, optional=True).get("seconds", 0.0) + more
    write_json(file, {"seconds": total})
    return total


def fingerprint(config: sizes.OmniConfig) -> str:
    """Stands for all sizes of a model: another config, another fingerprint."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:12]


def commit() -> str:
    """The commit of the code that runs, or 'unknown' where there is no git."""
    try:
        answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


def make(name: str, size: str, home: Path, seed: int) -> Stage:
    """A stage ready to run: the model as its predecessors left it. Raises UserError for an unknown stage or size."""
    recipe = recipe_of(name, size)
    torch.manual_seed(seed)
    omni = Omni(sizes.size(size))
    graduate(omni, home / "stages", list(STAGES[name].needs))
    return STAGES[name](omni, recipe, home.parent / "corpus", seed)


def run_stage(name: str, size: str, home: Path, seed: int, resume: bool, slot: int = 0) -> None:
    """Run one stage in this process, on one thread: two stages share two cores better than one stage uses both."""
    torch.set_num_threads(1)
    train(make(name, size, home, seed), home / "stages", resume, slot=slot)


def run_all(size: str, home: Path, seed: int, lanes: int = 2) -> None:
    """Run every unfinished stage, two at a time as soon as what each needs is there; each in a process of its own.

    A stage that fails ends the run with its message; what is finished stays, and the next run goes on from there.
    """
    done = {name for name in STAGES if (home / "stages" / f"{name}.safetensors").exists()}
    running: dict[str, subprocess.Popen] = {}
    waited_for = {name: sum(name in stage.needs for stage in STAGES.values()) for name in STAGES}
    order = sorted(STAGES, key=lambda name: -waited_for[name])  # what most others wait for goes first
    while len(done) < len(STAGES):
        for name in order:
            ready = name not in done and name not in running and done.issuperset(STAGES[name].needs)
            if ready and len(running) < lanes:
                slot = next(i for i in range(lanes) if i not in [p.slot for p in running.values()])
                command = [
                    sys.executable,
                    "-m",
                    "minomni",
                    "train",
                    size,
                    "--stage",
                    name,
                    "--resume",
                    "--seed",
                    str(seed),
                    "--slot",
                    str(slot),
                    "--home",
                    str(home),
                ]
                running[name] = subprocess.Popen(command, cwd=ROOT)
                running[name].slot = slot
        time.sleep(0.2)
        for name, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode:
                for other in running.values():
                    other.terminate()
                raise UserError(f"stage {name} stopped with exit code {process.returncode}; its message stands above")
            done.add(name)
