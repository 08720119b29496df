"""Sound: files, bytes and arrays to a mono wave at 16 kHz."""

from math import ceil, isfinite
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from minomni.arguments import shown
from minomni.config import LISTENING_RATE, QWEN7B
from minomni.errors import UserError, shorten
from minomni.inputs.containers import is_ogg, parts_of_stream, pcm_samples, require_whole
from minomni.inputs.options import MediaOptions
from minomni.inputs.source import array_of, complaints, name_of, open_source

SHORTEST = LISTENING_RATE // 50  # samples: 20 ms or less make no audio token
# The context of the largest model holds this many seconds of sound and nothing else: 32,768 tokens,
# 25 a second.
LONGEST_SECONDS = (
    QWEN7B.thinker.text.max_position_embeddings / QWEN7B.thinker.position_id_per_seconds
)
SILENCE = 1e-3  # of full scale: speech is louder
# full scale is 1; lossy codecs overshoot it a little, samples that were never scaled by thousands
LOUDEST = 8.0
MOST_CHANNELS = 64
MOST_NUMBERS = (
    2**29
)  # samples over all channels: 21 minutes of eight at 48 kHz, or of two at 192 kHz
FASTEST = 1_000_000  # Hz
FARTHEST = (
    3_600  # s: what lies before audio_start is decoded, too, at 4 ms for each second of stereo mp3
)
SCALED = {
    ("i", 1),
    ("i", 2),
    ("i", 4),
    ("u", 1),
    ("u", 2),
}  # kinds and bytes of integers that sound comes in
UNKNOWN_FLAC = 2**32  # samples, a day at 48 kHz: a header that was never finished
BROADCAST = (
    "aac",
    "ac3",
    "mp3",
    "mpegts",
)  # ffmpeg's names of formats that can be joined and left at any time
DEEPEST_PACKED = (
    1 << 23
)  # int32 samples up to here are 24-bit values, or fewer bits, that were not scaled
BLOCK = 65_536  # samples of each channel that are read at once
# s: where times and sample counts differ by more, silence is filled in or sound is dropped (as
# ffmpeg does)
GAP = 0.1


def load_audio(source, options: MediaOptions = MediaOptions()) -> Tensor:
    """Anything that holds sound -> float32 mono wave [samples] at 16 kHz.

    source: a path, a file:// or data: URI, bytes or an open file (wav, flac, ogg, mp3, or what PyAV
    reads); an array [samples] taken as 16 kHz; (array, Hz) or (Hz, array); {"array",
    "sampling_rate"} or {"bytes", "path"} of Hugging Face datasets. Arrays hold floats from -1 to 1,
    or int16, int32, uint8 ... over their full range. Two- dimensional ones are [samples, channels]
    or [channels, samples], the channels being fewer. options.audio_start and audio_end: seconds.
    Raises UserError for what is missing, unreadable, too short, too long, not finite or of unknown
    scale.
    """
    name = name_of(source, "audio")
    start, end = _seconds_wanted(options, name)
    if isinstance(source, dict) and source.get("array") is not None:
        return _of_array(source["array"], source.get("sampling_rate"), start, end, name)
    if isinstance(source, tuple):
        return _of_array(*_array_and_rate(source, name), start, end, name)
    if isinstance(source, (np.ndarray, Tensor)):
        return _of_array(source, LISTENING_RATE, start, end, name)
    with open_source(source, name) as stream:
        require_whole(stream, name)
        _require_short_pcm(stream, start, end, name)
        timeline = _Timeline(name)
        for samples, rate, _ in _cut(_decode_parts(stream, name), start, end):
            timeline.add(samples, rate)
    if timeline.rate is None:
        after = f" after {start:g} s (audio_start)" if start else ""
        raise UserError(f"{name}: holds no sound{after}; more than 20 ms are needed")
    return timeline.wave()


def audio_track(
    stream, name: str, origin: float | None = None, end: float | None = None
) -> Tensor | None:
    """The first sound track of a container -> float32 mono wave [samples] at 16 kHz. None where
    there is none.

    stream: seekable and binary. origin, end: seconds on the container's own clock, that of PyAV's
    `frame.time`. With an origin every sample goes to its own time after it: what the track lacks is
    silence, and what lies before the origin or after the end is dropped. Without one the samples
    follow each other as they are stored. Where rate or number of channels change, each part is
    resampled from its own rate. Raises UserError for what is unreadable, too short, too long or not
    finite.
    """
    require_whole(stream, name)
    timeline = _Timeline(name, origin)
    for samples, rate, time in _decode_parts(stream, name, timed=origin is not None):
        if end is not None and time is not None and time >= end:
            break
        timeline.add(samples, rate, time)
    if timeline.rate is None:
        return None
    wave = timeline.wave()
    return (
        wave
        if origin is None or end is None
        else wave[: max(0, round((end - origin) * LISTENING_RATE))]
    )


def _seconds_wanted(options: MediaOptions, name: str) -> tuple[float, float | None]:
    """Checked audio_start (0 if not given) and audio_end (None if not given)."""
    start, end = (
        _seconds(getattr(options, key), key, name) for key in ("audio_start", "audio_end")
    )
    start = start or 0.0
    if end is not None and end <= start:
        raise UserError(f"{name}: audio_end ({end:g} s) is not behind audio_start ({start:g} s)")
    return start, end


def _seconds(value, key: str, name: str) -> float | None:
    """A number of Python or numpy as float; None stays. Raises UserError for others and for those
    out of range.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= FARTHEST:
        raise UserError(f"{name}: {key} is {shown(value)}; expected seconds from 0 to {FARTHEST}")
    return float(value)


def _cut(blocks, start: float, end: float | None):
    """The samples of blocks from int(start * rate) on, int((end - start) * rate) of them: as
    librosa counts them.
    """
    last = None
    for samples, rate, time in blocks:
        if last is None:
            skip, keep = int(start * rate), None if end is None else int((end - start) * rate)
        elif rate != last:
            skip, keep = skip * rate // last, None if keep is None else keep * rate // last
        last = rate
        skipped = min(skip, len(samples))
        skip -= skipped
        samples = samples[skipped:] if keep is None else samples[skipped : skipped + keep]
        if len(samples):
            yield samples, rate, time
        if keep is not None:
            keep -= len(samples)
            if keep <= 0:
                return


def _decode_parts(stream, name: str, timed: bool = False):
    """Yield what _decode does, over all parts of a stream that begins anew midway."""
    numbers = 0
    for part in parts_of_stream(stream, name):
        for block in _decode_ogg(part, name) if is_ogg(part) and not timed else _decode(part, name):
            numbers += block[0].size
            _require_few(numbers, name)
            yield block


def _decode_ogg(stream, name: str):
    """Yield what _decode does. libsndfile cuts the padding from the end of short Ogg files, which
    ffmpeg keeps.
    """
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
    """Yield samples [n, channels] float32, their rate in Hz, and their time in seconds (None if not
    stored).
    """
    import av

    stream.seek(0)
    with complaints(name, "not readable as sound"), av.open(stream) as container:
        if not container.streams.audio:
            return
        kind, count = None, 0
        for frame in _frames(container):
            count += frame.samples
            if kind != (
                frame.format.name,
                frame.layout.name,
                frame.sample_rate,
            ):  # changes midway in some streams
                kind = (frame.format.name, frame.layout.name, frame.sample_rate)
                # Packed samples: PyAV's to_ndarray of eight planes or more reads beyond them and
                # crashes.
                packed = av.AudioResampler(format="flt")
            for out in packed.resample(frame):
                yield out.to_ndarray().reshape(out.samples, -1), frame.sample_rate, frame.time
        if (
            container.format.name == "flac"
            and count < (container.streams.audio[0].duration or 0) < UNKNOWN_FLAC
        ):
            raise UserError(
                f"{name}: cut short, {count} of {container.streams.audio[0].duration} samples are there; "
                f"copy it again"
            )


def _frames(container):
    """Yield the decoded frames of the first sound track.

    Recordings of a broadcast begin and end within a frame: there the first and the last may be
    broken, and no others.
    """
    import av

    is_broadcast = container.format.name in BROADCAST
    begun, broken = False, None
    for packet in container.demux(audio=0):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            if not is_broadcast or (begun and broken):
                raise
            broken = error
            continue
        if frames and begun and broken:  # broken in the middle
            raise broken
        if frames:
            begun, broken = True, None
        yield from frames
    if broken and not begun:
        raise broken


class _Timeline:
    """Joins blocks of samples of any rate, at their own times if there is an origin, to one wave at
    16 kHz.
    """

    def __init__(self, name: str, origin: float | None = None):
        self.name, self.origin = name, origin
        # One buffer at 16 kHz that doubles: a list of small pieces, kept between large blocks,
        # fragments the memory.
        self.buffer = np.zeros(LISTENING_RATE, np.float32)
        self.length = 0  # samples of it that are filled
        self.rate = None  # Hz of the part that is being read
        self.resampler = None  # of this part
        self.begin = 0.0  # s, where this part begins, counted from the origin
        self.read = 0  # samples of this part, at its own rate
        self.made = 0  # samples of this part, at 16 kHz
        self.drop = 0  # samples of this part, at 16 kHz, that lie before the end of what is filled

    def add(self, samples: np.ndarray, rate: int, time: float | None = None) -> None:
        """Take the next samples [n, channels]; time in seconds on the clock of the origin."""
        if not len(samples):
            return
        low, high = float(samples.min()), float(samples.max())
        if not (isfinite(low) and isfinite(high)):
            raise UserError(f"{self.name}: holds NaN or infinite samples; repair the recording")
        if max(high, -low) > LOUDEST:
            raise UserError(
                f"{self.name}: samples from {low:g} to {high:g}; expected floats from -1 to 1, divide them "
                f"by their full scale"
            )
        expected = self.begin + self.read / self.rate if self.rate else None
        at = expected or 0.0
        if self.origin is not None and time is not None:
            if expected is None or abs(time - self.origin - expected) > GAP:
                at = time - self.origin
        if rate != self.rate or at != expected:
            self._end_part()
            self._begin_part(rate, at)
        self.read += len(samples)
        mono = samples[:, 0].copy()
        for channel in range(1, samples.shape[1]):  # five times as fast as mean(1)
            mono += samples[:, channel]
        mono /= samples.shape[1]
        self._append(mono if self.resampler is None else self.resampler.resample_chunk(mono))

    def wave(self) -> Tensor:
        """All samples so far -> [samples]."""
        self._end_part()
        self.rate = None
        if self.length <= SHORTEST:
            raise UserError(
                f"{self.name}: {self.length * 1000 / LISTENING_RATE:.0f} ms of sound; more than 20 ms are "
                f"needed"
            )
        return torch.from_numpy(self.buffer[: self.length].copy())

    def _begin_part(self, rate: int, at: float) -> None:
        _checked_rate(rate, self.name)
        import soxr

        self.rate, self.begin, self.read, self.made, self.drop = rate, at, 0, 0, 0
        self.resampler = None
        if rate != LISTENING_RATE:
            self.resampler = soxr.ResampleStream(rate, LISTENING_RATE, 1, dtype="float32")
        if self.origin is None:
            return
        _require_short(at, self.name)
        missing = round(at * LISTENING_RATE) - self.length
        if missing > 0:
            self._append(np.zeros(missing, np.float32))
            self.made = 0
        self.drop = max(0, -missing)

    def _end_part(self) -> None:
        if self.resampler is not None:
            self._append(self.resampler.resample_chunk(np.zeros(0, np.float32), last=True))
            # The same count as librosa's, which the release's own reader uses: rounded up, the rest
            # is silence.
            self._append(
                np.zeros(
                    max(0, ceil(self.read * (LISTENING_RATE / self.rate)) - self.made), np.float32
                )
            )
            self.resampler = None

    def _append(self, wave: np.ndarray) -> None:
        self.made += len(wave)
        kept = wave[self.drop :]
        self.drop -= len(wave) - len(kept)
        length = self.length + len(kept)
        _require_short(length / LISTENING_RATE, self.name)
        if length > len(self.buffer):
            self.buffer = np.pad(
                self.buffer, (0, max(length, 2 * len(self.buffer)) - len(self.buffer))
            )
        self.buffer[self.length : length] = kept
        self.length = length


def _array_and_rate(pair: tuple, name: str) -> tuple:
    """(array, Hz) as most write it, or (Hz, array) as scipy and gradio do -> array, Hz."""
    if len(pair) == 2:
        for array, rate in (pair, pair[::-1]):
            is_array = isinstance(array, list) or (
                isinstance(array, (np.ndarray, Tensor)) and array.ndim > 0
            )
            if is_array and _is_single(rate):
                return array, rate
    kinds = ", ".join(type(item).__name__ for item in pair[:5])
    raise UserError(f"{name}: a tuple of ({shorten(kinds)}); expected (array, sampling rate in Hz)")


def _is_single(value) -> bool:
    """Whether a value is none of an array's; lists of lists of unequal lengths are no array, but
    not single either.
    """
    try:
        return np.ndim(value) == 0
    except ValueError:
        return False


def _of_array(source, rate, start: float, end: float | None, name: str) -> Tensor:
    """An array [samples], [samples, channels] or [channels, samples] and its rate -> what
    load_audio promises.
    """
    rate = _checked_rate(rate, name)
    if not isinstance(source, (np.ndarray, Tensor)) or (
        isinstance(source, Tensor) and source.layout != torch.strided
    ):
        source = array_of(source, name)
    shape = tuple(source.shape)
    samples = source
    if len(shape) == 1:
        samples = source[:, None]
    elif len(shape) == 2 and shape[0] < shape[1]:
        samples = source.T
    if len(shape) not in (1, 2) or not 1 <= samples.shape[1] <= MOST_CHANNELS:
        raise UserError(
            f"{name}: sound of shape {shorten(shape, 60)}; expected [samples] or [samples, channels], at "
            f"most {MOST_CHANNELS} channels"
        )
    samples = samples[int(start * rate) : None if end is None else int(end * rate)]
    if start and not len(samples):
        raise UserError(f"{name}: holds no sound after {start:g} s (audio_start)")
    _require_short(
        len(samples) / rate, name
    )  # before anything is computed: a broadcast array may claim any length
    _require_few(len(samples) * samples.shape[1], name)
    timeline, peak, kind = _Timeline(name), 0, None
    for i in range(0, len(samples), BLOCK):
        block = array_of(samples[i : i + BLOCK], name)
        kind, peak = (
            block.dtype,
            max(peak, int(block.max()), -int(block.min())) if block.dtype.kind == "i" else 0,
        )
        timeline.add(_unit(block, name), rate)
    if kind == np.int32 and 0 < peak <= DEEPEST_PACKED:
        give = (
            "give int16"
            if peak <= 1 << 15
            else f"divide them by {DEEPEST_PACKED} and give floats from -1 to 1"
        )
        raise UserError(
            f"{name}: samples of type int32 that reach {peak} at most; expected its full range, up to "
            f"{2**31 - 1}; if they are {16 if peak <= 1 << 15 else 24}-bit values, {give}"
        )
    return timeline.wave()


def _checked_rate(rate, name: str) -> float:
    """A sampling rate in Hz that can be believed."""
    if isinstance(rate, (np.ndarray, np.generic, Tensor)) and rate.ndim == 0:
        rate = array_of(rate, name).item()
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 1 <= rate <= FASTEST:
        raise UserError(
            f"{name}: {shorten(rate, 60)} samples per second; expected the sampling rate in Hz, 1 to "
            f"{FASTEST}"
        )
    return int(rate) if rate == int(rate) else float(rate)


def _require_short(seconds: float, name: str) -> None:
    if seconds > LONGEST_SECONDS:
        raise UserError(
            f"{name}: more than {LONGEST_SECONDS:.0f} s of sound; the largest model's context holds no "
            f"more, cut it into shorter ones"
        )


def _require_short_pcm(stream, start: float, end: float | None, name: str) -> None:
    """Raise UserError for a wav that is too long by its header: decoding it only to refuse it takes
    minutes.
    """
    with complaints(name, "its header cannot be read"):
        found = pcm_samples(stream)
    if found is None:
        return
    samples, rate = found
    kept = samples - int(start * rate)
    if end is not None:
        kept = min(kept, int((end - start) * rate))
    _require_short(kept / rate, name)


def _require_few(numbers: int, name: str) -> None:
    if numbers > MOST_NUMBERS:
        raise UserError(
            f"{name}: more than {MOST_NUMBERS} samples over all channels; convert it to 16000 Hz, mono"
        )


def _unit(samples: np.ndarray, name: str) -> np.ndarray:
    """Samples as float32; those of whole numbers come to -1..1 first."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    if samples.dtype.kind not in "iu" or (samples.dtype.kind, samples.dtype.itemsize) not in SCALED:
        raise UserError(
            f"{name}: samples of type {samples.dtype}, which does not tell their scale; give int16, int32 "
            f"over its full range, or floats from -1 to 1"
        )
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    middle = (
        half if samples.dtype.kind == "u" else 0
    )  # unsigned samples swing about the middle of their range
    return ((samples - middle) / half).astype(np.float32)
