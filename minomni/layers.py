"""Shared layers: RMSNorm, SwiGLU, attention, initialization."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minomni.devices import is_emulated

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


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention.

    q [B, H, L, d]; k, v [B, H_kv, S, d], where H is a multiple of H_kv; mask bool, True = attend,
    broadcastable to [B, 1, L, S]; causal: query i attends to keys 0 .. i (needs L = S and no mask).
    -> [B, H, L, d]
    """
    # On a CPU the backward pass is 2.6 times as fast in fp32 as in bf16.
    if q.is_cpu and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask, causal)
    # Where 16 bits are emulated, 16 times as fast.
    if q.is_cpu and q.requires_grad and is_emulated(q.dtype, q.device):
        return attention(q.float(), k.float(), v.float(), mask, causal).to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    if q.is_cpu and grouped and q.shape[2] == 1 and not causal:
        # The queries of one new token that share a key become the rows of one attention, which
        # reads each key once: up to four times as fast.
        rows = q.squeeze(2).unflatten(1, (k.shape[1], -1))  # [B, H_kv, H / H_kv, d]
        return attention(rows, k, v, mask).flatten(1, 2).unsqueeze(2)  # [B, H, 1, d]
    backends = sdpa_kernel(SDPA_BACKENDS) if q.is_cuda else nullcontext()
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
