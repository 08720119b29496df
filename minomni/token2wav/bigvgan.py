"""Mel to sound: BigVGAN, a stack of upsampling convolutions with periodic activations that do not
alias.

Inside, sound is [B, T, C]: with the channels of one moment side by side, convolutions of few
channels train on a CPU in 60 % of the time, and a shift in time is a shift of whole rows. Source:
BigVGAN (arXiv 2206.04658), SnakeBeta in log scale, modified by the release (no tanh, mean of the
blocks).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minomni.config import BigVGANConfig


@cache
def kaiser_taps() -> tuple[float, ...]:
    """The 12 taps of the low-pass around every activation: Kaiser-windowed sinc, cutoff a quarter
    of the doubled rate.

    Plain numbers and no buffer: they are in no checkpoint, and so a model built on the meta device
    has nothing to fix.
    """
    attenuation = 2.285 * 5 * math.pi * 4 * 0.3 + 7.95  # dB, for 12 taps and a transition 0.3 wide
    exact = {"dtype": torch.float64, "device": "cpu"}
    window = torch.kaiser_window(12, periodic=False, beta=0.1102 * (attenuation - 8.7), **exact)
    taps = window * torch.sinc(0.5 * (torch.arange(12, **exact) - 5.5))
    return tuple((taps / taps.sum()).tolist())


class AntiAliasedSnake(torch.autograd.Function):
    """Double the rate, x + b sin^2(a x), halve the rate, with the gradient written by hand.

    A vocoder spends most of its time here; this trains twice as fast as padding and depthwise
    convolutions. Both rate changes are the same 12 taps, of which a sample ever meets six: the even
    samples of the doubled signal and the odd ones stay apart, [2, B, T, C], and a filter is six
    shifted additions of whole tensors. Beyond its ends a signal goes on with its first and last
    value, kept as three more rows on each side of a `wide` tensor, [B, T + 6, C].
    """

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """x [B, T, C], a and b [T, C] -> [B, T, C]."""
        halves = double_rate(x)  # [2, B, T, C]
        sine = (halves * a).sin_()
        ctx.save_for_backward(halves, sine, a, b)
        return halve_rate(sine.square().mul_(b).add_(halves))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        halves, sine, a, b = ctx.saved_tensors
        grad = halve_rate_adjoint(grad)  # [2, B, T, C]
        spare = sine.square().mul_(
            grad
        )  # fresh memory is what costs here, so one tensor serves three times
        grad_b = spare.sum((0, 1))  # [T, C]
        grad_angle = (halves * a).cos_().mul_(sine).mul_(grad).mul_(2 * b)  # d sin^2 = 2 sin cos
        grad_a = torch.mul(grad_angle, halves, out=spare).sum((0, 1))
        return double_rate_adjoint(torch.addcmul(grad, grad_angle, a, out=spare)), grad_a, grad_b


def pad_edges(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """[B, T, C] -> wide [B, T + 6, C]."""
    return torch.cat([first.expand(-1, 3, -1), x, last.expand(-1, 3, -1)], dim=1)


def add_filtered(out: Tensor, wide: Tensor, phase: int, gain: float = 1.0) -> None:
    """Add to out [B, T, C] the wide tensor seen through every second tap, from -3 frames on in
    phase 0, -2 in 1.
    """
    for i, tap in enumerate(kaiser_taps()[phase::2], start=phase):
        out.add_(wide[:, i : i + out.shape[1]], alpha=gain * tap)


def add_filtered_adjoint(wide: Tensor, grad: Tensor, phase: int, gain: float = 1.0) -> None:
    for i, tap in enumerate(kaiser_taps()[phase::2], start=phase):
        wide[:, i : i + grad.shape[1]].add_(grad, alpha=gain * tap)


def double_rate(x: Tensor) -> Tensor:
    """[B, T, C] -> even and odd samples at twice the rate, [2, B, T, C]."""
    wide = pad_edges(x, x[:, :1], x[:, -1:])
    halves = x.new_zeros(2, *x.shape)
    add_filtered(halves[0], wide, phase=0, gain=2)
    add_filtered(halves[1], wide, phase=1, gain=2)
    return halves


def double_rate_adjoint(grad: Tensor) -> Tensor:
    _, rows, frames, channels = grad.shape
    wide = grad.new_zeros(rows, frames + 6, channels)
    add_filtered_adjoint(wide, grad[0], phase=0, gain=2)
    add_filtered_adjoint(wide, grad[1], phase=1, gain=2)
    wide[:, 3] += wide[:, :3].sum(1)
    wide[:, -4] += wide[:, -3:].sum(1)
    return wide[:, 3:-3].contiguous()


def halve_rate(halves: Tensor) -> Tensor:
    """Even and odd samples [2, B, T, C] -> [B, T, C]."""
    even, odd = halves
    first, last = even[:, :1], odd[:, -1:]
    x = torch.zeros_like(even)
    add_filtered(x, pad_edges(odd, first, last), phase=0)
    add_filtered(x, pad_edges(even, first, last), phase=1)
    return x


def halve_rate_adjoint(grad: Tensor) -> Tensor:
    rows, frames, channels = grad.shape
    even, odd = wide = grad.new_zeros(2, rows, frames + 6, channels)
    add_filtered_adjoint(odd, grad, phase=0)
    add_filtered_adjoint(even, grad, phase=1)
    even[:, 3] += wide[:, :, :3].sum((0, 2))
    odd[:, -4] += wide[:, :, -3:].sum((0, 2))
    return wide[:, :, 3:-3]


class SnakeBeta(nn.Module):
    """The two numbers of x + sin^2(a x) / b for each channel, stored as logarithms."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, frames: int) -> tuple[Tensor, Tensor]:
        """a and 1/b, [T, C]: written out for each frame, as a loop over C channels alone is too
        short to be quick.
        """
        a, b = self.alpha.exp(), 1 / (self.beta.exp() + 1e-9)
        return a.expand(frames, -1).contiguous(), b.expand(frames, -1).contiguous()


class Activation(nn.Module):
    """SnakeBeta at twice the rate, so that the harmonics it makes do not fold back: [B, T, C] ->
    same.
    """

    # frames each way: a tap of twelve at twice the rate sees three, and so does the one after it
    reach = 5

    def __init__(self, channels: int):
        super().__init__()
        self.act = SnakeBeta(channels)

    def forward(self, x: Tensor) -> Tensor:
        return AntiAliasedSnake.apply(x, *self.act(x.shape[1]))


def convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A length-keeping convolution of [B, T, C], run as a picture one pixel high: those kernels
    take channels last.
    """
    picture = x.transpose(1, 2)[:, :, None]  # [B, C, 1, T]
    picture = F.conv2d(
        picture, conv.weight[:, :, None], conv.bias, padding="same", dilation=(1, *conv.dilation)
    )
    return picture[:, :, 0].transpose(1, 2)  # [B, T, C']


def reach(conv: nn.Conv1d) -> int:
    """Frames on either side that a length-keeping convolution looks at."""
    return conv.dilation[0] * (conv.kernel_size[0] - 1) // 2


class AMPBlock(nn.Module):
    """Anti-aliased multi-periodicity block: three residual pairs of convolutions, [B, T, C] ->
    same.
    """

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]):
        super().__init__()

        def conv(dilation):
            return nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding="same")

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)
        self.activations = nn.ModuleList(Activation(channels) for _ in range(2 * len(dilations)))

    def pairs(self) -> list[int]:
        """The numbers of the pairs that are run: all in training, else those whose second
        convolution is not zero.

        A model converted from two pairs to three has a pair of zeros. It adds exactly nothing and
        costs a third.
        """
        numbers = range(len(self.convs2))
        if self.training:
            return list(numbers)
        return [i for i in numbers if self.convs2[i].weight.any() or self.convs2[i].bias.any()]

    def context_frames(self, pairs: list[int]) -> int:
        """Frames on either side that an output depends on."""
        return sum(
            reach(self.convs1[i]) + reach(self.convs2[i]) + 2 * Activation.context_frames
            for i in pairs
        )

    def forward(self, x: Tensor, pairs: list[int] | None = None) -> Tensor:
        for i in self.pairs() if pairs is None else pairs:
            y = convolve(self.convs1[i], self.activations[2 * i](x))
            x = x + convolve(self.convs2[i], self.activations[2 * i + 1](y))
        return x


@dataclass(frozen=True)
class UpsampleStage:
    """One step of the vocoder: [B, T, C] -> [B, rate * T, C'], an output frame seeing `reach`
    inputs on either side.
    """

    run: Callable[[Tensor], Tensor]
    context_frames: int
    rate: int = 1


class BigVGAN(nn.Module):
    """Natural-log mel [B, 80, T] -> waveform [B, T * prod(upsample_rates)] within [-1, 1]. Keep it
    in float32.
    """

    def __init__(self, config: BigVGANConfig):
        super().__init__()
        channels = [
            config.upsample_initial_channel // 2**i for i in range(len(config.upsample_rates) + 1)
        ]
        self.conv_pre = nn.Conv1d(config.mel_dim, channels[0], 7, padding="same")
        self.ups = nn.ModuleList(
            nn.ModuleList(
                [nn.ConvTranspose1d(wide, narrow, kernel, rate, padding=(kernel - rate) // 2)]
            )
            for wide, narrow, rate, kernel in zip(
                channels, channels[1:], config.upsample_rates, config.upsample_kernel_sizes
            )
        )
        self.kinds = len(config.resblock_kernel_sizes)  # of AMP blocks, side by side in each stage
        self.resblocks = nn.ModuleList(
            AMPBlock(width, kernel, dilations)
            for width in channels[1:]
            for kernel, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes
            )
        )
        self.activation_post = Activation(channels[-1])
        self.conv_post = nn.Conv1d(channels[-1], 1, 7, padding="same", bias=False)

    def stages(self) -> list["UpsampleStage"]:
        """What a mel goes through, in order. forward() runs them on a whole one,
        token2wav/streaming.py piece by piece.
        """
        stages = [UpsampleStage(lambda x: convolve(self.conv_pre, x), reach(self.conv_pre))]
        for i, (up,) in enumerate(self.ups):
            blocks, rate = self.resblocks[self.kinds * i : self.kinds * (i + 1)], up.stride[0]
            beyond = (
                up.kernel_size[0] - 1 - up.padding[0]
            )  # samples that an input adds to after its own first one
            stages.append(
                UpsampleStage(
                    lambda x, up=up: up(x.transpose(1, 2)).transpose(1, 2).contiguous(),
                    beyond // rate,
                    rate,
                )
            )  # [B, rate * T, C/2]
            blocks = [(block, block.pairs()) for block in blocks]
            stages.append(
                UpsampleStage(
                    lambda x, blocks=blocks: (
                        sum(block(x, pairs) for block, pairs in blocks) / self.kinds
                    ),
                    max(block.context_frames(pairs) for block, pairs in blocks),
                )
            )

        def speak(x):
            return convolve(self.conv_post, self.activation_post(x)).clamp(-1, 1)  # [B, samples, 1]

        return [*stages, UpsampleStage(speak, Activation.context_frames + reach(self.conv_post))]

    @property
    def context_frames(self) -> float:
        """Mel frames on either side that a sample depends on."""
        frames, rate = 0.0, 1
        for stage in self.stages():
            frames, rate = frames + stage.context_frames / rate, rate * stage.rate
        return frames

    def forward(self, mel: Tensor) -> Tensor:
        x = normalize(mel).transpose(1, 2).contiguous()  # [B, T, C]
        for stage in self.stages():
            x = stage.run(x)
        return x.squeeze(-1)  # [B, samples]


def normalize(mel: Tensor) -> Tensor:
    """Natural-log magnitudes to decibels, and those from -115 dB .. 0 dB to -1 .. 1."""
    decibels = 20 * torch.log10(mel.exp().clamp(min=10 ** (-115 / 20))) - 20
    return (2 * (decibels + 115) / 115 - 1).clamp(-1, 1)
