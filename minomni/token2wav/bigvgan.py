"""Mel to waveform: BigVGAN, upsampling convolutions with anti-aliased periodic activations.

Tensors are [B, T, C], channels last: convolutions with few channels then train on a CPU in 60 % of
the time, and a shift in time is a shift of whole rows. Source: BigVGAN (arXiv 2206.04658),
SnakeBeta in log scale, modified by the release (no tanh, mean of the blocks).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minomni.config import BigVGANConfig

MIN_DB = -115  # level of the vocoder's smallest input
REF_DB = 20  # subtracted from all levels


@cache
def kaiser_taps() -> tuple[float, ...]:
    """The 12 taps of the low-pass filter around every activation.

    A Kaiser-windowed sinc with its cutoff at a quarter of the doubled rate. The taps are Python
    numbers, not a buffer: no checkpoint has them, and a model built on the meta device then has no
    buffer to fill.
    """
    attenuation = 2.285 * 5 * math.pi * 4 * 0.3 + 7.95  # dB, for 12 taps and a transition 0.3 wide
    beta = 0.1102 * (attenuation - 8.7)
    window = torch.kaiser_window(
        12, periodic=False, beta=beta, dtype=torch.float64, device=torch.device("cpu")
    )
    offsets = torch.arange(12, dtype=torch.float64, device="cpu") - 5.5
    taps = window * torch.sinc(0.5 * offsets)
    taps = taps / taps.sum()
    return tuple(taps.tolist())


@cache
def filter_taps(device: torch.device, dtype: torch.dtype) -> Tensor:
    """kaiser_taps() on a device [12], copied there once."""
    with torch.inference_mode(False):
        return torch.tensor(kaiser_taps(), dtype=dtype, device=device)


class AntiAliasedSnake(torch.autograd.Function):
    """Upsample by two, x + b sin^2(a x), downsample by two; the backward pass is written by hand.

    The vocoder spends most of its time here. This trains twice as fast as padding and depthwise
    convolutions. Both resamplers use the same 12 taps, of which each sample needs six (polyphase):
    even and odd samples of the upsampled signal are stored apart, [2, B, T, C], and a filter is six
    shifted additions of whole tensors. Edges are replicated: a `wide` tensor [B, T + 6, C] repeats
    the first and the last value three times.
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

        # Memory allocation dominates here, so one scratch tensor is used three times.
        scratch = sine.square().mul_(grad)
        grad_b = scratch.sum((0, 1))  # [T, C]

        # d sin^2(angle) = 2 sin(angle) cos(angle), with angle = a x
        grad_angle = (halves * a).cos_().mul_(sine).mul_(grad).mul_(2 * b)
        grad_a = torch.mul(grad_angle, halves, out=scratch).sum((0, 1))
        grad_halves = torch.addcmul(grad, grad_angle, a, out=scratch)
        return double_rate_adjoint(grad_halves), grad_a, grad_b


def snake_by_convolution(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What AntiAliasedSnake computes, in a few large kernels as a GPU wants: its filters are
    depthwise convolutions. x [B, T, C], a and b [C] -> [B, T, C].
    """
    channels = x.shape[-1]
    taps = filter_taps(x.device, x.dtype).expand(channels, 1, -1)

    # Twice the rate. The 11 samples at each end belong to the padding.
    wide = F.pad(x.transpose(1, 2), (3, 3), mode="replicate")  # [B, C, T + 6]
    fine = F.conv_transpose1d(wide, 2 * taps, stride=2, groups=channels)  # [B, C, 2 T + 22]
    fine = fine[..., 11:-11]  # [B, C, 2 T]

    sine = torch.sin(fine * a[:, None])
    fine = torch.addcmul(fine, sine.square(), b[:, None])

    # Half the rate. Output t is the middle of the samples 2 t - 5 to 2 t + 6.
    wide = F.pad(fine, (5, 6), mode="replicate")  # [B, C, 2 T + 11]
    return F.conv1d(wide, taps, stride=2, groups=channels).transpose(1, 2)


def pad_edges(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """x [B, T, C] between three copies of first and of last [B, 1, C] -> wide [B, T + 6, C]."""
    left = first.expand(-1, 3, -1)
    right = last.expand(-1, 3, -1)
    return torch.cat([left, x, right], dim=1)


def add_filtered(out: Tensor, wide: Tensor, phase: int, gain: float = 1.0) -> None:
    """Add to out [B, T, C] the wide tensor filtered with every second tap.

    The first tap lies 3 frames before the output in phase 0, and 2 frames before it in
    phase 1.
    """
    frames = out.shape[1]
    for i, tap in enumerate(kaiser_taps()[phase::2], start=phase):
        shifted = wide[:, i : i + frames]
        out.add_(shifted, alpha=gain * tap)


def add_filtered_adjoint(wide: Tensor, grad: Tensor, phase: int, gain: float = 1.0) -> None:
    """Adjoint of add_filtered(): adds the gradient [B, T, C] of its output to that of wide."""
    frames = grad.shape[1]
    for i, tap in enumerate(kaiser_taps()[phase::2], start=phase):
        shifted = wide[:, i : i + frames]
        shifted.add_(grad, alpha=gain * tap)


def double_rate(x: Tensor) -> Tensor:
    """Upsample by two: [B, T, C] -> even and odd samples [2, B, T, C]."""
    wide = pad_edges(x, x[:, :1], x[:, -1:])
    halves = x.new_zeros(2, *x.shape)
    add_filtered(halves[0], wide, phase=0, gain=2)
    add_filtered(halves[1], wide, phase=1, gain=2)
    return halves


def double_rate_adjoint(grad: Tensor) -> Tensor:
    """Gradient [2, B, T, C] of double_rate()'s output -> that of its input [B, T, C]."""
    _, rows, frames, channels = grad.shape
    wide = grad.new_zeros(rows, frames + 6, channels)
    add_filtered_adjoint(wide, grad[0], phase=0, gain=2)
    add_filtered_adjoint(wide, grad[1], phase=1, gain=2)
    # The copies at the edges add to the samples that they were copied from.
    wide[:, 3] += wide[:, :3].sum(1)
    wide[:, -4] += wide[:, -3:].sum(1)
    return wide[:, 3:-3].contiguous()


def halve_rate(halves: Tensor) -> Tensor:
    """Downsample by two: even and odd samples [2, B, T, C] -> [B, T, C]."""
    even, odd = halves
    first, last = even[:, :1], odd[:, -1:]  # the ends of the upsampled signal
    x = torch.zeros_like(even)
    add_filtered(x, pad_edges(odd, first, last), phase=0)
    add_filtered(x, pad_edges(even, first, last), phase=1)
    return x


def halve_rate_adjoint(grad: Tensor) -> Tensor:
    """Gradient [B, T, C] of halve_rate()'s output -> that of its input [2, B, T, C]."""
    rows, frames, channels = grad.shape
    wide = grad.new_zeros(2, rows, frames + 6, channels)
    even, odd = wide
    add_filtered_adjoint(odd, grad, phase=0)
    add_filtered_adjoint(even, grad, phase=1)
    # All copies at the edges are of the first even and of the last odd sample.
    even[:, 3] += wide[:, :, :3].sum((0, 2))
    odd[:, -4] += wide[:, :, -3:].sum((0, 2))
    return wide[:, :, 3:-3]


class SnakeBeta(nn.Module):
    """The parameters a and b of x + sin^2(a x) / b, per channel, stored as logarithms."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self) -> tuple[Tensor, Tensor]:
        """a and 1/b, each [C]."""
        return self.alpha.exp(), 1 / (self.beta.exp() + 1e-9)


class Activation(nn.Module):
    """SnakeBeta at twice the rate, so that its harmonics do not alias: [B, T, C] -> same."""

    # Frames on each side: each of the two filters of 12 taps at twice the rate spans three.
    context_frames = 5

    def __init__(self, channels: int):
        super().__init__()
        self.act = SnakeBeta(channels)

    def forward(self, x: Tensor) -> Tensor:
        a, inverse_b = self.act()
        if x.is_cuda:
            return snake_by_convolution(x, a, inverse_b)
        # Copied for each frame: an inner loop over C channels alone is too short to be fast.
        a = a.expand(x.shape[1], -1).contiguous()  # [T, C]
        inverse_b = inverse_b.expand(x.shape[1], -1).contiguous()
        return AntiAliasedSnake.apply(x, a, inverse_b)


def convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A length-preserving convolution: [B, T, C] -> [B, T, C'].

    It runs as a 2-D convolution of height 1, whose kernels accept channels-last tensors.
    """
    image = x.transpose(1, 2)[:, :, None]  # [B, C, 1, T]
    weight = conv.weight[:, :, None]  # [C', C, 1, kernel]
    dilation = (1, conv.dilation[0])
    image = F.conv2d(image, weight, conv.bias, padding="same", dilation=dilation)
    return image[:, :, 0].transpose(1, 2)  # [B, T, C']


def conv_context(conv: nn.Conv1d) -> int:
    """Frames on each side that an output of a length-preserving convolution depends on."""
    return conv.dilation[0] * (conv.kernel_size[0] - 1) // 2


class AMPBlock(nn.Module):
    """Anti-aliased multi-periodicity block: three residual pairs of convolutions.

    [B, T, C] -> same.
    """

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]):
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            return nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding="same")

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)
        self.activations = nn.ModuleList(Activation(channels) for _ in range(2 * len(dilations)))

    def convs(self, i: int) -> tuple[nn.Conv1d, nn.Conv1d]:
        """The two convolutions of a pair."""
        return cast(nn.Conv1d, self.convs1[i]), cast(nn.Conv1d, self.convs2[i])

    @property
    def context_frames(self) -> int:
        """Frames on each side that an output depends on."""
        frames = 0
        for i in range(len(self.convs1)):
            first, second = self.convs(i)
            frames += conv_context(first) + conv_context(second)
            frames += 2 * Activation.context_frames
        return frames

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.convs1)):
            first, second = self.convs(i)
            y = self.activations[2 * i](x)
            y = convolve(first, y)
            y = self.activations[2 * i + 1](y)
            x = x + convolve(second, y)
        return x


@dataclass(frozen=True)
class VocoderLayer:
    """One layer of the vocoder: [B, T, C] -> [B, rate * T, C'].

    An output frame depends on `context_frames` inputs on each side.
    """

    run: Callable[[Tensor], Tensor]
    context_frames: int
    rate: int = 1


class BigVGAN(nn.Module):
    """Natural-log mel [B, 80, T] -> waveform [B, T * prod(upsample_rates)] in [-1, 1].

    Keep it in float32.
    """

    def __init__(self, config: BigVGANConfig):
        super().__init__()
        rates, kernels = config.upsample_rates, config.upsample_kernel_sizes
        channels = [config.upsample_initial_channel // 2**i for i in range(len(rates) + 1)]
        self.conv_pre = nn.Conv1d(config.mel_dim, channels[0], 7, padding="same")

        # Upsampling layers; each is a list of one, as the checkpoint names them.
        self.ups = nn.ModuleList()
        for i, (rate, kernel) in enumerate(zip(rates, kernels, strict=True)):
            padding = (kernel - rate) // 2
            up = nn.ConvTranspose1d(channels[i], channels[i + 1], kernel, rate, padding=padding)
            self.ups.append(nn.ModuleList([up]))

        # AMP blocks with different kernels run in parallel after each upsampling layer.
        self.num_kernels = len(config.resblock_kernel_sizes)
        self.resblocks = nn.ModuleList()
        for width in channels[1:]:
            for kernel, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(AMPBlock(width, kernel, dilations))

        self.activation_post = Activation(channels[-1])
        self.conv_post = nn.Conv1d(channels[-1], 1, 7, padding="same", bias=False)

    def layers(self) -> list[VocoderLayer]:
        """The layers from mel to waveform, in order.

        forward() runs them on a whole mel, token2wav/streaming.py on chunk after chunk.
        """
        first = partial(convolve, self.conv_pre)
        layers = [VocoderLayer(first, conv_context(self.conv_pre))]
        for i, layer in enumerate(self.ups):
            (up,) = cast(list[nn.ConvTranspose1d], layer)
            blocks = list(self.resblocks[self.num_kernels * i : self.num_kernels * (i + 1)])
            layers += [upsampling_layer(up), amp_layer(cast(list[AMPBlock], blocks))]
        context_frames = Activation.context_frames + conv_context(self.conv_post)
        layers.append(VocoderLayer(self.output, context_frames))
        return layers

    def output(self, x: Tensor) -> Tensor:
        """Last activation and convolution: [B, samples, C] -> [B, samples, 1] in [-1, 1]."""
        x = convolve(self.conv_post, self.activation_post(x))
        return x.clamp(-1, 1)

    @property
    def context_frames(self) -> float:
        """Mel frames on each side that a sample depends on."""
        frames = 0.0
        rate = 1  # of the layer's input, relative to the mel
        for layer in self.layers():
            frames += layer.context_frames / rate
            rate *= layer.rate
        return frames

    def forward(self, mel: Tensor) -> Tensor:
        x = normalize(mel).transpose(1, 2).contiguous()  # [B, T, C]
        for layer in self.layers():
            x = layer.run(x)
        return x.squeeze(-1)  # [B, samples]


def upsampling_layer(up: nn.ConvTranspose1d) -> VocoderLayer:
    """A transposed convolution: [B, T, C] -> [B, rate * T, C / 2]."""
    rate = up.stride[0]
    # Samples that an input adds to after the first sample of its own frame.
    after = up.kernel_size[0] - 1 - int(up.padding[0])

    def run(x: Tensor) -> Tensor:
        return up(x.transpose(1, 2)).transpose(1, 2).contiguous()

    return VocoderLayer(run, after // rate, rate)


def amp_layer(blocks: list[AMPBlock]) -> VocoderLayer:
    """The mean of parallel AMP blocks: [B, T, C] -> same."""

    def run(x: Tensor) -> Tensor:
        return sum(block(x) for block in blocks) / len(blocks)

    return VocoderLayer(run, max(block.context_frames for block in blocks))


def normalize(mel: Tensor) -> Tensor:
    """Natural-log magnitudes -> decibels, then MIN_DB .. 0 dB -> -1 .. 1, as the release does.

    dB = 20 log10(magnitude) - REF_DB, and the result is 2 (dB - MIN_DB) / -MIN_DB - 1.
    """
    magnitudes = mel.exp().clamp(min=10 ** (MIN_DB / 20))
    decibels = 20 * torch.log10(magnitudes) - REF_DB
    return (2 * (decibels - MIN_DB) / -MIN_DB - 1).clamp(-1, 1)
