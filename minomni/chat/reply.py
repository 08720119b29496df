"""What the model returns: replies, the chunks in which they arrive, and the times of each step."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from torch import Tensor

from minomni.errors import UserError
from minomni.files import is_stream, write_atomically

# File name extension -> format and subtype, as soundfile names them.
AUDIO_FILES = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
# Samples encoded per call: some versions of libsndfile crash on much longer blocks of Vorbis.
BLOCK = 65_536


class Timings:
    """When each step produced its outputs, in seconds since the question.

    times: for each of input, encode, prefill, text, code, mel and audio, the time of its first
    output, of its second, and so on. Steps that had nothing to do are missing.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: dict[str, list[float]] = defaultdict(list)

    def mark(self, step: str) -> float:
        """Record that a step has produced one more output, now -> seconds since the question."""
        now = time.perf_counter() - self.start
        self.times[step].append(now)
        return now

    def first(self, step: str) -> float | None:
        """Time of a step's first output, None if there is none."""
        return self.times[step][0] if step in self.times else None

    def last(self, step: str) -> float | None:
        """Time of a step's last output, None if there is none."""
        return self.times[step][-1] if step in self.times else None


@dataclass
class GenerateOutput:
    """Replies to a batch, before decoding."""

    tokens: list[list[int]]  # per row the text ids, stop id included
    codes: list[Tensor]  # per row the codec ids [n]
    waves: list[Tensor]  # per row the waveform [samples], float32


@dataclass
class Reply:
    """One reply. A notebook displays its text and an audio player."""

    text: str
    wave: Tensor  # float32 [samples] in [-1, 1]; empty without speech
    sample_rate: int  # Hz
    codes: Tensor  # codec ids [n] of the speech
    total_s: float  # seconds from the messages to the last sample
    timings: Timings = field(repr=False)

    @property
    def seconds(self) -> float:
        """Duration of the speech."""
        return len(self.wave) / self.sample_rate if len(self.wave) else 0.0

    def save(self, path: str | Path) -> None:
        """Write the speech to a wav, flac, ogg or mp3 file, as its extension says. The file is
        written completely or not at all.

        An empty reply makes a file without samples. Raises UserError for another extension, for a
        model that answers in text only, and where the file cannot be written.
        """
        import soundfile

        file_format, subtype = audio_file(path)
        if not self.sample_rate:
            raise UserError(f"{path}: nothing to write, as this model answers in text only")
        encoded = BytesIO()
        samples = self.wave.cpu().numpy()
        with soundfile.SoundFile(
            encoded, "w", self.sample_rate, channels=1, subtype=subtype, format=file_format
        ) as file:
            for start in range(0, len(samples), BLOCK):
                file.write(samples[start : start + BLOCK])
        write_atomically(Path(path), lambda file: file.write(encoded.getbuffer()))

    def _repr_html_(self) -> str:
        from html import escape

        from IPython.display import Audio

        player = ""
        if len(self.wave):
            player = Audio(self.wave.cpu().numpy(), rate=self.sample_rate)._repr_html_()
        return f"<p>{escape(self.text)}</p>{player}"


class Replies(list):
    """Replies to several conversations, in order. A notebook displays them one below the other."""

    @property
    def text(self) -> list[str]:
        """The text of each reply."""
        return [reply.text for reply in self]

    def _repr_html_(self) -> str:
        return "".join(reply._repr_html_() for reply in self)


def audio_file(path: str | Path) -> tuple[str, str]:
    """soundfile's format and subtype for a file name; wav for a device or a pipe.

    Raises UserError for any other name.
    """
    if not isinstance(path, (str, Path)):
        raise UserError(f"the file to write is a {type(path).__name__}; expected a path")
    path = Path(path)
    extension = path.suffix.lower()
    if extension in AUDIO_FILES:
        return AUDIO_FILES[extension]
    if is_stream(path):
        return AUDIO_FILES[".wav"]
    raise UserError(
        f"{path}: speech is written as {', '.join(AUDIO_FILES)}; give a name that ends in one"
    )


@dataclass
class TextChunk:
    """The next chunk of a reply's text."""

    text: str
    at_s: float  # seconds since the question


@dataclass
class AudioChunk:
    """The next chunk of a reply's audio."""

    wave: Tensor  # float32 [samples]
    sample_rate: int  # Hz
    at_s: float  # seconds since the question


@dataclass
class ReplyDone:
    """The end of a reply, with all its chunks joined."""

    reply: Reply


def required_buffer_s(chunks: list[AudioChunk]) -> float:
    """Seconds that a player must wait after the first chunk so that it never runs out of audio.

    0 means that it can start at once. Chunk k must be there when all before it have been played.
    """
    played = 0.0
    wait = 0.0
    for chunk in chunks:
        arrival = chunk.at_s - chunks[0].at_s
        wait = max(wait, arrival - played)
        played += len(chunk.wave) / chunk.sample_rate
    return wait
