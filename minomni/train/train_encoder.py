"""An encoder for a folder that has none: its codes are learned from its own sound.

A Talker is tuned on the codes of recordings. The release has no encoder that would make them, but
its Token2Wav makes the sound of any codes. A classifier is trained to invert it: mel -> codes.
Thinker, Talker and Token2Wav stay as they are.
"""

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minomni import load
from minomni.checkpoint import saving
from minomni.config import SIZES, CodeClassifierConfig, OmniConfig
from minomni.data.jsonl import JsonlRows
from minomni.devices import memory_errors
from minomni.errors import UserError
from minomni.talker.codec import CodeClassifier
from minomni.token2wav.voice import Voice
from minomni.train import distributed
from minomni.train.code_pairs import PairMaker
from minomni.train.finetune import (
    agree_on_run,
    begin_run,
    read_rows,
    train_or_load,
    weights_hash,
)
from minomni.train.loop import Recipe, run_setup
from minomni.train.provenance import write_provenance
from minomni.train.run_folder import is_finished
from minomni.train.stages.encoder import EncoderStage

if TYPE_CHECKING:
    from minomni.omni import Omni

# What to do where the training of an encoder takes too much memory.
ENCODER_ADVICE = "give a smaller encoder (--size tiny) or shorter rows in --data"
BATCH = 16  # pairs in a step
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class EncoderOptions:
    """What an encoder is, and how it is trained."""

    size: str = "small"  # whose codec has the sizes of the encoder's layers
    pairs: int = 2000
    steps: int = 3000
    random_share: float = 0.1  # of the pairs: random codes instead of the Talker's


@memory_errors(ENCODER_ADVICE)
def train_encoder(
    folder: str,
    out: Path,
    options: EncoderOptions,
    data: Path | None = None,
    seed: int = 0,
    resume: bool = False,
    fresh: bool = False,
    device: str = "cpu",
    home: Path | None = None,
) -> Path:
    """Train an encoder for the codes of a model folder -> the folder `out`: the same model with the
    encoder as its codec, instead of one that it may have.

    data: rows whose answers the Talker speaks, as for fine-tuning; without it, sentences of the
    generated world. The run works in `home`, by default the folder of `out`; the pairs stay there,
    and a run that is started over uses them again. Raises UserError for a model that cannot speak,
    for bad data, and for a run that was begun with something else.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    run = begin_run(out, home, resume, fresh, "config.json")
    omni = load(folder, device)
    config = with_classifier(omni.config, options.size)
    rows = None if data is None else read_answers(data, run, omni)

    # The pairs depend on fewer things than the run, which may be started over with other steps.
    inputs_of_pairs = inputs_by_name(omni, rows, seed, options.random_share)
    agree_on_run(run, inputs_of_pairs | {"options": asdict(options)})
    warmup = min(30, ceil(options.steps / 10))
    recipe = Recipe(options.steps, BATCH, LEARNING_RATE, warmup=warmup)
    key = hashlib.sha256(repr(inputs_of_pairs).encode()).hexdigest()[:12]
    cache = run / f"pairs-{key}"

    maker = PairMaker(omni, rows, seed, options.random_share)
    put_classifier(omni, config, seed)
    stage = EncoderStage(omni, recipe, cache, seed, maker, options.pairs)
    make_pairs(stage, run / "stages")
    train_or_load(stage, run / "stages")

    omni.eval().requires_grad_(False)
    if distributed.is_first():
        saving.save(omni, out)
        seconds = time.perf_counter() - began
        name = Path(folder).resolve().name
        write_provenance(out, omni, name, seed, seconds, encoder=asdict(options))
    return out


def read_answers(data: Path, run: Path, omni: "Omni") -> JsonlRows:
    """The rows whose answers the Talker speaks. Raises UserError for bad data."""
    with distributed.first_goes_first():
        return read_rows(data, run, omni, skip_corrupt=False)


def make_pairs(stage: EncoderStage, folder: Path) -> None:
    """Make the pairs of mel and codes, or read them from the cache, unless training is finished."""
    if not is_finished(folder, stage.name):
        with distributed.first_goes_first():
            run_setup(stage)


def inputs_by_name(
    omni: "Omni", rows: JsonlRows | None, seed: int, random_share: float
) -> dict[str, Any]:
    """All that the pairs depend on, by name."""
    return {
        "data": "none" if rows is None else rows.digest.hexdigest(),
        "model": weights_hash(omni),
        "voices": voices_hash(omni.voices),
        "system prompt": omni.config.media.system_prompt,
        "Talker sampling": asdict(omni.config.talker_sampling),
        "flow": asdict(omni.config.flow),
        "seed": seed,
        "random share": random_share,
    }


def voices_hash(voices: dict[str, Voice]) -> str:
    """A digest of voices, in their order."""
    digest = hashlib.sha256()
    for name, voice in voices.items():
        digest.update(repr((name, voice.bos_token)).encode())
        for tensor in (voice.cond, voice.ref_mel):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def with_classifier(config: OmniConfig, size: str) -> OmniConfig:
    """The configuration with an encoder for its own codes, whose layers are as wide as those of the
    codec of `size`. Raises UserError for a model that cannot speak, and for codes of a length that
    no encoder has.
    """
    if config.token2wav is None:
        raise UserError("this model answers in text alone, and has no codes that could be learned")
    layers = layers_of_codec(size)
    dit = config.token2wav.dit
    layers |= {"num_codes": dit.num_embeds + 1, "downsample": dit.repeats}
    try:
        return replace(config, codec=CodeClassifierConfig(**layers))
    except ValueError as error:
        raise UserError(f"no encoder fits this model: {error}") from None


def layers_of_codec(size: str) -> dict[str, int]:
    """The sizes of the layers of a codec by name."""
    codec = SIZES[size].codec
    assert codec is not None  # the command line offers sizes that have one
    layers = asdict(codec)
    del layers["levels"]
    return layers


def put_classifier(omni: "Omni", config: OmniConfig, seed: int) -> None:
    """Give a model an untrained encoder."""
    assert isinstance(config.codec, CodeClassifierConfig)
    torch.manual_seed(seed)
    device = omni.thinker.device
    omni.config = config
    omni.codec = CodeClassifier(config.codec).to(device)
