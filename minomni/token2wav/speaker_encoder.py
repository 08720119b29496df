"""Speaker encoder: an ECAPA-TDNN that maps a reference mel to a timbre vector for the DiT.

Source: ECAPA-TDNN (arXiv 2005.07143) as the release ships it: no batch norm, reflect padding, one
vector per voice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minomni.config import DiTConfig
from minomni.talker.codec import MEL_MEAN, MEL_STD


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
    """Channel groups with growing receptive fields: [B, C, R] -> same."""

    def __init__(self, channels: int, kernel_size: int, dilation: int, scale: int):
        super().__init__()
        self.scale = scale
        width = channels // scale
        self.blocks = nn.ModuleList(
            TDNN(width, width, kernel_size, dilation) for _ in range(scale - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *groups = x.chunk(self.scale, dim=1)
        outputs = [first]
        for i, (block, group) in enumerate(zip(self.blocks, groups, strict=True)):
            # Each output is added to the next group, but the unprocessed first group is not.
            if i > 0:
                group = group + outputs[-1]
            outputs.append(block(group))
        return torch.cat(outputs, dim=1)


class SqueezeExcitation(nn.Module):
    """One gate per channel, computed from the channel means over time: [B, C, R] -> same."""

    def __init__(self, channels: int, bottleneck: int):
        super().__init__()
        self.conv1 = nn.Conv1d(channels, bottleneck, 1)
        self.conv2 = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)  # [B, C, 1]
        return x * self.conv2(self.conv1(mean).relu()).sigmoid()


class SERes2Net(nn.Module):
    """The residual block of ECAPA-TDNN: [B, C, R] -> same."""

    def __init__(self, channels: int, kernel_size: int, dilation: int, config: DiTConfig):
        super().__init__()
        self.tdnn1 = TDNN(channels, channels, 1, 1)
        self.res2net_block = Res2Net(channels, kernel_size, dilation, config.enc_res2net_scale)
        self.tdnn2 = TDNN(channels, channels, 1, 1)
        self.se_block = SqueezeExcitation(channels, config.enc_se_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.res2net_block(self.tdnn1(x))
        return x + self.se_block(self.tdnn2(h))


class AttentiveStatistics(nn.Module):
    """Mean and standard deviation over time, weighted by per-channel attention over frames.

    [B, C, R] -> [B, 2C, 1].
    """

    def __init__(self, channels: int, bottleneck: int):
        super().__init__()
        self.tdnn = TDNN(3 * channels, bottleneck, 1, 1)
        self.conv = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Attention sees each frame beside the unweighted statistics of all frames.
        uniform = torch.full_like(x[:1, :1], 1 / x.shape[-1], dtype=torch.float64)  # [1, 1, R]
        mean, std = statistics(x, uniform)
        features = torch.cat([x, mean.expand_as(x), std.expand_as(x)], dim=1)  # [B, 3C, R]
        weights = self.conv(self.tdnn(features).tanh()).softmax(-1)  # [B, C, R]
        return torch.cat(statistics(x, weights), dim=1)  # [B, 2C, 1]


def statistics(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation over time: [B, C, R] -> two of [B, C, 1].

    The weights [B, C, R] of a channel sum to one.
    """
    dtype = x.dtype
    precise = torch.promote_types(dtype, torch.float32)  # in bf16 the weights would not sum to one
    x, weights = x.to(precise), weights.to(precise)
    mean = (weights * x).sum(-1, keepdim=True)
    variance = (weights * (x - mean).square()).sum(-1, keepdim=True)
    return mean.to(dtype), variance.clamp(min=1e-12).sqrt().to(dtype)


class SpeakerEncoder(nn.Module):
    """ECAPA-TDNN: reference mel [B, R, mel_dim] -> timbre [B, enc_dim]."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        # Channels, kernel size and dilation of each layer.
        sizes = (config.enc_channels, config.enc_kernel_sizes, config.enc_dilations)
        first, *middle, last = zip(*sizes, strict=True)
        channels = last[0]
        self.blocks = nn.ModuleList([TDNN(config.mel_dim, *first)])
        for layer in middle:
            self.blocks.append(SERes2Net(*layer, config))
        # Multi-layer feature aggregation, attentive statistics pooling, output layer.
        self.mfa = TDNN(channels, *last)
        self.asp = AttentiveStatistics(channels, config.enc_attention_channels)
        self.fc = nn.Conv1d(2 * channels, config.enc_dim, 1)

    def forward(self, ref_mel: Tensor) -> Tensor:
        x = self.blocks[0](ref_mel.transpose(1, 2))  # [B, C, R]
        outputs = []
        for block in self.blocks[1:]:
            x = block(x)
            outputs.append(x)
        x = self.mfa(torch.cat(outputs, dim=1))  # [B, sum of the outputs' C, R]
        return self.fc(self.asp(x)).squeeze(-1)  # [B, enc_dim]


def speaker_vector(mel: Tensor) -> Tensor:
    """Voice mel [T, mel_dim] of a few seconds of one voice -> unit vector [2 * mel_dim].

    It holds the mean and standard deviation of each band: statistics instead of a trained network.
    The release's extractor was never published, and the long-term spectrum is enough to distinguish
    a handful of voices.
    """
    x = (mel - MEL_MEAN) / MEL_STD
    statistics = torch.cat([x.mean(0), x.std(0)])
    return F.normalize(statistics, dim=0)
