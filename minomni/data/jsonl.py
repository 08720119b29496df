"""User-supplied training data: conversations on disk, validated in full, then read on demand.

    {"messages": [... as respond() takes them, the last one the assistant's text],
     "speech": "reply.wav", "voice": "Me", "speaker": "who asks"}

One JSON object per line, objects over many lines or with commas between them, or an array of
objects, in this layout or in one of those in jsonl_layouts.py. Media paths are relative to the
file. Two well-known folder layouts are converted to such lines: free-spoken-digit-dataset and
LJSpeech.
"""

import codecs
import csv
import hashlib
import io
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minomni.config import INPUT_SAMPLE_RATE
from minomni.data.grammar import NUMBERS
from minomni.data.jsonl_layouts import normalize_row
from minomni.errors import UserError, shorten
from minomni.files import open_regular, write_atomically
from minomni.inputs.audio import SILENCE_LEVEL, load_audio
from minomni.inputs.prompt import CHATML, Inputs, Processor
from minomni.inputs.source import name_of
from minomni.token2wav.voice import make_voice

if TYPE_CHECKING:
    from minomni.omni import Omni

MAX_QUOTED = 3  # errors quoted in a message; the others are in BAD_LINES
MAX_ERRORS = 1000  # errors after which the rest of a file is not validated
BAD_LINES = "bad_lines.txt"  # in the run's folder
MEBIBYTE = 2**20  # bytes
MAX_LINE_BYTES = 64 * MEBIBYTE  # a line with images as data: URIs may be long
MAX_WHOLE_BYTES = 256 * MEBIBYTE  # a file that cannot be read line by line
VOICE_SECONDS = 20  # an unknown voice is made from this much of its first recordings
DIGIT_NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")  # {digit}_{speaker}_{index}.wav
WHICH_DIGIT = "which digit do you hear"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
WHITESPACE = re.compile(r"\s*")


@dataclass
class JsonlRow:
    """One training example: the question, the answer, and a recording of the answer if any."""

    question: list[dict]
    answer: str
    speech: Any  # a source of load_audio()
    voice: str | None
    use_audio_in_video: bool
    speaker: str | None  # who asks


# ----------------------------------------------------------------------------------------------
# one row


def parse(text: str | bytes, folder: Path, system_prompt: str) -> JsonlRow:
    """A line of the file -> its row, with absolute paths. Raises UserError if it is invalid."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({shorten(error, 100)})") from None
    row = normalize_row(row, folder)
    for message in row["messages"]:
        if message["role"] == "assistant":
            require_no_special_tokens(message)
    *question, last = row["messages"]
    if question[0]["role"] != "system":  # as respond() does it
        question = [{"role": "system", "content": system_prompt}, *question]
    return JsonlRow(
        question,
        answer_of(last),
        row.get("speech"),
        row.get("voice"),
        row.get("use_audio_in_video", False),
        row.get("speaker"),
    )


def answer_of(message: dict) -> str:
    """The text of the last message. Raises UserError if it is empty or not only text."""
    content = message["content"]
    if not isinstance(content, str):
        for item in content:
            if item.get("type", "text") != "text" or "text" not in item:
                raise UserError(
                    'the answer holds media; give text; its recording goes under "speech"'
                )
        content = "".join(item["text"] for item in content)
    if not content.strip():
        raise UserError("the answer is empty")
    return content


def require_no_special_tokens(message: dict) -> None:
    """Raises UserError if an answer holds a special token of ChatML. Training adds the last one."""
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(item.get("text", "") for item in content)
    for token in CHATML:
        if token in content:
            raise UserError(
                f"an answer holds {token}, which only the template may put there; "
                f"leave it out of the text"
            )


def prompt_inputs(row: JsonlRow, processor: Processor) -> Inputs:
    """Model inputs of the question alone."""
    return processor([row.question], row.use_audio_in_video)


# ----------------------------------------------------------------------------------------------
# a file of rows


class JsonlRows:
    """The rows of a file, read from disk one by one. In memory are 8 bytes per row: its offset.

    spoken: the indices of rows with speech. voices: the first recordings of each voice that the
    model does not know [samples], by name. digest: a hash of the whole file. Rows of the held-out
    speaker are kept apart; len() and indices do not count them.
    """

    def __init__(
        self,
        path: Path,
        system_prompt: str,
        folder: Path | None = None,
        label: Path | None = None,
        held_out_speaker: str | None = None,
    ):
        """path: a file with one row per line. folder: what its media are relative to, by default
        the file's folder. label: the name of the file in messages.
        """
        self.path = path
        self.system_prompt = system_prompt
        self.folder = folder or path.parent
        self.label = shorten(label or path, 200)
        self.held_out_speaker = held_out_speaker
        self.starts = array("q")  # offset of each row in bytes
        self.held_out_starts = array("q")  # of each row of the held-out speaker
        self.spoken = array("q")
        self.voices: dict[str, Tensor] = {}
        self.first_recordings: dict[str, str] = {}  # line and file of a new voice's first recording
        self.digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> JsonlRow:
        return self.row_at(self.starts[i])

    def held_out(self) -> Iterator[JsonlRow]:
        """The rows of the held-out speaker."""
        return map(self.row_at, self.held_out_starts)

    def row_at(self, start: int) -> JsonlRow:
        """The row that begins at an offset in bytes."""
        with open(self.path, "rb") as file:
            file.seek(start)
            return parse(file.readline(MAX_LINE_BYTES), self.folder, self.system_prompt)

    def add_speech(self, name: str, wave: Tensor, source: str) -> None:
        """Keep the first VOICE_SECONDS of an unknown voice. source: line and file, for messages."""
        self.first_recordings.setdefault(name, source)
        earlier = self.voices.get(name, wave[:0])
        self.voices[name] = torch.cat([earlier, wave])[: VOICE_SECONDS * INPUT_SAMPLE_RATE]


def read_dataset(
    data: Path, run: Path, omni: "Omni", held_out_speaker: str | None = None
) -> JsonlRows:
    """A file of rows, or a folder in a known layout -> validated rows.

    Data that are not one row per line are converted to run/lines.jsonl. Every medium is opened and
    every prompt is built once. Raises one UserError that names the first bad lines;
    run/bad_lines.txt then lists more of them. Also raises UserError for a held-out speaker who has
    no row, or all of them.
    """
    rows = convert_and_validate(data, run, omni, held_out_speaker)
    if held_out_speaker is not None and not rows.held_out_starts:
        raise UserError(
            f"{rows.label}: no row has the speaker {shorten(held_out_speaker, 60)!r}; spoken "
            f'digits name the speaker in the file, JSONL rows in "speaker"'
        )
    return rows


def convert_and_validate(
    data: Path, run: Path, omni: "Omni", held_out_speaker: str | None
) -> JsonlRows:
    """read_dataset() without the check of the speaker."""
    converted = run / "lines.jsonl"
    if is_folder(data):
        write_rows(layout(data), converted)
        unit = "row" if (data / "metadata.csv").is_file() else "recording"
        return validate(converted, omni, run, unit, data, None, held_out_speaker)
    with open_regular(data, "the data") as file:
        row_per_line = has_row_per_line(file)
    if row_per_line:
        return validate(data, omni, run, held_out_speaker=held_out_speaker)
    # An array, objects over many lines or with commas between them, or UTF-16.
    text = whole_text(data)
    if text.lstrip().startswith("["):
        unit = "entry"
        write_rows(elements(text, data), converted)
    elif is_spread(text.lstrip()):
        unit = "entry"
        write_rows(objects(text, data), converted)
    else:
        unit = "line"
        write_rows(text.split("\n"), converted)
    return validate(converted, omni, run, unit, data, data.parent, held_out_speaker)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder. Raises UserError if it cannot be a path."""
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shorten(path, 200)}: cannot be read ({reason})") from None


def has_row_per_line(file: BinaryIO) -> bool:
    """Whether a file can be read line by line. Reads its first line, and more if that is no row."""
    start = file.read(4096) + file.readline(MAX_LINE_BYTES)
    if start.startswith(UTF16):
        return False
    text = start.decode("utf-8-sig", "ignore").lstrip()
    first, _, rest = text.partition("\n")
    if text.startswith("["):
        # A file of lists, each in a line, is not an array of rows: all of its lines are bad.
        return rest.lstrip().startswith("[") and is_json(first)
    if is_json(first):
        return True
    return not is_spread(text + file.read(MAX_LINE_BYTES).decode("utf-8", "ignore"))


def is_json(text: str) -> bool:
    """Whether a text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def is_spread(text: str) -> bool:
    """Whether objects() has to read a text that begins with an object, because its first line is
    not one object: it goes on in the next line, or a comma or another object follows it.
    """
    first, line_end, rest = text.partition("\n")
    if not first.startswith("{"):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        # It is broken. A line that is cut may end as one that goes on, but an object follows it.
        goes_on = first.rstrip().endswith(("{", "[", ","))
        return bool(line_end) and goes_on and not rest.startswith("{")
    return end > len(first) or first[end:].lstrip().startswith((",", "{"))


def validate(
    path: Path,
    omni: "Omni",
    run: Path | None = None,
    unit: str = "line",
    data: Path | None = None,
    folder: Path | None = None,
    held_out_speaker: str | None = None,
) -> JsonlRows:
    """Validate a whole file of one row per line -> its rows.

    run: folder for a list of the bad lines. unit: what a line is called in messages. data: the file
    or folder that `path` was converted from. folder: what media are relative to. Raises one
    UserError that names the first bad lines and what is wrong with them.
    """
    system_prompt = omni.config.media.system_prompt
    rows = JsonlRows(path, system_prompt, folder, data, held_out_speaker)
    assert omni.tokenizer is not None  # load() sets it
    processor = Processor(omni.config, omni.tokenizer)
    errors: list[str] = []
    with (
        open_regular(path, "the data") as file,
        tqdm(desc="checking", unit=" rows", leave=False, disable=None) as progress,
    ):
        for number in count(1):
            start = file.tell()
            text = file.readline(MAX_LINE_BYTES + 1)
            if not text or len(errors) >= MAX_ERRORS:
                break
            progress.update()
            if len(text) > MAX_LINE_BYTES:
                # What follows is not a line of its own, and may be endless.
                limit = MAX_LINE_BYTES // MEBIBYTE
                errors.append(
                    f"{unit} {number}: is longer than {limit} MB; keep media in files of their own"
                )
                break
            rows.digest.update(text)
            error = add_line(rows, text, start, processor, omni, f"{unit} {number}")
            if error is not None:
                errors.append(f"{unit} {number}: {error}")
    if not errors:
        errors = voice_errors(rows, omni)
    if errors:
        raise UserError(bad_rows_message(rows.label, errors, run, unit))
    if rows.held_out_starts and not len(rows):
        raise UserError(f"{rows.label}: all rows are of the held-out speaker; nothing to train on")
    if not len(rows):
        raise UserError(f"{rows.label}: holds no line; each is a JSON object with messages")
    return rows


def add_line(
    rows: JsonlRows, text: bytes, start: int, processor: Processor, omni: "Omni", label: str
) -> str | None:
    """Validate one line and add it to the rows -> what is wrong with it, None if nothing is.

    start: its offset in the file. label: "line 3", for messages.
    """
    if not text.strip():
        return None
    read = partial(parse, text, rows.folder, rows.system_prompt)
    return add_row(rows, read, start, processor, omni, label)


def add_row(
    rows: JsonlRows,
    read: Callable[[], JsonlRow],
    start: int,
    processor: Processor,
    omni: "Omni",
    label: str,
) -> str | None:
    """Read and validate one row and add it to the rows -> what is wrong with it, None if nothing
    is. start: where it is read again.
    """
    try:
        row = read()
        dry_run(row, processor, rows, omni, label)
    except UserError as error:
        return str(error)
    except Exception as error:  # anything else a row may cause must name the row too
        return f"cannot be read ({type(error).__name__}: {shorten(error, 200)})"
    if rows.held_out_speaker is not None and row.speaker == rows.held_out_speaker:
        rows.held_out_starts.append(start)
        return None
    if row.speech:
        rows.spoken.append(len(rows))
    rows.starts.append(start)
    return None


def bad_rows_message(label: str, errors: list[str], run: Path | None, unit: str) -> str:
    """One message about all bad lines: how many there are, the first few, and where the rest is."""
    if run:
        encoded = [line.encode() + b"\n" for line in errors]
        write_atomically(run / BAD_LINES, lambda file: file.writelines(encoded))
    # How many, of what.
    units = unit
    if len(errors) > 1:
        units = "entries" if unit == "entry" else f"{unit}s"
    number = f"{len(errors)} or more" if len(errors) >= MAX_ERRORS else f"{len(errors)}"
    # The first few share the space of the message.
    space = 300 // min(len(errors), MAX_QUOTED)  # characters for each
    first = "; ".join(shorten(line, space) for line in errors[:MAX_QUOTED])
    message = f"{shorten(label, 80)}: {number} bad {units}, nothing was trained; {first}"
    # Where the others are.
    if len(errors) > MAX_QUOTED:
        message += f"; and {len(errors) - MAX_QUOTED} more"
        if run:
            message += f" in {shorten(run / BAD_LINES, 60)}"
    return message


def dry_run(
    row: JsonlRow, processor: Processor, rows: JsonlRows, omni: "Omni", label: str = ""
) -> None:
    """Do once with a row everything that training will do with it.

    Collects the recordings of unknown voices in `rows`. Raises UserError for what would stop
    training later.
    """
    # Question and answer have to fit the Thinker's context.
    context = omni.config.thinker.text.max_position_embeddings
    answer_length = len(processor.encode(row.answer)) + 1
    prompt_length = prompt_inputs(row, processor).input_ids.shape[1]
    total = prompt_length + answer_length
    if total > context:
        raise UserError(
            f"question and answer have {total} tokens and the context holds {context}; shorten them"
        )
    talker = omni.config.talker
    token2wav = omni.config.token2wav
    if row.speech is None or talker is None or token2wav is None:
        return

    # The recording must not be silent, and has to fit the Talker's context.
    name = name_of(row.speech, "recording")
    wave = load_audio(row.speech)
    if float(wave.abs().max()) < SILENCE_LEVEL:
        raise UserError(f"{name}: is silent; give a recording of the answer")
    codes = len(wave) * token2wav.codes_per_second // INPUT_SAMPLE_RATE
    if prompt_length + codes + 3 > talker.decoder.max_position_embeddings:
        raise UserError(
            f"{name}: is too long for the Talker's context with {codes} codes; cut it up"
        )

    # An unknown voice is made from its recordings.
    voice = row.voice or next(iter(omni.voices), "")
    if not voice:
        raise UserError('the model has no voices; give this recording a "voice"')
    if voice not in omni.voices:
        rows.add_speech(voice, wave, f"{label}: {name}")


def voice_errors(rows: JsonlRows, omni: "Omni") -> list[str]:
    """Why new voices of a file cannot be made, with the line of each one's first recording."""
    errors = []
    for name, wave in rows.voices.items():
        try:
            make_voice(wave, name, omni)
        except UserError as error:
            source = rows.first_recordings[name]
            errors.append(f"{source}, of voice {shorten(name, 40)!r}: {error}")
    return errors


# ----------------------------------------------------------------------------------------------
# conversion to one row per line


def write_rows(rows: Iterable[dict | str], path: Path) -> None:
    """Write one row per line; strings as they are."""
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    encoded = (text.encode() + b"\n" for text in texts)
    write_atomically(path, lambda file: file.writelines(encoded))


def whole_text(path: Path) -> str:
    """The text of a file that cannot be read line by line.

    Raises UserError if it is too large or not text.
    """
    with open_regular(path, "the data") as file:
        content = file.read(MAX_WHOLE_BYTES + 1)
    if len(content) > MAX_WHOLE_BYTES:
        limit = MAX_WHOLE_BYTES // MEBIBYTE
        raise UserError(
            f"{shorten(path, 200)}: is larger than {limit} MB and not one JSON object a line; "
            f"write it as JSONL in UTF-8, which is read line by line"
        )
    return decoded(content, path)


def decoded(content: bytes, path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Raises UserError for other encodings.
    """
    encoding = "utf-16" if content.startswith(UTF16) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{shorten(path, 200)}: is not {name} (byte {error.start}, in line {line}); "
            f"save it as UTF-8"
        ) from None


def elements(text: str, path: Path) -> Iterator[str]:
    """The elements of a JSON array, each as one line of JSON.

    Raises UserError if the array is broken, naming the entry.
    """
    decoder = json.JSONDecoder()
    label = shorten(path, 200)
    bracket = skip_space(text, 0)
    index = skip_space(text, bracket + 1)
    number = 0
    while text[index : index + 1] != "]":
        number += 1
        try:
            _, end = decoder.raw_decode(text, index)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{label}: entry {number} of the array is not JSON ({shorten(error, 100)})"
            ) from None
        # Valid JSON has line ends only between its tokens, where they mean nothing.
        yield text[index:end].replace("\n", " ").replace("\r", " ")
        index = skip_space(text, end)
        if text[index : index + 1] == ",":
            index = skip_space(text, index + 1)
        elif text[index : index + 1] != "]":
            raise UserError(
                f"{label}: the array does not go on after entry {number}; expected , or ]"
            )
    if text[index + 1 :].strip():
        raise UserError(
            f"{label}: something follows the array; expected one array, or one object a line"
        )


def objects(text: str, path: Path) -> Iterator[str]:
    """The JSON objects of a text, each as one line, with or without commas between them.

    Raises UserError if one is broken, naming its number and line.
    """
    decoder = json.JSONDecoder()
    index = skip_space(text, 0)
    for number in count(1):
        if index == len(text):
            return
        try:
            _, end = decoder.raw_decode(text, index)
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, index) + 1
            raise UserError(
                f"{shorten(path, 200)}: object {number}, which begins in line {line}, is not JSON "
                f"({shorten(error, 100)}); expected JSON objects, one a line or over many lines"
            ) from None
        yield text[index:end].replace("\n", " ").replace("\r", " ")
        index = skip_space(text, end)
        if text[index : index + 1] == ",":
            index = skip_space(text, index + 1)


def skip_space(text: str, index: int) -> int:
    """The index of the first character that is not white space, from `index` on."""
    match = WHITESPACE.match(text, index)
    assert match is not None  # the pattern matches an empty string
    return match.end()


def layout(folder: Path) -> Iterator[dict]:
    """The rows of a folder of recordings, one by one. Raises UserError for an unknown layout."""
    if (folder / "metadata.csv").is_file():
        return ljspeech(folder.resolve())
    return map(spoken_digit, digit_files(folder))


def digit_files(folder: Path) -> list[Path]:
    """Recordings of the free-spoken-digit-dataset in a folder or its recordings/.

    Raises UserError if there are none.
    """
    recordings = folder / "recordings"
    inner = recordings if recordings.is_dir() else folder
    waves = inner.resolve().glob("*.wav")
    files = sorted(path for path in waves if DIGIT_NAME.fullmatch(path.name))
    if not files:
        raise UserError(
            f"{folder}: holds no {{digit}}_{{speaker}}_{{index}}.wav and no metadata.csv with wavs/"
        )
    return files


def spoken_digit(path: Path) -> dict:
    """A recording of the free-spoken-digit-dataset as a row: which digit is it?"""
    question = [{"type": "audio", "audio": str(path)}, {"type": "text", "text": WHICH_DIGIT}]
    match = DIGIT_NAME.fullmatch(path.name)
    assert match is not None  # digit_files() returns only such names
    row = question_and_answer(question, f"the digit is {NUMBERS[int(match[1])]}")
    return {**row, "speaker": match[2]}


def ljspeech(folder: Path) -> Iterator[dict]:
    """The lines of metadata.csv (id|text|normalized text) as rows: say this, in the folder's voice.

    Raises UserError for another number of columns, and for an encoding other than UTF-8 and UTF-16.
    """
    path = folder / "metadata.csv"
    text = io.StringIO(whole_text(path), newline=None)
    number = 0
    try:
        for number, row in enumerate(csv.reader(text, delimiter="|", quoting=csv.QUOTE_NONE), 1):
            if len(row) not in (2, 3):
                raise UserError(
                    f"{path}: row {number} has {len(row)} columns; expected id|text|text"
                )
            speech = str(folder / "wavs" / f"{row[0]}.wav")
            yield {
                **question_and_answer(f"say {row[-1]}", row[-1]),
                "speech": speech,
                "voice": folder.name,
            }
    except csv.Error as error:
        reason = shorten(error, 100)
        raise UserError(f"{path}: row {number + 1} cannot be read ({reason})") from None


def question_and_answer(question: str | list[dict], answer: str) -> dict:
    """A question and its answer as a row."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


# ----------------------------------------------------------------------------------------------
# order of training


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` rows in an epoch [count]: each once, a function of the seed."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def epoch_index(seed: int, count: int, step: int) -> int:
    """The row at a step (0, 1, ...) of an unlimited number of epochs of `count` rows."""
    epoch, position = divmod(step, count)
    return int(epoch_permutation(seed, epoch, count)[position])
