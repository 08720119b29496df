"""Where speech is lost: the same held-out sentences after each step, scored by outside judges.

recordings   the corpus, as it was synthesized
griffin_lim  their mel to audio by Griffin-Lim, without a network: what the mel holds
vocoder      their mel to audio by BigVGAN
codec        their codes through the DiT and BigVGAN
model        the whole model, asked to say the sentence
streamed     the same codes as `model`, decoded in chunks
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from minomni.config import INPUT_SAMPLE_RATE
from minomni.data import grammar
from minomni.data.corpus import corpus, is_own_statement
from minomni.eval.outside_judges import (
    NaturalnessScorer,
    NotInstalled,
    OpenRecognizer,
    SpeakerSimilarity,
    capped_word_errors,
)
from minomni.eval.stats import Metric, score_metric, word_error_metric
from minomni.inputs.mel import voice_mel
from minomni.train.samples import griffin_lim

if TYPE_CHECKING:
    from minomni.eval.evaluator import Evaluator
    from minomni.omni import Omni

STEPS = ("recordings", "griffin_lim", "vocoder", "codec", "model", "streamed")
SCORED_STEPS = ("recordings", "model")  # also for naturalness and for the voice

Judge = TypeVar("Judge")


class Audio(NamedTuple):
    """A waveform [samples] and its rate in Hz."""

    wave: Tensor
    sample_rate: int


class VoiceEmbeddings(NamedTuple):
    """One sentence as the outside speaker encoder describes it: unit vectors [256]."""

    voice: str
    recording: np.ndarray
    model: np.ndarray


@dataclass
class Judgments:
    """What the judges say of all sentences. A list stays empty if nothing measures it here."""

    open_errors: dict[str, list] = field(default_factory=lambda: {step: [] for step in STEPS})
    prompted_errors: dict[str, list] = field(default_factory=lambda: {step: [] for step in STEPS})
    naturalness: dict[str, list] = field(
        default_factory=lambda: {step: [] for step in SCORED_STEPS}
    )
    embeddings: list[VoiceEmbeddings] = field(default_factory=list)

    def metrics(self) -> list[Metric]:
        """All rows; those without a judge, or without a step of this model, have no value."""
        rows = []
        for step in STEPS:
            rows.append(word_error_metric(f"open_wer_{step}", self.open_errors[step]))
        for step in STEPS:
            rows.append(word_error_metric(f"prompted_wer_{step}", self.prompted_errors[step]))
        for step in SCORED_STEPS:
            rows.append(score_metric(f"dnsmos_{step}", self.naturalness[step]))
        for name, values in similarities(self.embeddings).items():
            rows.append(score_metric(f"speaker_similarity_{name}", values))
        return rows


class Panel:
    """The outside judges that are installed."""

    def __init__(self) -> None:
        self.recognizer = if_installed(OpenRecognizer)
        self.scorer = if_installed(NaturalnessScorer)
        self.speakers = if_installed(SpeakerSimilarity)

    def is_empty(self) -> bool:
        return self.recognizer is None and self.scorer is None and self.speakers is None

    def judge(self, text: str, voice: str | None, steps: dict[str, Audio], into: Judgments) -> None:
        """Add the judgments on one sentence. voice: None if the model has other voices."""
        if self.recognizer is not None:
            for step, audio in steps.items():
                transcripts = self.recognizer.transcribe(*audio)
                into.open_errors[step].append(capped_word_errors(text, transcripts.open))
                into.prompted_errors[step].append(capped_word_errors(text, transcripts.prompted))
        if self.scorer is not None:
            for step in SCORED_STEPS:
                into.naturalness[step].append(self.scorer.score(*steps[step]))
        if self.speakers is not None and voice is not None:
            recording = self.speakers.embedding(*steps["recordings"])
            model = self.speakers.embedding(*steps["model"])
            into.embeddings.append(VoiceEmbeddings(voice, recording, model))


def if_installed(judge: Callable[[], Judge]) -> Judge | None:
    """A judge, or None where its package is missing."""
    try:
        return judge()
    except NotInstalled:
        return None


def speech_chain_metrics(evaluator: "Evaluator") -> list[Metric]:
    """Scores of every step on `evaluator.items` sentences, at most 400.

    Rows without a value stand for judges that are not installed and for the codec of a model that
    has none.
    """
    panel = Panel()
    judgments = Judgments()
    if panel.is_empty():
        return judgments.metrics()

    omni = evaluator.omni
    speech = corpus("judged", evaluator.cache, evaluator.builder.english)
    has_our_voices = set(grammar.VOICES) <= set(omni.voices)
    chosen = [i for i, u in enumerate(speech.utterances) if is_own_statement(u)]
    for i in chosen[: evaluator.items]:
        utterance = speech.utterances[i]
        voice = utterance.voice if has_our_voices else None
        recording = speech.wave(i)
        steps = copy_synthesis(omni, recording, voice, seed=i)
        reply = evaluator.speak(utterance.text, voice, seed=i)
        streamed = evaluator.speak_streaming(utterance.text, voice, seed=i)
        steps["model"] = Audio(reply.wave, reply.sample_rate)
        steps["streamed"] = Audio(streamed, reply.sample_rate)
        panel.judge(utterance.text, voice, steps, judgments)
    return judgments.metrics()


@torch.no_grad()
def copy_synthesis(
    omni: "Omni", recording: Tensor, voice: str | None, seed: int
) -> dict[str, Audio]:
    """A recording [samples] at 16 kHz and what each step of the synthesis makes of it.

    voice: the DiT's voice; without one, or without a codec, there is no step `codec`.
    """
    token2wav = omni.token2wav
    assert token2wav is not None  # a model without speech has nothing to score
    device = token2wav.code2wav_dit_model.proj_out.weight.device
    mel = voice_mel(recording)  # [T, bands]
    steps = {
        "recordings": Audio(recording, INPUT_SAMPLE_RATE),
        "griffin_lim": Audio(griffin_lim(mel), INPUT_SAMPLE_RATE),
    }
    wave = token2wav.code2wav_bigvgan_model(mel.T[None].to(device))[0]
    steps["vocoder"] = Audio(wave.cpu(), omni.sample_rate)

    codec = omni.codec
    if codec is not None and voice is not None:
        frames = len(mel) // codec.config.downsample * codec.config.downsample
        codes = codec.encode(mel[None, :frames].to(device))
        generator = torch.Generator().manual_seed(seed)
        wave = token2wav(codes, omni.voices[voice], omni.config.flow, generator)
        steps["codec"] = Audio(wave.cpu(), omni.sample_rate)
    return steps


# ----------------------------------------------------------------------------------------------
# voices


def similarities(sentences: list[VoiceEmbeddings]) -> dict[str, list[float]]:
    """Cosines between sentences and voices, one list per row of the report.

    model: the model's sentence and the mean of the other recordings of its voice. recordings: the
    recording of the sentence and the same mean, an upper bound. other_voices: the recording of the
    sentence and the means of all other voices, on average: what no likeness looks like.
    """
    values: dict[str, list[float]] = {"model": [], "recordings": [], "other_voices": []}
    for i, sentence in enumerate(sentences):
        others = sentences[:i] + sentences[i + 1 :]
        recordings: dict[str, list[np.ndarray]] = {}
        for other in others:
            recordings.setdefault(other.voice, []).append(other.recording)
        voices = {name: unit(np.mean(rows, axis=0)) for name, rows in recordings.items()}

        own = voices.pop(sentence.voice, None)
        if own is not None:
            values["model"].append(float(sentence.model @ own))
            values["recordings"].append(float(sentence.recording @ own))
        if voices:
            cosines = [float(sentence.recording @ voice) for voice in voices.values()]
            values["other_voices"].append(sum(cosines) / len(cosines))
    return values


def unit(vector: np.ndarray) -> np.ndarray:
    """A vector scaled to length 1; zeros stay zeros."""
    length = float(np.linalg.norm(vector))
    return vector / length if length > 0 else vector
