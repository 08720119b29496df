"""Sound: files, bytes and arrays to a mono wave at 16 kHz."""

import numpy as np
import torch
from torch import Tensor

from ..config import LISTENING_RATE
from ..errors import UserError
from .options import MediaOptions
from .source import complaints, name_of, open_source, require_whole

SHORTEST = LISTENING_RATE // 50  # samples: 20 ms or less make no audio token


def load_audio(source, options: MediaOptions = MediaOptions()) -> Tensor:
    """Anything that holds sound -> float32 mono wave [samples] at 16 kHz.

    source: path (wav, flac, ogg, mp3, or what PyAV reads), bytes, array [samples] taken as 16 kHz, or (array, Hz); two-
    dimensional arrays are [samples, channels]. Raises UserError for what is missing, unreadable, too
    short or not finite.
    """
    name = name_of(source, "audio")
    return to_wave(*_decode_audio(source, name), name)


def to_wave(samples: np.ndarray, rate: int, name: str) -> Tensor:
    """Decoded samples [n] or [n, channels] -> what load_audio promises."""
    if samples.ndim == 2:
        samples = samples.mean(1)
    if samples.ndim != 1:
        raise UserError(f"{name}: sound of shape {samples.shape}; expected [samples] or [samples, channels]")
    if not np.isfinite(samples).all():
        raise UserError(f"{name}: holds NaN or infinite samples; repair the recording")
    if rate <= 0:
        raise UserError(f"{name}: {rate} samples per second; expected the sampling rate in Hz")
    if rate != LISTENING_RATE:
        import soxr

        samples = soxr.resample(samples, rate, LISTENING_RATE)
    if len(samples) <= SHORTEST:
        raise UserError(f"{name}: {len(samples) * 1000 / LISTENING_RATE:.0f} ms of sound; more than 20 ms are needed")
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


def _decode_audio(source, name) -> tuple[np.ndarray, int]:
    if isinstance(source, tuple):
        return _unit(np.asarray(source[0])), int(source[1])
    if isinstance(source, (np.ndarray, Tensor)):
        return _unit(np.asarray(source)), LISTENING_RATE
    import soundfile

    with open_source(source, name) as stream:
        try:
            return soundfile.read(stream, dtype="float32")
        except (soundfile.SoundFileError, TypeError):  # TypeError: a name ending in .raw is taken at its word
            stream.seek(0)
        track = audio_track(stream, name)
    if track is None:
        raise UserError(f"{name}: holds no sound")
    return track


def _unit(samples: np.ndarray) -> np.ndarray:
    """Samples as float32; those of whole numbers come to -1..1 first."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    if samples.dtype.kind not in "iu":
        raise UserError(f"the audio given: samples of type {samples.dtype}; expected numbers, float or integer")
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    middle = half if samples.dtype.kind == "u" else 0  # unsigned samples swing about the middle of their range
    return ((samples - middle) / half).astype(np.float32)


def audio_track(stream, name) -> tuple[np.ndarray, int] | None:
    """The first sound track of a container: mono [samples] and its Hz. None where there is none."""
    import av

    require_whole(stream, name)
    with complaints(name, "not readable as sound"), av.open(stream) as container:
        if not container.streams.audio:
            return None
        planar, pieces, rate = av.AudioResampler(format="fltp"), [], LISTENING_RATE
        for frame in container.decode(audio=0):
            rate = frame.sample_rate
            pieces += [out.to_ndarray().mean(0) for out in planar.resample(frame)]  # each [samples]
    return (np.concatenate(pieces), rate) if pieces else None
