"""Vision encoder: patches of 14 x 14 pixels and two frames in, one token per 28 x 28 pixels out.

Images may have any size. Most layers use window attention, a few attend to the whole frame.
Positions are 2-D rotary embeddings of rows and columns. At the end 2 x 2 patches are merged into
one token (source: paper sec. 2.3, Qwen2.5-VL).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minomni.config import VisionEncoderConfig
from minomni.inputs.patches import Grid
from minomni.layers import RMSNorm, SwiGLU, attention, init_weights
from minomni.rotary import apply_rotary, rotary_frequencies

# Not in the release's config.json:
THETA = 10_000.0
EPS = 1e-6


@dataclass
class Segments:
    """Groups of patches that attend to each other.

    Segments of equal length are batched together, so that attention needs no padding or mask.
    """

    order: Tensor  # [N], sorts the patches into segments, shortest first
    back: Tensor  # [N], the inverse: back to reading order
    shapes: list[tuple[int, int]]  # (segments, patches in each), one entry per length
    cos: Tensor  # [N, 1, d] of the rotary angles, sorted into segments
    sin: Tensor  # [N, 1, d]


def patch_positions(grid: Grid, merge: int) -> Tensor:
    """Frame pair, row and column of each patch -> [N, 3].

    Reading order is merge cell by merge cell, and row by row inside a cell.
    """
    t, rows, columns = grid
    axes = [torch.arange(n) for n in grid]
    positions = torch.cartesian_prod(*axes)  # [N, 3]
    cells = positions.view(t, rows // merge, merge, columns // merge, merge, 3)
    return cells.transpose(2, 3).reshape(-1, 3)


def segment(keys: Tensor, angles: Tensor) -> Segments:
    """Group patches with equal keys.

    keys [N, k]: patches with equal rows attend to each other. angles [N, d]: for the
    rotary embedding.
    """
    _, labels, counts = keys.unique(dim=0, return_inverse=True, return_counts=True)
    # Sort by length of the segment, then by segment.
    sort_keys = counts[labels] * len(counts) + labels
    order = sort_keys.argsort(stable=True)
    lengths, segments = counts.unique(return_counts=True)
    shapes = zip(segments.tolist(), lengths.tolist(), strict=True)
    angles = angles[order][:, None]  # [N, 1, d]
    return Segments(
        order=order,
        back=order.argsort(),
        shapes=list(shapes),
        cos=angles.cos(),
        sin=angles.sin(),
    )


class VisionAttention(nn.Module):
    """Bidirectional attention within segments. Packed [N, D] -> [N, D]."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        x = x.index_select(0, segments.order)
        q = self.q(x).unflatten(-1, (self.heads, -1))  # [N, H, d]
        k = self.k(x).unflatten(-1, (self.heads, -1))
        v = self.v(x).unflatten(-1, (self.heads, -1))
        q = apply_rotary(q.float(), segments.cos, segments.sin).to(x.dtype)
        k = apply_rotary(k.float(), segments.cos, segments.sin).to(x.dtype)

        # One call for all segments of a length, as a batch [segments, H, length, d].
        outputs = []
        begin = 0
        for count, length in segments.shapes:
            end = begin + count * length
            batch = [
                packed[begin:end].unflatten(0, (count, length)).transpose(1, 2)
                for packed in (q, k, v)
            ]
            out = attention(*batch)
            outputs.append(out.transpose(1, 2).flatten(0, 1))  # [count * length, H, d]
            begin = end

        out = torch.cat(outputs).flatten(1)  # [N, D]
        return self.proj(out.index_select(0, segments.back))


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
    """A linear layer on patches, stored as a 3-D convolution. [N, patch_dim] -> [N, D]."""

    def __init__(self, config: VisionEncoderConfig):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, kernel_size=size, stride=size, bias=False
        )

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)  # [D, patch_dim]
        return F.linear(patches.to(weight), weight)


class PatchMerger(nn.Module):
    """The patches of a merge cell become one token of the Thinker's width.

    [N, D] -> [N / merge^2, out].
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
        cells = self.ln_q(x).view(-1, self.inner)  # [N / merge^2, merge^2 * D]
        return self.mlp(cells)


class VisionEncoder(nn.Module):
    """Qwen2.5-VL's vision transformer.

    Frames never attend to each other; time enters through the Thinker's positions.
    """

    def __init__(self, config: VisionEncoderConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        init_weights(self, config.depth)

    def plan(self, grids: list[Grid], device: torch.device) -> tuple[Segments, Segments]:
        """Segments of window attention and of whole-frame attention, for a batch of items."""
        config = self.config
        # Item of the batch, frame pair, row and column of each patch.
        positions = []
        for item, grid in enumerate(grids):
            patches = patch_positions(grid, config.spatial_merge_size)
            positions.append(F.pad(patches, (1, 0), value=item))
        position = torch.cat(positions).to(device)  # [N, 4]
        frame, row_column = position[:, :2], position[:, 2:]

        # 2-D rotary: half of the angles follow the row, half the column.
        head_dim = config.hidden_size // config.num_heads
        frequencies = rotary_frequencies(head_dim // 2, THETA, device)  # [d / 4]
        angles = (row_column[..., None] * frequencies).flatten(1)  # [N, d / 2]
        angles = angles.repeat(1, 2)  # [N, d]

        patches_per_side = config.window_size // config.patch_size
        window = torch.cat((frame, row_column // patches_per_side), dim=1)  # [N, 4]
        return segment(window, angles), segment(frame, angles)

    def forward(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        """Encode images or clips.

        patches [N, patch_dim] in reading order; grids: frame pairs, rows and columns, whose
        products sum to N. -> tokens [N / spatial_merge_size^2, out_hidden_size], in reading order
        of the merge cells.
        """
        x = self.patch_embed(patches)  # [N, D]
        windows, frames = self.plan(grids, x.device)
        for index, block in enumerate(self.blocks):
            is_full = index in self.config.fullatt_block_indexes
            x = block(x, frames if is_full else windows)
        return self.merger(x)
