"""Waveform to mel: 128 bands for the Thinker's ears, 80 for codec, DiT and vocoder. Both at 100
frames per second.
"""

from functools import cache
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from minomni.config import LISTENING_RATE, MEL_RATE

HOP = LISTENING_RATE // MEL_RATE  # samples per mel frame
LOG_FFT, LOG_BANDS = 400, 128  # the Thinker's: 25 ms window
VOICE_FFT, VOICE_WINDOW, VOICE_BANDS = 1024, 640, 80  # the voice side's: 40 ms window


def hz_to_mel(hz: Tensor) -> Tensor:
    """Slaney's scale: linear below 1000 Hz (3 mels per 200 Hz), logarithmic above (27 mels per
    factor of 6.4).
    """
    return torch.where(
        hz < 1000, 3 * hz / 200, 15 + 27 * (hz / 1000).clamp_min(1e-9).log() / log(6.4)
    )


def mel_to_hz(mel: Tensor) -> Tensor:
    """The inverse of hz_to_mel."""
    return torch.where(mel < 15, 200 * mel / 3, 1000 * torch.exp((mel - 15) * log(6.4) / 27))


@cache
def mel_filters(n_fft: int, bands: int) -> Tensor:
    """Triangular filters, equally spaced in mels from 0 to 8000 Hz, each of area 1 -> [bands, n_fft
    / 2 + 1].
    """
    top = hz_to_mel(torch.tensor(LISTENING_RATE / 2, dtype=torch.float64))
    edges = mel_to_hz(torch.linspace(0, float(top), bands + 2, dtype=torch.float64))[
        :, None
    ]  # [bands + 2, 1]
    bins = torch.linspace(0, LISTENING_RATE / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles = torch.minimum(rising, falling).clamp_min(0)  # [bands, bins]
    return (triangles * 2 / (edges[2:] - edges[:-2])).float()


def num_audio_tokens(frames: int) -> int:
    """How many tokens the Thinker's ears make of mel frames: two halvings, one token per 40 ms."""
    return (frames + 1) // 4


def log_power(wave: Tensor) -> Tensor:
    """Waveform [samples] or [B, samples] at 16 kHz -> log10 of power in 128 bands [..., 128, F +
    some], F log_mel's.

    Power spectrum of 25 ms Hann windows, the one of frame t centred on sample 160 t. The clip is
    followed by silence and not by its reflection, as the release's padding to 300 s makes it;
    frames after F still hear the clip's end.
    """
    frames = -(-wave.shape[-1] // HOP)
    padded = F.pad(wave, (0, frames * HOP + LOG_FFT - wave.shape[-1]))
    window = torch.hann_window(LOG_FFT, device=wave.device)
    spectrum = torch.stft(
        padded, LOG_FFT, HOP, window=window, center=True, pad_mode="reflect", return_complex=True
    )
    power = spectrum.abs() ** 2  # [..., 201, F + some]
    return (mel_filters(LOG_FFT, LOG_BANDS).to(wave.device) @ power).clamp_min(1e-10).log10()


def normalize_log_mel(power: Tensor, peak: Tensor) -> Tensor:
    """log_power() -> cut 8 (80 dB) below the peak, the clip's loudest point, and scaled to about -1
    ... 1.
    """
    return (torch.maximum(power, peak - 8.0) + 4.0) / 4.0


def log_mel(wave: Tensor) -> Tensor:
    """Waveform [samples] or [B, samples] at 16 kHz -> log-mel [128, F] or [B, 128, F], F =
    ceil(samples / 160).

    Source: release feature extractor; Whisper's recipe with 128 bands.
    """
    power = log_power(wave)
    return normalize_log_mel(power, power.amax((-2, -1), keepdim=True))[
        ..., : -(-wave.shape[-1] // HOP)
    ]


def voice_mel(wave: Tensor) -> Tensor:
    """Waveform [samples] or [B, samples] at 16 kHz -> natural-log mel [T, 80] or [B, T, 80], T =
    samples // 160.

    Magnitude spectrum of 40 ms Hann windows; frame t is centred on sample 160 t + 80, so mel and
    wave cut alike. Differentiable: the vocoder learns through it (its settings follow Qwen3-TTS'
    published speaker code).
    """
    side = (VOICE_FFT - HOP) // 2
    rows = wave if wave.dim() == 2 else wave[None]
    padded = F.pad(rows[:, None], (side, side), mode="reflect")[:, 0]
    window = torch.hann_window(VOICE_WINDOW, device=wave.device)
    spectrum = torch.stft(
        padded, VOICE_FFT, HOP, VOICE_WINDOW, window, center=False, return_complex=True
    )
    magnitude = (
        spectrum.real**2 + spectrum.imag**2 + 1e-18
    ).sqrt()  # the tiny term keeps silence's gradient finite
    mel = (
        (mel_filters(VOICE_FFT, VOICE_BANDS).to(wave.device) @ magnitude)
        .clamp_min(1e-5)
        .log()
        .transpose(1, 2)
    )
    return mel if wave.dim() == 2 else mel[0]
