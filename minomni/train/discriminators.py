"""Discriminators: networks that tell recordings from the vocoder's waveforms, in training only.

As for BigVGAN (arXiv 2206.04658, sec. 2.1), with fewer channels, for a CPU. A mel leaves the phase
open. Spectral losses average over it, which sounds like a buzz; a discriminator accepts any
waveform that could be a recording.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minomni.train.losses import stft_magnitude

PERIODS = (2, 3, 5, 7, 11)  # samples, as in HiFi-GAN
PERIOD_CHANNELS = (16, 32, 64, 128)
FFT_SIZES = (256, 512, 1024)  # samples
SPECTROGRAM_CHANNELS = (8, 8, 8, 8)
SLOPE = 0.1  # of the leaky ReLU below zero

Size = tuple[int, int]  # height and width
# Scores [B, N], one per place of the waveform, and the activations of all layers
Judgment = tuple[Tensor, list[Tensor]]


class Discriminator(nn.Module):
    """Convolutions over an image that is made of the waveform; subclasses make it.

    kernel, stride and score_kernel: (height, width).
    """

    def __init__(self, channels: tuple[int, ...], kernel: Size, stride: Size, score_kernel: Size):
        super().__init__()
        self.layers = nn.ModuleList()
        inputs = 1
        for outputs in channels:
            self.layers.append(nn.Conv2d(inputs, outputs, kernel, stride, half(kernel)))
            inputs = outputs
        self.score = nn.Conv2d(inputs, 1, score_kernel, padding=half(score_kernel))

    def image(self, wave: Tensor) -> Tensor:
        """Waveforms [B, samples] -> [B, 1, height, width]."""
        raise NotImplementedError

    def forward(self, wave: Tensor) -> Judgment:
        x = self.image(wave)
        activations = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)  # [B, channels, height, width]
            activations.append(x)
        return self.score(x).flatten(1), activations


def half(kernel: Size) -> Size:
    """The padding with which an odd kernel keeps an image's size."""
    return kernel[0] // 2, kernel[1] // 2


class PeriodDiscriminator(Discriminator):
    """Sees every period-th sample in one column (arXiv 2010.05646, sec. 2.3)."""

    def __init__(self, period: int):
        super().__init__(PERIOD_CHANNELS, kernel=(5, 1), stride=(3, 1), score_kernel=(3, 1))
        self.period = period

    def image(self, wave: Tensor) -> Tensor:
        padding = -wave.shape[1] % self.period
        padded = F.pad(wave[:, None], (0, padding), mode="reflect")
        return padded.unflatten(-1, (-1, self.period))  # [B, 1, samples / period, period]


class SpectrogramDiscriminator(Discriminator):
    """Sees the log magnitudes of an STFT (arXiv 2106.07889, sec. 2.3, without the logarithm)."""

    def __init__(self, fft_size: int):
        super().__init__(SPECTROGRAM_CHANNELS, kernel=(9, 3), stride=(2, 1), score_kernel=(3, 3))
        self.fft_size = fft_size

    def image(self, wave: Tensor) -> Tensor:
        return stft_magnitude(wave, self.fft_size).log()[:, None]  # [B, 1, bins, frames]


class Discriminators(nn.Module):
    """One discriminator per period and one per FFT size."""

    def __init__(self) -> None:
        super().__init__()
        periods = [PeriodDiscriminator(period) for period in PERIODS]
        spectrograms = [SpectrogramDiscriminator(fft_size) for fft_size in FFT_SIZES]
        self.members = nn.ModuleList([*periods, *spectrograms])

    def forward(self, wave: Tensor) -> list[Judgment]:
        return [member(wave) for member in self.members]


def fixed(module: nn.Module, wave: Tensor) -> list[Judgment]:
    """What the discriminators say about waveforms [B, samples]; the gradient reaches the waveforms
    and not the weights.
    """
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, weights, (wave,))
