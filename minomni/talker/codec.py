"""Our speech tokenizer: mel -> one code per 40 ms -> letters and mel. The release ships no encoder;
its codes differ.

A mel is shortened by strided convolutions, understood by a small transformer in 2-second blocks (so
that encoding can stream), and rounded to a grid by finite scalar quantisation (FSQ, arXiv
2309.15505). Two readers behind the grid decide what the codes must keep: a CTC head reads letters
(the words), a convolutional mel decoder that is *told the speaker* reads the sound (melody and
timing), so that the codes need not carry the voice. The idea of teaching a tokenizer by transcripts
is that of the supervised tokenizers (CosyVoice, Qwen3-TTS); the shape here is our own.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minomni.config import CodecConfig
from minomni.layers import attention

FIRST_CODE = 1  # code 0 is the one the DiT sees where guidance drops the condition
MEL_CENTRE, MEL_SPREAD = -5.0, 3.0  # brings natural-log mels (about -11.5 ... 2) near unit scale
LETTERS = " abcdefghijklmnopqrstuvwxyz"  # CTC class i + 1; class 0 is blank


def letters_to_ids(text: str) -> Tensor:
    """Lower-case text -> CTC classes [letters]. Raises KeyError for a character outside LETTERS."""
    index = {letter: i + 1 for i, letter in enumerate(LETTERS)}
    return torch.tensor([index[letter] for letter in text])


def ids_to_letters(classes: Tensor) -> str:
    """Best CTC classes per frame [T] -> text: repeats collapse, blanks (0) vanish."""
    collapsed = torch.unique_consecutive(classes).tolist()
    return "".join(LETTERS[c - 1] for c in collapsed if 0 < c <= len(LETTERS))


def ctc_align(log_probs: Tensor, letters: Tensor) -> Tensor | None:
    """Which letter is being said when: the likeliest way of CTC through a text (Viterbi).

    log_probs [T, classes], letters [n] -> index of a letter for each of T moments [T], that of the
    one before in a pause; None where there are too few moments for the letters.
    """
    states = torch.zeros(
        2 * len(letters) + 1, dtype=torch.long
    )  # blank, letter, blank, letter, ... blank
    states[1::2] = letters
    leap = torch.zeros(len(states), dtype=torch.bool)  # over a blank, between letters that differ
    leap[3::2] = states[3::2] != states[1:-2:2]
    heard = log_probs.cpu().float()[:, states]  # [T, states]
    never = torch.full((2,), -torch.inf)
    score, came = torch.cat([heard[0, :2], never.new_full((len(states) - 2,), -torch.inf)]), []
    for row in heard[1:]:
        ways = torch.stack(
            [
                score,
                torch.cat([never[:1], score[:-1]]),
                torch.cat([never, score[:-2]]).where(leap, never[0]),
            ]
        )  # stay, step, leap
        best, way = ways.max(0)
        score = best + row
        came.append(way)
    place = len(states) - 2 + int(score[-1] > score[-2])
    if score[place] == -torch.inf:
        return None
    places = [place]
    for way in reversed(came):
        places.append(places[-1] - int(way[places[-1]]))
    return ((torch.tensor(places[::-1]) - 1) // 2).clamp_min(0)


class FSQ(nn.Module):
    """Finite scalar quantisation: every channel is squashed to (-1, 1) and rounded to one of
    `levels` values.
    """

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels = levels
        self.strides = tuple(
            math.prod(levels[:i]) for i in range(len(levels))
        )  # a code is a number in mixed radix

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [..., channels] -> the same rounded (gradient straight through), codes [...]
        from FIRST_CODE on.
        """
        scale = self._scale(x)
        steps = (torch.tanh(x) + 1) * scale  # 0 ... levels - 1
        rounded = steps + (steps.round() - steps).detach()
        codes = (steps.round().long() * torch.tensor(self.strides, device=x.device)).sum(
            -1
        ) + FIRST_CODE
        return rounded / scale - 1, codes

    def values(self, codes: Tensor) -> Tensor:
        """Codes [...] -> grid values [..., channels] in [-1, 1]; the inverse of forward."""
        digits = torch.stack(
            [(codes - FIRST_CODE) // s % n for s, n in zip(self.strides, self.levels)], -1
        )
        return digits / self._scale(codes) - 1

    def _scale(self, like: Tensor) -> Tensor:
        return torch.tensor([(n - 1) / 2 for n in self.levels], device=like.device)


class Block(nn.Module):
    """Pre-norm transformer layer whose attention stays inside one block of time."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.attn_norm, self.ff_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.near = nn.Conv1d(
            width, width, 5, padding=2, groups=width
        )  # order inside a block comes from here
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = nn.Sequential(
            nn.Linear(width, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, width),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [N, T, D] blocks of time, mask [N, 1, 1, T] true where a frame is real -> [N, T, D]."""
        x = x + self.near((x * mask[:, 0, 0, :, None]).transpose(1, 2)).transpose(1, 2)
        n, t, d = x.shape
        q, k, v = (
            self.qkv(self.attn_norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # [N, H, T, D/H] each
        x = x + self.out(attention(q, k, v, mask=mask).transpose(1, 2).reshape(n, t, d))
        return x + self.ff(self.ff_norm(x))


class Codec(nn.Module):
    """Speech tokenizer of CodecConfig: encode() for codes, forward() for training both readers."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        width, halvings = config.hidden_size, config.downsample.bit_length() - 1
        self.stem = nn.Conv1d(config.mel_dim, width, 5, padding=2)
        self.down = nn.ModuleList(
            nn.Conv1d(width, width, 4, stride=2, padding=1) for _ in range(halvings)
        )
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.to_grid = nn.Linear(width, len(config.levels))
        self.fsq = FSQ(config.levels)
        self.from_grid = nn.Linear(len(config.levels), width)
        self.reader = Block(config)
        self.ctc_head = nn.Linear(width, config.ctc_vocab)
        self.speaker = nn.Linear(2 * config.mel_dim, width)
        self.mel_layers = nn.ModuleList(
            nn.Conv1d(width, width, 5, padding=2) for _ in range(halvings + 2)
        )
        self.mel_out = nn.Conv1d(width, config.mel_dim, 5, padding=2)

    def encode(self, mel: Tensor) -> Tensor:
        """Voice mel [B, T, mel_dim], T a multiple of downsample -> codes [B, T / downsample],
        FIRST_CODE and up.
        """
        return self.quantize(mel)[1]

    def quantize(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Voice mel [B, T, mel_dim] -> grid values [B, T / downsample, channels] and codes [B, T /
        downsample].
        """
        x = F.gelu(self.stem(((mel - MEL_CENTRE) / MEL_SPREAD).transpose(1, 2)))
        for layer in self.down:
            x = F.gelu(layer(x))  # halves T
        x = self._in_blocks(x.transpose(1, 2), self.encoder)  # [B, T / downsample, D]
        return self.fsq(self.to_grid(x))

    def letters(self, grid: Tensor) -> Tensor:
        """Grid values [B, C, channels] -> CTC log-probabilities [B, C, ctc_vocab]."""
        return self.ctc_head(self._in_blocks(self.from_grid(grid), [self.reader])).log_softmax(-1)

    def mel(self, grid: Tensor, cond: Tensor) -> Tensor:
        """Grid values [B, C, channels] and speaker vectors [B, 2 * mel_dim] -> mel [B, C *
        downsample, mel_dim].
        """
        x = (self.from_grid(grid) + self.speaker(cond)[:, None]).transpose(1, 2)
        for i, layer in enumerate(self.mel_layers):
            x = x + F.gelu(layer(x))
            if i < len(self.down):
                x = x.repeat_interleave(2, -1)  # doubles T
        return self.mel_out(x).transpose(1, 2) * MEL_SPREAD + MEL_CENTRE

    def _in_blocks(self, x: Tensor, layers) -> Tensor:
        """Run layers over x [B, C, D] cut into blocks of time that do not see each other."""
        b, c, d = x.shape
        size = min(self.config.block_frames // self.config.downsample, c)
        blocks = F.pad(x, (0, 0, 0, -c % size)).reshape(-1, size, d)  # [B * blocks, size, D]
        real = F.pad(x.new_ones(b, c, dtype=torch.bool), (0, -c % size)).view(-1, 1, 1, size)
        for layer in layers:
            blocks = layer(blocks, real)
        return blocks.view(b, -1, d)[:, :c]


def speaker_vector(mel: Tensor) -> Tensor:
    """Voice mel [T, mel_dim] of a few seconds of one voice -> unit vector [2 * mel_dim]: mean and
    spread of every band.

    Plain statistics instead of a trained network: the release's extractor was never published, and
    for telling a handful of voices apart the long-term spectrum is enough.
    """
    x = (mel - MEL_CENTRE) / MEL_SPREAD
    return F.normalize(torch.cat([x.mean(0), x.std(0)]), dim=0)
