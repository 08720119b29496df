"""Ears: log-mel spectrogram in, one token per 40 ms out, heard in independent blocks of 2 seconds.

The blocks are what makes listening streamable: nothing ever looks across a border (spec: paper sec.
2.3).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minomni.config import AudioEncoderConfig
from minomni.layers import attention, init_weights


def token_count(frames: int) -> int:
    """Audio tokens of a clip of that many mel frames: one per four frames, none for one or two
    frames.
    """
    return (frames + 1) // 4


def sinusoids(length: int, size: int, device: torch.device) -> Tensor:
    """Whisper's position vectors, sines first. -> [length, size]."""
    steps = math.log(10_000) / (size // 2 - 1)
    angles = torch.arange(length, device=device)[:, None] * torch.exp(
        -steps * torch.arange(size // 2, device=device)
    )
    return torch.cat((angles.sin(), angles.cos()), dim=1)  # [length, size]


class AudioAttention(nn.Module):
    """Attention inside one block of sound; the keys have no bias. [blocks, T, D] -> [blocks, T, D]."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [blocks, H, T, d]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))  # [blocks, T, D]


class AudioLayer(nn.Module):
    """Pre-norm transformer layer. [blocks, T, D] -> [blocks, T, D]."""

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        self.self_attn = AudioAttention(config.d_model, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class AudioEncoder(nn.Module):
    """Whisper-large-v3's encoder, cut into blocks, plus pooling by two and a projection to the
    Thinker's width.
    """

    token_count = staticmethod(token_count)

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.encoder_layers))
        self.ln_post = nn.LayerNorm(config.d_model)
        self.proj = nn.Linear(config.d_model, config.output_dim)
        self.audio_bos_eos_token = nn.Embedding(
            2, config.output_dim
        )  # in the release, and used by nothing
        init_weights(self, config.encoder_layers)

    def blocks(self, mels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Cut clips [bands, F] into blocks, padded to the longest -> [blocks, bands, W], frames of
        each [blocks].
        """
        pieces = [
            piece
            for mel in mels
            for piece in mel.split(2 * self.config.n_window, dim=1)
            if piece.shape[1]
        ]
        lengths = [piece.shape[1] for piece in pieces]
        padded = [F.pad(piece, (0, max(lengths) - piece.shape[1])) for piece in pieces]
        return torch.stack(padded).to(self.proj.weight), torch.tensor(
            lengths, device=self.proj.weight.device
        )

    def stem(self, mel: Tensor, frames: Tensor) -> Tensor:
        """Two convolutions, the second halving the rate; each block sees zeros beyond its borders.

        mel [blocks, bands, W], frames [blocks] -> [blocks, T, D] with T = (W + 1) // 2.
        """
        x = F.gelu(self.conv1(mel))  # [blocks, D, W]
        x = (
            x * (torch.arange(x.shape[2], device=x.device) < frames[:, None])[:, None]
        )  # padding is zeros again
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # [blocks, T, D]
        return x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)

    def forward(self, mels: list[Tensor]) -> Tensor:
        """Listen to clips: list of [num_mel_bins, F] -> tokens of all, packed [sum of
        token_count(F), output_dim].

        Positions restart in every block. Release behaviour: pool, then ln_post, then proj.
        """
        if not any(mel.shape[1] for mel in mels):
            return self.proj.weight.new_zeros(0, self.config.output_dim)
        mel, frames = self.blocks(mels)
        x = self.stem(mel, frames)
        steps = torch.arange(x.shape[1], device=x.device)
        mask = (
            None
            if bool((frames == mel.shape[2]).all())
            else (steps < (frames[:, None] + 1) // 2)[:, None, None]
        )
        for layer in self.layers:
            x = layer(x, mask)
        pairs = x.shape[1] // 2
        x = (
            x[:, : 2 * pairs].unflatten(1, (pairs, 2)).mean(2)
        )  # [blocks, pairs, D]; an odd last step is dropped
        x = x[steps[:pairs] < ((frames + 1) // 4)[:, None]]  # [N, D]
        return self.proj(self.ln_post(x))  # [N, output_dim]
