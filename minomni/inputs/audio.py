"""Sound: files, bytes and arrays to a mono wave at 16 kHz."""

from math import ceil

import numpy as np
import torch
from torch import Tensor

from ..config import LISTENING_RATE, QWEN7B
from ..errors import UserError
from .options import MediaOptions
from .source import complaints, is_ogg, name_of, open_source, parts_of_stream, require_whole

SHORTEST = LISTENING_RATE // 50  # samples: 20 ms or less make no audio token
# The context of the largest model holds this many seconds of sound and nothing else: 32,768 tokens, 25 a second.
LONGEST_SECONDS = QWEN7B.thinker.text.max_position_embeddings / QWEN7B.thinker.position_id_per_seconds
LOUDEST = 8.0  # full scale is 1; lossy codecs overshoot it a little, samples that were never scaled by thousands
BLOCK = 65_536  # samples of each channel that are read at once
GAP = 0.1  # s: where times and sample counts differ by more, silence is filled in or sound is dropped (as ffmpeg does)


def load_audio(source, options: MediaOptions = MediaOptions()) -> Tensor:
    """Anything that holds sound -> float32 mono wave [samples] at 16 kHz.

    source: path (wav, flac, ogg, mp3, or what PyAV reads), bytes, array [samples] taken as 16 kHz, or (array, Hz); two-
    dimensional arrays are [samples, channels]. Raises UserError for what is missing, unreadable, too
    short or not finite.
    """
    name = name_of(source, "audio")
    if isinstance(source, tuple):
        return _of_array(_unit(np.asarray(source[0])), int(source[1]), name)
    if isinstance(source, (np.ndarray, Tensor)):
        return _of_array(_unit(np.asarray(source)), LISTENING_RATE, name)
    with open_source(source, name) as stream:
        wave = audio_track(stream, name)
    if wave is None:
        raise UserError(f"{name}: holds no sound")
    return wave


def audio_track(stream, name: str, origin: float | None = None, end: float | None = None) -> Tensor | None:
    """The first sound track of a container -> float32 mono wave [samples] at 16 kHz. None where there is none.

    stream: seekable and binary. origin, end: seconds on the container's own clock, that of PyAV's `frame.time`. With an
    origin every sample goes to its own time after it: what the track lacks is silence, and what lies before the
    origin or after the end is dropped. Without one the samples follow each other as they are stored. Where rate or
    number of channels change, each part is resampled from its own rate. Raises UserError for what is unreadable, too
    short, too long or not finite.
    """
    require_whole(stream, name)
    timeline, found = _Timeline(name, origin), False
    for part in parts_of_stream(stream, name):
        blocks = _decode_ogg(part, name) if origin is None and is_ogg(part) else _decode(part, name)
        for samples, rate, time in blocks:
            if end is not None and time is not None and time >= end:
                break
            timeline.add(samples, rate, time)
            found = True
    if not found:
        return None
    wave = timeline.wave()
    return wave if origin is None or end is None else wave[: max(0, round((end - origin) * LISTENING_RATE))]


def _decode_ogg(stream, name: str):
    """Yield what _decode does. libsndfile cuts the padding from the end of short Ogg files, which ffmpeg keeps."""
    import soundfile

    try:
        stream.seek(0)
        file = soundfile.SoundFile(stream)
    except soundfile.SoundFileError:  # a codec that libsndfile does not know
        yield from _decode(stream, name)
        return
    with complaints(name, "not readable as sound"), file:
        while len(samples := file.read(BLOCK, dtype="float32", always_2d=True)):
            yield samples, file.samplerate, None


def _decode(stream, name: str):
    """Yield samples [n, channels] float32, their rate in Hz, and their time in seconds (None if not stored)."""
    import av

    stream.seek(0)
    with complaints(name, "not readable as sound"), av.open(stream) as container:
        if not container.streams.audio:
            return
        kind = None
        for frame in container.decode(audio=0):
            if kind != (frame.format.name, frame.layout.name, frame.sample_rate):  # changes midway in some streams
                kind = (frame.format.name, frame.layout.name, frame.sample_rate)
                # Packed samples: PyAV's to_ndarray of eight planes or more reads beyond them and crashes.
                packed = av.AudioResampler(format="flt")
            for out in packed.resample(frame):
                yield out.to_ndarray().reshape(out.samples, -1), frame.sample_rate, frame.time


class _Timeline:
    """Joins blocks of samples of any rate, at their own times if there is an origin, to one wave at 16 kHz."""

    def __init__(self, name: str, origin: float | None = None):
        self.name, self.origin = name, origin
        self.waves: list[np.ndarray] = []  # float32 at 16 kHz
        self.length = 0  # samples in self.waves
        self.rate = None  # Hz of the part that is being read
        self.resampler = None  # of this part
        self.begin = 0.0  # s, where this part begins, counted from the origin
        self.read = 0  # samples of this part, at its own rate
        self.made = 0  # samples of this part, at 16 kHz
        self.drop = 0  # samples of this part, at 16 kHz, that lie before the end of self.waves

    def add(self, samples: np.ndarray, rate: int, time: float | None = None) -> None:
        """Take the next samples [n, channels]; time in seconds on the clock of the origin."""
        if not np.isfinite(samples).all():
            raise UserError(f"{self.name}: holds NaN or infinite samples; repair the recording")
        if len(samples) and max(samples.max(), -samples.min()) > LOUDEST:
            raise UserError(f"{self.name}: samples of up to {abs(samples).max():.0f}; expected floats from -1 to 1, "
                            f"divide them by their full scale")
        expected = self.begin + self.read / self.rate if self.rate else None
        at = expected or 0.0
        if self.origin is not None and time is not None:
            if expected is None or abs(time - self.origin - expected) > GAP:
                at = time - self.origin
        if rate != self.rate or at != expected:
            self._end_part()
            self._begin_part(rate, at)
        self.read += len(samples)
        mono = samples.mean(1)
        self._append(mono if self.resampler is None else self.resampler.resample_chunk(mono))

    def wave(self) -> Tensor:
        """All samples so far -> [samples]."""
        self._end_part()
        self.rate = None
        if self.length <= SHORTEST:
            raise UserError(f"{self.name}: {self.length * 1000 / LISTENING_RATE:.0f} ms of sound; more than 20 ms are "
                            f"needed")
        return torch.from_numpy(np.concatenate(self.waves))

    def _begin_part(self, rate: int, at: float) -> None:
        if rate <= 0:
            raise UserError(f"{self.name}: {rate} samples per second; expected the sampling rate in Hz")
        import soxr

        self.rate, self.begin, self.read, self.made, self.drop = rate, at, 0, 0, 0
        self.resampler = None
        if rate != LISTENING_RATE:
            self.resampler = soxr.ResampleStream(rate, LISTENING_RATE, 1, dtype="float32")
        if self.origin is None:
            return
        self._require_short(at)
        missing = round(at * LISTENING_RATE) - self.length
        if missing > 0:
            self.waves.append(np.zeros(missing, np.float32))
            self.length += missing
        self.drop = max(0, -missing)

    def _end_part(self) -> None:
        if self.resampler is not None:
            self._append(self.resampler.resample_chunk(np.zeros(0, np.float32), last=True))
            # The same count as librosa's, which the release's own reader uses: rounded up, the rest is silence.
            self._append(np.zeros(max(0, ceil(self.read * (LISTENING_RATE / self.rate)) - self.made), np.float32))
            self.resampler = None

    def _append(self, wave: np.ndarray) -> None:
        self.made += len(wave)
        kept = wave[self.drop :]
        self.drop -= len(wave) - len(kept)
        self.waves.append(kept)
        self.length += len(kept)
        self._require_short(self.length / LISTENING_RATE)

    def _require_short(self, seconds: float) -> None:
        if seconds > LONGEST_SECONDS:
            raise UserError(f"{self.name}: more than {LONGEST_SECONDS:.0f} s of sound; the largest model's context "
                            f"holds no more, cut it into shorter ones")


def _of_array(samples: np.ndarray, rate: int, name: str) -> Tensor:
    """Decoded samples [n] or [n, channels] -> what load_audio promises."""
    if samples.ndim not in (1, 2):
        raise UserError(f"{name}: sound of shape {samples.shape}; expected [samples] or [samples, channels]")
    timeline = _Timeline(name)
    timeline.add(samples if samples.ndim == 2 else samples[:, None], rate)
    return timeline.wave()


def _unit(samples: np.ndarray) -> np.ndarray:
    """Samples as float32; those of whole numbers come to -1..1 first."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    if samples.dtype.kind not in "iu":
        raise UserError(f"the audio given: samples of type {samples.dtype}; expected numbers, float or integer")
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    middle = half if samples.dtype.kind == "u" else 0  # unsigned samples swing about the middle of their range
    return ((samples - middle) / half).astype(np.float32)
