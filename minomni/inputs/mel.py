"""Waveform to mel spectrogram: 128 bands for the audio encoder, 80 for codec, DiT and vocoder.

Both have 100 frames per second.
"""

from functools import cache
from math import ceil, log
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from minomni.config import INPUT_SAMPLE_RATE, MEL_RATE

Frames = TypeVar("Frames", int, torch.Tensor)

HOP = INPUT_SAMPLE_RATE // MEL_RATE  # samples per mel frame

# Of the audio encoder: 25 ms window.
LOG_FFT = 400
LOG_BANDS = 128
DYNAMIC_RANGE = 8.0  # log10 power below the peak at which normalize_log_mel() clips: 80 dB

# Of speech synthesis: 40 ms window.
VOICE_FFT = 1024
VOICE_WINDOW = 640
VOICE_BANDS = 80


def hz_to_mel(hz: Tensor) -> Tensor:
    """Slaney's mel scale.

    Linear below 1000 Hz (3 mels per 200 Hz), logarithmic above (27 mels per factor of 6.4).
    """
    linear = 3 * hz / 200
    logarithmic = 15 + 27 * (hz / 1000).clamp_min(1e-9).log() / log(6.4)
    return torch.where(hz < 1000, linear, logarithmic)


def mel_to_hz(mel: Tensor) -> Tensor:
    """The inverse of hz_to_mel."""
    linear = 200 * mel / 3
    exponential = 1000 * torch.exp((mel - 15) * log(6.4) / 27)
    return torch.where(mel < 15, linear, exponential)


@cache
def mel_filters(n_fft: int, bands: int) -> Tensor:
    """Triangular filters, equally spaced in mels from 0 to 8000 Hz, each of area 1.

    -> [bands, n_fft / 2 + 1]
    """
    nyquist = INPUT_SAMPLE_RATE / 2
    highest_mel = hz_to_mel(torch.tensor(nyquist, dtype=torch.float64))
    mels = torch.linspace(0, float(highest_mel), bands + 2, dtype=torch.float64)
    edges = mel_to_hz(mels)[:, None]  # [bands + 2, 1]
    bins = torch.linspace(0, nyquist, n_fft // 2 + 1, dtype=torch.float64)

    # Band k rises from edge k to its center, edge k + 1, and falls to edge k + 2.
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins - left) / (center - left)
    falling = (right - bins) / (right - center)
    triangles = torch.minimum(rising, falling).clamp_min(0)  # [bands, bins]
    return (triangles * 2 / (right - left)).float()


def num_audio_tokens(frames: Frames) -> Frames:
    """Tokens that the audio encoder makes of mel frames: halved twice, one token per 40 ms.

    An int or a tensor of ints; none for one or two frames.
    """
    return (frames + 1) // 4


def log_power(wave: Tensor) -> Tensor:
    """Waveform [samples] or [B, samples], 16 kHz -> log10 power of bands [..., 128, n].

    n is F, the number of frames of log_mel, plus a few. Power spectrum of 25 ms Hann
    windows; the window of frame t is centered on sample 160 t. The end of the clip is
    padded with silence, not by reflection, as the release's padding to 300 s does; the
    windows of the frames after F still overlap the clip.
    """
    samples = wave.shape[-1]
    frames = ceil(samples / HOP)
    padded = F.pad(wave, (0, frames * HOP + LOG_FFT - samples))
    window = torch.hann_window(LOG_FFT, dtype=wave.dtype, device=wave.device)
    spectrum = torch.stft(
        padded,
        LOG_FFT,
        HOP,
        window=window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power = spectrum.abs() ** 2  # [..., 201, n]
    filters = mel_filters(LOG_FFT, LOG_BANDS).to(wave)
    return (filters @ power).clamp_min(1e-10).log10()


def normalize_log_mel(power: Tensor, peak: Tensor) -> Tensor:
    """log_power() -> scaled and clipped DYNAMIC_RANGE below `peak`, the maximum.

    The result spans at most two units; where it lies depends on how loud the clip is.
    """
    return (torch.maximum(power, peak - DYNAMIC_RANGE) + 4.0) / 4.0


def log_mel(wave: Tensor) -> Tensor:
    """Waveform [samples] or [B, samples] at 16 kHz -> log-mel [128, F] or [B, 128, F].

    F = ceil(samples / 160). Source: release feature extractor; Whisper's recipe with
    128 bands.
    """
    power = log_power(wave)
    peak = power.amax((-2, -1), keepdim=True)
    frames = ceil(wave.shape[-1] / HOP)
    return normalize_log_mel(power, peak)[..., :frames]


def voice_mel(wave: Tensor) -> Tensor:
    """Waveform [samples] or [B, samples] at 16 kHz -> natural-log mel [T, 80] or [B, T, 80].

    T = samples // 160. Magnitude spectrum of 40 ms Hann windows; frame t is centered on sample
    160 t + 80, so a cut of the mel and the same cut of the waveform match. Differentiable, since
    the vocoder is trained through it. The settings follow the published speaker code of Qwen3-TTS.
    """
    waves = wave if wave.dim() == 2 else wave[None]
    side = (VOICE_FFT - HOP) // 2
    padded = F.pad(waves[:, None], (side, side), mode="reflect")[:, 0]
    window = torch.hann_window(VOICE_WINDOW, device=wave.device)
    spectrum = torch.stft(
        padded, VOICE_FFT, HOP, VOICE_WINDOW, window, center=False, return_complex=True
    )
    # 1e-18 keeps the gradient of silence finite.
    magnitude = (spectrum.real**2 + spectrum.imag**2 + 1e-18).sqrt()

    filters = mel_filters(VOICE_FFT, VOICE_BANDS).to(wave.device)
    mel = (filters @ magnitude).clamp_min(1e-5).log().transpose(1, 2)  # [B, T, 80]
    return mel if wave.dim() == 2 else mel[0]
