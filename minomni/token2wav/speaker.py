"""Who is speaking: the Voice a reply is spoken in, how to make one, and the ECAPA-TDNN that hears
its timbre.

Source: ECAPA-TDNN (arXiv 2005.07143) as the release ships it: no batch norm, reflect padding, one
vector per voice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minomni.arguments import shown, whole_number
from minomni.config import LISTENING_RATE, MEL_RATE, DiTConfig
from minomni.errors import UserError
from minomni.inputs.media import load_audio, name_of
from minomni.inputs.mel import voice_mel
from minomni.talker.codec import speaker_vector

REFERENCE_FRAMES = 150  # mel frames (1.5 s) that stand for a voice
SHORTEST_SPEECH, LONGEST_SPEECH = (
    1,
    60,
)  # seconds of a recording that make a voice; what follows is not listened to
LOUDNESS = 0.5  # peak that a recording is brought to: the mels of a voice tell how loud it is
QUIET = 4.0  # natural-log units (35 dB) below its loud moments a recording holds no speech
MARGIN = 4  # mel frames kept around speech


@dataclass(frozen=True)
class Voice:
    """One voice: an entry of the release's spk_dict.pt.

    bos_token opens the Talker's prompt, cond [1, E] is the speaker vector, ref_mel [1, R, 80] a
    natural-log mel of the speaker at 100 frames per second.
    """

    name: str
    bos_token: int
    cond: Tensor
    ref_mel: Tensor


def make_voice(wav, name: str, omni, bos_token: int | None = None) -> Voice:
    """A few seconds of speech -> a Voice for this model; omni.voices[name] = voice lets it speak
    so.

    wav: whatever load_audio takes; pauses are cut out, and only the first minute is heard.
    bos_token is the word by which the Talker is told who speaks. Our codes hardly carry a voice, so
    a word that it has never met does no harm: the default is the first free one, which training on
    speech of this voice can then fill with a manner of speaking. Raises UserError for silence, too
    little speech, and a model whose speaker vectors come from an unpublished network.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"the name of a voice is {shown(name)}; expected a text")
    if not hasattr(omni, "config"):
        raise UserError(
            f"make_voice() was given a {type(omni).__name__} as the model; expected what load() gives"
        )
    if omni.config.token2wav is None:
        raise UserError(
            "this model has no Token2Wav, so it cannot speak in any voice; load one that has"
        )
    if bos_token is not None:
        bos_token = whole_number(bos_token, "bos_token", 0, omni.config.thinker.text.vocab_size - 1)
    dit, given = omni.config.token2wav.dit, name_of(wav, "audio")
    if dit.enc_emb_dim != 2 * dit.mel_dim:
        raise UserError(
            f"voice {name!r}: this model's speaker vectors of {dit.enc_emb_dim} numbers come from a "
            f"network that was not released; make voices for a size trained here"
        )
    token = free_token(omni) if bos_token is None else bos_token
    return voice_of(speech_frames(load_audio(wav), given), name, token)


def free_token(omni) -> int:
    """The first token id behind all special tokens and the model's voices. Raises UserError where
    none is left.
    """
    taken = [
        *vars(omni.config.thinker.tokens).values(),
        *(voice.bos_token for voice in omni.voices.values()),
    ]
    free, rows = max(taken) + 1, omni.config.thinker.text.vocab_size
    if free >= rows:
        raise UserError(
            f"all {rows} token ids are taken; give the bos_token of a voice that the new one may replace"
        )
    return free


def voice_of(mel: Tensor, name: str, bos_token: int) -> Voice:
    """Voice mel [T, 80] of one speaker -> its Voice; the reference is the first 1.5 s, repeated if
    need be.
    """
    reference = mel.repeat(-(-REFERENCE_FRAMES // len(mel)), 1)[:REFERENCE_FRAMES]
    return Voice(name, bos_token, speaker_vector(mel)[None], reference[None].clone())


def speech_frames(wave: Tensor, given: str) -> Tensor:
    """The frames of a wave at 16 kHz in which somebody speaks -> voice mel [T, 80]. Raises
    UserError naming `given`.
    """
    peak = float(wave.abs().max())
    if peak < 1e-3:
        raise UserError(
            f"{given}: is silent (its peak is {peak:.5f} of 1); give a recording of speech"
        )
    mel = voice_mel(
        F.pad(wave[: LONGEST_SPEECH * LISTENING_RATE], (0, LISTENING_RATE)) * (LOUDNESS / peak)
    )  # [T, 80]
    level, wide = mel.mean(1), {"kernel_size": 2 * MARGIN + 1, "stride": 1, "padding": MARGIN}
    loudest = F.avg_pool1d(level[None], **wide).max()  # over 90 ms: a click is no speech
    loud = (level > loudest - QUIET).float()
    speech = mel[F.max_pool1d(loud[None], **wide)[0] > 0]
    if len(speech) < SHORTEST_SPEECH * MEL_RATE:
        raise UserError(
            f"{given}: {len(speech) / MEL_RATE:.1f} s of speech; a voice needs at least "
            f"{SHORTEST_SPEECH} s, better five"
        )
    return speech


class TDNN(nn.Module):
    """Convolution that keeps the length (reflect padding), then ReLU: [B, C, R] -> [B, C', R]."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, dilation: int):
        super().__init__()
        self.conv = nn.Conv1d(
            channels_in,
            channels_out,
            kernel_size,
            dilation=dilation,
            padding="same",
            padding_mode="reflect",
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Res2Net(nn.Module):
    """Channel groups, each hearing a wider stretch of time than the one before it: [B, C, R] ->
    same.
    """

    def __init__(self, channels: int, kernel_size: int, dilation: int, scale: int):
        super().__init__()
        self.scale = scale
        width = channels // scale
        self.blocks = nn.ModuleList(
            TDNN(width, width, kernel_size, dilation) for _ in range(scale - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = x.chunk(self.scale, dim=1)
        done = [first]
        for i, (block, group) in enumerate(zip(self.blocks, rest)):
            done.append(
                block(group + done[-1] if i else group)
            )  # the untouched first group is not passed on
        return torch.cat(done, dim=1)


class SqueezeExcitation(nn.Module):
    """One gate per channel, decided from the channel means over time: [B, C, R] -> same."""

    def __init__(self, channels: int, bottleneck: int):
        super().__init__()
        self.conv1 = nn.Conv1d(channels, bottleneck, 1)
        self.conv2 = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)  # [B, C, 1]
        return x * self.conv2(self.conv1(mean).relu()).sigmoid()


class SERes2Net(nn.Module):
    """The block of ECAPA, with a residual connection: [B, C, R] -> same."""

    def __init__(self, channels: int, kernel_size: int, dilation: int, config: DiTConfig):
        super().__init__()
        self.tdnn1 = TDNN(channels, channels, 1, 1)
        self.res2net_block = Res2Net(channels, kernel_size, dilation, config.enc_res2net_scale)
        self.tdnn2 = TDNN(channels, channels, 1, 1)
        self.se_block = SqueezeExcitation(channels, config.enc_se_channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x))))


class AttentiveStatistics(nn.Module):
    """Mean and deviation over time, weighted by attention over frames for each channel: [B, C, R]
    -> [B, 2C, 1].
    """

    def __init__(self, channels: int, bottleneck: int):
        super().__init__()
        self.tdnn = TDNN(3 * channels, bottleneck, 1, 1)
        self.conv = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = statistics(x, torch.full_like(x[:1, :1], 1 / x.shape[-1]))
        seen = torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], dim=1)  # [B, 3C, R]
        weights = self.conv(self.tdnn(seen).tanh()).softmax(-1)  # [B, C, R]
        return torch.cat(statistics(x, weights), dim=1)  # [B, 2C, 1]


def statistics(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and deviation over time, [B, C, R] -> two of [B, C, 1]. The weights of a
    channel add up to one.
    """
    mean = (weights * x).sum(-1, keepdim=True)
    variance = (weights * (x - mean).square()).sum(-1, keepdim=True)
    return mean, variance.clamp(min=1e-12).sqrt()


class SpeakerEncoder(nn.Module):
    """ECAPA-TDNN: reference mel [B, R, mel_dim] -> timbre [B, enc_dim]."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        channels, kernels, dilations = (
            config.enc_channels,
            config.enc_kernel_sizes,
            config.enc_dilations,
        )
        self.blocks = nn.ModuleList([TDNN(config.mel_dim, channels[0], kernels[0], dilations[0])])
        middle = list(zip(channels, kernels, dilations))[1:-1]
        self.blocks.extend(SERes2Net(*sizes, config) for sizes in middle)
        self.mfa = TDNN(channels[-1], channels[-1], kernels[-1], dilations[-1])
        self.asp = AttentiveStatistics(channels[-1], config.enc_attention_channels)
        self.fc = nn.Conv1d(2 * channels[-1], config.enc_dim, 1)

    def forward(self, ref_mel: Tensor) -> Tensor:
        x = self.blocks[0](ref_mel.transpose(1, 2))  # [B, C, R]
        levels = []
        for block in self.blocks[1:]:
            x = block(x)
            levels.append(x)
        x = self.mfa(torch.cat(levels, dim=1))  # [B, sum of the levels' C, R]
        return self.fc(self.asp(x)).squeeze(-1)  # [B, enc_dim]
