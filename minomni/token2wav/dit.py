"""Codes to mel: a diffusion transformer that turns noise into speech along a learned flow, 24
frames at a time.

A block of frames attends to itself; single layers also let it look one block back or ahead, so that
one call of the network hears two blocks of past and one of future and speech can be made while
codes still arrive. Source: paper sec. 3.3 (flow matching, sliding window) and sec. 2.4 (streaming);
F5-TTS (arXiv 2410.06885) for adaptive norms and sway sampling; the release for everything the paper
leaves open.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minomni.config import DiTConfig, FlowConfig
from minomni.layers import attention, rotary_frequencies
from minomni.token2wav.ode_solver import solve, time_grid
from minomni.token2wav.speaker_encoder import SpeakerEncoder

TIME_FREQUENCIES = 128


class TimeEmbedding(nn.Module):
    """Where on the way from noise (0) to speech (1): time [B] -> [B, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.time_mlp = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, time: Tensor) -> Tensor:
        steps = torch.arange(TIME_FREQUENCIES, device=time.device, dtype=time.dtype)
        angles = (
            1000 * time[:, None] * torch.exp(steps * (-math.log(10_000) / (TIME_FREQUENCIES - 1)))
        )  # [B, 128]
        return self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class CodeEmbedding(nn.Module):
    """Speech codes [B, n] -> [B, n, emb_dim]. Row 0 doubles as "no code" of the unguided branch, as
    in the release.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.codec_embed = nn.Embedding(config.num_embeds + 1, config.emb_dim)

    def forward(self, codes: Tensor) -> Tensor:
        return self.codec_embed(codes)


class InputEmbedding(nn.Module):
    """One linear map of [noisy mel, timbre, code, speaker vector], in two halves: the solver
    changes only the mel.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.mel_dim, self.repeats = config.mel_dim, config.repeats
        self.proj = nn.Linear(
            config.mel_dim + config.enc_dim + config.emb_dim + config.enc_emb_dim,
            config.hidden_size,
        )
        self.spk_encoder = SpeakerEncoder(config)

    def context(self, code_embeds: Tensor, cond: Tensor, timbre: Tensor) -> Tensor:
        """[B, n, emb_dim], [B, E], [B, enc_dim] -> [B, n * repeats, D], computed at code rate and
        repeated after it.
        """

        def at_each_code(vector):
            return vector[:, None].expand(-1, code_embeds.shape[1], -1)  # [B, n, .]

        fixed = torch.cat([at_each_code(timbre), code_embeds, at_each_code(cond)], dim=-1)
        fixed = F.linear(fixed, self.proj.weight[:, self.mel_dim :], self.proj.bias)  # [B, n, D]
        return fixed.repeat_interleave(self.repeats, dim=1)  # [B, T, D]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight[:, : self.mel_dim]) + context


class AdaptiveNorm(nn.Module):
    """Holds the map from time to the shifts, scales and gates around a LayerNorm: [B, D] -> parts
    of [B, 1, D].
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
    """LayerNorm without weights of its own, scaled and shifted by the time: [B, T, D] -> same."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


def rotate_first_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary on neighbouring pairs (0,1), (2,3), ... of head 0 alone, a quirk of the release. x [B,
    T, H, d].
    """
    first, rest = x[:, :, :1], x[:, :, 1:]
    even, odd = first[..., 0::2], first[..., 1::2]  # [B, T, 1, d/2]
    first = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([first, rest], dim=2)


@dataclass
class BlockCache:
    """What a layer keeps of the last finished blocks in one look at the field; nothing before the
    first.
    """

    kept: tuple[Tensor, Tensor, Tensor] | None = (
        None  # keys and values [B, blocks, size, H, d], what exists of them
    )

    def join(
        self, new: tuple[Tensor, Tensor, Tensor], finished: int, back: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the past before new blocks, of which the first `finished` become the past, `back` of
        them at most.
        """
        if self.kept is not None:
            finished += self.kept[0].shape[1]
            new = tuple(torch.cat(pair, dim=1) for pair in zip(self.kept, new))
        self.kept = tuple(x[:, max(finished - back, 0) : finished] for x in new)
        return new


class BlockAttention(nn.Module):
    """Attention of each block of frames to `back` blocks before it, itself and `ahead` blocks after
    it.
    """

    def __init__(self, config: DiTConfig, back: int, ahead: int):
        super().__init__()
        self.heads, self.block_size, self.back, self.ahead = (
            config.num_attention_heads,
            config.block_size,
            back,
            ahead,
        )
        inner = config.num_attention_heads * config.head_dim
        self.to_q = nn.Linear(config.hidden_size, inner)
        self.to_k = nn.Linear(config.hidden_size, inner)
        self.to_v = nn.Linear(config.hidden_size, inner)
        self.to_out = nn.Sequential(
            nn.Linear(inner, config.hidden_size), nn.Dropout(config.dropout)
        )

    def neighbourhood(self, x: Tensor, missing: int) -> Tensor:
        """What each new block sees: [B, known blocks, size, ...] -> [B, new blocks, seen, ...],
        zeros beyond the ends.

        missing: how many of the blocks that the first new one looks back to do not exist.
        """
        x = F.pad(
            x, (0, 0) * (x.ndim - 2) + (missing, self.ahead)
        )  # [B, back + new + ahead, size, ...]
        blocks = x.shape[1] - self.back - self.ahead
        return torch.cat([x[:, i : i + blocks] for i in range(self.back + 1 + self.ahead)], dim=2)

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        exists: Tensor | None,
        past: BlockCache | None = None,
        finished: int = 0,
    ) -> Tensor:
        """h [B, T, D] with T whole blocks; exists [1, T] is False at frames that only fill the
        first or the last one.

        None if all are there. past: what earlier blocks left behind, and where the first `finished`
        leave theirs.
        """
        q, k, v = (
            to(h).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v)
        )  # [B, T, H, d]
        q, k = rotate_first_head(q, cos, sin), rotate_first_head(k, cos, sin)
        q, k, v = (
            x.unflatten(1, (-1, self.block_size)) for x in (q, k, v)
        )  # [B, blocks, size, H, d]
        new = q.shape[1]
        there = (
            k.new_ones(1, new, self.block_size, dtype=torch.bool)
            if exists is None
            else exists.view(1, new, -1)
        )
        if past is not None and self.back:
            k, v, there = past.join(
                (k, v, there), finished, self.back
            )  # [B or 1, known blocks, size, ...]
        missing, mask = self.back + new - k.shape[1], None
        if exists is not None or missing or self.ahead or k.shape[1] > new:
            there = self.neighbourhood(there, missing)
            mask = there.expand(len(h), -1, -1).flatten(0, 1)[
                :, None, None
            ]  # [B * blocks, 1, 1, seen]
        if self.back or self.ahead:
            k, v = (
                self.neighbourhood(k, missing),
                self.neighbourhood(v, missing),
            )  # [B, blocks, seen, H, d]
        q, k, v = (
            x.flatten(0, 1).transpose(1, 2) for x in (q, k, v)
        )  # [B * blocks, H, size or seen, d]
        out = attention(q, k, v, mask)
        return self.to_out(out.transpose(1, 2).reshape(*h.shape[:2], -1))  # [B, T, D]


class FeedForward(nn.Module):
    """Two layers around a tanh-approximated GELU: [B, T, D] -> same."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width, inner = config.hidden_size, config.hidden_size * config.ff_mult
        self.ff = nn.Sequential(
            nn.Linear(width, inner),
            nn.GELU(approximate="tanh"),
            nn.Dropout(config.dropout),
            nn.Linear(inner, width),
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.ff(h)


class DiTBlock(nn.Module):
    """Attention, then the feed-forward, each with shift, scale and gate that attn_norm makes from
    the time.

    [B, T, D] -> same.
    """

    def __init__(self, config: DiTConfig, back: int, ahead: int):
        super().__init__()
        self.attn_norm = AdaptiveNorm(config.hidden_size, parts=6)
        self.attn = BlockAttention(config, back, ahead)
        self.ff = FeedForward(config)

    def forward(self, h: Tensor, modulation: tuple[Tensor, ...], *attention_inputs) -> Tensor:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation
        h = torch.addcmul(h, gate, self.attn(modulate(h, shift, scale), *attention_inputs))
        return torch.addcmul(h, gate_ff, self.ff(modulate(h, shift_ff, scale_ff)))


class DiT(nn.Module):
    """The velocity field between noise and mel, and how to follow it. Keep it in float32, as the
    release does.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.time_embed = TimeEmbedding(config.hidden_size)
        self.text_embed = CodeEmbedding(config)
        self.input_embed = InputEmbedding(config)
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(
                config,
                back=int(i in config.look_backward_layers),
                ahead=int(i in config.look_ahead_layers),
            )
            for i in range(config.num_hidden_layers)
        )
        self.norm_out = AdaptiveNorm(config.hidden_size, parts=2)
        self.proj_out = nn.Linear(config.hidden_size, config.mel_dim)

    def forward(
        self,
        x: Tensor,
        codes: Tensor,
        time: Tensor,
        cond: Tensor,
        ref_mel: Tensor,
        lacking: int = 0,
    ) -> Tensor:
        """Velocity [B, T, 80] of the noisy mel x [B, T, 80] at time [B] or one number for all, 0
        noise to 1 speech.

        codes [B, n] with T = n * repeats, cond [B, E], ref_mel [B, R, 80]. Zeros in codes, cond and
        ref_mel are the unconditional branch of classifier-free guidance. lacking: see look().
        """
        return self.velocity(x, time, self.context(codes, cond, ref_mel), lacking)

    def context(self, codes: Tensor, cond: Tensor, ref_mel: Tensor) -> Tensor:
        """All of the input that does not depend on x or time, [B, T, D]: computed once per
        utterance.
        """
        return self.input_embed.context(
            self.text_embed(codes), cond, self.input_embed.spk_encoder(ref_mel)
        )

    def modulations(self, time: Tensor) -> list[tuple[Tensor, ...]]:
        """Shifts, scales and gates of every block, and scale and shift of the end, for time [B]:
        each [B, 1, D].
        """
        time = self.time_embed(time)  # [B, D]
        return [
            norm(time)
            for norm in (*(block.attn_norm for block in self.transformer_blocks), self.norm_out)
        ]

    def velocity(self, x: Tensor, time: Tensor, context: Tensor, lacking: int = 0) -> Tensor:
        """forward() with what context() made: x [B, T, 80], time [B] or one number -> [B, T, 80]."""
        time = torch.as_tensor(time, dtype=x.dtype, device=x.device).reshape(-1)  # [B or 1]
        return self.look(x, context, self.modulations(time), first_block_missing=lacking)

    def look(
        self,
        x: Tensor,
        context: Tensor,
        modulations: list[tuple[Tensor, ...]],
        start: int = 0,
        pasts: Sequence[BlockCache | None] | None = None,
        finished: int = 0,
        lacking: int = 0,
    ) -> Tensor:
        """velocity() with what modulations() made, from frame `start` of an utterance on.

        pasts: a Past for each block of the network; the first `finished` blocks of frames are added
        to them. lacking: frames that the first block has less than the others.
        """
        frames = x.shape[1]
        h = self.input_embed(x, context)  # [B, T, D]
        h = F.pad(
            h, (0, 0, lacking, -(lacking + frames) % self.config.block_size)
        )  # [B, T in whole blocks, D]
        positions = torch.arange(-lacking, h.shape[1] - lacking, device=x.device)
        cos, sin = self.rotary(start + positions)
        exists = (
            None if len(positions) == frames else ((positions >= 0) & (positions < frames))[None]
        )
        for i, block in enumerate(self.transformer_blocks):
            h = block(h, modulations[i], cos, sin, exists, pasts and pasts[i], finished)
        scale, shift = modulations[
            -1
        ]  # in this order here, shift before scale inside the blocks: as released
        return self.proj_out(modulate(h[:, lacking : lacking + frames], shift, scale))  # [B, T, 80]

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, d/2]; computed at each call, so that a model built on the meta device
        needs no fixing.
        """
        angles = positions[:, None, None] * rotary_frequencies(
            self.config.head_dim, self.config.rope_theta, positions.device
        )
        return angles.cos(), angles.sin()

    @torch.no_grad()
    def sample(
        self, codes: Tensor, cond: Tensor, ref_mel: Tensor, flow: FlowConfig, noise: Tensor
    ) -> Tensor:
        """Follow the flow from noise [1, T, 80] to a natural-log mel [1, 80, T] for codes [1, n], T
        = n * repeats.

        Guidance g moves along conditional + g * (conditional - unconditional); 0 costs half the
        work.
        """
        context = self.context(*(both_branches(x, flow) for x in (codes, cond, ref_mel)))

        def field(time: Tensor, x: Tensor) -> Tensor:
            return guided(self.velocity(x.expand(len(context), -1, -1), time, context), flow)

        return solve(field, noise, time_grid(flow, noise.device), flow.solver).transpose(1, 2)


def both_branches(x: Tensor, flow: FlowConfig) -> Tensor:
    """An input as asked and, where there is guidance, zeros for the unconditional branch: [1, ...]
    -> [1 or 2, ...].
    """
    return torch.cat([x, torch.zeros_like(x)]) if flow.guidance else x


def guided(velocity: Tensor, flow: FlowConfig) -> Tensor:
    """Velocities of both branches [1 or 2, T, 80] -> the one to follow [1, T, 80]."""
    return velocity[:1] + flow.guidance * (velocity[:1] - velocity[-1:])
