"""Voices: what the Talker and the DiT need to know of a speaker, made from a short recording."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from minomni.arguments import check_int
from minomni.config import INPUT_SAMPLE_RATE, MEL_RATE
from minomni.errors import UserError, quote
from minomni.inputs.media import load_audio, name_of
from minomni.inputs.mel import voice_mel
from minomni.token2wav.speaker_encoder import speaker_vector

if TYPE_CHECKING:
    from minomni.omni import Omni

REFERENCE_FRAMES = 150  # mel frames (1.5 s) of a voice's reference
MIN_SPEECH = 1  # seconds of speech that a recording must have
MAX_SPEECH = 60  # seconds of a recording that are used; the rest is ignored
PEAK = 0.5  # recordings are scaled to this peak: the mels of a voice depend on its level
SILENCE_DEPTH = 4.0  # natural-log units (35 dB) below the loudest part: no speech
MARGIN = 4  # mel frames kept around speech


@dataclass(frozen=True)
class Voice:
    """One voice: an entry of the release's spk_dict.pt.

    bos_token starts the Talker's prompt, cond [1, E] is the speaker vector, ref_mel [1, R, 80] a
    natural-log mel of the speaker at 100 frames per second.
    """

    name: str
    bos_token: int
    cond: Tensor
    ref_mel: Tensor


def make_voice(wav, name: str, omni: "Omni", bos_token: int | None = None) -> Voice:
    """A few seconds of speech -> a Voice for this model; add it with omni.voices[name] = voice.

    wav: any input of load_audio(); pauses are cut out, and only the first minute is used.
    bos_token is the token that tells the Talker who speaks. Our codes carry little of the voice, so
    a token without training does no harm: the default is the first free one, and training on
    speech of this voice can give it a speaking style. Raises UserError for silence, too little
    speech, and a model whose speaker vectors come from an unpublished network.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"the name of a voice is {quote(name)}; expected a string")
    if not hasattr(omni, "config"):
        raise UserError(
            f"make_voice() was given a {type(omni).__name__} as the model; expected the result of "
            f"load()"
        )
    config = omni.config
    if config.token2wav is None:
        raise UserError(
            "this model has no Token2Wav, so it cannot speak in any voice; load one that has"
        )
    if bos_token is not None:
        bos_token = check_int(bos_token, "bos_token", 0, config.thinker.text.vocab_size - 1)
    given = name_of(wav, "audio")
    dit = config.token2wav.dit
    if dit.enc_emb_dim != 2 * dit.mel_dim:
        raise UserError(
            f"voice {name!r}: this model's speaker vectors of {dit.enc_emb_dim} numbers come from "
            f"a network that was not released; make voices for a size trained here"
        )
    if bos_token is None:
        bos_token = free_token(omni)
    mel = speech_frames(load_audio(wav), given)
    return voice_of(mel, name, bos_token)


def free_token(omni: "Omni") -> int:
    """The first token id after all special tokens and the model's voices.

    Raises UserError if none is left.
    """
    special = vars(omni.config.thinker.tokens).values()
    voices = [voice.bos_token for voice in omni.voices.values()]
    free = max(*special, *voices) + 1
    vocab_size = omni.config.thinker.text.vocab_size
    if free >= vocab_size:
        raise UserError(
            f"all {vocab_size} token ids are taken; give the bos_token of a voice that the new one "
            f"may replace"
        )
    return free


def voice_of(mel: Tensor, name: str, bos_token: int) -> Voice:
    """Voice mel [T, 80] of one speaker -> its Voice.

    The reference is the first 1.5 s; a shorter mel is repeated.
    """
    repeats = -(-REFERENCE_FRAMES // len(mel))  # rounded up
    reference = mel.repeat(repeats, 1)[:REFERENCE_FRAMES]
    return Voice(name, bos_token, speaker_vector(mel)[None], reference[None].clone())


def speech_frames(wave: Tensor, given: str) -> Tensor:
    """The frames of a waveform at 16 kHz that hold speech -> voice mel [T, 80].

    Raises UserError, which names the recording `given`.
    """
    peak = float(wave.abs().max())
    if peak < 1e-3:
        raise UserError(
            f"{given}: is silent (its peak is {peak:.5f} of 1); give a recording of speech"
        )
    wave = F.pad(wave[: MAX_SPEECH * INPUT_SAMPLE_RATE], (0, INPUT_SAMPLE_RATE))
    mel = voice_mel(wave * (PEAK / peak))  # [T, 80]

    # The threshold follows the loudest 90 ms, so that a click does not set it.
    kernel_size = 2 * MARGIN + 1
    level = mel.mean(1)  # [T]
    smooth = F.avg_pool1d(level[None], kernel_size, stride=1, padding=MARGIN)
    loud = (level > smooth.max() - SILENCE_DEPTH).float()

    # Frames near a loud one belong to speech too.
    near = F.max_pool1d(loud[None], kernel_size, stride=1, padding=MARGIN)[0]
    speech = mel[near > 0]
    seconds = len(speech) / MEL_RATE
    if seconds < MIN_SPEECH:
        raise UserError(
            f"{given}: {seconds:.1f} s of speech; a voice needs at least {MIN_SPEECH} s, better "
            f"five"
        )
    return speech
