"""The Qwen2.5 decoder with TMRoPE, used by the Thinker and, smaller, by the Talker."""

import torch
from torch import Tensor, nn

from minomni.config import DecoderConfig
from minomni.kv_cache import KVCache
from minomni.layers import RMSNorm, SwiGLU, attention, init_weights
from minomni.rotary import apply_rotary, rotary_cos_sin


def next_position(position_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The position id after the largest one of a row's real tokens.

    position_ids [3, B, L], attention_mask [B, L] -> [B].
    """
    real = position_ids.masked_fill(attention_mask == 0, -1)
    return real.amax(dim=(0, 2)) + 1


def causal_mask(
    attention_mask: Tensor | None, length: int, total: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """The attention mask of the last `length` of `total` tokens.

    attention_mask [B, total] is 0 at padding -> (mask [B or 1, 1, length, total] or None, causal),
    as attention() takes them. The common cases need no mask: one new token attends to everything,
    and padding on the right is hidden from real tokens by causality. A padding token attends to
    itself, so that no row of the mask is empty.
    """
    no_padding = attention_mask is None
    right_padded = attention_mask is None
    if attention_mask is not None:
        no_padding = bool(attention_mask.all())
        falling = attention_mask[:, 1:] <= attention_mask[:, :-1]
        right_padded = bool(falling.all())
    if right_padded and length == total:
        return None, True
    if no_padding and length == 1:
        return None, False

    # The general case: causal, and without the padding.
    rows = torch.arange(total - length, total, device=device)[:, None]
    columns = torch.arange(total, device=device)
    mask = (columns <= rows)[None]  # [1, length, total]
    if attention_mask is not None and not no_padding:
        real = attention_mask[:, None].bool()  # [B, 1, total]
        mask = (mask & real) | (columns == rows)  # [B, length, total]
    return mask[:, None], False


class SelfAttention(nn.Module):
    """Grouped-query attention; q, k and v have biases, the output has none.

    [B, L, D] -> [B, L, D].
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        causal: bool,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        q = self.split_heads(self.q_proj(x))  # [B, H, L, d]
        k = self.split_heads(self.k_proj(x))  # [B, H_kv, L, d]
        v = self.split_heads(self.v_proj(x))
        q = apply_rotary(q, cos, sin)
        k = apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # [B, H_kv, past + L, d]
        out = attention(q, k, v, mask, causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, L, D]

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, L, heads * d] -> [B, heads, L, d]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer: attention, then MLP. [B, L, D] -> [B, L, D]."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding table, layers and final norm.

    The embeddings may be wider than the hidden states, as they are in the Talker.
    """

    def __init__(self, config: DecoderConfig, embedding_size: int):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, embedding_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Embeddings of unit variance match what they are added to: media features and the Thinker's
        # normalized hidden states.
        init_weights(self, config.num_hidden_layers, embedding_std=1.0)

    def new_cache(self) -> KVCache:
        return KVCache(len(self.layers))

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run the layers on new tokens.

        inputs_embeds [B, L, D]; position_ids [3, B, L]; attention_mask [B, past + L], 0 at padding,
        None without padding; cache: holds past positions and is extended in place. ->
        hidden_states [B, L, D] after the final norm.
        """
        # Rotary angles and the mask are the same in every layer.
        dtype, device = inputs_embeds.dtype, inputs_embeds.device
        cos, sin = rotary_cos_sin(position_ids, self.config)
        cos, sin = cos.to(dtype), sin.to(dtype)
        length = inputs_embeds.shape[1]
        past = 0 if cache is None else cache.length
        mask, causal = causal_mask(attention_mask, length, past + length, device)

        hidden_states = inputs_embeds
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, cos, sin, mask, causal, cache, index)
        return self.norm(hidden_states)
