"""Audio of the API: waveforms to its formats, and 16-bit samples to waveforms."""

import io
import struct

import numpy as np
import soxr
import torch
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


def pcm16(samples: np.ndarray) -> bytes:
    """Floats [n] in [-1, 1] -> 16-bit little-endian samples."""
    scaled = np.clip(samples * 32768.0, -32768, 32767)
    return np.rint(scaled).astype("<i2").tobytes()


class AudioSender:
    """Chunks of a waveform of any rate -> 16-bit samples at WIRE_RATE, without seams."""

    def __init__(self, sample_rate: int):
        self.resampler = None
        if sample_rate != WIRE_RATE:
            self.resampler = soxr.ResampleStream(sample_rate, WIRE_RATE, 1, dtype="float32")

    def feed(self, wave: Tensor, last: bool = False) -> bytes:
        """The next chunk [samples]; last: flush what the resampler holds back."""
        samples = wave.cpu().numpy().astype(np.float32)
        if self.resampler is not None:
            samples = self.resampler.resample_chunk(samples, last=last)
        return pcm16(samples)

    def finish(self) -> bytes:
        """The end of the waveform."""
        return self.feed(torch.zeros(0), last=True)


class AudioReceiver:
    """16-bit samples at WIRE_RATE, in chunks of any length -> waveform at the model's rate."""

    def __init__(self) -> None:
        self.resampler = soxr.ResampleStream(WIRE_RATE, INPUT_SAMPLE_RATE, 1, dtype="float32")

    def feed(self, data: bytes) -> np.ndarray:
        """Little-endian samples -> float32 [samples] at 16 kHz. The resampler holds back some."""
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768.0
        return self.resampler.resample_chunk(samples)

    def finish(self) -> np.ndarray:
        """The end of the audio: what the resampler held back. The next chunk begins a new one."""
        rest = self.resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        self.resampler.clear()
        return rest


def encode(wave: Tensor, sample_rate: int, name: str) -> bytes:
    """A waveform [samples] in one of the formats MEDIA_TYPES."""
    if name == "pcm16":
        return AudioSender(sample_rate).feed(wave, last=True)
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
