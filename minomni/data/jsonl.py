"""People's own data: conversations on disk, checked in full and then read when asked for.

    {"messages": [... as respond() takes them, the last one the assistant's text], "speech":
    "reply.wav", "voice": "Me"}

One JSON object a line, or an array of such objects, in this layout or in one of those in
jsonl_layouts.py. Media paths are relative to the file. Two well-known folder layouts are written down
as such lines: free-spoken-digit-dataset and LJSpeech.
"""

import codecs
import csv
import hashlib
import io
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minomni.data.grammar import NUMBERS
from minomni.data.jsonl_layouts import standard
from minomni.errors import UserError, shorten
from minomni.files import open_regular, write_atomically
from minomni.inputs.audio import SILENCE, load_audio
from minomni.inputs.prompt import CHATML, Inputs, Processor
from minomni.token2wav.voice import make_voice

SHOWN = 3  # bad lines that a message names; more of them stand in BAD_LINES
MOST_BAD = 1000  # bad lines after which the rest of a file is not looked at
BAD_LINES = "bad_lines.txt"  # in the run's folder
LONGEST_LINE = 64 * 2**20  # bytes of a line: one with pictures as data: URIs may be long
LARGEST_WHOLE = 256 * 2**20  # bytes of a file that cannot be read line by line
VOICE_SECONDS = 20  # of the first recordings of an unknown voice, from which it is made
DIGIT_NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")  # {digit}_{speaker}_{index}.wav
WHICH_DIGIT = "which digit do you hear"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass
class JsonlRow:
    """One lesson: what is asked, what is answered, and the recording of the answer where there is
    one.
    """

    question: list[dict]
    answer: str
    speech: str | None
    voice: str | None
    use_audio_in_video: bool


def parse(text: str | bytes, folder: Path, system_prompt: str) -> JsonlRow:
    """A line of the file -> its lesson, paths made whole. Raises UserError saying what is wrong
    with it.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({shorten(error, 100)})") from None
    row = standard(row, folder)
    for message in row["messages"]:
        if message["role"] == "assistant":
            require_no_marks(message)
    *question, last = row["messages"]
    if question[0]["role"] != "system":  # as respond() does it
        question = [{"role": "system", "content": system_prompt}, *question]
    return JsonlRow(
        question,
        answer_of(last),
        row.get("speech"),
        row.get("voice"),
        row.get("use_audio_in_video", False),
    )


def answer_of(message: dict) -> str:
    """The text of the last message. Raises UserError where it is empty or holds more than text."""
    content = message["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if any(item.get("type", "text") != "text" or "text" not in item for item in items):
        raise UserError(
            'the answer holds media; it is a text, and its recording goes under "speech"'
        )
    text = "".join(item["text"] for item in items)
    if not text.strip():
        raise UserError("the answer is empty")
    return text


def require_no_marks(message: dict) -> None:
    """Raise UserError where an answer holds a special token of ChatML: the end of a turn is added
    in training.
    """
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(item.get("text", "") for item in content)
    found = [mark for mark in CHATML if mark in content]
    if found:
        raise UserError(
            f"an answer holds {found[0]}, which only the template may put there; leave it out of the text"
        )


class JsonlRows:
    """The lessons of a file, read from disk one by one: in memory are 8 bytes for each, where it
    begins.

    path: the file with one row a line. folder: what its media are relative to. shown: what messages
    call the file. voices: the first recordings of each voice that the model does not know
    [samples], by name.
    """

    def __init__(
        self, path: Path, system_prompt: str, folder: Path | None = None, shown: Path | None = None
    ):
        self.path, self.system_prompt = path, system_prompt
        self.folder, self.shown = folder or path.parent, shorten(shown or path, 200)
        self.starts, self.spoken = (
            array("q"),
            array("q"),
        )  # bytes; spoken holds the numbers of lines with speech
        self.voices: dict[str, Tensor] = {}
        self.heard_in: dict[str, str] = {}  # where the first recording of such a voice is
        self.digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> JsonlRow:
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            return parse(file.readline(LONGEST_LINE), self.folder, self.system_prompt)


def read(data: Path, run: Path, omni) -> JsonlRows:
    """A file of rows, or a folder in a known layout -> checked lessons.

    What is not one row a line already is written so to run/. Every medium is opened and every
    prompt laid out once. Raises one UserError that names the first bad lines; run/bad_lines.txt
    then holds more of them.
    """
    lined = run / "lines.jsonl"
    if is_folder(data):
        write_rows(layout(data), lined)
        return checked(
            lined, omni, run, "row" if (data / "metadata.csv").is_file() else "recording", data=data
        )
    with open_regular(data, "the data") as file:
        start = file.read(4096)
    array_of_rows = start.decode("utf-8-sig", "ignore").lstrip()[:1] == "["
    if start.startswith(UTF16) or array_of_rows and not is_row(start):
        text = whole_text(data)
        array_of_rows = text.lstrip()[:1] == "["
        write_rows(elements(text, data) if array_of_rows else text.split("\n"), lined)
        return checked(
            lined, omni, run, "entry" if array_of_rows else "line", data=data, folder=data.parent
        )
    return checked(data, omni, run)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder. Raises UserError for what cannot be a path."""
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{shorten(path, 200)}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None


def checked(
    path: Path,
    omni,
    run: Path | None = None,
    unit: str = "line",
    data: Path | None = None,
    folder: Path | None = None,
) -> JsonlRows:
    """Go through a whole file of one row a line -> its lessons.

    run: where a list of the bad lines goes. unit: what a line is called in messages. data: the file
    or folder that was given, of which `path` was made; folder: what media are relative to. Raises
    one UserError that names the first bad lines and their causes.
    """
    lines = JsonlRows(path, omni.config.media.system_prompt, folder, data)
    processor, bad, place, number = Processor(omni.config, omni.tokenizer), [], 0, 0
    with (
        open_regular(path, "the data") as file,
        tqdm(desc="checking", unit=" rows", leave=False, disable=None) as bar,
    ):
        while (text := file.readline(LONGEST_LINE + 1)) and len(bad) < MOST_BAD:
            number += 1
            bar.update()
            if len(text) > LONGEST_LINE:  # the rest of it is no line, and may be without end
                bad.append(
                    f"{unit} {number}: is longer than {LONGEST_LINE >> 20} MB; keep media in files of their own"
                )
                break
            lines.digest.update(text)
            try:
                if text.strip():
                    lesson = parse(text, lines.folder, lines.system_prompt)
                    dry_run(lesson, processor, lines, omni, f"{unit} {number}")
                    if lesson.speech:
                        lines.spoken.append(len(lines))
                    lines.starts.append(place)
            except UserError as error:
                bad.append(f"{unit} {number}: {error}")
            except Exception as error:  # whatever a line brings about, its number is told
                bad.append(
                    f"{unit} {number}: cannot be read ({type(error).__name__}: {shorten(error, 200)})"
                )
            place += len(text)
    bad += [] if bad else bad_voices(lines, omni)
    if bad:
        raise UserError(row_error(lines.shown, bad, run, unit))
    if not len(lines):
        raise UserError(f"{lines.shown}: holds no line; each is a JSON object with messages")
    return lines


def row_error(shown: str, bad: list[str], run: Path | None, unit: str) -> str:
    """One message about all bad lines: the first few, how many there are, and where all of them
    stand.
    """
    if run:
        write_atomically(
            run / BAD_LINES, lambda file: file.writelines(line.encode() + b"\n" for line in bad)
        )
    room = 300 // min(len(bad), SHOWN)  # characters for each
    few, more = [shorten(line, room) for line in bad[:SHOWN]], len(bad) - SHOWN
    units = unit if len(bad) == 1 else f"{unit}s".replace("ys", "ies")
    count = f"{len(bad)}{' or more' if len(bad) >= MOST_BAD else ''} bad {units}"
    where = (
        f"; and {more} more{f' in {shorten(run / BAD_LINES, 60)}' if run else ''}"
        if more > 0
        else ""
    )
    return f"{shorten(shown, 80)}: {count}, nothing was trained; {'; '.join(few)}{where}"


def dry_run(line: JsonlRow, processor: Processor, lines: JsonlRows, omni, place: str = "") -> None:
    """Do once with a lesson all that training will do with it. Raises UserError for what would stop
    it there.
    """
    room, answer = (
        omni.config.thinker.text.max_position_embeddings,
        len(processor.encode(line.answer)) + 1,
    )
    length = prompt(line, processor).input_ids.shape[1]
    if length + answer > room:
        raise UserError(
            f"question and answer have {length + answer} tokens and the context holds {room}; shorten them"
        )
    if line.speech is None:
        return
    wave, voice = load_audio(line.speech), line.voice or next(iter(omni.voices), "")
    if float(wave.abs().max()) < SILENCE:
        raise UserError(f"{shorten(line.speech, 200)}: is silent; give a recording of the answer")
    codes = len(wave) * omni.config.token2wav.codes_per_second // 16_000
    if length + codes + 3 > omni.config.talker.decoder.max_position_embeddings:
        raise UserError(
            f"{line.speech}: is too long for the Talker's context with {codes} codes; cut it up"
        )
    if voice in omni.voices:
        return
    if not voice:
        raise UserError('the model has no voices; give this recording a "voice"')
    lines.heard_in.setdefault(voice, f"{place}: {line.speech}")
    heard = lines.voices.get(voice, wave[:0])
    lines.voices[voice] = torch.cat([heard, wave])[: VOICE_SECONDS * 16_000]


def bad_voices(lines: JsonlRows, omni) -> list[str]:
    """What keeps the new voices of a file from being made, each with the place of its first
    recording.
    """
    bad = []
    for name, wave in lines.voices.items():
        try:
            make_voice(wave, name, omni)
        except UserError as error:
            bad.append(f"{lines.heard_in[name]}, of voice {shorten(name, 40)!r}: {error}")
    return bad


def write_rows(rows: Iterator[dict | str], path: Path) -> None:
    """Write one row a line; those that are texts as they stand."""
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    write_atomically(path, lambda file: file.writelines(text.encode() + b"\n" for text in texts))


def whole_text(path: Path) -> str:
    """The text of a file that cannot be read line by line. Raises UserError where it is too large,
    or no text.
    """
    with open_regular(path, "the data") as file:
        content = file.read(LARGEST_WHOLE + 1)
    if len(content) > LARGEST_WHOLE:
        raise UserError(
            f"{shorten(path, 200)}: is larger than {LARGEST_WHOLE >> 20} MB and not one JSON object a line; "
            f"write it as JSONL in UTF-8, which is read line by line"
        )
    return decoded(content, path)


def decoded(content: bytes, path: Path) -> str:
    """Bytes of a text file as text: UTF-8, or UTF-16 that begins with its mark. Raises UserError
    for other encodings.
    """
    encoding = "utf-16" if content.startswith(UTF16) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{shorten(path, 200)}: is not {encoding.upper().removesuffix('-SIG')} (byte {error.start}, in row "
            f"{row}); save it as UTF-8"
        ) from None


def is_row(start: bytes) -> bool:
    """Whether the first line of a file, which begins with a bracket, is a whole JSON value, and
    others follow.

    A file of such lines is no array of rows; each of its lines is told to be bad.
    """
    first, _, rest = start.partition(b"\n")
    if not rest.strip() or rest.strip()[:1] != b"[":
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def elements(text: str, path: Path) -> Iterator[dict | str]:
    """The elements of a JSON array one by one. Raises UserError where it is broken, naming the
    entry.
    """
    decoder, space, number = json.JSONDecoder(), re.compile(r"\s*"), 0
    at = space.match(text, space.match(text).end() + 1).end()  # behind the bracket
    while text[at : at + 1] != "]":
        number += 1
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{shorten(path, 200)}: entry {number} of the array is not JSON "
                f"({shorten(error, 100)})"
            ) from None
        yield (
            text[at:end].replace("\n", " ").replace("\r", " ")
        )  # line feeds only stand between the parts of a row
        at = space.match(text, end).end()
        if text[at : at + 1] == ",":
            at = space.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise UserError(
                f"{shorten(path, 200)}: the array does not go on after entry {number}; expected , or ]"
            )
    if text[at + 1 :].strip():
        raise UserError(
            f"{shorten(path, 200)}: something follows the array; expected one array, or one object a line"
        )


def prompt(line: JsonlRow, processor: Processor) -> Inputs:
    """Model inputs of the question alone."""
    return processor([line.question], line.use_audio_in_video)


def layout(folder: Path) -> Iterator[dict]:
    """The lines that a folder of recordings stands for, one by one. Raises UserError for an unknown
    layout.
    """
    if (folder / "metadata.csv").is_file():
        return ljspeech(folder.resolve())
    return map(spoken_digit, digit_files(folder))


def digit_files(folder: Path) -> list[Path]:
    """Recordings of the free-spoken-digit-dataset in a folder, or in its recordings/. Raises
    UserError for none.
    """
    inner = folder / "recordings" if (folder / "recordings").is_dir() else folder
    files = sorted(
        path for path in inner.resolve().glob("*.wav") if DIGIT_NAME.fullmatch(path.name)
    )
    if not files:
        raise UserError(
            f"{folder}: holds no {{digit}}_{{speaker}}_{{index}}.wav and no metadata.csv with wavs/"
        )
    return files


def spoken_digit(path: Path) -> dict:
    """A recording of the free-spoken-digit-dataset as a line: which digit is it?"""
    question = [{"type": "audio", "audio": str(path)}, {"type": "text", "text": WHICH_DIGIT}]
    return dialogue(question, f"the digit is {NUMBERS[int(path.name[0])]}")


def ljspeech(folder: Path) -> Iterator[dict]:
    """The rows of metadata.csv (id|text|text with numbers spelled) as lines: say this, in the
    folder's voice.

    Raises UserError for another number of columns, and for an encoding other than UTF-8 and UTF-16.
    """
    path = folder / "metadata.csv"
    rows = csv.reader(
        io.StringIO(whole_text(path), newline=None), delimiter="|", quoting=csv.QUOTE_NONE
    )
    for number in count(1):
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(
                f"{path}: row {number} cannot be read ({shorten(error, 100)})"
            ) from None
        if row is None:
            return
        if len(row) not in (2, 3):
            raise UserError(f"{path}: row {number} has {len(row)} columns; expected id|text|text")
        speech = {"speech": str(folder / "wavs" / f"{row[0]}.wav"), "voice": folder.name}
        yield {**dialogue(f"say {row[-1]}", row[-1]), **speech}


def dialogue(question, answer: str) -> dict:
    """A question and its answer as a line."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """In which order an epoch goes through `count` lessons [count]: each once, and the same for the
    same seed.
    """
    return np.random.default_rng([seed, epoch]).permutation(count)


def epoch_index(seed: int, count: int, place: int) -> int:
    """Which of `count` lessons comes at a place (0, 1, ...) of endlessly many epochs."""
    return int(epoch_permutation(seed, place // count, count)[place % count])
