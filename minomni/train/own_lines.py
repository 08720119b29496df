"""People's own data: conversations on disk, one JSON object a line, checked in full and then read when asked for.

    {"messages": [... as respond() takes them, the last one the assistant's text], "speech": "reply.wav", "voice": "Me"}

Media paths are relative to the file. Optional: speech (the reply, spoken), voice (who speaks it), use_audio_in_video.
Two well-known folder layouts are written down as such lines: free-spoken-digit-dataset and LJSpeech.
"""

import csv
import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..files import write_atomically
from ..inputs.media import load_audio
from ..inputs.prompt import Inputs, Processor, kind_and_source
from .world import NUMBERS

KEYS = {"messages", "speech", "voice", "use_audio_in_video"}
SHOWN = 20  # bad lines that a message names
VOICE_SECONDS = 20  # of the first recordings of an unknown voice, from which it is made
DIGIT_NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")  # {digit}_{speaker}_{index}.wav
WHICH_DIGIT = "which digit do you hear"


@dataclass
class Line:
    """One lesson: what is asked, what is answered, and the recording of the answer where there is one."""

    question: list[dict]
    answer: str
    speech: str | None
    voice: str | None
    use_audio_in_video: bool


def parse(text: str | bytes, folder: Path, system_prompt: str) -> Line:
    """A line of the file -> its lesson, paths made whole. Raises UserError saying what is wrong with it."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise UserError('expected an object with a list "messages"')
    if unknown := row.keys() - KEYS:
        raise UserError(f"unknown key {min(unknown)!r}; keys are {', '.join(sorted(KEYS))}")
    for key in ("speech", "voice"):
        if not isinstance(row.get(key, ""), str):
            raise UserError(f"{key!r} is {row[key]!r}; expected a text")
    messages = row["messages"]
    if not all(isinstance(message, dict) for message in messages):
        raise UserError("a message is no dictionary with role and content")
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise UserError("expected at least one question, and as the last message the assistant's answer")
    question = [{**message, "content": contents(message.get("content"), folder)} for message in messages[:-1]]
    if question[0].get("role") != "system":  # as respond() does it
        question = [{"role": "system", "content": system_prompt}, *question]
    speech = str(folder / row["speech"]) if row.get("speech") else None
    return Line(question, answer_of(messages[-1]), speech, row.get("voice"), bool(row.get("use_audio_in_video")))


def contents(content, folder: Path):
    """A message's content with paths of media relative to the folder made whole; web addresses stay, to be refused."""
    if not isinstance(content, list):
        return content
    items = []
    for kind, source in map(kind_and_source, content):
        is_path = kind != "text" and isinstance(source, str) and "://" not in source
        items.append({"type": kind, kind: str(folder / source) if is_path else source})
    return items


def answer_of(message: dict) -> str:
    """The text of the last message. Raises UserError where it is empty or holds more than text."""
    content = message.get("content")
    items = [("text", content)] if isinstance(content, str) else [kind_and_source(item) for item in content or []]
    if any(kind != "text" for kind, _ in items):
        raise UserError("the answer holds media; it is a text, and its recording goes under \"speech\"")
    text = "".join(str(source) for _, source in items)
    if not text.strip():
        raise UserError("the answer is empty")
    return text


class Lines:
    """The lessons of a file, read from disk one by one: in memory are 8 bytes for each, where it begins.

    voices: the first recordings of each voice that the model does not know [samples], by name.
    """

    def __init__(self, path: Path, system_prompt: str):
        self.path, self.system_prompt = path, system_prompt
        self.starts, self.spoken = array("q"), array("q")  # bytes; spoken holds the numbers of lines with speech
        self.voices: dict[str, Tensor] = {}
        self.digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Line:
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            return parse(file.readline(), self.path.parent, self.system_prompt)


def read(data: Path, run: Path, omni) -> Lines:
    """A file of lines, or a folder in a known layout -> checked lessons; what a folder holds is written to run/.

    Every medium is opened and every prompt laid out once. Raises one UserError that names the first bad lines.
    """
    if data.is_dir():
        rows, path = layout(data), run / "lines.jsonl"
        write_atomically(path, lambda f: f.writelines(json.dumps(row).encode() + b"\n" for row in rows))
        return checked(path, omni)
    if not data.is_file():
        raise UserError(f"{data}: no such file or folder; --data takes a JSONL file, or a folder of recordings")
    return checked(data, omni)


def checked(path: Path, omni) -> Lines:
    """Go through a whole file -> its lessons. Raises one UserError that names the first bad lines and their causes."""
    lines, processor = Lines(path, omni.config.media.system_prompt), Processor(omni.config, omni.tokenizer)
    problems, bad, place = [], 0, 0
    with open(path, "rb") as file:
        for number, text in enumerate(tqdm(file, desc="checking", unit=" lines", leave=False, disable=None), 1):
            lines.digest.update(text)
            try:
                if text.strip():
                    lesson = parse(text, path.parent, lines.system_prompt)
                    try_out(lesson, processor, lines, omni)
                    if lesson.speech:
                        lines.spoken.append(len(lines))
                    lines.starts.append(place)
            except UserError as error:
                bad += 1
                problems += [f"line {number}: {error}"] if bad <= SHOWN else []
            place += len(text)
    if bad:
        more = f"\n... and {bad - SHOWN} more" if bad > SHOWN else ""
        raise UserError(f"{path}: {bad} bad lines, nothing was trained\n" + "\n".join(problems) + more)
    if not len(lines):
        raise UserError(f"{path}: holds no line; each is a JSON object with messages")
    return lines


def try_out(line: Line, processor: Processor, lines: Lines, omni) -> None:
    """Do once with a lesson all that training will do with it. Raises UserError for what would stop it there."""
    room, answer = omni.config.thinker.text.max_position_embeddings, len(processor.tokenizer.encode(line.answer)) + 1
    length = prompt(line, processor).input_ids.shape[1]
    if length + answer > room:
        raise UserError(f"question and answer have {length + answer} tokens and the context holds {room}; shorten them")
    if line.speech is None:
        return
    wave, voice = load_audio(line.speech), line.voice or next(iter(omni.voices), "")
    codes = len(wave) * omni.config.token2wav.codes_per_second // 16_000
    if length + codes + 3 > omni.config.talker.decoder.max_position_embeddings:
        raise UserError(f"{line.speech}: is too long for the Talker's context with {codes} codes; cut it up")
    if voice in omni.voices:
        return
    if not voice:
        raise UserError('the model has no voices; give this recording a "voice"')
    heard = lines.voices.get(voice, wave[:0])
    lines.voices[voice] = torch.cat([heard, wave])[: VOICE_SECONDS * 16_000]


def prompt(line: Line, processor: Processor) -> Inputs:
    """Model inputs of the question alone."""
    return processor([line.question], line.use_audio_in_video)


def layout(folder: Path) -> Iterator[dict]:
    """The lines that a folder of recordings stands for, one by one. Raises UserError for an unknown layout."""
    if (folder / "metadata.csv").is_file():
        return ljspeech(folder.resolve())
    return map(spoken_digit, digit_files(folder))


def digit_files(folder: Path) -> list[Path]:
    """Recordings of the free-spoken-digit-dataset in a folder, or in its recordings/. Raises UserError for none."""
    inner = folder / "recordings" if (folder / "recordings").is_dir() else folder
    files = sorted(path for path in inner.resolve().glob("*.wav") if DIGIT_NAME.fullmatch(path.name))
    if not files:
        raise UserError(f"{folder}: holds no {{digit}}_{{speaker}}_{{index}}.wav and no metadata.csv with wavs/")
    return files


def spoken_digit(path: Path) -> dict:
    """A recording of the free-spoken-digit-dataset as a line: which digit is it?"""
    question = [{"type": "audio", "audio": str(path)}, {"type": "text", "text": WHICH_DIGIT}]
    return dialogue(question, f"the digit is {NUMBERS[int(path.name[0])]}")


def ljspeech(folder: Path) -> Iterator[dict]:
    """The rows of metadata.csv (id|text|text with numbers spelled) as lines: say this, in the folder's voice."""
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE), 1):
            if len(row) not in (2, 3):
                raise UserError(f"{folder}/metadata.csv: row {number} has {len(row)} columns; expected id|text|text")
            speech = {"speech": str(folder / "wavs" / f"{row[0]}.wav"), "voice": folder.name}
            yield {**dialogue(f"say {row[-1]}", row[-1]), **speech}


def dialogue(question, answer: str) -> dict:
    """A question and its answer as a line."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """In which order an epoch goes through `count` lessons [count]: each once, and the same for the same seed."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def in_turn(seed: int, count: int, place: int) -> int:
    """Which of `count` lessons comes at a place (0, 1, ...) of endlessly many epochs."""
    return int(order(seed, place // count, count)[place % count])
