"""What every tower shares: norm, rotary turns, attention, the key/value cache, the gated MLP and
the initialisation.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CACHE_STEP = 256  # a full cache grows by at least this many tokens
# How a GPU attends. cuDNN's way is left out: it plans every new shape anew, for milliseconds, and
# shapes are new at every token and in every batch.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class RMSNorm(nn.Module):
    """Divide by the root mean square, times a learned weight. [..., D] -> [..., D].

    Normalised in fp32 and cast back before the weight is applied, as the release does (it matters
    in bf16).
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)). [..., D] -> [..., D]."""

    def __init__(self, size: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """Rotary frequencies theta^(-2j / size), j = 0 .. size/2 - 1. -> [size / 2] fp32."""
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a), a and b being the halves of the last axis: a quarter turn of each pair
    x[j], x[j + half].
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of the last axis by its angle. x and what cos and sin broadcast to: [...,
    head_dim].
    """
    return x * cos + rotate_half(x) * sin


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention, the fast way.

    q [B, H, L, d]; k, v [B, H_kv, S, d], where H is a multiple of H_kv; mask bool, True = may be
    seen, broadcastable to [B, H, L, S]; causal: query i sees keys 0 .. i (needs L = S and no mask).
    -> [B, H, L, d]
    """
    if q.is_cpu and torch.is_autocast_enabled(
        "cpu"
    ):  # a CPU takes its gradient 2.6 times as fast in fp32 as in bf16
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask, causal)
    with sdpa_kernel(SDPA_BACKENDS) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The same as attention(), spelled out. -> (output [B, H, L, d], weights [B, H, L, S] to draw
    pictures of).
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # [B, H, S, d]
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # [B, H, L, S]
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    return weights @ v, weights


class KVCache:
    """Keys and values of the tokens a decoder has seen, [B, H_kv, length, d] per layer, in buffers
    that grow.
    """

    def __init__(self, layers: int):
        self.buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.lengths = [0] * layers

    @property
    def length(self) -> int:
        """Tokens that all layers have seen."""
        return self.lengths[-1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, H_kv, L, d] and return all keys and values of the layer so far."""
        start, end = self.lengths[layer], self.lengths[layer] + k.shape[2]
        if self.buffers[layer] is None:
            self.buffers[layer] = (k, v)
        elif end > self.buffers[layer][0].shape[2]:
            room = end - start + max(CACHE_STEP, end // 2)
            self.buffers[layer] = tuple(
                F.pad(x[:, :, :start], (0, 0, 0, room)) for x in self.buffers[layer]
            )
        keys, values = self.buffers[layer]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.lengths[layer] = end
        return keys[:, :, :end], values[:, :, :end]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.lengths = [min(length, seen) for seen in self.lengths]


def init_weights(module: nn.Module, depth: int, embedding_std: float = 0.02) -> None:
    """Start a module for training from scratch, in place; torch.manual_seed before building repeats
    it.

    Linears and convolutions keep the variance of what goes through them (std 0.017 at width 3584,
    the usual 0.02); whatever writes into the residual stream is scaled by 1/sqrt(2 depth), so that
    the stream's variance does not grow with the number of layers (spec: GPT-2 paper sec. 2.3).
    Biases start at zero; norms keep their ones.
    """
    writers = ("o_proj", "out_proj", "down_proj", "fc2", "attn.proj")
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=embedding_std)
        elif isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv3d)):
            scale = (2 * depth) ** -0.5 if name.endswith(writers) else 1.0
            nn.init.normal_(part.weight, std=scale * part.weight[0].numel() ** -0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
