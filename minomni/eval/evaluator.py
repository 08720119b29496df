"""Evaluate a model on held-out examples: accuracy of answers, word error rate of speech."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minomni.chat.reply import Reply, ReplyDone
from minomni.config import INPUT_SAMPLE_RATE
from minomni.data import grammar, scenes
from minomni.data.batching import batched
from minomni.data.corpus import SpeechCorpus, Utterance, corpus, is_own_statement
from minomni.data.examples import ExampleBuilder
from minomni.data.scenes import Example
from minomni.data.vocabulary import evaluation_words
from minomni.data.word_errors import ErrorPair, edit_distance, word_errors
from minomni.eval.asr import ENGLISH, LONG_STATEMENT, STATEMENT, SpeechRecognizer
from minomni.eval.stats import Metric, bootstrap, word_error_metric
from minomni.inputs.mel import voice_mel
from minomni.train.run_folder import is_finished, load_stages

if TYPE_CHECKING:
    from minomni.omni import Omni

BATCH = 16  # conversations per forward pass
HARD_SENTENCES = 400
# Words of the sentence template around the English words under test; they are not scored.
TEMPLATE_WORDS = {"the", "is", *" ".join(grammar.RELATIONS).split()}

# Kinds of examples behind each accuracy metric.
ANSWERS = {
    "typed_accuracy": ("say-typed",),
    "spoken_accuracy": ("say-spoken", "scene-spoken"),
    "scene_accuracy": ("scene-typed",),
    "handwriting_accuracy": ("handwriting-typed",),
    "video_accuracy": ("video-typed",),
    "sync_accuracy": ("sync-typed",),
}
SPOKEN_KINDS = ("say-spoken", "scene-spoken", "handwriting-spoken", "video-spoken")


@dataclass
class SpeechResult:
    """Scores of one sentence that the model spoke; (edits, words) come from the recognizer."""

    generated: ErrorPair  # speech decoded after the whole reply
    streamed: ErrorPair  # the same codes, decoded chunk by chunk
    recorded: ErrorPair  # the corpus recording of the sentence
    stop_error: bool  # half or twice the recording's length, or no stop code at all
    voice_correct: bool


class Evaluator:
    """Scores one model. Its seeds and sentences are held out: training never draws them."""

    def __init__(self, omni: "Omni", items: int, cache: Path):
        """items: number of examples per metric. cache: folder of the corpora, of a run if any."""
        self.omni = omni
        self.items = items
        self.cache = cache
        self.builder = ExampleBuilder(omni.config, self.cache, held_out=True)

    def recordings(self, is_wanted: Callable[[Utterance], bool]) -> list[int]:
        """Indices of the first recordings of the held-out corpus that are wanted."""
        utterances = self.builder.speech.utterances
        return [i for i, u in enumerate(utterances) if is_wanted(u)][: self.items]

    # Answers in text

    @torch.no_grad()
    def replies(
        self, conversations: list[list[dict]], use_audio_in_video: bool = False
    ) -> list[str]:
        """The model's text answer to each conversation."""
        texts = []
        for batch in batched(conversations, BATCH):
            inputs = self.builder.processor(batch, use_audio_in_video)
            reply = self.omni.thinker.generate(inputs, self.omni.config.thinker_sampling)
            texts += [self.omni.decode(row) for row in reply.tokens]
        return texts

    def is_correct(self, examples: list[Example], random: Random) -> list[bool]:
        """Per example: does the answer match exactly? Either all examples have audio or none."""
        conversations = [self.builder.question_messages(example, random) for example in examples]
        has_audio = examples[0].sound is not None
        texts = self.replies(conversations, use_audio_in_video=has_audio)
        return [text == example.answer for text, example in zip(texts, examples)]

    def accuracy(self, name: str, kinds: tuple[str, ...]) -> Metric:
        """Accuracy on examples that cycle through `kinds`."""
        random = Random(f"held-out-{name}")
        examples = [self.builder.example(kinds[i % len(kinds)], random) for i in range(self.items)]
        correct = self.is_correct(examples, random)
        return Metric(name, sum(correct) / self.items, self.items)

    def spoken_over_typed(self) -> Metric:
        """Correct answers to spoken questions / to the same questions typed (paper, table 2)."""
        random = Random("held-out-spoken")
        kinds = [SPOKEN_KINDS[i % len(SPOKEN_KINDS)] for i in range(self.items)]
        spoken = [self.builder.example(kind, random) for kind in kinds]
        typed = [replace(example, voice=None) for example in spoken]
        spoken_correct = self.is_correct(spoken, random)
        typed_correct = self.is_correct(typed, random)
        pairs = list(zip(spoken_correct, typed_correct))
        interval = bootstrap(correct_ratio, pairs)
        return Metric("spoken_over_typed", correct_ratio(pairs), self.items, interval)

    def long_metrics(self, count: int) -> list[Metric]:
        """Half a minute of speech and a minute of video frames, beside short ones to compare."""
        random = Random("held-out-long")
        metrics = []
        for name, seconds in (("word error, 30 s of speech", 30), ("word error, one sentence", 0)):
            examples = [self.builder.dictation(random, seconds) for _ in range(count)]
            conversations = [
                self.builder.question_messages(example, random) for example in examples
            ]
            texts = self.replies(conversations)
            pairs = [
                word_errors(example.answer, text.split()) for example, text in zip(examples, texts)
            ]
            metrics.append(word_error_metric(name, pairs))

        long_clips = [scenes.long_clip(random, scenes.LONG_PAIRS) for _ in range(count)]
        short_clips = [scenes.ordered_clip(random) for _ in range(count)]
        for name, clips in (
            ("accuracy, clips of about 45 s", long_clips),
            ("accuracy, clips of about 3 s", short_clips),
        ):
            correct = self.is_correct(clips, random)
            metrics.append(Metric(name, sum(correct) / count, count))
        return metrics

    # Speech recognition by the model

    def transcription(
        self, name: str, voices: dict, silence_s: float = 0.0, second_turn: bool = False
    ) -> Metric:
        """Word error rate of the Thinker's transcripts of held-out sentences in some voices.

        silence_s: seconds of silence before each. second_turn: each is the second turn of a
        conversation, whose first turn is the recording before it with its correct transcript.
        """
        utterances = self.builder.speech.utterances
        chosen = self.recordings(lambda u: u.voice in voices and u.text.startswith("say "))
        transcripts = self.transcribe_recordings(chosen, silence_s, second_turn)
        pairs = [
            word_errors(utterances[i].text, transcript.split())
            for i, transcript in zip(chosen, transcripts)
        ]
        return word_error_metric(name, pairs)

    def transcribe_recordings(
        self, indices: list[int], silence_s: float = 0.0, second_turn: bool = False
    ) -> list[str]:
        """The Thinker's transcripts of some recordings of the test corpus: see transcription()."""
        turns = [self.transcription_turn(i, silence_s) for i in indices]
        if not second_turn:
            return self.replies([[turn] for turn in turns])
        conversations = []
        for position, turn in enumerate(turns):
            before = position - 1  # the first one follows the last one
            answer = self.builder.speech.utterances[indices[before]].text
            conversations.append([turns[before], {"role": "assistant", "content": answer}, turn])
        return self.replies(conversations)

    def transcription_turn(self, index: int, silence_s: float) -> dict:
        """A user's turn that asks for a transcript of a recording after some silence."""
        wave = self.builder.speech.wave(index)
        silence = torch.zeros(round(silence_s * INPUT_SAMPLE_RATE))
        audio = {"type": "audio", "audio": torch.cat([silence, wave])}
        question = {"type": "text", "text": grammar.TRANSCRIBE}
        return {"role": "user", "content": [audio, question]}

    # English words

    def english(self) -> list[Metric]:
        """Word error rates of English words, transcribed and spoken.

        Empty for a model that only knows the words of the generated world. Metrics that end in
        _new are of words that no training example contains.
        """
        words = self.builder.english
        metrics = []
        for suffix, tested in (
            ("", evaluation_words(words.trained)),
            ("_new", evaluation_words(words.held_out)),
        ):
            if tested:
                metrics += self.english_words(suffix, tested)
        return metrics

    def english_words(self, suffix: str, words: list[str]) -> list[Metric]:
        """Error rates of some words, without the sentence template around them.

        As the Thinker transcribes them, as the model speaks them, and as they were recorded.
        """
        speech = self.builder.speech
        recognizer = SpeechRecognizer(ENGLISH, words)
        chosen = self.recordings(lambda u: not set(words).isdisjoint(u.text.split()))

        errors: dict[str, list] = {
            "english_asr": [],
            "closed_english_speech": [],
            "closed_english_natural_speech": [],
        }
        for i, transcript in zip(chosen, self.transcribe_recordings(chosen)):
            utterance = speech.utterances[i]
            reply = self.speak(utterance.text, utterance.voice, seed=i)
            hypotheses = {
                "english_asr": transcript.split(),
                "closed_english_speech": recognized_words(
                    recognizer, reply.wave, reply.sample_rate
                ),
                "closed_english_natural_speech": recognized_words(
                    recognizer, speech.wave(i), INPUT_SAMPLE_RATE
                ),
            }
            reference = [word for word in utterance.text.split() if word in words]
            for name, hypothesis in hypotheses.items():
                content_words = [word for word in hypothesis if word not in TEMPLATE_WORDS]
                edits = edit_distance(reference, content_words)
                errors[name].append((edits, len(reference)))
        return [word_error_metric(f"{name}_wer{suffix}", pairs) for name, pairs in errors.items()]

    # Speech of the model

    def speech(self) -> list[Metric]:
        """Word error rates of spoken held-out sentences, stop errors and voice accuracy.

        The recognizer is independent of the model. The word error rate of recordings is its floor.
        It chooses among the sentences of the grammar (closed_): speech_chain.py has the word error
        rates of a recognizer that may write anything.
        """
        chosen = self.recordings(is_own_statement)

        # A model from elsewhere has other voices, which the classifier does not know.
        classifier = None
        if set(grammar.VOICES) <= set(self.omni.voices):
            classifier = VoiceClassifier(corpus("speaking", self.cache, self.builder.english))

        recognizer = SpeechRecognizer()
        results = [self.speech_result(i, recognizer, classifier) for i in chosen]
        count = len(results)
        voice_accuracy = None
        if classifier is not None:
            voice_accuracy = sum(result.voice_correct for result in results) / count
        stop_error_rate = sum(result.stop_error for result in results) / count
        return [
            word_error_metric("closed_speech_wer", [result.generated for result in results]),
            word_error_metric(
                "closed_streamed_speech_wer", [result.streamed for result in results]
            ),
            word_error_metric("closed_natural_speech_wer", [result.recorded for result in results]),
            Metric("stop_errors", stop_error_rate, count),
            Metric("voice_accuracy", voice_accuracy, count),
        ]

    def speech_result(
        self, index: int, recognizer: SpeechRecognizer, classifier: "VoiceClassifier | None"
    ) -> SpeechResult:
        """Let the model speak one sentence of the test corpus in both modes, and score it."""
        recording = self.builder.speech.wave(index)
        utterance = self.builder.speech.utterances[index]
        voice = None if classifier is None else utterance.voice
        reply = self.speak(utterance.text, voice, seed=index)
        streamed = self.speak_streaming(utterance.text, voice, seed=index)

        # Speech that stops far too early or too late, or only at the limit of codes.
        relative_length = reply.seconds / (len(recording) / INPUT_SAMPLE_RATE)
        max_codes = self.omni.config.talker_sampling.max_new_tokens
        stop_error = not 0.5 < relative_length < 2 or len(reply.codes) == max_codes

        voice_correct = False
        if classifier is not None and len(reply.wave) > 0:
            voice_correct = classifier.predict(reply.wave) == utterance.voice

        def score(wave: Tensor, sample_rate: int) -> ErrorPair:
            return word_errors(utterance.text, recognized_words(recognizer, wave, sample_rate))

        return SpeechResult(
            generated=score(reply.wave, reply.sample_rate),
            streamed=score(streamed, reply.sample_rate),
            recorded=score(recording, INPUT_SAMPLE_RATE),
            stop_error=stop_error,
            voice_correct=voice_correct,
        )

    def preference(self, stages: Path) -> list[Metric]:
        """Word error rates on hard sentences before and after DPO, with the same seeds.

        The values are None if the folder `stages` lacks the weights of the two stages.
        """
        stage_of_metric = {"closed_dpo_wer_before": "talker", "closed_dpo_wer_after": "dpo"}
        if not all(is_finished(stages, stage) for stage in stage_of_metric.values()):
            return [Metric(name, None) for name in stage_of_metric]

        talker = self.omni.talker
        assert talker is not None  # every size that is trained here can speak
        own_weights = {name: tensor.clone() for name, tensor in talker.state_dict().items()}
        sentences = hard_sentences()[: self.items]
        metrics = []
        for name, stage in stage_of_metric.items():
            load_stages(self.omni, stages, [stage])
            pairs = self.reply_errors(sentences, self.speak_all(sentences), LONG_STATEMENT)
            metrics.append(word_error_metric(name, pairs))
        talker.load_state_dict(own_weights)
        return metrics

    def speak_all(self, sentences: list[str]) -> list[Reply]:
        """Speak sentences in all voices in turn, each with its own seed."""
        voices = list(self.omni.voices)
        return [
            self.speak(text, voices[i % len(voices)], seed=i) for i, text in enumerate(sentences)
        ]

    def reply_errors(
        self, sentences: list[str], replies: list[Reply], utterance: str = STATEMENT
    ) -> list[ErrorPair]:
        """Recognize the replies -> (edits, words) of each sentence. utterance: see asr.py."""
        recognizer = SpeechRecognizer(utterance)
        pairs = []
        for text, reply in zip(sentences, replies):
            hypothesis = recognized_words(recognizer, reply.wave, reply.sample_rate)
            pairs.append(word_errors(text, hypothesis))
        return pairs

    def speak(self, text: str, voice: str | None, seed: int) -> Reply:
        """The spoken reply to a typed request to say a sentence."""
        return self.omni.respond(request(text), voice=voice, seed=seed)

    def speak_streaming(self, text: str, voice: str | None, seed: int) -> Tensor:
        """The same request as a stream: same codes, decoded in chunks -> waveform [samples]."""
        *_, done = self.omni.stream(request(text), voice=voice, seed=seed)
        assert isinstance(done, ReplyDone)
        return done.reply.wave


def request(text: str) -> list[dict]:
    """Messages that ask to say a sentence."""
    return [{"role": "user", "content": f"say {text}"}]


def correct_ratio(pairs: list[tuple[bool, bool]]) -> float:
    """Number of correct firsts over number of correct seconds."""
    first = sum(first for first, _ in pairs)
    second = sum(second for _, second in pairs)
    return first / max(1, second)


def recognized_words(recognizer: SpeechRecognizer, wave: Tensor, sample_rate: int) -> list[str]:
    """Words in a waveform [samples]; none if it is empty."""
    if not len(wave):
        return []
    return recognizer.transcribe(wave, sample_rate).split()


def hard_sentences(held_out: bool = True) -> list[str]:
    """Sentences of two held-out statements (or two trained ones) with a repeated word."""
    random = Random("hard")
    return [grammar.long_statement(random, held_out) for _ in range(HARD_SENTENCES)]


class VoiceClassifier:
    """Tells the voice of a recording: linear discriminant analysis of long-term mel statistics.

    It is fitted on corpus recordings only, never on speech of the model.
    """

    def __init__(self, speech: SpeechCorpus, per_voice: int = 60):
        """per_voice: number of recordings per voice to fit on."""
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        features, labels = [], []
        for name in grammar.VOICES:
            indices = [i for i, u in enumerate(speech.utterances) if u.voice == name]
            for i in indices[:per_voice]:
                features.append(timbre(speech.wave(i)))
                labels.append(name)
        self.model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        self.model.fit(np.stack(features), labels)

    def predict(self, wave: Tensor) -> str:
        """Name of the voice in a waveform [samples] at 16 kHz."""
        return str(self.model.predict(timbre(wave)[None])[0])


def timbre(wave: Tensor) -> np.ndarray:
    """Mean and standard deviation of each mel band over the louder half of frames [2 * bands]."""
    mel = voice_mel(wave)  # [T, bands]
    loudness = mel.mean(1)
    loud = mel[loudness >= loudness.median()]
    return torch.cat([loud.mean(0), loud.std(0)]).numpy()
