"""What comes out of a model: a reply, the pieces in which it arrives, and when each of them was
there.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from torch import Tensor

from minomni.errors import UserError
from minomni.files import write_atomically

AUDIO_FILES = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}  # as soundfile names them: format and subtype
# samples that are encoded at once: some versions of libsndfile crash on much longer blocks of
# Vorbis
BLOCK = 65_536


class Timings:
    """When things were handed on, in seconds since the question.

    times: for each of input, encode, prefill, text, code, mel and sound, when its first piece was
    there, when the second, and so on. A stage that had nothing to do is missing.
    """

    def __init__(self):
        self.began = time.perf_counter()
        self.times: dict[str, list[float]] = defaultdict(list)

    def mark(self, what: str) -> float:
        """One more piece is there, now -> seconds since the question."""
        now = time.perf_counter() - self.began
        self.times[what].append(now)
        return now

    def first(self, what: str) -> float | None:
        return self.times[what][0] if what in self.times else None

    def last(self, what: str) -> float | None:
        return self.times[what][-1] if what in self.times else None


@dataclass
class GenerateOutput:
    """Answers to a batch, as the parts made them."""

    tokens: list[list[int]]  # per row the text ids, stop id included
    codes: list[Tensor]  # per row the codec ids [n]
    waves: list[Tensor]  # per row the sound [samples], float32


@dataclass
class Reply:
    """One answer. In a notebook it shows its text and a player."""

    text: str
    wave: Tensor  # float32 [samples] in [-1, 1]; empty where no speech was asked for
    sample_rate: int  # Hz
    codes: Tensor  # the codec ids that were spoken [n]
    total_s: float  # seconds from messages to the last sample
    timings: Timings = field(repr=False)

    @property
    def seconds(self) -> float:
        """Length of the speech."""
        return len(self.wave) / self.sample_rate if len(self.wave) else 0.0

    def save(self, path: str | Path) -> None:
        """Write the speech into a file, whole or not at all; the name says which kind: wav, flac,
        ogg or mp3.

        A reply whose answer is empty is a file of no samples. Raises UserError for another name,
        for a model that answers in text alone, and where the file cannot be written.
        """
        import soundfile

        kind, subtype = audio_file(path)
        if not self.sample_rate:
            raise UserError(f"{path}: nothing to write, as this model answers in text alone")
        content, samples = BytesIO(), self.wave.cpu().numpy()
        with soundfile.SoundFile(content, "w", self.sample_rate, 1, subtype, format=kind) as file:
            for start in range(0, len(samples), BLOCK):
                file.write(samples[start : start + BLOCK])
        write_atomically(Path(path), lambda file: file.write(content.getbuffer()))

    def _repr_html_(self) -> str:
        from html import escape

        from IPython.display import Audio

        player = (
            Audio(self.wave.cpu().numpy(), rate=self.sample_rate)._repr_html_()
            if len(self.wave)
            else ""
        )
        return f"<p>{escape(self.text)}</p>{player}"


class Replies(list):
    """The replies to several conversations, in their order. In a notebook they show one below the
    other.
    """

    @property
    def text(self) -> list[str]:
        """The texts of all."""
        return [reply.text for reply in self]

    def _repr_html_(self) -> str:
        return "".join(reply._repr_html_() for reply in self)


def audio_file(path: str | Path) -> tuple[str, str]:
    """Format and subtype of the sound file that a name stands for; a device or a pipe gets a wav.

    Raises UserError for a name that is none.
    """
    if not isinstance(path, (str, Path)):
        raise UserError(f"the file to write is a {type(path).__name__}; expected a path")
    path = Path(path)
    if path.suffix.lower() in AUDIO_FILES:
        return AUDIO_FILES[path.suffix.lower()]
    if is_device(path):
        return AUDIO_FILES[".wav"]
    raise UserError(
        f"{path}: speech is written as {', '.join(AUDIO_FILES)}; give a name that ends so"
    )


def is_device(path: Path) -> bool:
    """Whether a path names a device, a pipe, or a file of /dev or /proc, such as /dev/stdout that
    leads to a file.
    """
    try:
        of_the_system = path.absolute().parts[1:2] in (("dev",), ("proc",))
        return path.exists() and not path.is_dir() and (of_the_system or not path.is_file())
    except (OSError, ValueError):  # a name that is too long, or holds NUL
        return False


@dataclass
class TextChunk:
    """The next bit of the answer's text."""

    text: str
    at_s: float  # seconds since the question


@dataclass
class AudioChunk:
    """The next bit of the answer's sound."""

    wave: Tensor  # float32 [samples]
    sample_rate: int  # Hz
    at_s: float


@dataclass
class ReplyDone:
    """Nothing more comes; the pieces put together."""

    reply: Reply


def required_buffer_s(pieces: list[AudioChunk]) -> float:
    """Seconds that a player has to wait before it starts, counted from the first piece, lest it run
    dry later.

    0 means that it may start at once. Piece k is needed when all before it has been played.
    """
    played, wait = 0.0, 0.0
    for piece in pieces:
        wait = max(wait, piece.at_s - pieces[0].at_s - played)
        played += len(piece.wave) / piece.sample_rate
    return wait
