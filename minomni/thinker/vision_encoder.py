"""Eyes: patches of 14 x 14 pixels and two frames in, one token per 28 x 28 pixels out, at any
picture size.

Most blocks attend inside windows, a few over the whole frame; rows and columns turn the heads (2-D
rotary); at the end 2 x 2 patches merge into one token (spec: paper sec. 2.3, Qwen2.5-VL).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minomni.config import VisionEncoderConfig
from minomni.layers import (
    RMSNorm,
    SwiGLU,
    apply_rotary,
    attention,
    init_weights,
    rotary_frequencies,
)

Grid = tuple[int, int, int]  # frame pairs, rows and columns of patches
THETA, EPS = 10_000.0, 1e-6  # not in the release's config.json


@dataclass
class Segments:
    """Which patches attend to each other: equal lengths are put side by side, so that no call pads
    or masks.
    """

    order: Tensor  # [N], brings the patches into segments, shortest first
    back: Tensor  # [N], and back to reading order
    shapes: list[tuple[int, int]]  # (segments, patches in each), one entry per length
    cos: Tensor  # [N, 1, d], of the rotary angles, already in that order
    sin: Tensor


def patch_positions(grid: Grid, merge: int) -> Tensor:
    """Frame pair, row and column of each patch in reading order: cell by cell, row by row inside a
    cell -> [N, 3].
    """
    t, gh, gw = grid
    places = torch.cartesian_prod(torch.arange(t), torch.arange(gh), torch.arange(gw))  # [N, 3]
    places = places.view(t, gh // merge, merge, gw // merge, merge, 3)
    return places.transpose(2, 3).reshape(-1, 3)  # [N, 3]


def segment(keys: Tensor, angles: Tensor) -> Segments:
    """Patches with equal rows of keys [N, k] attend to each other; angles [N, d] are their rotary
    angles.
    """
    _, labels, counts = keys.unique(dim=0, return_inverse=True, return_counts=True)
    order = (counts[labels] * len(counts) + labels).argsort(
        stable=True
    )  # by length, then by segment
    lengths, segments = counts.unique(return_counts=True)
    turned = angles[order][:, None]  # [N, 1, d]
    return Segments(
        order,
        order.argsort(),
        list(zip(segments.tolist(), lengths.tolist())),
        turned.cos(),
        turned.sin(),
    )


class VisionAttention(nn.Module):
    """Attention inside segments, both ways. Packed [N, D] -> [N, D]."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        x = x.index_select(0, segments.order)
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q, self.k, self.v)
        )  # [N, H, d]
        q, k = (apply_rotary(y.float(), segments.cos, segments.sin).to(x.dtype) for y in (q, k))
        sizes = [rows * length for rows, length in segments.shapes]
        parts = [
            attention(*(y.view(*shape, *y.shape[1:]).transpose(1, 2) for y in qkv))
            .transpose(1, 2)
            .flatten(0, 1)
            for shape, qkv in zip(segments.shapes, zip(*(y.split(sizes) for y in (q, k, v))))
        ]
        return self.proj(torch.cat(parts).flatten(1).index_select(0, segments.back))  # [N, D]


class VisionBlock(nn.Module):
    """Pre-norm transformer block. [N, D] -> [N, D]."""

    def __init__(self, config: VisionEncoderConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, EPS)
        self.norm2 = RMSNorm(config.hidden_size, EPS)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        x = x + self.attn(self.norm1(x), segments)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """One linear map of a patch, stored as the 3-D convolution that it also is. [N, patch_dim] ->
    [N, D].
    """

    def __init__(self, config: VisionEncoderConfig):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, kernel_size=size, stride=size, bias=False
        )

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.proj.weight), self.proj.weight.flatten(1))  # [N, D]


class PatchMerger(nn.Module):
    """The patches of one merge cell become one token of the Thinker's width. [N, D] -> [N /
    merge^2, out].
    """

    def __init__(self, config: VisionEncoderConfig):
        super().__init__()
        inner = config.hidden_size * config.spatial_merge_size**2
        self.inner = inner
        self.ln_q = RMSNorm(config.hidden_size, EPS)
        self.mlp = nn.Sequential(
            nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.inner))  # [N / merge^2, out]


class VisionEncoder(nn.Module):
    """Qwen2.5-VL's vision transformer. Frames never attend to each other; time is left to the
    Thinker's positions.
    """

    def __init__(self, config: VisionEncoderConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        init_weights(self, config.depth)

    def plan(self, grids: list[Grid], device: torch.device) -> tuple[Segments, Segments]:
        """Segments of the window blocks and of the whole-frame blocks, for all pictures and frames
        of a batch.
        """
        config = self.config
        places = torch.cat(
            [
                F.pad(patch_positions(grid, config.spatial_merge_size), (1, 0), value=item)
                for item, grid in enumerate(grids)
            ]
        ).to(device)  # [N, 4]: item, frame pair, row, column
        inverse = rotary_frequencies(
            config.hidden_size // config.num_heads // 2, THETA, device
        )  # [d / 4]
        angles = (
            (places[:, 2:, None] * inverse).flatten(1).repeat(1, 2)
        )  # [N, d]: row and column angles, twice
        window = config.window_size // config.patch_size  # patches along one side
        windows = torch.cat((places[:, :2], places[:, 2:] // window), dim=1)  # [N, 4]
        return segment(windows, angles), segment(places[:, :2], angles)

    def forward(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        """Look at pictures or clips: patches [N, patch_dim] in reading order, grids whose products
        add up to N.

        -> tokens [N / spatial_merge_size^2, out_hidden_size], in reading order of the merge cells.
        """
        x = self.patch_embed(patches)
        windows, frames = self.plan(grids, x.device)
        for index, block in enumerate(self.blocks):
            x = block(x, frames if index in self.config.fullatt_block_indexes else windows)
        return self.merger(x)
