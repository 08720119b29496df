"""Shared layers: RMSNorm, SwiGLU, rotary embeddings, attention, the KV cache, initialization."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CACHE_STEP = 256  # a full KV cache grows by at least this many positions
# SDPA backends on CUDA. cuDNN is excluded: it plans for milliseconds whenever a shape is new, and
# the shape changes at every token and in every batch.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class RMSNorm(nn.Module):
    """Divide by the root mean square and multiply by a learned weight. [..., D] -> [..., D].

    Normalized in fp32 and cast back before the weight is applied, as the release does (it matters
    in bf16).
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalized = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return self.weight * normalized.to(x.dtype)


class SwiGLU(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)). [..., D] -> [..., D]."""

    def __init__(self, size: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


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


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention.

    q [B, H, L, d]; k, v [B, H_kv, S, d], where H is a multiple of H_kv; mask bool, True = attend,
    broadcastable to [B, H, L, S]; causal: query i attends to keys 0 .. i (needs L = S and no mask).
    -> [B, H, L, d]
    """
    # On a CPU the backward pass is 2.6 times as fast in fp32 as in bf16.
    if q.is_cpu and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask, causal)
    backends = sdpa_kernel(SDPA_BACKENDS) if q.is_cuda else nullcontext()
    grouped = q.shape[1] != k.shape[1]
    with backends:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """attention() written out, for tests and plots.

    -> (output [B, H, L, d], weights [B, H, L, S])
    """
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)  # [B, H, S, d]
    v = v.repeat_interleave(groups, dim=1)
    scale = q.shape[-1] ** 0.5
    scores = q @ k.transpose(2, 3) / scale  # [B, H, L, S]
    if causal:
        ones = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device)
        mask = ones.tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    return weights @ v, weights


class KVCache:
    """Keys and values of past positions, [B, H_kv, length, d] per layer, in buffers that grow."""

    def __init__(self, layers: int):
        self.buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.lengths = [0] * layers

    @property
    def length(self) -> int:
        """Positions that all layers hold."""
        return self.lengths[-1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, H_kv, L, d] and return all keys and values of the layer."""
        start = self.lengths[layer]
        end = start + k.shape[2]
        buffers = self.buffers[layer]
        if buffers is None:
            buffers = (k, v)
        elif end > buffers[0].shape[2]:
            # Grow by half of the new length at least, so that copies stay rare.
            room = end - start + max(CACHE_STEP, end // 2)
            keys, values = buffers
            keys = F.pad(keys[:, :, :start], (0, 0, 0, room))
            values = F.pad(values[:, :, :start], (0, 0, 0, room))
            buffers = (keys, values)
        self.buffers[layer] = buffers
        self.lengths[layer] = end

        keys, values = buffers
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` positions."""
        self.lengths = [min(length, current) for current in self.lengths]


def init_weights(module: nn.Module, depth: int, embedding_std: float = 0.02) -> None:
    """Initialize a module for training from scratch, in place.

    Linear and convolution layers keep the variance of their input (std 0.017 at width 3584, the
    usual 0.02). Layers that write into the residual stream are scaled by 1/sqrt(2 depth), so that
    its variance does not grow with the number of layers (source: GPT-2 paper sec. 2.3). Biases
    start at zero, norms at one. torch.manual_seed before building makes it repeatable.
    """
    residual = ("o_proj", "out_proj", "down_proj", "fc2", "attn.proj")
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=embedding_std)
        elif isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv3d)):
            fan_in = part.weight[0].numel()
            std = fan_in**-0.5
            if name.endswith(residual):
                std = (2 * depth) ** -0.5 * std
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
