"""Tuning a trained model on people's own data: `chat` learns the answers, `talker` their
recordings.

The same loop, losses and hand-over as in pipeline.py; only where the lessons come from differs
(jsonl.py).
"""

import hashlib
import time
from math import ceil
from pathlib import Path

import torch
from torch.nn import functional as F

from minomni import load
from minomni.checkpoint import weights
from minomni.checkpoint.hf_config import read_json, write_json
from minomni.data.batching import pad_mels
from minomni.data.examples import append_answer
from minomni.data.jsonl import JsonlRow, JsonlRows, epoch_index, prompt, read
from minomni.errors import UserError, shorten
from minomni.files import writing
from minomni.inputs.media import load_audio
from minomni.inputs.mel import HOP, voice_mel
from minomni.inputs.prompt import Processor
from minomni.token2wav.voice import make_voice
from minomni.train import losses
from minomni.train.checkpoint import load_stages
from minomni.train.loop import Recipe, Stage, to_device, train
from minomni.train.pipeline import TRAINED, commit, config_hash, prepare_run
from minomni.train.stages.speech import TalkerExample, code_loss, talker_prompts
from minomni.train.stages.thinker import PARTS

LEAST_STEPS, LEAST_EPOCHS = (
    300,
    3,
)  # where nobody says how many epochs: few lines are seen often, many at least thrice
MADE_OF = "made_of.json"  # in the run's folder: what is being tuned on what


class FinetuneStage(Stage):
    """Lessons from a file, each once an epoch."""

    def __init__(self, omni, recipe: Recipe, cache: Path, seed: int, lines: JsonlRows):
        super().__init__(omni, recipe, cache, seed)
        self.lines, self.tokens = lines, omni.config.thinker.tokens
        self.processor = Processor(omni.config, omni.tokenizer)

    def chosen(self, place: int) -> int:
        """Which line comes at a place of the epochs."""
        return epoch_index(self.seed, len(self.lines), place)

    def batch(self, number):
        first = number * self.recipe.batch
        return [self.lines[self.chosen(place)] for place in range(first, first + self.recipe.batch)]

    def collate(self, prompts: list, lines: list[JsonlRow]):
        """Inputs and targets [B, L] of prompts and the answers of their lines."""
        answers = [
            self.processor.tokenizer.encode(line.answer) + [self.tokens.im_end] for line in lines
        ]
        return to_device(append_answer(prompts, answers, self.tokens.endoftext), self.device)


class FinetuneChatStage(FinetuneStage):
    """Next-token loss on the answers, the whole Thinker unlocked."""

    name, learns = "chat", ("thinker.",)

    def losses(self, batch):
        rows = [(prompt(line, self.processor), line) for line in batch]
        rows.sort(key=lambda row: row[0].input_ids.shape[1])
        size = ceil(len(rows) / PARTS)  # rows of like length together, so that little is padding
        parts = [self.collate(*zip(*rows[i : i + size])) for i in range(0, len(rows), size)]
        return {
            "text": losses.in_parts(
                [(self.omni.thinker(inputs), targets) for inputs, targets in parts]
            )
        }

    def sample(self):
        line = self.lines[0]
        reply = self.omni.thinker.generate(
            prompt(line, self.processor), self.omni.config.thinker_sampling
        )
        return f"{line.answer!r} -> {self.processor.tokenizer.decode(reply.tokens[0], skip_special=True)!r}"


class FinetuneTalkerStage(FinetuneStage):
    """Next-code loss on the recordings of the answers, spoken from the states of the Thinker as it
    is.
    """

    name, learns = "talker", ("talker.",)

    def chosen(self, place):
        return self.lines.spoken[epoch_index(self.seed, len(self.lines.spoken), place)]

    def losses(self, batch):
        rows = talker_prompts(
            self.omni.thinker,
            *self.collate([prompt(line, self.processor) for line in batch], batch),
        )
        voices = [
            self.omni.voice(line.voice or next(iter(self.omni.voices))).bos_token for line in batch
        ]
        spoken = zip(rows, voices, self.codes(batch), batch)
        lessons = [TalkerExample(*row, bos, codes, line.answer) for row, bos, codes, line in spoken]
        return {"codes": code_loss(self.omni, lessons)}

    @torch.no_grad()
    def codes(self, lines: list[JsonlRow]) -> list[torch.Tensor]:
        """What our codec makes of the recordings: codes [m] of each line."""
        hop = HOP * self.omni.config.codec.downsample  # samples a code
        waves = [load_audio(line.speech) for line in lines]
        mels, frames = pad_mels([voice_mel(F.pad(wave, (0, -len(wave) % hop))) for wave in waves])
        counts = frames // self.omni.config.codec.downsample
        return [
            row[:n] for row, n in zip(self.omni.codec.encode(mels.to(self.device)).cpu(), counts)
        ]


STAGES = {stage.name: stage for stage in (FinetuneChatStage, FinetuneTalkerStage)}
RECIPES = {  # rate and batch; the steps follow from the epochs
    "tiny": {"chat": (2e-3, 16), "talker": (2e-3, 16)},
    "small": {"chat": (5e-4, 32), "talker": (5e-4, 32)},
}


def finetune(
    size: str,
    data: Path,
    out: Path,
    stage: str | None = None,
    seed: int = 0,
    epochs: int | None = None,
    resume: bool = False,
    fresh: bool = False,
    device: str = "cpu",
) -> Path:
    """Tune the trained model of a size on own data -> the folder of the tuned model, written whole
    or not at all.

    All of the data is checked before the first step. Stages: chat, then talker where answers have
    recordings; or one of them. A voice that the model does not know is made from its first
    recordings. Raises UserError for bad data, naming the lines, and for a run that belongs to other
    data.
    """
    if size not in RECIPES:
        raise UserError(
            f"no recipe tunes {size!r}; sizes that can be tuned are {', '.join(RECIPES)}"
        )
    if stage is not None and stage not in STAGES:
        raise UserError(f"own data has no stage {stage!r}; its stages are {', '.join(STAGES)}")
    torch.set_num_threads(1)
    run, began = run_of(out), time.perf_counter()
    prepare_run(run, resume, fresh)
    omni = load(size, device)
    lines = read(data, run, omni)
    if stage == "talker" and not lines.spoken:
        raise UserError(f'{data}: no line has "speech", so the Talker has nothing to learn from it')
    names = [stage] if stage else [name for name in STAGES if name == "chat" or lines.spoken]
    check_same_run(
        run,
        {
            "data": lines.digest.hexdigest(),
            "model": content(omni),
            "seed": seed,
            "epochs": epochs,
            "stages": names,
        },
    )
    for name, wave in lines.voices.items():
        omni.voices[name] = make_voice(wave, name, omni)
    for name in names:
        if not (run / "stages" / f"{name}.safetensors").exists():
            train(
                make_stage(name, size, omni, run, seed, lines, epochs), run / "stages", resume=True
            )
        load_stages(omni, run / "stages", [name])
    omni.eval().requires_grad_(False)
    weights.save(omni, out)
    write_json(
        out / TRAINED,
        {
            "size": size,
            "seed": seed,
            "data": data.name,
            "stages": names,
            "epochs": epochs,
            "seconds": round(time.perf_counter() - began),
            "config": config_hash(omni.config),
            "commit": commit(),
        },
    )
    return out


def run_of(out: Path) -> Path:
    """The folder of the run, beside the one of the tuned model. Raises UserError where no model can
    go there.
    """
    shown = shorten(out, 200) or "an empty name"
    with writing(out):
        if out.name in ("", ".."):
            raise UserError(
                f"--out {shown}: expected the name of a folder for the tuned model, as runs/tuned"
            )
        if out.exists() and not out.is_dir():
            raise UserError(
                f"--out {shown}: is a file; give the name of a folder for the tuned model"
            )
        if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
            raise UserError(
                f"--out {shown}: holds something that is no model; give the name of a new folder"
            )
    return out.with_name(f"{out.name}.run")


def make_stage(
    name: str, size: str, omni, run: Path, seed: int, lines: JsonlRows, epochs: int | None
) -> FinetuneStage:
    """A stage whose steps go through its lines `epochs` times; without a number, as long as is
    sensible.
    """
    lr, batch = RECIPES[size][name]
    count = len(lines.spoken) if name == "talker" else len(lines)
    steps = (
        ceil(epochs * count / batch)
        if epochs
        else max(LEAST_STEPS, ceil(LEAST_EPOCHS * count / batch))
    )
    recipe = Recipe(steps, batch, lr, warmup=min(30, ceil(steps / 10)))
    return STAGES[name](omni, recipe, run, seed, lines)


def content(omni) -> str:
    """Stands for all weights of a model."""
    digest = hashlib.sha256()
    for tensor in omni.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_same_run(run: Path, made_of: dict) -> None:
    """Note what a run is made of, or raise UserError where it already is made of something else."""
    kept = read_json(run / MADE_OF, optional=True)
    changed = [key for key, value in made_of.items() if kept.get(key, value) != value]
    if changed and any((run / "stages").iterdir()):
        raise UserError(
            f"{run} was begun with other {' and '.join(changed)}; use --fresh, or another --out"
        )
    write_json(run / MADE_OF, made_of)
