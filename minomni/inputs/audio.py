"""Audio: files, bytes and arrays to a mono waveform at 16 kHz."""

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minomni.config import INPUT_SAMPLE_RATE, QWEN7B
from minomni.errors import UserError, quote, shorten
from minomni.inputs.containers import (
    RisingTimes,
    Watched,
    best_track,
    is_ogg,
    open_container,
    parts_of_stream,
    pcm_samples,
    require_whole,
)
from minomni.inputs.options import NO_OPTIONS, MediaOptions
from minomni.inputs.source import (
    name_of,
    one_line_errors,
    open_source,
    shape_of,
    to_numpy,
)

MIN_SAMPLES = INPUT_SAMPLE_RATE // 50  # samples: 20 ms or less make no audio token
TOKENS_PER_S = QWEN7B.thinker.position_id_per_seconds  # of audio, in all sizes: 25
# Seconds of audio that fill the context of the largest model, 32,768 tokens.
MAX_AUDIO_S = QWEN7B.thinker.text.max_position_embeddings / TOKENS_PER_S
SILENCE_LEVEL = 1e-3  # of full scale: speech is louder
# Of full scale. Lossy codecs overshoot it a little, unscaled samples by a factor of thousands.
MAX_AMPLITUDE = 8.0
MAX_CHANNELS = 64
# Samples over all channels: 21 minutes of eight channels at 48 kHz, or of two at 192 kHz.
MAX_SAMPLES = 2**29
MAX_RATE = 1_000_000  # Hz
# Seconds. The samples before audio_start are decoded too, at 4 ms per second of stereo mp3.
MAX_START_S = 3_600
# Kinds and bytes of the integers that samples may have.
INTEGER_TYPES = {("i", 1), ("i", 2), ("i", 4), ("u", 1), ("u", 2)}
# Samples of a flac, a day at 48 kHz. A header that says more was never finished.
UNKNOWN_FLAC = 2**32
# ffmpeg's names of the formats of broadcasts: a recording may begin and end anywhere.
BROADCAST = ("aac", "ac3", "mp3", "mpegts")
# int32 samples up to here are values of at most 24 bits that were not scaled.
MAX_UNSCALED = 1 << 23
BLOCK = 65_536  # samples of each channel that are read at once
# Seconds. Where times and sample counts differ by more, silence is inserted or samples are dropped
# (as ffmpeg does).
GAP = 0.1

# Samples [n, channels] float32, their rate in Hz, and their time in seconds if it is stored.
Block = tuple[np.ndarray, int, float | None]


def load_audio(source: Any, options: MediaOptions = NO_OPTIONS) -> Tensor:
    """Any source of audio -> float32 mono waveform [samples] at 16 kHz.

    source: a path, a file:// or data: URI, bytes or an open file (wav, flac, ogg, mp3, or anything
    that PyAV reads); an array [samples], assumed to be at 16 kHz; (array, Hz) or (Hz, array);
    {"array", "sampling_rate"} or {"bytes", "path"} of Hugging Face datasets. Arrays hold floats
    from -1 to 1, or int16, int32, uint8 ... over their full range. Two-dimensional ones are
    [samples, channels] or [channels, samples]; there are fewer channels than samples.
    options.audio_start and audio_end: seconds. Raises UserError for audio that is missing,
    unreadable, too short, too long, not finite or of unknown scale.
    """
    name = name_of(source, "audio")
    start, end = _start_and_end(options, name)
    if isinstance(source, dict) and source.get("array") is not None:
        return _of_array(source["array"], source.get("sampling_rate"), start, end, name)
    if isinstance(source, tuple):
        array, rate = _array_and_rate(source, name)
        return _of_array(array, rate, start, end, name)
    if isinstance(source, (np.ndarray, Tensor)):
        return _of_array(source, INPUT_SAMPLE_RATE, start, end, name)

    timeline = _Timeline(name)
    with open_source(source, name) as stream:
        require_whole(stream, name)
        _require_short_pcm(stream, start, end, name)
        for samples, rate, _ in _cut(_decode_parts(stream, name), start, end):
            timeline.add(samples, rate)
    if timeline.rate is None:
        after = f" after {start:g} s (audio_start)" if start else ""
        raise UserError(f"{name}: holds no audio{after}; more than 20 ms are needed")
    return timeline.wave()


def audio_track(
    stream: Any,
    name: str,
    origin: float | None = None,
    end: float | None = None,
    shifts: Sequence[float] = (0.0,),
) -> Tensor | None:
    """The best audio track of a container -> float32 mono waveform [samples] at 16 kHz, or None.

    stream: seekable and binary. origin, end: seconds on the clock of the container, that of PyAV's
    `frame.time`. With an origin, every sample is put at its own time after the origin: gaps are
    filled with silence, and samples before the origin or after the end are dropped. Without one,
    the samples follow each other as they are stored. shifts: seconds to add to the times of each
    recording in the container, where others begin midway (RisingTimes). Where the rate or the
    number of channels changes, each part is resampled from its own rate. Raises UserError for a
    track that is unreadable, too short, too long or not finite.
    """
    require_whole(stream, name)
    timeline = _Timeline(name, origin)
    times = RisingTimes(shifts)
    for samples, rate, stored in _decode_parts(stream, name, timed=origin is not None):
        time = None if stored is None else times.repair(stored, step=GAP)
        if end is not None and time is not None and time >= end:
            break
        timeline.add(samples, rate, time)
    if timeline.rate is None:
        return None
    wave = timeline.wave()
    if origin is None or end is None:
        return wave
    length = max(0, round((end - origin) * INPUT_SAMPLE_RATE))
    return wave[:length]


def _start_and_end(options: MediaOptions, name: str) -> tuple[float, float | None]:
    """Checked audio_start (0 if not given) and audio_end (None if not given)."""
    start = _seconds(options.audio_start, "audio_start", name) or 0.0
    end = _seconds(options.audio_end, "audio_end", name)
    if end is not None and end <= start:
        raise UserError(f"{name}: audio_end ({end:g} s) is not behind audio_start ({start:g} s)")
    return start, end


def _seconds(value: Any, key: str, name: str) -> float | None:
    """A number of Python or numpy as float; None stays None.

    Raises UserError for other types and for numbers out of range.
    """
    if value is None:
        return None
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_START_S:
        raise UserError(
            f"{name}: {key} is {quote(value)}; expected seconds from 0 to {MAX_START_S}"
        )
    return float(value)


def _cut(blocks: Iterable[Block], start: float, end: float | None) -> Iterator[Block]:
    """The samples of blocks from start to end, in seconds.

    They begin at int(start * rate) and are int((end - start) * rate), as librosa counts them.
    """
    skip = 0  # samples still to be dropped
    keep: int | None = None  # samples still to be kept; None for all
    last_rate = None
    for samples, rate, time in blocks:
        if last_rate is None:
            skip = int(start * rate)
            keep = None if end is None else int((end - start) * rate)
        elif rate != last_rate:
            skip = skip * rate // last_rate
            keep = None if keep is None else keep * rate // last_rate
        last_rate = rate

        skipped = min(skip, len(samples))
        skip -= skipped
        stop = None if keep is None else skipped + keep
        kept = samples[skipped:stop]
        if len(kept):
            yield kept, rate, time
        if keep is not None:
            keep -= len(kept)
            if keep <= 0:
                return


# ------------------------------------------------------------------------------------- decoders


def _decode_parts(stream: Any, name: str, timed: bool = False) -> Iterator[Block]:
    """The blocks of _decode over all parts of a stream, where a new recording may begin midway."""
    count = 0
    for part in parts_of_stream(stream, name):
        has_no_times = is_ogg(part) and not timed
        blocks = _decode_ogg(part, name) if has_no_times else _decode(part, name)
        for block in blocks:
            count += block[0].size
            _require_few(count, name)
            yield block


def _decode_ogg(stream: Any, name: str) -> Iterator[Block]:
    """The blocks of _decode, without times.

    libsndfile cuts the padding from the end of short Ogg files, which ffmpeg keeps.
    """
    import soundfile

    watched = Watched(stream, name)
    try:
        stream.seek(0)
        file = soundfile.SoundFile(watched)
    except soundfile.SoundFileError:  # a codec that libsndfile does not know
        yield from _decode(stream, name)
        return
    with one_line_errors(name, "not readable as audio"), file:
        while len(samples := file.read(BLOCK, dtype="float32", always_2d=True)):
            yield samples, file.samplerate, None
        watched.require_read()


def _decode(stream: Any, name: str) -> Iterator[Block]:
    """Decode the best audio track of a container block by block."""
    import av

    errors = one_line_errors(name, "not readable as audio")
    with errors, open_container(stream, name) as (container, watched):
        track = best_track(container, "audio")
        if track is None:
            return
        format_now = None
        count = 0
        for frame in _frames(container, track, watched):
            count += frame.samples
            frame_format = (frame.format.name, frame.layout.name, frame.sample_rate)
            if frame_format != format_now:  # changes midway in some streams
                format_now = frame_format
                # Packed samples: for eight planes or more, PyAV's to_ndarray reads beyond them and
                # crashes.
                packed = av.AudioResampler(format="flt")
            for out in packed.resample(frame):
                samples = out.to_ndarray().reshape(out.samples, -1)
                yield samples, frame.sample_rate, frame.time

        announced = track.duration or 0
        if container.format.name == "flac" and count < announced < UNKNOWN_FLAC:
            raise UserError(
                f"{name}: cut short, {count} of {announced} samples are there; copy it again"
            )


def _frames(container: Any, track: Any, watched: Watched) -> Iterator[Any]:
    """The decoded frames of an audio track.

    Recordings of a broadcast begin and end within a frame. There the first and the last frame may
    be broken, but no others.
    """
    import av

    is_broadcast = container.format.name in BROADCAST
    has_begun = False
    broken = None
    for packet in container.demux(track):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            if not is_broadcast or (has_begun and broken):
                raise
            broken = error
            continue
        if frames and has_begun and broken:  # broken in the middle
            raise broken
        if frames:
            watched.zeros = 0
            has_begun = True
            broken = None
        yield from frames
    if broken and not has_begun:
        raise broken


# ------------------------------------------------------------------------------------- timeline


class _Timeline:
    """Joins blocks of samples of any rate to one waveform at 16 kHz.

    With an origin, each block is put at its own time. A part is a run of blocks of one rate that
    follow each other.
    """

    def __init__(self, name: str, origin: float | None = None):
        self.name = name
        self.origin = origin
        # One buffer at 16 kHz that doubles. A list of small arrays, allocated between large blocks,
        # fragments the memory.
        self.buffer = np.zeros(INPUT_SAMPLE_RATE, np.float32)
        self.length = 0  # samples in the buffer
        self.rate: float | None = None  # Hz of the current part
        self.resampler: Any = None  # of the current part
        self.begin = 0.0  # seconds from the origin to the current part
        self.read = 0  # samples of the current part, at its own rate
        self.made = 0  # samples of the current part, at 16 kHz
        self.drop = 0  # samples of the current part, at 16 kHz, that overlap the one before

    def add(self, samples: np.ndarray, rate: float, time: float | None = None) -> None:
        """Append samples [n, channels]; time in seconds on the clock of the origin."""
        if not len(samples):
            return
        self._require_valid(samples)

        # A new part begins where the rate changes, and where the time is off by more than GAP.
        expected = self.begin + self.read / self.rate if self.rate else None
        begin = expected or 0.0
        if self.origin is not None and time is not None:
            found = time - self.origin
            if expected is None or abs(found - expected) > GAP:
                begin = found
        if rate != self.rate or begin != expected:
            self._end_part()
            self._begin_part(rate, begin)

        self.read += len(samples)
        mono = _mixed(samples)
        if self.resampler is not None:
            mono = self.resampler.resample_chunk(mono)
        self._append(mono)

    def wave(self) -> Tensor:
        """All samples so far -> [samples]."""
        self._end_part()
        self.rate = None
        if self.length <= MIN_SAMPLES:
            milliseconds = self.length * 1000 / INPUT_SAMPLE_RATE
            raise UserError(
                f"{self.name}: {milliseconds:.0f} ms of audio; more than 20 ms are needed"
            )
        return torch.from_numpy(self.buffer[: self.length].copy())

    def _require_valid(self, samples: np.ndarray) -> None:
        low = float(samples.min())
        high = float(samples.max())
        if not (isfinite(low) and isfinite(high)):
            raise UserError(f"{self.name}: holds NaN or infinite samples; repair the recording")
        if max(high, -low) > MAX_AMPLITUDE:
            raise UserError(
                f"{self.name}: samples from {low:g} to {high:g}; expected floats from -1 to 1, "
                f"divide them by their full scale"
            )

    def _begin_part(self, rate: float, begin: float) -> None:
        import soxr

        _checked_rate(rate, self.name)
        self.rate = rate
        self.begin = begin
        self.read = 0
        self.made = 0
        self.drop = 0
        self.resampler = None
        if rate != INPUT_SAMPLE_RATE:
            self.resampler = soxr.ResampleStream(rate, INPUT_SAMPLE_RATE, 1, dtype="float32")
        if self.origin is None:
            return

        # Fill a gap with silence, and drop samples that overlap the part before.
        _require_short(begin, self.name)
        missing = round(begin * INPUT_SAMPLE_RATE) - self.length
        if missing > 0:
            self._append(np.zeros(missing, np.float32))
            self.made = 0
        self.drop = max(0, -missing)

    def _end_part(self) -> None:
        if self.resampler is None or self.rate is None:
            return
        self._append(self.resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        # Pad to the length that librosa gives, which the release's reader uses: rounded up.
        length = ceil(self.read * (INPUT_SAMPLE_RATE / self.rate))
        self._append(np.zeros(max(0, length - self.made), np.float32))
        self.resampler = None

    def _append(self, wave: np.ndarray) -> None:
        self.made += len(wave)
        kept = wave[self.drop :]
        self.drop -= len(wave) - len(kept)
        length = self.length + len(kept)
        _require_short(length / INPUT_SAMPLE_RATE, self.name)
        if length > len(self.buffer):
            capacity = max(length, 2 * len(self.buffer))
            self.buffer = np.pad(self.buffer, (0, capacity - len(self.buffer)))
        self.buffer[self.length : length] = kept
        self.length = length


def _mixed(samples: np.ndarray) -> np.ndarray:
    """The mean over the channels [n, channels] -> [n]."""
    mono = samples[:, 0].copy()
    for channel in range(1, samples.shape[1]):  # five times as fast as mean(1)
        mono += samples[:, channel]
    mono /= samples.shape[1]
    return mono


# ------------------------------------------------------------------------------------- arrays


def _array_and_rate(pair: tuple, name: str) -> tuple[Any, Any]:
    """(array, Hz) as most write it, or (Hz, array) as scipy and gradio do -> array, Hz."""
    if len(pair) == 2:
        for array, rate in (pair, pair[::-1]):
            if _is_array(array) and _is_scalar(rate):
                return array, rate
    kinds = ", ".join(type(item).__name__ for item in pair[:5])
    raise UserError(f"{name}: a tuple of ({shorten(kinds)}); expected (array, sampling rate in Hz)")


def _is_array(value: Any) -> bool:
    """Whether a value is a list, or an array or tensor of at least one dimension."""
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim > 0
    return isinstance(value, list)


def _is_scalar(value: Any) -> bool:
    """Whether a value has no dimensions."""
    try:
        return np.ndim(value) == 0
    except ValueError:  # ragged lists
        return False


def _of_array(source: Any, rate: Any, start: float, end: float | None, name: str) -> Tensor:
    """An array and its rate -> the result of load_audio.

    The array is [samples], [samples, channels] or [channels, samples].
    """
    rate = _checked_rate(rate, name)
    samples = _channels_last(source, name)
    first = int(start * rate)
    last = None if end is None else int(end * rate)
    samples = samples[first:last]
    if start and not len(samples):
        raise UserError(f"{name}: holds no audio after {start:g} s (audio_start)")

    # Checked before anything is computed: a broadcast array may have any length.
    _require_short(len(samples) / rate, name)
    _require_few(len(samples) * samples.shape[1], name)

    timeline = _Timeline(name)
    dtype = None
    peak = 0  # of signed integers
    for i in range(0, len(samples), BLOCK):
        block = to_numpy(samples[i : i + BLOCK], name)
        dtype = block.dtype
        if dtype.kind == "i":
            peak = max(peak, int(block.max()), -int(block.min()))
        timeline.add(_as_float(block, name), rate)
    if dtype == np.int32:
        _require_full_range(peak, name)
    return timeline.wave()


def _channels_last(source: Any, name: str) -> Any:
    """An array or tensor in one of the layouts of _of_array -> [samples, channels]."""
    is_strided = isinstance(source, Tensor) and source.layout == torch.strided
    if not isinstance(source, np.ndarray) and not is_strided:
        source = to_numpy(source, name)
    shape = shape_of(source, name)
    samples = source
    if len(shape) == 1:
        samples = source[:, None]
    elif len(shape) == 2 and shape[0] < shape[1]:
        samples = source.T
    if len(shape) not in (1, 2) or not 1 <= samples.shape[1] <= MAX_CHANNELS:
        raise UserError(
            f"{name}: audio of shape {shorten(shape, 60)}; expected [samples] or [samples, "
            f"channels], at most {MAX_CHANNELS} channels"
        )
    return samples


def _as_float(samples: np.ndarray, name: str) -> np.ndarray:
    """Samples as float32; integers are scaled to -1 ... 1."""
    kind = samples.dtype.kind
    if kind == "f":
        return samples.astype(np.float32)
    if (kind, samples.dtype.itemsize) not in INTEGER_TYPES:
        raise UserError(
            f"{name}: samples of type {samples.dtype}, which does not tell their scale; give "
            f"int16, int32 over its full range, or floats from -1 to 1"
        )
    full_scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
    zero = full_scale if kind == "u" else 0  # unsigned samples have it in the middle of their range
    return ((samples - zero) / full_scale).astype(np.float32)


def _require_full_range(peak: int, name: str) -> None:
    """Raise UserError for int32 samples whose peak shows that they were not scaled."""
    if not 0 < peak <= MAX_UNSCALED:
        return
    bits = 24
    advice = f"divide them by {MAX_UNSCALED} and give floats from -1 to 1"
    if peak <= 1 << 15:
        bits = 16
        advice = "give int16"
    raise UserError(
        f"{name}: samples of type int32 that reach {peak} at most; expected its full range, up to "
        f"{2**31 - 1}; if they are {bits}-bit values, {advice}"
    )


# ------------------------------------------------------------------------------------- limits


def _checked_rate(rate: Any, name: str) -> float:
    """A plausible sampling rate in Hz. Raises UserError for others."""
    if isinstance(rate, (np.ndarray, np.generic, Tensor)) and rate.ndim == 0:
        rate = to_numpy(rate, name).item()
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not is_number or not 1 <= rate <= MAX_RATE:
        raise UserError(
            f"{name}: {shorten(rate, 60)} samples per second; expected the sampling rate in Hz, "
            f"1 to {MAX_RATE}"
        )
    return int(rate) if rate == int(rate) else float(rate)


def _require_short(seconds: float, name: str) -> None:
    if seconds > MAX_AUDIO_S:
        raise UserError(
            f"{name}: more than {MAX_AUDIO_S:.0f} s of audio; the largest model's context "
            f"holds no more, cut it into shorter ones"
        )


def _require_short_pcm(stream: Any, start: float, end: float | None, name: str) -> None:
    """Raise UserError for a wav that is too long by its header.

    To decode it first and then refuse it would take minutes.
    """
    with one_line_errors(name, "its header cannot be read"):
        found = pcm_samples(stream)
    if found is None:
        return
    samples, rate = found
    kept = samples - int(start * rate)
    if end is not None:
        kept = min(kept, int((end - start) * rate))
    _require_short(kept / rate, name)


def _require_few(count: int, name: str) -> None:
    if count > MAX_SAMPLES:
        raise UserError(
            f"{name}: more than {MAX_SAMPLES} samples over all channels; convert it to 16000 Hz, "
            f"mono"
        )
