"""Codes to mel: a diffusion transformer (DiT) that turns noise into a mel by flow matching.

Attention is local to blocks of 24 frames. A few layers also attend to one block before or after, so
one forward pass sees two blocks of past and one block of future. This lets the mel be generated
while codes still arrive. Source: paper sec. 3.3 (flow matching, sliding window) and sec. 2.4
(streaming); F5-TTS (arXiv 2410.06885) for adaptive norms and sway sampling; the release for
everything the paper leaves open.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minomni.config import DiTConfig, FlowConfig
from minomni.layers import attention
from minomni.rotary import rotary_frequencies
from minomni.token2wav.ode_solver import solve, time_grid
from minomni.token2wav.speaker_encoder import SpeakerEncoder

# The embedding of the flow time is F5-TTS's: its SinusPositionEmbedding.
TIME_FREQUENCIES = 128
MAX_PERIOD = 10_000  # of the slowest sinusoid, over 2 pi
TIME_SCALE = 1000  # times on [0, 1] are embedded as 0 to 1000


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the flow time, 0 noise to 1 speech, and an MLP: [B] -> [B, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.time_mlp = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, time: Tensor) -> Tensor:
        index = torch.arange(TIME_FREQUENCIES, device=time.device, dtype=time.dtype)
        frequencies = torch.exp(index * (-math.log(MAX_PERIOD) / (TIME_FREQUENCIES - 1)))
        angles = TIME_SCALE * time[:, None] * frequencies  # [B, 128]
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.time_mlp(waves.to(next(self.parameters()).dtype))


class CodeEmbedding(nn.Module):
    """Speech codes [B, n] -> [B, n, emb_dim].

    Row 0 is also the "no code" of the unconditional branch, as in the release.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.codec_embed = nn.Embedding(config.num_embeds + 1, config.emb_dim)

    def forward(self, codes: Tensor) -> Tensor:
        return self.codec_embed(codes)


class InputEmbedding(nn.Module):
    """One linear map of [noisy mel, timbre, code, speaker vector].

    It is computed in two parts: the solver changes only the mel, so the rest is computed once.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.mel_dim = config.mel_dim
        self.repeats = config.repeats
        width = config.mel_dim + config.enc_dim + config.emb_dim + config.enc_emb_dim
        self.proj = nn.Linear(width, config.hidden_size)
        self.spk_encoder = SpeakerEncoder(config)

    def context(self, code_embeds: Tensor, cond: Tensor, timbre: Tensor) -> Tensor:
        """The part that does not depend on the noisy mel.

        code_embeds [B, n, emb_dim], cond [B, E], timbre [B, enc_dim] -> [B, T, D] with
        T = n * repeats.
        """
        # Computed once per code, then repeated for each mel frame of the code.
        length = code_embeds.shape[1]
        timbre = timbre[:, None].expand(-1, length, -1)  # [B, n, enc_dim]
        cond = cond[:, None].expand(-1, length, -1)  # [B, n, E]
        features = torch.cat([timbre, code_embeds, cond], dim=-1)
        weight = self.proj.weight[:, self.mel_dim :]
        context = F.linear(features, weight, self.proj.bias)  # [B, n, D]
        return context.repeat_interleave(self.repeats, dim=1)  # [B, T, D]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Noisy mel x [B, T, mel_dim] and context [B, T, D] -> [B, T, D]."""
        return F.linear(x, self.proj.weight[:, : self.mel_dim]) + context


class AdaptiveNorm(nn.Module):
    """Maps the time embedding to the shifts, scales and gates around a LayerNorm.

    [B, D] -> `parts` tensors of [B, 1, D].
    """

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)
        nn.init.zeros_(self.linear.weight)  # every block starts as the identity
        nn.init.zeros_(self.linear.bias)

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(time))[:, None].chunk(self.parts, dim=-1)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without own weights, then scale and shift from the time: [B, T, D] -> same."""
    normalized = F.layer_norm(h, h.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normalized, 1 + scale)


def rotate_first_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of head 0 only, on pairs (0, 1), (2, 3), ...; a quirk of the release.

    x [B, T, H, d], cos and sin [T, 1, d/2] -> [B, T, H, d].
    """
    first, rest = x[:, :, :1], x[:, :, 1:]
    even, odd = first[..., 0::2], first[..., 1::2]  # [B, T, 1, d/2]
    rotated = [even * cos - odd * sin, odd * cos + even * sin]
    first = torch.stack(rotated, dim=-1).flatten(-2)  # pairs interleaved again: [B, T, 1, d]
    return torch.cat([first.to(x.dtype), rest], dim=2)


class BlockKV(NamedTuple):
    """Keys and values of consecutive blocks."""

    keys: Tensor  # [B, blocks, size, H, d]
    values: Tensor  # [B, blocks, size, H, d]
    valid: Tensor  # bool [1, blocks, size], False at padding frames

    def blocks(self, begin: int, end: int) -> "BlockKV":
        """The blocks from begin to end."""
        return BlockKV(self.keys[:, begin:end], self.values[:, begin:end], self.valid[:, begin:end])


@dataclass
class BlockCache:
    """Keys and values of the newest final blocks, for one layer and one evaluation time.

    Empty (None) before the first final block.
    """

    entries: BlockKV | None = None

    def prepend(self, new: BlockKV, num_final: int, max_blocks: int) -> BlockKV:
        """Cached blocks followed by new blocks; the last `max_blocks` final ones stay in the cache.

        The first `num_final` of the new blocks are final and enter the cache.
        """
        joined = new
        end = num_final
        if self.entries is not None:
            end += self.entries.keys.shape[1]
            joined = BlockKV(
                torch.cat([self.entries.keys, new.keys], dim=1),
                torch.cat([self.entries.values, new.values], dim=1),
                torch.cat([self.entries.valid, new.valid], dim=1),
            )
        self.entries = joined.blocks(max(end - max_blocks, 0), end)
        return joined


class BlockAttention(nn.Module):
    """Block-local attention: itself, `back` blocks before it and `ahead` blocks after it."""

    def __init__(self, config: DiTConfig, back: int, ahead: int):
        super().__init__()
        self.heads = config.num_attention_heads
        self.block_size = config.block_size
        self.back = back
        self.ahead = ahead
        width = config.hidden_size
        inner = config.num_attention_heads * config.head_dim
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(width, inner)
        self.to_v = nn.Linear(width, inner)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(config.dropout))

    def project(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, D] -> queries, keys and values, each [B, blocks, size, H, d]."""
        heads = (self.heads, -1)
        q = self.to_q(h).unflatten(-1, heads)  # [B, T, H, d]
        k = self.to_k(h).unflatten(-1, heads)
        v = self.to_v(h).unflatten(-1, heads)
        q = rotate_first_head(q, cos, sin)
        k = rotate_first_head(k, cos, sin)
        blocks = (-1, self.block_size)
        return q.unflatten(1, blocks), k.unflatten(1, blocks), v.unflatten(1, blocks)

    def window(self, x: Tensor, left_missing: int) -> Tensor:
        """The frames that each new block attends to, zeros beyond the ends.

        [B, known blocks, size, ...] -> [B, new blocks, window, ...]. left_missing: how
        many of the `back` blocks before the first new block do not exist.
        """
        if not self.back and not self.ahead:
            return x
        # Blocks of zeros at both ends; F.pad lists the padding of the last axis first.
        other_axes = (0, 0) * (x.ndim - 2)
        x = F.pad(x, other_axes + (left_missing, self.ahead))
        # -> [B, back + new + ahead, size, ...]

        # Shifted copies side by side: the window of each new block.
        size = self.back + 1 + self.ahead
        new = x.shape[1] - size + 1
        shifted = [x[:, i : i + new] for i in range(size)]
        return torch.cat(shifted, dim=2)

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        valid: Tensor | None,
        cache: BlockCache | None = None,
        num_final: int = 0,
    ) -> Tensor:
        """h [B, T, D] with T whole blocks -> [B, T, D].

        valid [1, T] is False at padding frames of the first or last block; None without padding.
        cache: keys and values of earlier blocks; the first `num_final` blocks of h are added to it.
        """
        q, k, v = self.project(h, cos, sin)  # [B, blocks, size, H, d]
        new_blocks = q.shape[1]
        needs_mask = valid is not None or self.back > 0 or self.ahead > 0
        if valid is None:
            valid = h.new_ones(1, h.shape[1], dtype=torch.bool)
        valid = valid.view(1, new_blocks, self.block_size)

        # Earlier blocks come from the cache, if this layer attends to any.
        if cache is not None and self.back:
            k, v, valid = cache.prepend(BlockKV(k, v, valid), num_final, self.back)
        left_missing = self.back + new_blocks - k.shape[1]

        # Each block gets the keys and values of its own window.
        k = self.window(k, left_missing)  # [B, blocks, window, H, d]
        v = self.window(v, left_missing)
        mask = None
        if needs_mask:
            valid = self.window(valid, left_missing)  # [1, blocks, window]
            mask = valid.expand(len(h), -1, -1).flatten(0, 1)  # [B * blocks, window]
            mask = mask[:, None, None]

        # Blocks are independent now: fold them into the batch. [B * blocks, H, size or window, d]
        q = q.flatten(0, 1).transpose(1, 2)
        k = k.flatten(0, 1).transpose(1, 2)
        v = v.flatten(0, 1).transpose(1, 2)
        out = attention(q, k, v, mask)
        out = out.transpose(1, 2).reshape(*h.shape[:2], -1)  # [B, T, H * d]
        return self.to_out(out)


class FeedForward(nn.Module):
    """Two layers around a tanh-approximated GELU: [B, T, D] -> same."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.hidden_size
        inner = width * config.ff_mult
        self.ff = nn.Sequential(
            nn.Linear(width, inner),
            nn.GELU(approximate="tanh"),
            nn.Dropout(config.dropout),
            nn.Linear(inner, width),
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.ff(h)


class DiTBlock(nn.Module):
    """Attention, then feed-forward, each with shift, scale and gate from the time.

    attn_norm makes all six from the time embedding. [B, T, D] -> [B, T, D].
    """

    def __init__(self, config: DiTConfig, back: int, ahead: int):
        super().__init__()
        self.attn_norm = AdaptiveNorm(config.hidden_size, parts=6)
        self.attn = BlockAttention(config, back, ahead)
        self.ff = FeedForward(config)

    def forward(
        self,
        h: Tensor,
        modulation: tuple[Tensor, ...],
        cos: Tensor,
        sin: Tensor,
        valid: Tensor | None,
        cache: BlockCache | None = None,
        num_final: int = 0,
    ) -> Tensor:
        """modulation: what attn_norm gives; the rest as in BlockAttention."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation
        normed = modulate(h, shift, scale)
        attended = self.attn(normed, cos, sin, valid, cache, num_final)
        h = torch.addcmul(h, gate, attended)
        transformed = self.ff(modulate(h, shift_ff, scale_ff))
        return torch.addcmul(h, gate_ff, transformed)


class DiT(nn.Module):
    """The velocity field from noise to mel, and its integration.

    As released it is float32. In bf16 the mel, the time and the sum of velocities stay float32.

        codes, cond, ref_mel  ->  context()      once per utterance
        time                  ->  modulations()  once per evaluation time
        noisy mel and both    ->  velocity()     at each evaluation

    forward() is all three, for training; sample() integrates from noise to mel.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.time_embed = TimeEmbedding(config.hidden_size)
        self.text_embed = CodeEmbedding(config)
        self.input_embed = InputEmbedding(config)
        self.transformer_blocks = nn.ModuleList()
        for i in range(config.num_hidden_layers):
            back = int(i in config.look_backward_layers)
            ahead = int(i in config.look_ahead_layers)
            self.transformer_blocks.append(DiTBlock(config, back, ahead))
        self.norm_out = AdaptiveNorm(config.hidden_size, parts=2)
        self.proj_out = nn.Linear(config.hidden_size, config.mel_dim)

    def forward(
        self,
        x: Tensor,
        codes: Tensor,
        time: Tensor | float,
        cond: Tensor,
        ref_mel: Tensor,
        left_pad: int = 0,
    ) -> Tensor:
        """Velocity [B, T, 80] at the noisy mel x [B, T, 80] and time [B] or one number for all.

        Time runs from 0 (noise) to 1 (speech). codes [B, n] with T = n * repeats, cond [B, E],
        ref_mel [B, R, 80]. Zeros in codes, cond and ref_mel are the unconditional branch of
        classifier-free guidance. left_pad: see velocity().
        """
        context = self.context(codes, cond, ref_mel)
        return self.velocity(x, context, self.modulations(time), left_pad=left_pad)

    def context(self, codes: Tensor, cond: Tensor, ref_mel: Tensor) -> Tensor:
        """The part of the input that depends on neither x nor time: [B, T, D].

        It is computed once per utterance.
        """
        cond, timbre = self.speaker(cond, ref_mel)
        return self.input_embed.context(self.text_embed(codes), cond, timbre)

    def speaker(self, cond: Tensor, ref_mel: Tensor) -> tuple[Tensor, Tensor]:
        """The speaker vector [B, E] and the timbre [B, enc_dim], in the DiT's precision."""
        dtype = self.proj_out.weight.dtype
        return cond.to(dtype), self.input_embed.spk_encoder(ref_mel.to(dtype))

    def modulations(self, time: Tensor | float) -> list[tuple[Tensor, ...]]:
        """Shifts, scales and gates for time [B], or for one number: of every block, then of the
        output norm. Each is [B or 1, 1, D].
        """
        weight = self.proj_out.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        time = torch.as_tensor(time, dtype=dtype, device=weight.device).reshape(-1)
        embedding = self.time_embed(time)  # [B or 1, D]
        blocks = cast(Iterable[DiTBlock], self.transformer_blocks)
        norms = [block.attn_norm for block in blocks]
        norms.append(self.norm_out)
        return [norm(embedding) for norm in norms]

    def velocity(
        self,
        x: Tensor,
        context: Tensor,
        modulations: list[tuple[Tensor, ...]],
        start: int | Tensor = 0,
        caches: Sequence[BlockCache] | None = None,
        num_final: int = 0,
        left_pad: int = 0,
    ) -> Tensor:
        """Velocity at x [B, T, 80] with the results of context() and modulations() -> [B, T, 80].

        start: frame of the utterance at which x begins. caches: one BlockCache per layer; the first
        `num_final` blocks of frames are added to them. left_pad: how many frames shorter the first
        block is than the others.
        """
        # Pad on both sides to whole blocks.
        frames = x.shape[1]
        right_pad = -(left_pad + frames) % self.config.block_size
        h = self.input_embed(x.to(self.proj_out.weight.dtype), context)  # [B, T, D]
        h = F.pad(h, (0, 0, left_pad, right_pad))  # [B, T in whole blocks, D]
        positions = torch.arange(-left_pad, frames + right_pad, device=x.device)
        valid = None
        if left_pad or right_pad:
            valid = ((positions >= 0) & (positions < frames))[None]

        cos, sin = self.rotary(start + positions)
        for i, block in enumerate(self.transformer_blocks):
            cache = None if caches is None else caches[i]
            h = block(h, modulations[i], cos, sin, valid, cache, num_final)

        # The output norm has scale before shift, the blocks have shift before scale: as released.
        scale, shift = modulations[-1]
        h = h[:, left_pad : left_pad + frames]
        return self.proj_out(modulate(h, shift, scale)).to(x.dtype)  # [B, T, 80]

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, d/2] of positions [T].

        Computed at each call instead of kept in a buffer, so that a model built on the meta device
        has no buffer to fill.
        """
        config = self.config
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, positions.device)
        angles = positions[:, None, None] * frequencies
        return angles.cos(), angles.sin()

    @torch.no_grad()
    def sample(
        self, codes: Tensor, cond: Tensor, ref_mel: Tensor, flow: FlowConfig, noise: Tensor
    ) -> Tensor:
        """Integrate from noise [1, T, 80] to a natural-log mel [1, 80, T].

        codes [1, n] with T = n * repeats. With guidance g the velocity is
        conditional + g * (conditional - unconditional); g = 0 skips the unconditional
        branch, which halves the work.
        """
        branches = [both_branches(x, flow) for x in (codes, cond, ref_mel)]
        context = self.context(*branches)  # [1 or 2, T, D]

        def velocity_fn(time: Tensor, x: Tensor) -> Tensor:
            x = x.expand(len(context), -1, -1)
            return guided(self.velocity(x, context, self.modulations(time)), flow)

        grid = time_grid(flow, noise.device)
        mel = solve(velocity_fn, noise, grid, flow.solver)  # [1, T, 80]
        return mel.transpose(1, 2)


def both_branches(x: Tensor, flow: FlowConfig) -> Tensor:
    """The conditional input and, with guidance, zeros for the unconditional branch.

    [1, ...] -> [1 or 2, ...].
    """
    if not flow.guidance:
        return x
    return torch.cat([x, torch.zeros_like(x)])


def guided(velocity: Tensor, flow: FlowConfig) -> Tensor:
    """Velocities of both branches [1 or 2, T, 80] -> the guided velocity [1, T, 80]."""
    conditional, unconditional = velocity[:1], velocity[-1:]
    return conditional + flow.guidance * (conditional - unconditional)
