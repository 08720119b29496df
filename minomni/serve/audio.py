"""Audio of the API: waveforms to its formats, and 16-bit samples to waveforms."""

import io
import struct
from math import ceil, gcd

import numpy as np
import soxr
from torch import Tensor

from minomni.config import INPUT_SAMPLE_RATE

WIRE_RATE = 24_000  # Hz of OpenAI's pcm16
# Format of the API -> media type.
MEDIA_TYPES = {
    "wav": "audio/wav",
    "pcm16": "audio/pcm",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
}
# Format -> soundfile's format and subtype.
SOUNDFILE = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}
BLOCK = 65_536  # samples encoded per call
UNKNOWN_LENGTH = 0xFFFF_FFFF  # in the head of a wav
# Samples at the lower rate, on each side, that an output sample of soxr depends on: 6 ms at 16 kHz.
FILTER = 96


def pcm16(samples: np.ndarray) -> bytes:
    """Floats [n] in [-1, 1] -> 16-bit little-endian samples."""
    scaled = np.clip(samples * 32768.0, -32768, 32767)
    return np.rint(scaled).astype("<i2").tobytes()


class Resampler:
    """Chunks of a waveform at one rate -> the same at another rate, without seams.

    A stream of soxr holds back up to 32 ms at these rates, half of the first chunk of an answer.
    This one holds back what its filter reads, and keeps as much of what came before.
    """

    def __init__(self, from_rate: int, to_rate: int):
        self.from_rate = from_rate
        self.to_rate = to_rate
        # So many samples at from_rate last as long as so many at to_rate.
        self.step = from_rate // gcd(from_rate, to_rate)
        self.to_step = to_rate // gcd(from_rate, to_rate)
        self.margin = ceil(FILTER * from_rate / min(from_rate, to_rate) / self.step)  # in steps
        self.clear()

    def clear(self) -> None:
        """Begin a new waveform."""
        self.samples = np.zeros(0, np.float32)  # at from_rate, from a whole step on
        self.done = 0  # steps of them that have been handed out

    def feed(self, chunk: np.ndarray) -> np.ndarray:
        """The next samples [n] -> those [m] at the other rate that are complete."""
        self.samples = np.concatenate((self.samples, chunk))
        ready = len(self.samples) // self.step - self.margin
        if ready <= self.done:
            return np.zeros(0, np.float32)
        resampled = self.resampled()[self.done * self.to_step : ready * self.to_step]
        kept_from = max(0, ready - self.margin)
        self.samples = self.samples[kept_from * self.step :]
        self.done = ready - kept_from
        return resampled

    def finish(self) -> np.ndarray:
        """The end of the waveform [m]. The next chunk begins a new one."""
        rest = self.resampled()[self.done * self.to_step :]
        self.clear()
        return rest

    def resampled(self) -> np.ndarray:
        """All samples at the other rate."""
        if not len(self.samples):
            return self.samples
        return soxr.resample(self.samples, self.from_rate, self.to_rate)


class AudioSender:
    """Chunks of a waveform of any rate -> 16-bit samples at WIRE_RATE, without seams."""

    def __init__(self, sample_rate: int):
        self.resampler = None
        if sample_rate != WIRE_RATE:
            self.resampler = Resampler(sample_rate, WIRE_RATE)

    def feed(self, wave: Tensor) -> bytes:
        """The next chunk [samples]. The resampler holds back a few."""
        samples = wave.cpu().numpy().astype(np.float32)
        if self.resampler is not None:
            samples = self.resampler.feed(samples)
        return pcm16(samples)

    def finish(self) -> bytes:
        """The end of the waveform: what the resampler held back."""
        return b"" if self.resampler is None else pcm16(self.resampler.finish())


class AudioReceiver:
    """16-bit samples at WIRE_RATE, in chunks of any length -> waveform at the model's rate."""

    def __init__(self) -> None:
        self.resampler = Resampler(WIRE_RATE, INPUT_SAMPLE_RATE)

    def feed(self, data: bytes) -> np.ndarray:
        """Little-endian samples -> float32 [samples] at 16 kHz. The resampler holds back a few."""
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768.0
        return self.resampler.feed(samples)

    def finish(self) -> np.ndarray:
        """The end of the audio: what the resampler held back. The next chunk begins a new one."""
        return self.resampler.finish()


def encode(wave: Tensor, sample_rate: int, name: str) -> bytes:
    """A waveform [samples] in one of the formats MEDIA_TYPES."""
    if name == "pcm16":
        sender = AudioSender(sample_rate)
        return sender.feed(wave) + sender.finish()
    if name == "aac":
        return encode_aac(wave, sample_rate)
    import soundfile

    samples = wave.cpu().numpy()
    container, subtype = SOUNDFILE[name]
    encoded = io.BytesIO()
    with soundfile.SoundFile(
        encoded, "w", sample_rate, channels=1, subtype=subtype, format=container
    ) as file:
        for start in range(0, len(samples), BLOCK):
            file.write(samples[start : start + BLOCK])
    return encoded.getvalue()


def encode_aac(wave: Tensor, sample_rate: int) -> bytes:
    """A waveform [samples] as an ADTS stream."""
    import av

    encoded = io.BytesIO()
    with av.open(encoded, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=sample_rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave.cpu().numpy()[None], format="fltp", layout="mono")
        frame.sample_rate = sample_rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return encoded.getvalue()


def wav_header(sample_rate: int) -> bytes:
    """The head of a wav of unknown length, for a stream."""
    bytes_per_s = 2 * sample_rate
    channels = 1
    pcm = 1
    return b"".join(
        (
            b"RIFF",
            struct.pack("<I", UNKNOWN_LENGTH),
            b"WAVEfmt ",
            struct.pack("<IHHIIHH", 16, pcm, channels, sample_rate, bytes_per_s, 2, 16),
            b"data",
            struct.pack("<I", UNKNOWN_LENGTH),
        )
    )
