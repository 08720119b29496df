"""Natural voices by hibari-tts: a 6 M parameter network, distilled from Kokoro-82M, on the CPU.

One recorded speaker becomes several. Playback at another rate moves the formants, the resonances of
the vocal tract, which is shorter in a smaller speaker. The pitch is then set by PSOLA (Moulines and
Charpentier 1990): the network gives the fundamental frequency, so the periods of the voice are
known, and they are laid out at other distances.

The samples of an utterance depend on its job and the seed alone, not on other utterances or on the
process. Another kind of processor may round the network's int8 products differently.

Weights and code are Apache-2.0 and inside the package; nothing is downloaded.
"""

import hashlib
import importlib.metadata
import importlib.util
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import soxr

from minomni.config import INPUT_SAMPLE_RATE
from minomni.errors import UserError

if TYPE_CHECKING:
    from minomni.data.text_to_speech import Job

PREFIX = "natural:"  # of a Job's voice that this module synthesizes
PACKAGE = "hibari-tts==0.2.1"
WEIGHTS_SHA256 = "5f70741d4e900f4e85d0037498736cc1b3e1b9a63a13546a5da1e63abf4fccd8"
NATIVE_RATE = 24_000  # Hz, of the network's output
HOP = 300  # samples of a frame of the network (12.5 ms)
UNVOICED = 40  # Hz: a lower fundamental frequency means no voicing
UNVOICED_PERIOD = 120  # samples: unvoiced speech is cut into pieces of 5 ms
PAUSE = 0.02  # of the peak: quieter samples do not count for the loudness
LOUDNESS = 2800  # root mean square of speech, of 32767, as loud as espeak-ng
PEAK = 32_000  # of 32767: no sample is louder

# A Job's rate and pitch at which a voice speaks as it was made.
NORMAL_RATE = 180  # words per minute
NORMAL_PITCH = 50
OCTAVE = 50  # steps of a Job's pitch


class NaturalVoice(NamedTuple):
    """A speaker, relative to the one that the network was trained on (female, 198 Hz)."""

    pitch: float = 1.0  # factor of the fundamental frequency
    formants: float = 1.0  # factor of the frequencies of the resonances
    speed: float = 1.0  # factor of the speaking rate


VOICES = {
    "heart": NaturalVoice(),
    "young": NaturalVoice(pitch=1.12, formants=1.08, speed=1.05),
    "alto": NaturalVoice(pitch=0.85, formants=0.94),
    "tenor": NaturalVoice(pitch=0.65, formants=0.86, speed=1.1),
    "baritone": NaturalVoice(pitch=0.58, formants=0.84),
    "bass": NaturalVoice(pitch=0.5, formants=0.8, speed=0.95),
}


def available() -> bool:
    """Whether the package is installed."""
    return bool(importlib.util.find_spec("hibari") and importlib.util.find_spec("onnxruntime"))


def synthesize(job: "Job", seed: int) -> np.ndarray:
    """Synthesize one utterance -> float32 [samples] at 16 kHz on the scale of int16, not trimmed.

    The same job and seed give the same samples in any process. Raises UserError if the package is
    not installed or of another version, if it lacks the voice, or if the text has no words.
    """
    voice = find_voice(job.voice)
    engine = _load_engine()
    phonemes = " ".join(engine.phonemize(job.text))
    if not phonemes:
        raise UserError(f"nothing to pronounce in the text {job.text!r}: it needs a word")

    # Playback at another rate moves the formants. It also changes the pace and the pitch, which
    # are corrected beforehand.
    playback_rate = NATIVE_RATE * voice.formants
    speed = voice.speed * job.rate / NORMAL_RATE / voice.formants
    octaves = (job.pitch - NORMAL_PITCH) / OCTAVE
    pitch = voice.pitch * 2**octaves / voice.formants

    *spectrum, frequency = _predict(engine, phonemes, speed)
    wave = _vocode(spectrum, frequency, _noise(job, seed))
    if pitch != 1:
        wave = shift_pitch(wave, frequency, pitch)
    wave = soxr.resample(wave, playback_rate, INPUT_SAMPLE_RATE)
    return _normalize_loudness(wave)


def find_voice(name: str) -> NaturalVoice:
    """The voice of a Job. Raises UserError if there is none of this name."""
    voice = VOICES.get(name.removeprefix(PREFIX))
    if voice is None:
        known = ", ".join(PREFIX + known for known in VOICES)
        raise UserError(f"there is no natural voice {name!r}, only {known}")
    return voice


@cache
def _load_engine() -> Any:
    """Load the network and the dictionary, once per process.

    Raises UserError if the package is missing, or if its weights are not those that were tested.
    """
    if not available():
        raise UserError(
            f"natural voices are not installed: pip install {PACKAGE} onnxruntime, "
            "or choose a voice of espeak-ng"
        )
    import hibari

    weights = Path(hibari.__file__).parent / "assets" / "hibari.onnx"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != WEIGHTS_SHA256:
        version = importlib.metadata.version("hibari-tts")
        raise UserError(
            f"hibari-tts {version} has other weights than the version that was tested: "
            f"pip install --force-reinstall {PACKAGE}"
        )
    return hibari.Hibari(model=str(weights), threads=1)


def _predict(engine: Any, phonemes: str, speed: float) -> list[np.ndarray]:
    """Phonemes -> five spectral parts [601, frames], and the fundamental frequency [frames] in Hz.

    A frame has HOP samples. The frequency of an unvoiced frame is below UNVOICED.
    """
    inputs = {
        "ids": np.array([engine.ids(phonemes)], np.int64),
        "speed": np.array([speed], np.float32),
    }
    return [output[0] for output in engine.sess.run(None, inputs)]


def _vocode(
    spectrum: list[np.ndarray], frequency: np.ndarray, noise: np.random.Generator
) -> np.ndarray:
    """Filter pulses and noise by the spectrum -> float32 [samples] at 24 kHz in [-1, 1]."""
    from hibari import dsp

    return dsp.synth(*spectrum, frequency, noise)


def shift_pitch(wave: np.ndarray, frequency: np.ndarray, factor: float) -> np.ndarray:
    """Scale the pitch of speech by PSOLA; its length, formants and unvoiced sounds stay.

    wave: [frames * HOP] at 24 kHz. frequency: the fundamental frequency [frames] in Hz.
    """
    frequency = np.repeat(frequency, HOP)
    is_voiced = frequency > UNVOICED
    period = np.where(is_voiced, NATIVE_RATE / np.maximum(frequency, UNVOICED), UNVOICED_PERIOD)
    # One piece per period, and where each piece of the output begins: its nearest piece is copied.
    sources = _whole_turns(1 / period)
    targets = _whole_turns(np.where(is_voiced, factor, 1) / period)
    if len(sources) < 2:
        return wave
    borders = (sources[1:] + sources[:-1]) / 2
    nearest = sources[np.searchsorted(borders, targets)]

    margin = int(period.max())
    padded = np.pad(wave, margin)
    shifted = np.zeros_like(padded)
    for source, target in zip(nearest + margin, targets + margin, strict=True):
        half = int(period[source - margin])
        window = 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * half) / half)  # Hann, two periods
        piece = padded[source - half : source + half]
        shifted[target - half : target + half] += window * piece
    return shifted[margin:-margin]


def _whole_turns(turns_per_sample: np.ndarray) -> np.ndarray:
    """Indices of the samples at which the sum of turns passes a whole number."""
    turns = np.floor(np.cumsum(turns_per_sample))
    return np.flatnonzero(np.diff(turns, prepend=0))


def _noise(job: "Job", seed: int) -> np.random.Generator:
    """The noise of breath and fricatives, different in every utterance."""
    return np.random.default_rng([seed, zlib.crc32(repr(tuple(job)).encode())])


def _normalize_loudness(wave: np.ndarray) -> np.ndarray:
    """Scale speech to one loudness on the scale of int16: a lower voice has more harmonics, which
    add up.
    """
    peak = np.abs(wave).max()
    speech = wave[np.abs(wave) > PAUSE * peak]
    root_mean_square = np.sqrt(np.mean(np.square(speech)))
    return wave * min(LOUDNESS / root_mean_square, PEAK / peak)
