"""Mel to sound: BigVGAN, a stack of upsampling convolutions with periodic activations that do not alias.

Source: BigVGAN (arXiv 2206.04658), SnakeBeta in log scale, modified by the release (no tanh, mean of the blocks).
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minomni.config import BigVGANConfig


@cache
def kaiser_taps() -> tuple[float, ...]:
    """The 12 taps of the half-band low-pass around every activation: Kaiser-windowed sinc, cutoff a quarter of the rate.

    Plain numbers and no buffer: they are in no checkpoint, and so a model built on the meta device has nothing to fix.
    """
    attenuation = 2.285 * 5 * math.pi * 4 * 0.3 + 7.95  # dB, for 12 taps and a transition 0.3 wide
    window = torch.kaiser_window(12, periodic=False, beta=0.1102 * (attenuation - 8.7), dtype=torch.float64)
    taps = window * torch.sinc(0.5 * (torch.arange(12, dtype=torch.float64) - 5.5))
    return tuple((taps / taps.sum()).tolist())


class SnakeBeta(nn.Module):
    """x + sin^2(a x) / b for each channel, a and b stored as logarithms."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x + (x * alpha).sin().square() / (beta + 1e-9)


class AntiAliasedActivation(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.act = SnakeBeta(channels)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        taps = torch.tensor(kaiser_taps(), device=x.device, dtype=x.dtype).expand(channels, 1, -1)
        x = 2 * F.conv_transpose1d(F.pad(x, (5, 5), mode="replicate"), taps, stride=2, groups=channels)[..., 15:-15]
        return F.conv1d(F.pad(self.act(x), (5, 6), mode="replicate"), taps, stride=2, groups=channels)


class AMPBlock(nn.Module):
    """Anti-aliased multi-periodicity block: three residual pairs of convolutions, [B, C, T] -> same."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1 = nn.ModuleList(nn.Conv1d(channels, channels, kernel_size, dilation=d, padding="same") for d in dilations)
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel_size, padding="same") for _ in dilations)
        self.activations = nn.ModuleList(AntiAliasedActivation(channels) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv1, conv2) in enumerate(zip(self.convs1, self.convs2)):
            x = x + conv2(self.activations[2 * i + 1](conv1(self.activations[2 * i](x))))
        return x


class BigVGAN(nn.Module):
    """Natural-log mel [B, 80, T] -> waveform [B, T * prod(upsample_rates)] within [-1, 1]. Keep it in float32."""

    def __init__(self, config: BigVGANConfig):
        super().__init__()
        channels = [config.upsample_initial_channel // 2**i for i in range(len(config.upsample_rates) + 1)]
        self.conv_pre = nn.Conv1d(config.mel_dim, channels[0], 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ModuleList([nn.ConvTranspose1d(channels[i], channels[i + 1], kernel, rate, padding=(kernel - rate) // 2)])
            for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes))
        )
        self.kinds = len(config.resblock_kernel_sizes)  # of AMP blocks, side by side in each stage
        self.resblocks = nn.ModuleList(
            AMPBlock(width, kernel, dilations)
            for width in channels[1:]
            for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes)
        )
        self.activation_post = AntiAliasedActivation(channels[-1])
        self.conv_post = nn.Conv1d(channels[-1], 1, 7, padding=3, bias=False)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.conv_pre(normalise(mel))  # [B, C, T]
        for i, (up,) in enumerate(self.ups):
            x = up(x)  # [B, C/2, rate * T]
            x = sum(block(x) for block in self.resblocks[self.kinds * i : self.kinds * (i + 1)]) / self.kinds
        return self.conv_post(self.activation_post(x)).clamp(-1, 1).squeeze(1)  # [B, samples]


def normalise(mel: Tensor) -> Tensor:
    """Natural-log magnitudes to decibels, and those from -115 dB .. 0 dB to -1 .. 1."""
    decibels = 20 * torch.log10(mel.exp().clamp(min=10 ** (-115 / 20))) - 20
    return (2 * (decibels + 115) / 115 - 1).clamp(-1, 1)
