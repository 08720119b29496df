"""A voice: what the Talker and the DiT need to know of a speaker, made from a short recording."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from minomni.arguments import shown, whole_number
from minomni.config import LISTENING_RATE, MEL_RATE
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
