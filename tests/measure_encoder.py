"""Is an encoder that was learned back as good as the one that a model was trained with?

    python tests/measure_encoder.py FOLDER [--pairs 2000] [--steps 3000] [--rows 200] [--items 60]
    python tests/measure_encoder.py FOLDER --encoders true,untrained

The encoder of tiny is thrown away and learned from the model's own sound, as for a folder of the
release, which has none. Then the Talker is tuned by LoRA on a synthesized voice that tiny does not
know, once on the codes of each encoder: the true one, the learned one, and one of random weights,
whose codes say nothing of the sound. Outside judges compare the speech: word error rate (Whisper,
open vocabulary) and likeness to the recordings (GE2E). Everything is kept in FOLDER, and the same
command continues what was interrupted. FOLDER/result.json has the table and how long each part
took; a command with some encoders adds their rows to it, and tests/refresh_readme.py --encoder
takes it. It needs the packages of requirements-dev.txt and the third judge that is named there.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import soundfile
import torch

import minomni
from minomni import paths
from minomni.checkpoint.lora import load_lora, parse_lora
from minomni.config import INPUT_SAMPLE_RATE
from minomni.data import text_to_speech
from minomni.data.codes import encode_waves
from minomni.data.grammar import statement
from minomni.data.text_to_speech import Job
from minomni.data.word_errors import word_error_rate
from minomni.eval.outside_judges import OpenRecognizer, SpeakerSimilarity, capped_word_errors
from minomni.inputs.mel import HOP
from minomni.omni import Omni
from minomni.train.finetune import FinetuneOptions, finetune
from minomni.train.train_encoder import (
    EncoderOptions,
    put_classifier,
    train_encoder,
    with_classifier,
)

VOICE = "New"
LORA = "r=16"
ENCODERS = ("true", "learned", "untrained")


def synthesized(texts: list[str], voice: str) -> list[np.ndarray]:
    """Recordings of texts: int16 [samples] each, at 16 kHz."""
    return text_to_speech.synthesize([Job(text, voice) for text in texts], seed=0)


def texts_of(count: int, held_out: bool) -> list[str]:
    """Different statements, all held out or none of them."""
    random = Random(7)
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[statement(random, held_out)] = None
    return list(texts)


def write_data(folder: Path, voice: str, count: int) -> Path:
    """Training rows whose answers the new voice speaks -> the JSONL file."""
    path = folder / "data.jsonl"
    if path.exists():
        return path
    texts = texts_of(count, held_out=False)
    rows = []
    for i, (text, wave) in enumerate(zip(texts, synthesized(texts, voice), strict=True)):
        soundfile.write(folder / f"{i:04}.wav", wave, INPUT_SAMPLE_RATE)
        messages = [
            {"role": "user", "content": f"say {text}"},
            {"role": "assistant", "content": text},
        ]
        row = {"messages": messages, "speech": f"{i:04}.wav", "voice": VOICE}
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))
    return path


def model_with(encoder: str, folder: Path, options: EncoderOptions) -> Path:
    """tiny with one of ENCODERS."""
    if encoder == "true":
        return paths.data_samples() / "tiny"
    model = folder / encoder
    if model.exists():
        return model
    omni = minomni.load("tiny")
    if encoder == "untrained":
        put_classifier(omni, with_classifier(omni.config, options.size), seed=0)
        minomni.save(omni, model)
        return model
    base = folder / "no-encoder"
    if not base.exists():
        omni.codec = None
        omni.config = replace(omni.config, codec=None)
        minomni.save(omni, base)
    return train_encoder(str(base), model, options, resume=True)


def tuned(base: Path, data: Path, out: Path, epochs: int | None) -> Omni:
    """The model `base` with a LoRA adapter of its Talker, trained on the codes of its encoder."""
    if not out.exists():
        lora = parse_lora(LORA)
        options = FinetuneOptions(epochs=epochs, resume=True, lora=lora, lora_parts=("talker",))
        finetune(str(base), data, out, options)
    omni = minomni.load(str(base))
    load_lora(omni, out)
    return omni


def same_codes(one: Omni, two: Omni, waves: list[np.ndarray]) -> float:
    """The share of codes in which two encoders agree on recordings."""
    equal = []
    for wave in waves:
        sound = torch.from_numpy(wave / 32768).float()
        code_samples = HOP * one.codec.config.downsample
        cut = sound[: len(sound) // code_samples * code_samples]
        with torch.no_grad():
            first, second = (encode_waves(omni.codec, [cut])[0] for omni in (one, two))
        equal.append((first == second).float())
    return float(torch.cat(equal).mean())


class Judges:
    """What outside judges say about speech that ought to be like some recordings."""

    def __init__(self, recordings: list[np.ndarray]):
        self.recognizer = OpenRecognizer()
        self.similarity = SpeakerSimilarity()
        waves = [torch.from_numpy(wave / 32768).float() for wave in recordings]
        embeddings = [self.similarity.embedding(wave, INPUT_SAMPLE_RATE) for wave in waves]
        mean = np.mean(embeddings, axis=0)
        self.speaker = mean / np.linalg.norm(mean)

    def row(self, texts: list[str], waves: list[torch.Tensor], rate: int) -> dict[str, float]:
        """Word error rate and mean cosine similarity to the recordings."""
        errors = []
        likeness = []
        for text, wave in zip(texts, waves, strict=True):
            words = self.recognizer.transcribe(wave, rate).open
            errors.append(capped_word_errors(text, words))
            likeness.append(float(self.similarity.embedding(wave, rate) @ self.speaker))
        return {"wer": word_error_rate(errors), "likeness": float(np.mean(likeness))}


def spoken(omni: Omni, texts: list[str]) -> list[torch.Tensor]:
    """The answers to requests to say the texts, in the new voice."""
    waves = []
    for seed, text in enumerate(texts):
        messages = [{"role": "user", "content": f"say {text}"}]
        waves.append(omni.respond(messages, voice=VOICE, seed=seed).wave)
    return waves


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add how long the block runs to what it took in earlier commands, which it continues."""
    began = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - began, 1)


def names_of(text: str) -> list[str]:
    """true,learned -> the names of encoders."""
    names = text.split(",")
    if not set(names) <= set(ENCODERS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(ENCODERS)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--encoders", type=names_of, default=list(ENCODERS))
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, help="of the tuning (default: that of train)")
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--voice", default="natural:alto", help="as in text_to_speech.Job")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    options = EncoderOptions("tiny", arguments.pairs, arguments.steps)
    output = folder / "result.json"
    result = {"rows": {}, "same codes on recordings": {}, "seconds": {}}
    if output.exists():
        result = json.loads(output.read_text())
    rows, same, seconds = result["rows"], result["same codes on recordings"], result["seconds"]

    with timed("recordings", seconds):
        data = write_data(folder, arguments.voice, arguments.rows)
        texts = texts_of(arguments.items, held_out=True)
        recordings = synthesized(texts, arguments.voice)
        judges = Judges(recordings)
        sounds = [torch.from_numpy(wave / 32768).float() for wave in recordings]
        rows["recordings"] = judges.row(texts, sounds, INPUT_SAMPLE_RATE)

    # The new voice by the codes of each encoder. The judges hear held-out sentences.
    plain = minomni.load("tiny")
    for name in arguments.encoders:
        with timed(f"{name} encoder", seconds):
            base = model_with(name, folder, options)
        with timed(f"{name} encoder, tuning", seconds):
            omni = tuned(base, data, folder / f"adapter-{name}", arguments.epochs)
        with timed(f"{name} encoder, judging", seconds):
            waves = spoken(omni, texts)
            rows[f"{name} encoder"] = judges.row(texts, waves, omni.sample_rate)
            same[name] = same_codes(plain, omni, recordings)
        output.write_text(json.dumps(result, indent=2) + "\n")
    plain.voices[VOICE] = omni.voices[VOICE]
    rows["not tuned"] = judges.row(texts, spoken(plain, texts), plain.sample_rate)
    output.write_text(json.dumps(result, indent=2) + "\n")

    print("| speech in the new voice | word error rate | likeness |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['wer']:.1%} | {row['likeness']:.3f} |")
    for name, share in same.items():
        print(f"equal codes on the recordings, {name}: {share:.1%}")
    for name, value in seconds.items():
        print(f"{name}: {value:.0f} s")


if __name__ == "__main__":
    main()
