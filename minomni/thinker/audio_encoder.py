"""Audio encoder: log-mel spectrogram in, one token per 40 ms out.

Audio is encoded in independent blocks of 2 seconds. Nothing crosses a block border, so audio can be
encoded while it arrives (source: paper sec. 2.3).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minomni.config import AudioEncoderConfig
from minomni.inputs.mel import num_audio_tokens
from minomni.layers import attention, init_weights


def sinusoids(length: int, size: int, device: torch.device) -> Tensor:
    """Whisper's sinusoidal position embeddings, sines first. -> [length, size]."""
    half = size // 2
    step = math.log(10_000) / (half - 1)
    frequencies = torch.exp(-step * torch.arange(half, device=device))
    positions = torch.arange(length, device=device)
    angles = positions[:, None] * frequencies  # [length, size / 2]
    return torch.cat((angles.sin(), angles.cos()), dim=1)  # [length, size]


class AudioAttention(nn.Module):
    """Attention within each block of audio; the keys have no bias. [blocks, T, D] -> same."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q = self.split_heads(self.q_proj(x))  # [blocks, H, T, d]
        k = self.split_heads(self.k_proj(x))
        v = self.split_heads(self.v_proj(x))
        out = attention(q, k, v, mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [blocks, T, D]

    def split_heads(self, x: Tensor) -> Tensor:
        """[blocks, T, H * d] -> [blocks, H, T, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


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
        h = F.gelu(self.fc1(self.final_layer_norm(x)))
        return x + self.fc2(h)


class AudioEncoder(nn.Module):
    """Whisper-large-v3's encoder on blocks, then pooling by two and a projection.

    The projection maps to the Thinker's width.
    """

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.encoder_layers))
        self.ln_post = nn.LayerNorm(config.d_model)
        self.proj = nn.Linear(config.d_model, config.output_dim)
        # Part of the released checkpoint, but unused.
        self.audio_bos_eos_token = nn.Embedding(2, config.output_dim)
        init_weights(self, config.encoder_layers)

    def blocks(self, mels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Split clips [bands, F] into blocks, padded to the longest block.

        -> (blocks [blocks, bands, W], frames of each [blocks])
        """
        pieces: list[Tensor] = []
        for mel in mels:
            pieces += mel.split(2 * self.config.n_window, dim=1)
        pieces = [piece for piece in pieces if piece.shape[1]]

        frames = [piece.shape[1] for piece in pieces]
        longest = max(frames)
        padded = []
        for piece, length in zip(pieces, frames, strict=True):
            padded.append(F.pad(piece, (0, longest - length)))
        weight = self.proj.weight
        blocks = torch.stack(padded).to(weight)
        return blocks, torch.tensor(frames, device=weight.device)

    def stem(self, mel: Tensor, frames: Tensor) -> Tensor:
        """Two convolutions, the second with stride two; each block is padded with zeros.

        mel [blocks, bands, W], frames [blocks] -> [blocks, T, D] with T = (W + 1) // 2.
        """
        x = F.gelu(self.conv1(mel))  # [blocks, D, W]
        # Padding frames become zeros again, so that a short block ends like a full one.
        index = torch.arange(x.shape[2], device=x.device)
        valid = index < frames[:, None]  # [blocks, W]
        x = x * valid[:, None]
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # [blocks, T, D]
        _, length, size = x.shape
        positions = sinusoids(length, size, x.device)
        return x + positions.to(x.dtype)

    def forward(self, mels: list[Tensor]) -> Tensor:
        """Encode clips [num_mel_bins, F] -> packed tokens [N, output_dim].

        N is the sum of num_audio_tokens(F). Positions restart in every block. As in the
        release: pool, then ln_post, then proj.
        """
        if not any(mel.shape[1] for mel in mels):
            weight = self.proj.weight
            size = (0, self.config.output_dim)
            return torch.zeros(size, dtype=weight.dtype, device=weight.device)
        mel, frames = self.blocks(mels)
        x = self.stem(mel, frames)  # [blocks, T, D]

        # Keys beyond the end of a short block are masked.
        steps = torch.arange(x.shape[1], device=x.device)
        mask = None
        if bool((frames < mel.shape[2]).any()):
            lengths = (frames[:, None] + 1) // 2  # [blocks, 1]
            mask = (steps < lengths)[:, None, None]  # [blocks, 1, 1, T]
        for layer in self.layers:
            x = layer(x, mask)

        # Pool pairs of steps; an odd last step is dropped.
        pairs = x.shape[1] // 2
        x = x[:, : 2 * pairs]
        x = x.unflatten(1, (pairs, 2)).mean(2)  # [blocks, pairs, D]

        # Keep the tokens of real audio.
        counts = num_audio_tokens(frames)  # [blocks]
        valid = steps[:pairs] < counts[:, None]  # [blocks, pairs]
        x = x[valid]  # [N, D]
        return self.proj(self.ln_post(x))  # [N, output_dim]
