"""Rotary position embedding: frequencies, cos and sin of TMRoPE position ids, and the rotation."""

import torch
from torch import Tensor

from minomni.config import DecoderConfig


def rotary_frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """Rotary frequencies theta^(-2j / size), j = 0 .. size/2 - 1. -> [size / 2] fp32."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    return 1.0 / theta**exponents


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the halves a and b of the last axis.

    This rotates each pair x[j], x[j + half] by 90 degrees.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair x[j], x[j + half] of the last axis by its angle.

    x [..., head_dim]; cos and sin broadcast to it. -> [..., head_dim]
    """
    return x * cos + rotate_half(x) * sin


def rotary_cos_sin(position_ids: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of TMRoPE.

    position_ids [3, B, L] (time, height, width) -> two of [B, 1, L, head_dim], fp32. Of the
    head_dim/2 angles the first mrope_section[0] follow time, then height, then width (source: paper
    sec. 2.2). Where the three ids are equal, as in text, this is plain rotary embedding.
    """
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, position_ids.device)
    angles = position_ids[..., None] * frequencies  # [3, B, L, d/2]
    sections = angles.split(config.mrope_section, dim=-1)
    by_axis = [section[axis] for axis, section in enumerate(sections)]
    angles = torch.cat(by_axis, dim=-1)  # [B, L, d/2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, L, d]
    return angles.cos(), angles.sin()
