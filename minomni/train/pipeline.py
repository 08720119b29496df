"""A run of the stages: its folder, setup and training of one stage, export of the model."""

import os
import time
from pathlib import Path

import torch

from minomni.checkpoint import saving
from minomni.config import SIZES
from minomni.data.corpus import FIRST_VOICE_OFFSET, corpus, voices_of_corpus
from minomni.data.vocabulary import english, world_tokenizer
from minomni.devices import device_of, memory_errors
from minomni.errors import UserError
from minomni.omni import Omni
from minomni.train import distributed
from minomni.train.loop import Stage, run_setup, train
from minomni.train.measured_runs import write_summary
from minomni.train.provenance import elapsed_s, training_command, write_provenance
from minomni.train.recipes import Settings, recipe_of
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
from minomni.train.run_settings import forget_settings, read_settings
from minomni.train.stage_table import STAGES

# What to do where a stage takes too much memory.
STAGE_ADVICE = (
    "give a smaller batch with more accumulation (--set STAGE.batch=N --set STAGE.accumulate=M)"
)
LOADER_WORKERS = {"cuda": 2}  # processes per stage; on a CPU training itself takes all cores


def cache_of(home: Path) -> Path:
    """The folder in which a run caches its corpora and what is computed from them."""
    return home / "corpus"


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


def check_batches(size: str, settings: Settings, stage: str | None) -> None:
    """Raises UserError where a batch of the stage, or of any, has fewer rows than there are
    processes.
    """
    for name in [stage] if stage else STAGES:
        rows = recipe_of(name, size, settings).batch
        if rows < distributed.world():
            raise UserError(
                f"stage {name}: a batch has {rows} rows, too few for {distributed.world()} "
                f"processes; start at most {rows}, or --set {name}.batch={distributed.world()}"
            )


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


@memory_errors(STAGE_ADVICE)
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
    with distributed.first_goes_first():
        check_run_config(folder, SIZES[size])
        if resume and is_finished(folder, name):
            if distributed.is_first():
                print(f"stage {name} is finished; --stage {name} --fresh starts it over")
            return

    torch.set_num_threads(1)
    with distributed.first_goes_first():
        stage = make_stage(name, size, home, seed, device)
    log_event(stage, folder, "setup", stage.setup_s or 0.0)
    began = time.perf_counter()
    train(stage, folder, resume, workers=LOADER_WORKERS.get(device, 0), progress=progress)
    log_event(stage, folder, "train", time.perf_counter() - began)


def log_event(stage: Stage, folder: Path, event: str, seconds: float) -> None:
    """Append to log.jsonl how long setup or training took."""
    if not distributed.is_first():
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
    write_provenance(home / "model", omni, size, seed, elapsed_s(home), command=command)
    write_summary(home / "stages" / "log.jsonl", home / "log.jsonl")
