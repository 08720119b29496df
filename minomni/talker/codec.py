"""Our speech tokenizer: mel -> one code per 40 ms -> letters and mel.

The release ships no encoder; its codes differ from ours, and CodeClassifier predicts them. A mel
is downsampled by strided convolutions, encoded by a small transformer in 2-second blocks (so that
encoding can stream), and quantized by finite scalar quantization (FSQ, arXiv 2309.15505). Two
decoders determine what the codes keep: a CTC head predicts letters (the words), and a convolutional
mel decoder *conditioned on the speaker* predicts the mel (pitch and timing), so that the codes need
not carry the voice.
Supervision by transcripts follows the supervised tokenizers (CosyVoice, Qwen3-TTS); the
architecture is our own.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minomni.config import CodecConfig, CodeClassifierConfig
from minomni.layers import attention

FIRST_CODE = 1  # code 0 is the DiT's "no code" in classifier-free guidance
# Mean and scale that bring natural-log mels (about -11.5 ... 2) near unit scale.
MEL_MEAN = -5.0
MEL_STD = 3.0
LETTERS = " abcdefghijklmnopqrstuvwxyz"  # CTC class i + 1; class 0 is blank


def letters_to_ids(text: str) -> Tensor:
    """Lower-case text -> CTC classes [letters]. Raises KeyError for a character outside LETTERS."""
    index = {letter: i + 1 for i, letter in enumerate(LETTERS)}
    return torch.tensor([index[letter] for letter in text], dtype=torch.long)


def ids_to_letters(classes: Tensor) -> str:
    """Greedy CTC decoding: best classes per frame [T] -> text without repeats and blanks (0)."""
    text = ""
    for index in torch.unique_consecutive(classes).tolist():
        if 0 < index <= len(LETTERS):
            text += LETTERS[index - 1]
    return text


def ctc_align(log_probs: Tensor, letters: Tensor) -> Tensor | None:
    """Forced alignment: the most likely CTC path through a text (Viterbi).

    log_probs [T, classes], letters [n] -> index of the letter at each frame [T], in a blank that of
    the letter before it; None if there are too few frames for the letters. Names as in torchaudio's
    tutorial on forced alignment.
    """
    # The states of the path: blank, letter, blank, letter, ..., blank.
    states = torch.zeros(2 * len(letters) + 1, dtype=torch.long)
    states[1::2] = letters
    # The blank between two letters can be skipped if they differ.
    can_skip = torch.zeros(len(states), dtype=torch.bool)
    can_skip[3::2] = states[3::2] != states[1:-2:2]

    # Trellis: log-probability of the best path that ends in each state. It starts in either the
    # first blank or the first letter.
    emission = log_probs.cpu().float()[:, states]  # [T, states]
    never = -torch.inf
    trellis = torch.full((len(states),), never)
    trellis[:2] = emission[0, :2]
    backpointers = []  # per frame and state: how many states the best path moved on
    for frame in emission[1:]:
        stay = trellis
        move = F.pad(trellis[:-1], (1, 0), value=never)
        skip = F.pad(trellis[:-2], (2, 0), value=never)
        skip = skip.masked_fill(~can_skip, never)
        best, moved = torch.stack([stay, move, skip]).max(0)
        trellis = best + frame
        backpointers.append(moved)

    # The path ends in the last letter or in the blank after it; from there it is traced back.
    state = len(states) - 2
    if trellis[state + 1] > trellis[state]:
        state += 1
    if trellis[state] == never:
        return None
    path = [state]
    for moved in reversed(backpointers):
        state -= int(moved[state])
        path.append(state)
    path.reverse()
    letter = (torch.tensor(path) - 1) // 2
    return letter.clamp_min(0)  # the blank before the first letter counts as that letter


class FSQ(nn.Module):
    """Finite scalar quantization: each channel is bounded and rounded to one of `levels` values."""

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels = levels
        # A code is a number in mixed radix; these are the values of its digits.
        strides = [math.prod(levels[:i]) for i in range(len(levels))]
        self.strides = tuple(strides)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [..., channels] -> (grid values [..., channels], codes [...]).

        Values are in [-1, 1] with straight-through gradients, codes start at FIRST_CODE.
        """
        scale = self._scale(x)
        steps = (torch.tanh(x) + 1) * scale  # 0 ... levels - 1
        digits = steps.round()
        rounded = steps + (digits - steps).detach()  # straight-through estimator
        strides = torch.tensor(self.strides, device=x.device)
        codes = (digits.long() * strides).sum(-1) + FIRST_CODE
        return rounded / scale - 1, codes

    def values(self, codes: Tensor) -> Tensor:
        """Codes [...] -> grid values [..., channels] in [-1, 1]; the inverse of forward."""
        digits = []
        for stride, levels in zip(self.strides, self.levels, strict=True):
            digits.append((codes - FIRST_CODE) // stride % levels)
        return torch.stack(digits, -1) / self._scale(codes) - 1

    def _scale(self, like: Tensor) -> Tensor:
        return torch.tensor([(n - 1) / 2 for n in self.levels], device=like.device)


class Block(nn.Module):
    """Pre-norm transformer layer with attention inside one block of time."""

    def __init__(self, config: CodecConfig | CodeClassifierConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.attn_norm = nn.LayerNorm(width)
        self.ff_norm = nn.LayerNorm(width)
        # A depthwise convolution takes the place of position embeddings.
        self.near = nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ff = nn.Sequential(
            nn.Linear(width, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, width),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [N, T, D] blocks of time, mask [N, 1, 1, T] true at real frames -> [N, T, D]."""
        real = x * mask[:, 0, 0, :, None]
        x = x + self.near(real.transpose(1, 2)).transpose(1, 2)

        n, t, d = x.shape
        qkv = self.qkv(self.attn_norm(x))
        qkv = qkv.view(n, t, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N, H, T, D/H] each
        attended = attention(q, k, v, mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, d))
        return x + self.ff(self.ff_norm(x))


class SpeechEncoder(nn.Module):
    """A mel downsampled to one hidden state for each code. What follows is up to the subclass."""

    def __init__(self, config: CodecConfig | CodeClassifierConfig):
        super().__init__()
        width = config.hidden_size
        halvings = config.downsample.bit_length() - 1
        self.stem = nn.Conv1d(config.mel_dim, width, 5, padding=2)
        self.down = nn.ModuleList(
            nn.Conv1d(width, width, 4, stride=2, padding=1) for _ in range(halvings)
        )
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.block_codes = config.block_frames // config.downsample

    def hidden_states(self, mel: Tensor) -> Tensor:
        """Voice mel [B, T, mel_dim] -> hidden states [B, T / downsample, D].

        T is a multiple of downsample.
        """
        x = ((mel - MEL_MEAN) / MEL_STD).transpose(1, 2)  # [B, mel_dim, T]
        x = F.gelu(self.stem(x))
        for layer in self.down:
            x = F.gelu(layer(x))  # halves T
        return self._in_blocks(x.transpose(1, 2), self.encoder)

    def _in_blocks(self, x: Tensor, layers: Iterable[nn.Module]) -> Tensor:
        """Run layers on x [B, C, D], cut into blocks that do not see each other."""
        b, c, d = x.shape
        size = min(self.block_codes, c)
        padding = -c % size
        blocks = F.pad(x, (0, 0, 0, padding)).reshape(-1, size, d)  # [B * blocks, size, D]
        mask = F.pad(x.new_ones(b, c, dtype=torch.bool), (0, padding))
        mask = mask.view(-1, 1, 1, size)
        for layer in layers:
            blocks = layer(blocks, mask)
        return blocks.view(b, -1, d)[:, :c]


class Codec(SpeechEncoder):
    """Speech tokenizer of CodecConfig: encode() for codes, letters() and mel() for decoding."""

    def __init__(self, config: CodecConfig):
        super().__init__(config)
        self.config = config
        width = config.hidden_size
        self.to_grid = nn.Linear(width, len(config.levels))
        self.fsq = FSQ(config.levels)
        self.from_grid = nn.Linear(len(config.levels), width)
        # CTC decoder
        self.reader = Block(config)
        self.ctc_head = nn.Linear(width, config.ctc_vocab)
        # Mel decoder
        self.speaker = nn.Linear(2 * config.mel_dim, width)
        self.mel_layers = nn.ModuleList(
            nn.Conv1d(width, width, 5, padding=2) for _ in range(len(self.down) + 2)
        )
        self.mel_out = nn.Conv1d(width, config.mel_dim, 5, padding=2)
        # Mel of each code without its neighbors, in training only
        self.code_mel = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, config.downsample * config.mel_dim),
        )

    def encode(self, mel: Tensor) -> Tensor:
        """Voice mel [B, T, mel_dim] -> codes [B, T / downsample], FIRST_CODE and up.

        T is a multiple of downsample.
        """
        _, codes = self.quantize(mel)
        return codes

    def quantize(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Voice mel [B, T, mel_dim] -> (grid values [B, C, channels], codes [B, C]).

        C = T / downsample.
        """
        return self.fsq(self.to_grid(self.hidden_states(mel)))

    def letters(self, grid: Tensor) -> Tensor:
        """Grid values [B, C, channels] -> CTC log-probabilities [B, C, ctc_vocab]."""
        x = self._in_blocks(self.from_grid(grid), [self.reader])
        return self.ctc_head(x).log_softmax(-1)

    def mel(self, grid: Tensor, cond: Tensor) -> Tensor:
        """Grid values [B, C, channels] and speaker vectors -> mel [B, T, mel_dim].

        The vectors are cond [B, 2 * mel_dim]; T = C * downsample.
        """
        speaker = self.speaker(cond)[:, None]  # [B, 1, D]
        x = (self.from_grid(grid) + speaker).transpose(1, 2)  # [B, D, C]
        for i, layer in enumerate(self.mel_layers):
            x = x + F.gelu(layer(x))
            if i < len(self.down):
                x = x.repeat_interleave(2, -1)  # doubles T
        return self.mel_out(x).transpose(1, 2) * MEL_STD + MEL_MEAN

    def mel_of_codes(self, grid: Tensor, cond: Tensor) -> Tensor:
        """The mel of each code without its neighbors: shapes as in mel().

        Training on it too makes codes that mean something on their own, from which the DiT learns
        faster.
        """
        speaker = self.speaker(cond)[:, None]  # [B, 1, D]
        x = self.code_mel(self.from_grid(grid) + speaker)  # [B, C, downsample * mel_dim]
        frames = x.unflatten(-1, (-1, self.config.mel_dim)).flatten(1, 2)  # [B, T, mel_dim]
        return frames * MEL_STD + MEL_MEAN


class CodeClassifier(SpeechEncoder):
    """Predicts codes of any kind: class i is code i of Token2Wav. It has no decoder of its own.

    A CTC head on the same hidden states predicts letters. It is used in training only, where it
    keeps the words in the hidden states.
    """

    def __init__(self, config: CodeClassifierConfig):
        super().__init__(config)
        self.config = config
        self.code_head = nn.Linear(config.hidden_size, config.num_codes)
        self.ctc_head = nn.Linear(config.hidden_size, config.ctc_vocab)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Voice mel [B, T, mel_dim] -> (logits of the codes [B, C, num_codes], CTC
        log-probabilities [B, C, ctc_vocab]), C = T / downsample, a multiple of which is T.
        """
        hidden = self.hidden_states(mel)
        return self.code_head(hidden), self.ctc_head(hidden).log_softmax(-1)

    def encode(self, mel: Tensor) -> Tensor:
        """Voice mel [B, T, mel_dim] -> most likely codes [B, T / downsample]."""
        logits, _ = self(mel)
        return logits.argmax(-1)


def make_codec(config: CodecConfig | CodeClassifierConfig) -> Codec | CodeClassifier:
    """The codec of a configuration: one that has codes of its own, or one that predicts others."""
    return Codec(config) if isinstance(config, CodecConfig) else CodeClassifier(config)
