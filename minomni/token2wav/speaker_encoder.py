"""Who is speaking: the Voice a reply is spoken in, how to make one, and the ECAPA-TDNN that hears
its timbre.

Source: ECAPA-TDNN (arXiv 2005.07143) as the release ships it: no batch norm, reflect padding, one
vector per voice.
"""

import torch
from torch import Tensor, nn

from minomni.config import DiTConfig


class TDNN(nn.Module):
    """Convolution that keeps the length (reflect padding), then ReLU: [B, C, R] -> [B, C', R]."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, dilation: int):
        super().__init__()
        self.conv = nn.Conv1d(
            channels_in,
            channels_out,
            kernel_size,
            dilation=dilation,
            padding="same",
            padding_mode="reflect",
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Res2Net(nn.Module):
    """Channel groups, each hearing a wider stretch of time than the one before it: [B, C, R] ->
    same.
    """

    def __init__(self, channels: int, kernel_size: int, dilation: int, scale: int):
        super().__init__()
        self.scale = scale
        width = channels // scale
        self.blocks = nn.ModuleList(
            TDNN(width, width, kernel_size, dilation) for _ in range(scale - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = x.chunk(self.scale, dim=1)
        done = [first]
        for i, (block, group) in enumerate(zip(self.blocks, rest)):
            done.append(
                block(group + done[-1] if i else group)
            )  # the untouched first group is not passed on
        return torch.cat(done, dim=1)


class SqueezeExcitation(nn.Module):
    """One gate per channel, decided from the channel means over time: [B, C, R] -> same."""

    def __init__(self, channels: int, bottleneck: int):
        super().__init__()
        self.conv1 = nn.Conv1d(channels, bottleneck, 1)
        self.conv2 = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)  # [B, C, 1]
        return x * self.conv2(self.conv1(mean).relu()).sigmoid()


class SERes2Net(nn.Module):
    """The block of ECAPA, with a residual connection: [B, C, R] -> same."""

    def __init__(self, channels: int, kernel_size: int, dilation: int, config: DiTConfig):
        super().__init__()
        self.tdnn1 = TDNN(channels, channels, 1, 1)
        self.res2net_block = Res2Net(channels, kernel_size, dilation, config.enc_res2net_scale)
        self.tdnn2 = TDNN(channels, channels, 1, 1)
        self.se_block = SqueezeExcitation(channels, config.enc_se_channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x))))


class AttentiveStatistics(nn.Module):
    """Mean and deviation over time, weighted by attention over frames for each channel: [B, C, R]
    -> [B, 2C, 1].
    """

    def __init__(self, channels: int, bottleneck: int):
        super().__init__()
        self.tdnn = TDNN(3 * channels, bottleneck, 1, 1)
        self.conv = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = statistics(x, torch.full_like(x[:1, :1], 1 / x.shape[-1]))
        seen = torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], dim=1)  # [B, 3C, R]
        weights = self.conv(self.tdnn(seen).tanh()).softmax(-1)  # [B, C, R]
        return torch.cat(statistics(x, weights), dim=1)  # [B, 2C, 1]


def statistics(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and deviation over time, [B, C, R] -> two of [B, C, 1]. The weights of a
    channel add up to one.
    """
    mean = (weights * x).sum(-1, keepdim=True)
    variance = (weights * (x - mean).square()).sum(-1, keepdim=True)
    return mean, variance.clamp(min=1e-12).sqrt()


class SpeakerEncoder(nn.Module):
    """ECAPA-TDNN: reference mel [B, R, mel_dim] -> timbre [B, enc_dim]."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        channels, kernels, dilations = (
            config.enc_channels,
            config.enc_kernel_sizes,
            config.enc_dilations,
        )
        self.blocks = nn.ModuleList([TDNN(config.mel_dim, channels[0], kernels[0], dilations[0])])
        middle = list(zip(channels, kernels, dilations))[1:-1]
        self.blocks.extend(SERes2Net(*sizes, config) for sizes in middle)
        self.mfa = TDNN(channels[-1], channels[-1], kernels[-1], dilations[-1])
        self.asp = AttentiveStatistics(channels[-1], config.enc_attention_channels)
        self.fc = nn.Conv1d(2 * channels[-1], config.enc_dim, 1)

    def forward(self, ref_mel: Tensor) -> Tensor:
        x = self.blocks[0](ref_mel.transpose(1, 2))  # [B, C, R]
        levels = []
        for block in self.blocks[1:]:
            x = block(x)
            levels.append(x)
        x = self.mfa(torch.cat(levels, dim=1))  # [B, sum of the levels' C, R]
        return self.fc(self.asp(x)).squeeze(-1)  # [B, enc_dim]
