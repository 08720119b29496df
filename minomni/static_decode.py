"""One decoding step in which every shape and every address is fixed, so that a CUDA graph can
replay it.

The plain step (Decoder.forward with a KVCache, sampling.sample) launches over a thousand kernels
for a token, and the host waits for the device several times. Here the cache is allocated once, its
lengths are numbers on the device, random numbers are drawn outside of the step, and nothing is
read back. Given the same random numbers, a step chooses the ids that the plain one chooses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minomni.config import DecoderConfig, SamplingConfig
from minomni.decoder import Decoder, DecoderLayer
from minomni.kv_cache import KVCache
from minomni.rotary import apply_rotary, rotary_cos_sin
from minomni.sampling import process_logits

MIN_CAPACITY = 1024  # positions; a graph is captured for each power of two from here
FLASH_DTYPES = (torch.bfloat16, torch.float16)


def cache_capacity(length: int) -> int:
    """The positions of a static cache that holds `length`: a power of two."""
    return max(MIN_CAPACITY, 1 << (length - 1).bit_length())


class StaticCache:
    """Keys and values [B, capacity, H_kv, d] of every layer, allocated once.

    Row b holds its first lengths[b] positions, without padding. lengths is on the device: the step
    writes at that position and then adds one.
    """

    def __init__(
        self,
        config: DecoderConfig,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (rows, capacity, config.num_key_value_heads, config.head_dim)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for _ in range(config.num_hidden_layers):
            self.keys.append(torch.zeros(shape, device=device, dtype=dtype))
            self.values.append(torch.zeros(shape, device=device, dtype=dtype))
        self.capacity = capacity
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.rows = torch.arange(rows, device=device)
        self.columns = torch.arange(capacity, device=device)
        # Where each row begins in queries and in keys, for attention over rows of several lengths.
        self.query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.key_starts = self.query_starts * capacity
        self.flash = device.type == "cuda" and dtype in FLASH_DTYPES

    def fill(self, cache: KVCache, attention_mask: Tensor) -> None:
        """Take over what a prefill has left, without its padding. attention_mask [B, length]."""
        # A prompt is padded on one side, so the real tokens of a row are one stretch.
        counts = attention_mask.sum(1).tolist()
        starts = attention_mask.argmax(1).tolist()
        for layer, buffers in enumerate(cache.buffers):
            assert buffers is not None
            for row, (start, count) in enumerate(zip(starts, counts)):
                stretch = slice(start, start + count)
                self.keys[layer][row, :count] = buffers[0][row, :, stretch].transpose(0, 1)
                self.values[layer][row, :count] = buffers[1][row, :, stretch].transpose(0, 1)
        self.lengths.copy_(attention_mask.sum(1))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v [B, H_kv, d] of one new token per row, and attend to its row.

        q [B, H, d] -> [B, H, d].
        """
        keys, values = self.keys[layer], self.values[layer]
        keys.index_put_((self.rows, self.lengths), k)
        values.index_put_((self.rows, self.lengths), v)
        if self.flash:
            return self.flash_attention(q, keys, values)

        # Queries that share a key become the rows of one attention; a mask together with
        # enable_gqa would select the slow backend on CUDA.
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, H_kv, H / H_kv, d]
        visible = self.columns <= self.lengths[:, None]  # [B, capacity]
        mask = visible[:, None, None]
        out = F.scaled_dot_product_attention(
            grouped, keys.transpose(1, 2), values.transpose(1, 2), mask
        )
        return out.flatten(1, 2)

    def flash_attention(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention that reads only the filled part of each row, on CUDA in half precision."""
        from torch.nn.attention.varlen import varlen_attn  # imports PyTorch's compiler

        out = varlen_attn(
            q,
            keys.flatten(0, 1),
            values.flatten(0, 1),
            self.query_starts,
            self.key_starts,
            1,
            self.capacity,
            enable_gqa=True,
            seqused_k=(self.lengths + 1).to(torch.int32),
        )
        assert isinstance(out, Tensor)
        return out


def decoder_step(decoder: Decoder, x: Tensor, position: Tensor, cache: StaticCache) -> Tensor:
    """The decoder on one new text token per row: what Decoder.forward computes, with its weights.

    x [B, D], position [B] (its id on all three axes) -> hidden states [B, D] after the final norm.
    """
    position_ids = position.expand(3, -1)[..., None]  # [3, B, 1]
    cos, sin = rotary_cos_sin(position_ids, decoder.config)
    cos = cos[:, 0].to(x.dtype)  # [B, 1, d]
    sin = sin[:, 0].to(x.dtype)
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        attn = layer.self_attn
        normed = layer.input_layernorm(x)
        q = attn.q_proj(normed).unflatten(-1, (-1, attn.head_dim))  # [B, H, d]
        k = attn.k_proj(normed).unflatten(-1, (-1, attn.head_dim))  # [B, H_kv, d]
        v = attn.v_proj(normed).unflatten(-1, (-1, attn.head_dim))
        q = apply_rotary(q, cos, sin)
        k = apply_rotary(k, cos, sin)
        x = x + attn.o_proj(cache.attend(index, q, k, v).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    cache.lengths.add_(1)
    return decoder.norm(x)


def choose(
    logits: Tensor,
    history: Tensor,
    sampling: SamplingConfig,
    suppressed: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    """sample() without reading anything back: logits [B, V] -> ids [B].

    history and suppressed: as in process_logits(); noise [B, V]: numbers of the exponential
    distribution, None at temperature 0. An exponential race gives what torch.multinomial draws
    from the same generator.
    """
    logits = process_logits(logits, history, sampling, suppressed)
    if noise is None:
        return logits.argmax(-1)
    return (logits.softmax(-1) / noise).argmax(-1)
