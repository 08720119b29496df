"""Fine-tuning on a user's data: `chat` on the answers, `talker` on their recordings.

The loop, losses and checkpoints are those of the training from scratch; the examples come from a
JSONL file (data/jsonl.py).
"""

import hashlib
import sys
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minomni import load
from minomni.checkpoint import saving
from minomni.checkpoint.hf_config import read_json, write_json
from minomni.checkpoint.lora import (
    ADAPTER_CONFIG,
    TUNABLE_PARTS,
    LoraOptions,
    add_lora,
    check_replaceable,
    save_lora,
)
from minomni.checkpoint.memory import precision_of
from minomni.checkpoint.quantize import plain_parts
from minomni.data.batching import batched
from minomni.data.codes import encode_waves
from minomni.data.examples import append_answer
from minomni.data.jsonl import (
    JsonlRow,
    JsonlRows,
    epoch_index,
    is_folder,
    prompt_inputs,
    read_dataset,
)
from minomni.data.shards import read_shards, shard_files
from minomni.devices import memory_errors
from minomni.errors import UserError, shorten
from minomni.files import require_possible, writing
from minomni.inputs.media import load_audio
from minomni.inputs.mel import HOP
from minomni.inputs.prompt import Inputs, Processor
from minomni.token2wav.voice import make_voice
from minomni.train import distributed, losses
from minomni.train.loop import Recipe, Stage, to_device, train
from minomni.train.pipeline import prepare_run
from minomni.train.provenance import write_provenance
from minomni.train.run_folder import is_finished, load_stages
from minomni.train.stages.speech import TalkerExample, code_loss, talker_prompts
from minomni.train.stages.thinker import BATCH_PARTS

if TYPE_CHECKING:
    from minomni.omni import Omni

# What to do where fine-tuning takes too much memory.
FINETUNE_ADVICE = (
    "give shorter rows in --data, adapters alone (--lora r=16), or also the base in fewer bits "
    "(--quantize int8)"
)
# Without --epochs: at least so many epochs, and at least so many steps where there are few rows.
MIN_EPOCHS = 3
MIN_STEPS = 300
RUN_INPUTS = "run_inputs.json"  # in the run folder: the model, data and options it began with


class FinetuneStage(Stage):
    """Examples from a file, each once per epoch."""

    def __init__(self, omni: "Omni", recipe: Recipe, cache: Path, seed: int, rows: JsonlRows):
        super().__init__(omni, recipe, cache, seed)
        assert omni.tokenizer is not None, "a loaded model has a tokenizer"
        self.rows = rows
        self.tokens = omni.config.thinker.tokens
        self.processor = Processor(omni.config, omni.tokenizer)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of a model with adapters, the adapters alone."""
        chosen = super().parameters()
        adapters = {name: p for name, p in chosen.items() if ".lora_" in name}
        return adapters or chosen

    def row_index(self, position: int) -> int:
        """The index of the row at a position in the sequence of epochs."""
        return epoch_index(self.seed, len(self.rows), position)

    def whole_batch(self, number: int) -> list[JsonlRow]:
        first = number * self.recipe.batch
        positions = range(first, first + self.recipe.batch)
        return [self.rows[self.row_index(position)] for position in positions]

    def with_answers(self, prompts: list[Inputs], rows: list[JsonlRow]) -> tuple[Inputs, Tensor]:
        """Inputs and targets [B, L] of prompts followed by the answers of their rows."""
        encode = self.processor.tokenizer.encode
        answers = [encode(row.answer) + [self.tokens.im_end] for row in rows]
        return to_device(append_answer(prompts, answers, self.tokens.endoftext), self.device)


class FinetuneChatStage(FinetuneStage):
    """Next-token loss on the answers; the whole Thinker trains."""

    name = "chat"
    trainable = ("thinker.",)

    def losses(self, batch: list[JsonlRow]) -> dict[str, Tensor]:
        pairs = [(prompt_inputs(row, self.processor), row) for row in batch]
        # Rows of similar length share a part of the batch, which keeps padding short.
        pairs.sort(key=lambda pair: pair[0].input_ids.shape[1])
        parts = []
        for part in batched(pairs, ceil(len(pairs) / BATCH_PARTS)):
            prompts, rows = zip(*part, strict=True)
            inputs, targets = self.with_answers(list(prompts), list(rows))
            parts.append((self.omni.thinker(inputs), targets))
        return {"text": losses.in_parts(parts)}

    def preview_text(self) -> str:
        row = self.rows[0]
        sampling = self.omni.config.thinker_sampling
        reply = self.omni.thinker.generate(prompt_inputs(row, self.processor), sampling)
        text = self.processor.tokenizer.decode(reply.tokens[0], skip_special=True)
        return f"{row.answer!r} -> {text!r}"


class FinetuneTalkerStage(FinetuneStage):
    """Next-code loss on the recordings of the answers, given the states of the frozen Thinker."""

    name = "talker"
    trainable = ("talker.",)

    def row_index(self, position: int) -> int:
        return self.rows.spoken[epoch_index(self.seed, len(self.rows.spoken), position)]

    def losses(self, batch: list[JsonlRow]) -> dict[str, Tensor]:
        prompts = [prompt_inputs(row, self.processor) for row in batch]
        talker_inputs = talker_prompts(self.omni.thinker, *self.with_answers(prompts, batch))
        default_voice = next(iter(self.omni.voices))
        examples = []
        for inputs, codes, row in zip(talker_inputs, self.codes(batch), batch, strict=True):
            bos_token = self.omni.voice(row.voice or default_voice).bos_token
            examples.append(TalkerExample(*inputs, bos_token, codes, row.answer))
        return {"codes": code_loss(self.omni, examples)}

    @torch.no_grad()
    def codes(self, rows: list[JsonlRow]) -> list[Tensor]:
        """The recordings of the rows, encoded by our codec: codes [m] of each row.

        Each is encoded alone: beside a longer one its last codes would be others.
        """
        codec = self.omni.codec
        assert codec is not None  # see check_talker()
        code_samples = HOP * codec.config.downsample
        codes = []
        for row in rows:
            wave = load_audio(row.speech)
            codes += encode_waves(codec, [F.pad(wave, (0, -len(wave) % code_samples))])
        return codes


FINETUNE_STAGES: dict[str, type[FinetuneStage]] = {
    "chat": FinetuneChatStage,
    "talker": FinetuneTalkerStage,
}
LORA_RECIPE = (5e-4, 8)  # of a model folder
LORA_STAGES = {"thinker": "chat", "talker": "talker"}  # the stage that tunes a part
FINETUNE_RECIPES = {  # learning rate and batch; the steps follow from the epochs
    "tiny": {"chat": (2e-3, 16), "talker": (2e-3, 16)},
    "small": {"chat": (5e-4, 32), "talker": (5e-4, 32)},
}


@dataclass(frozen=True)
class FinetuneOptions:
    """What of a model is trained, on which rows, and how long."""

    stage: str | None = None  # None: chat, then talker where answers have recordings
    epochs: int | None = None  # None: MIN_EPOCHS, and MIN_STEPS at least
    seed: int = 0
    resume: bool = False  # continue an earlier run
    fresh: bool = False  # delete an earlier run
    lora: LoraOptions | None = None  # train adapters alone
    lora_parts: tuple[str, ...] = ()  # "thinker" and "talker"; none: what the data can tune
    quantize: str | None = None  # keep the weights in so many bits, as in load()
    skip_corrupt: bool = False  # leave out damaged samples of packed data
    held_out_speaker: str | None = None  # train without the rows of this speaker


@memory_errors(FINETUNE_ADVICE)
def finetune(
    size: str,
    data: Path,
    out: Path,
    options: FinetuneOptions,
    device: str = "cpu",
    home: Path | None = None,
) -> Path:
    """Fine-tune the trained model of a size on a user's data -> the folder of the new model, which
    is written completely or not at all.

    With options.lora, `size` may also be the folder of any model. Its weights stay as they are,
    adapters are trained, and the folder holds the adapters alone.

    All of the data is checked before the first step. A voice that the model does not know is made
    from its first recordings. The run works in `home`, by default the folder of `out`. Raises
    UserError for bad data, naming the lines, and for a run that belongs to other data.
    """
    check_quantize(options.quantize, options.lora is not None)
    check_size_and_stage(size, options.stage, options.lora is not None)
    torch.set_num_threads(1)
    began = time.perf_counter()
    result_file = ADAPTER_CONFIG if options.lora else "config.json"
    run = begin_run(out, home, options.resume, options.fresh, result_file)

    # The data is read with the model, whose tokenizer and voices it is checked against.
    omni = load(size, device, quantize=options.quantize)
    precision = omni.thinker.lm_head.weight.dtype
    distributed.require_same({"precisions (free memory decides)": precision})
    with distributed.first_goes_first():
        rows = read_rows(data, run, omni, options.skip_corrupt, options.held_out_speaker)
    names = stage_names(omni, rows, data, options)
    agree_on_run(run, inputs_of(omni, rows, names, options))

    add_new_parts(omni, rows, names, options)
    for name in names:
        stage = make_finetune_stage(name, size, omni, run, rows, options)
        train_or_load(stage, run / "stages")

    omni.eval().requires_grad_(False)
    if distributed.is_first() and options.lora:
        save_lora(omni, out, list(rows.voices))
    elif distributed.is_first():
        saving.save(omni, out)
        seconds = time.perf_counter() - began
        details = {"data": data.name, "stages": names, "epochs": options.epochs}
        write_provenance(out, omni, size, options.seed, seconds, **details)
    return out


def begin_run(out: Path, home: Path | None, resume: bool, fresh: bool, config: str) -> Path:
    """Make the folder of a run whose result will be `out` -> that folder. Raises UserError where
    one of the two cannot be written. config: as in working_folder().
    """
    run = working_folder(out, home, config)
    with distributed.first_goes_first():
        if distributed.is_first():
            prepare_run(run, resume, fresh)
    return run


def inputs_of(omni: "Omni", rows: JsonlRows, names: list[str], options: FinetuneOptions) -> dict:
    """What a run is made of: hashes of data and model, and the options that change the result.

    names: of the stages.
    """
    inputs: dict = {
        "seed": options.seed,
        "epochs": options.epochs,
        "stages": names,
        "data": rows.digest.hexdigest(),
        "model": weights_hash(omni),
    }
    if options.held_out_speaker is not None:
        inputs["held-out speaker"] = options.held_out_speaker
    if options.lora:
        inputs["lora"] = vars(options.lora) | {"layers": list(options.lora.layers)}
    return inputs


def agree_on_run(run: Path, inputs_of_run: dict) -> None:
    """Raises UserError unless all processes, and the run so far, have the same inputs."""
    distributed.require_same(inputs_of_run)
    with distributed.first_goes_first():
        check_same_run(run, inputs_of_run)


def add_new_parts(
    omni: "Omni", rows: JsonlRows, names: list[str], options: FinetuneOptions
) -> None:
    """Add the voices that are new, and the adapters of the parts that the stages `names` tune."""
    for name, waveform in rows.voices.items():
        omni.voices[name] = make_voice(waveform, name, omni)
    if options.lora:
        tuned = tuple(part for part in TUNABLE_PARTS if LORA_STAGES[part] in names)
        add_lora(omni, options.lora, tuned, options.seed)


def train_or_load(stage: Stage, folder: Path) -> None:
    """Give the model of a stage what it learns there: from the folder if the stage is finished."""
    if not is_finished(folder, stage.name):
        train(stage, folder, resume=True)
    load_stages(stage.omni, folder, [stage.name])


def check_quantize(quantize: str | None, lora: bool) -> None:
    """Raises UserError for quantized weights that would be trained, and for several processes."""
    if quantize is None:
        return
    if not lora:
        raise UserError("--quantize goes with --lora: quantized weights are not trained themselves")
    if distributed.world() > 1:
        raise UserError("--quantize trains in one process; leave it out, or start without torchrun")


def read_rows(
    data: Path,
    run: Path,
    omni: "Omni",
    skip_corrupt: bool,
    held_out_speaker: str | None = None,
) -> JsonlRows:
    """The rows of a JSONL file, of a folder of recordings, or of shards (data/shards.py).

    Raises UserError for bad data, for skip_corrupt with data that are not packed, and for a
    held-out speaker of packed data.
    """
    if is_folder(data) and shard_files(data):
        if held_out_speaker is not None:
            raise UserError(f"{data}: --held-out takes a JSONL file or a folder of recordings")
        packed = read_shards(data, run, omni, skip_corrupt)
        if distributed.is_first():
            for error in packed.skipped:
                print(f"skipped: {error}", file=sys.stderr)
        return packed
    if skip_corrupt:
        raise UserError(f"{data}: --skip-corrupt goes with packed data; minomni pack makes them")
    return read_dataset(data, run, omni, held_out_speaker)


def stage_names(omni: "Omni", rows: JsonlRows, data: Path, options: FinetuneOptions) -> list[str]:
    """The stages to run: those asked for, by --stage or --parts, or those that the data can train.

    Raises UserError where the model or the data lacks what they need.
    """
    asked = [LORA_STAGES[part] for part in TUNABLE_PARTS if part in options.lora_parts]
    if options.stage:
        asked = [options.stage]
    if "talker" in asked:
        check_talker(omni, rows, data)
    if asked:
        return asked
    can_learn_speech = omni.talker is not None and omni.codec is not None
    return ["chat", "talker"] if rows.spoken and can_learn_speech else ["chat"]


def check_talker(omni: "Omni", rows: JsonlRows, data: Path) -> None:
    """Raises UserError unless the Talker of a model can be tuned on the data."""
    if omni.talker is None:
        raise UserError("the Talker: this model answers in text alone and has no Talker")
    if omni.codec is None:
        raise UserError(
            "the Talker: this model has no codec, which makes the codes that a Talker is tuned on; "
            "minomni train-encoder makes one"
        )
    if not rows.spoken:
        raise UserError(f'{data}: no line has "speech", so the Talker has nothing to learn from it')


def check_size_and_stage(size: str, stage: str | None, lora: bool) -> None:
    """Raises UserError for a size or a stage that cannot be fine-tuned."""
    if lora and stage:
        raise UserError("--lora takes --parts thinker,talker instead of --stage")
    if size not in FINETUNE_RECIPES and not lora:
        sizes = ", ".join(FINETUNE_RECIPES)
        raise UserError(f"cannot fine-tune size {size!r}; sizes with a recipe are {sizes}")
    if stage is not None and stage not in FINETUNE_STAGES:
        raise UserError(
            f"fine-tuning has no stage {stage!r}; its stages are {', '.join(FINETUNE_STAGES)}"
        )


def working_folder(out: Path, home: Path | None, config: str = "config.json") -> Path:
    """The folder of the run: NAME.run in `home`, or beside the new model without one.

    config: the file by which an earlier result in its place is known. Raises UserError where no
    model can be written as `out`.
    """
    label = f"--out {shorten(out, 200)}"
    with writing(out):
        require_possible(out)
        if out.name in ("", ".."):
            raise UserError(
                f"{label}: expected the name of a folder for the new model, as runs/new"
            )
        if out.exists() and not out.is_dir():
            raise UserError(f"{label}: is a file; give the name of a folder for the new model")
        if out.is_dir() and any(out.iterdir()) and not (out / config).is_file():
            kind = "a model" if config == "config.json" else "an adapter"
            raise UserError(
                f"{label}: contains something other than {kind}; give the name of a new folder"
            )
        if config == ADAPTER_CONFIG:
            check_replaceable(out)
    return (home or out.parent) / f"{out.name}.run"


def make_finetune_stage(
    name: str,
    size: str,
    omni: "Omni",
    run: Path,
    rows: JsonlRows,
    options: FinetuneOptions,
) -> FinetuneStage:
    """A stage that goes through its rows options.epochs times, or MIN_EPOCHS and MIN_STEPS at
    least.
    """
    lr, batch = FINETUNE_RECIPES[size][name] if size in FINETUNE_RECIPES else LORA_RECIPE
    count = len(rows.spoken) if name == "talker" else len(rows)
    if options.epochs:
        steps = ceil(options.epochs * count / batch)
    else:
        steps = max(MIN_STEPS, ceil(MIN_EPOCHS * count / batch))
    recipe = Recipe(steps, batch, lr, warmup=min(30, ceil(steps / 10)))
    return FINETUNE_STAGES[name](omni, recipe, run, options.seed, rows)


def weights_hash(omni: "Omni") -> str:
    """A digest of all weights of a model, in the precision of their folder."""
    digest = hashlib.sha256()
    for name, tensor in omni.state_dict().items():
        if omni.stored_dtype is not None:
            tensor = tensor.to(precision_of(name, omni.stored_dtype))
        for part in plain_parts(tensor):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_same_run(run: Path, inputs_of_run: dict) -> None:
    """Note what a run is made of. Raises UserError where it has begun with something else."""
    start_over = "--fresh deletes the run"
    kept = read_json(run / RUN_INPUTS, True, start_over)
    changed = [key for key, value in inputs_of_run.items() if kept.get(key, value) != value]
    if changed and any((run / "stages").iterdir()):
        raise UserError(
            f"{run} was begun with other {' and '.join(changed)}; use --fresh, or another --out"
        )
    write_json(run / RUN_INPUTS, inputs_of_run)
