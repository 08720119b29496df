"""The Qwen2.5 decoder with TMRoPE: the Thinker's, and smaller, the Talker's."""

import torch
from torch import Tensor, nn

from minomni.config import DecoderConfig
from minomni.layers import (
    KVCache,
    RMSNorm,
    SwiGLU,
    apply_rotary,
    attention,
    init_weights,
    rotary_frequencies,
)


def rotary_cos_sin(position_ids: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of TMRoPE. position_ids [3, B, L] (time, height, width) -> two [B, 1, L,
    head_dim], fp32.

    Of the head_dim/2 angles the first mrope_section[0] follow time, then height, then width (spec:
    paper sec. 2.2); where the three ids are equal, as in text, this is plain rotary.
    """
    inverse = rotary_frequencies(config.head_dim, config.rope_theta, position_ids.device)
    angles = position_ids[..., None] * inverse  # [3, B, L, d/2]
    sections = angles.split(config.mrope_section, dim=-1)
    angles = torch.cat(
        [section[axis] for axis, section in enumerate(sections)], dim=-1
    )  # [B, L, d/2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, L, d]
    return angles.cos(), angles.sin()


def next_position(position_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The id after all those of a row's real tokens. position_ids [3, B, L], attention_mask [B, L]
    -> [B].
    """
    return position_ids.masked_fill(attention_mask == 0, -1).amax(dim=(0, 2)) + 1


def causal_mask(
    attention_mask: Tensor | None, length: int, total: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """What each of the last `length` of `total` tokens may see -> (mask [B or 1, 1, length, total]
    or None, causal).

    attention_mask [B, total] is 0 at padding. The common cases need no mask at all: one new token
    sees everything, and padding on the right is hidden from real tokens by causality. A padding
    token sees itself, lest its row be empty.
    """
    ends = attention_mask is None or bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
    if ends and length == total:
        return None, True
    full = attention_mask is None or bool(attention_mask.all())
    if full and length == 1:
        return None, False
    rows = torch.arange(total - length, total, device=device)[:, None]
    columns = torch.arange(total, device=device)
    mask = (columns <= rows)[None]  # [1, length, total]
    if not full:
        mask = mask & attention_mask[:, None].bool() | (columns == rows)  # [B, length, total]
    return mask[:, None], False


class SelfAttention(nn.Module):
    """Grouped-query attention; q, k and v have biases, the output has none. [B, L, D] -> [B, L, D]."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        inner, shared = (
            n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, inner)
        self.k_proj = nn.Linear(config.hidden_size, shared)
        self.v_proj = nn.Linear(config.hidden_size, shared)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

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
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, L, d]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # [B, H_kv, past + L, d]
        out = attention(q, k, v, mask, causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, L, D]


class DecoderLayer(nn.Module):
    """Attention, then MLP, each on the normalised stream and added to it. [B, L, D] -> [B, L, D]."""

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
    """Embedding table, layers and final norm; the embeddings may be wider than the stream (the
    Talker's are).
    """

    def __init__(self, config: DecoderConfig, embedding_size: int):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, embedding_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Unit embeddings are as loud as what they are added to: media features, and the Thinker's
        # normed states.
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
        None where there is no padding; cache: holds the past and is extended in place. ->
        hidden_states [B, L, D] after the final norm.
        """
        hidden_states, length = inputs_embeds, inputs_embeds.shape[1]
        cos, sin = (x.to(inputs_embeds.dtype) for x in rotary_cos_sin(position_ids, self.config))
        past = 0 if cache is None else cache.length
        mask, causal = causal_mask(attention_mask, length, past + length, inputs_embeds.device)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, cos, sin, mask, causal, cache, index)
        return self.norm(hidden_states)
