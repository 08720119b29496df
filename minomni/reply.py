"""What comes out of a model: a reply, the pieces in which it arrives, and when each of them was there."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from minomni.files import write_atomically


class Trace:
    """When things were handed on, in seconds since the question.

    times: for each of input, encode, prefill, text, code, mel and sound, when its first piece was there, when the
    second, and so on. A stage that had nothing to do is missing.
    """

    def __init__(self):
        self.began = time.perf_counter()
        self.times: dict[str, list[float]] = defaultdict(list)

    def note(self, what: str) -> float:
        """One more piece is there, now -> seconds since the question."""
        now = time.perf_counter() - self.began
        self.times[what].append(now)
        return now

    def first(self, what: str) -> float | None:
        return self.times[what][0] if what in self.times else None

    def last(self, what: str) -> float | None:
        return self.times[what][-1] if what in self.times else None


@dataclass
class Spoken:
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
    trace: Trace = field(repr=False)

    @property
    def seconds(self) -> float:
        """Length of the speech."""
        return len(self.wave) / self.sample_rate if len(self.wave) else 0.0

    def save(self, path: str | Path) -> None:
        """Write the speech as a 16-bit wav file, whole or not at all."""
        import soundfile

        samples = self.wave.cpu().numpy()
        wav = dict(subtype="PCM_16", format="WAV")
        write_atomically(Path(path), lambda f: soundfile.write(f, samples, self.sample_rate, **wav))

    def _repr_html_(self) -> str:
        from html import escape

        from IPython.display import Audio

        player = Audio(self.wave.cpu().numpy(), rate=self.sample_rate)._repr_html_() if len(self.wave) else ""
        return f"<p>{escape(self.text)}</p>{player}"


@dataclass
class TextPiece:
    """The next bit of the answer's text."""

    text: str
    at_s: float  # seconds since the question


@dataclass
class SoundPiece:
    """The next bit of the answer's sound."""

    wave: Tensor  # float32 [samples]
    sample_rate: int  # Hz
    at_s: float


@dataclass
class End:
    """Nothing more comes; the pieces put together."""

    reply: Reply


def waiting(pieces: list[SoundPiece]) -> float:
    """Seconds that a player has to wait before it starts, counted from the first piece, lest it run dry later.

    0 means that it may start at once. Piece k is needed when all before it has been played.
    """
    played, wait = 0.0, 0.0
    for piece in pieces:
        wait = max(wait, piece.at_s - pieces[0].at_s - played)
        played += len(piece.wave) / piece.sample_rate
    return wait
