"""Held-out questions answered by a model, and its speech recognized by an outside judge."""

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from minomni import paths
from minomni.chat.reply import Reply
from minomni.config import LISTENING_RATE
from minomni.data import grammar, scenes
from minomni.data.corpus import corpus
from minomni.data.examples import TRANSCRIBE, ExampleBuilder
from minomni.data.scenes import Example
from minomni.data.vocabulary import told_apart
from minomni.data.word_errors import edit_distance
from minomni.eval.asr import ENGLISH, LONG, STATEMENT, SpeechRecognizer
from minomni.eval.stats import Metric, bootstrap, word_error_metric
from minomni.inputs.mel import voice_mel
from minomni.train.checkpoint import load_stages

BATCH = 16  # questions that are answered together
FRAME = {"the", "is", *" ".join(grammar.RELATIONS).split()}  # around the English words of a test


ANSWERS = {
    "typed_accuracy": ("say-typed",),
    "spoken_accuracy": ("say-spoken", "scene-spoken"),
    "scene_accuracy": ("scene-typed",),
    "handwriting_accuracy": ("handwriting-typed",),
    "video_accuracy": ("video-typed",),
    "sync_accuracy": ("sync-typed",),
}
SPOKEN = ("say-spoken", "scene-spoken", "handwriting-spoken", "video-spoken")


class Evaluator:
    """Asks one model and counts. Its examples come from seeds and sentences that training never
    draws.
    """

    def __init__(self, omni, items: int):
        self.omni, self.items = omni, items
        self.cache = paths.runs() / "corpus"
        self.teacher = ExampleBuilder(omni.config, self.cache, held=True)

    @torch.no_grad()
    def replies(
        self, conversations: list[list[dict]], use_audio_in_video: bool = False
    ) -> list[str]:
        """The model's texts."""
        texts = []
        for begin in range(0, len(conversations), BATCH):
            inputs = self.teacher.processor(
                conversations[begin : begin + BATCH], use_audio_in_video
            )
            reply = self.omni.thinker.generate(inputs, self.omni.config.thinker_sampling)
            texts += [self.omni.tokenizer.decode(row, skip_special=True) for row in reply.tokens]
        return texts

    def right(self, examples: list[Example], random: Random) -> list[bool]:
        """Which examples are answered right to the letter; all with a sound track, or none."""
        asked = [self.teacher.conversation(example, random) for example in examples]
        texts = self.replies(asked, use_audio_in_video=examples[0].sound is not None)
        return [text == example.answer for text, example in zip(texts, examples)]

    def answers(self, name: str, kinds: tuple[str, ...]) -> Metric:
        """Share of answers that are right."""
        random = Random(f"held-out-{name}")
        examples = [self.teacher.example(kinds[i % len(kinds)], random) for i in range(self.items)]
        return Metric(name, sum(self.right(examples, random)) / self.items, self.items)

    def spoken_over_typed(self) -> Metric:
        """Right answers to spoken questions over right answers to the same questions typed (paper,
        table 2).
        """
        random = Random("held-out-spoken")
        spoken = [self.teacher.example(SPOKEN[i % len(SPOKEN)], random) for i in range(self.items)]
        typed = [replace(example, voice=None) for example in spoken]
        pairs = list(zip(self.right(spoken, random), self.right(typed, random)))
        ratio = lambda rows: sum(a for a, _ in rows) / max(1, sum(b for _, b in rows))  # noqa: E731
        return Metric("spoken_over_typed", ratio(pairs), self.items, bootstrap(ratio, pairs))

    def hearing(self, name: str, voices: dict) -> Metric:
        """Word error of writing down held-out spoken sentences."""
        speech = self.teacher.speech
        chosen = [
            i
            for i, u in enumerate(speech.utterances)
            if u.voice in voices and u.text.startswith("say ")
        ]
        chosen = chosen[: self.items]
        texts = self.transcribe_recordings(chosen)
        sentences = [speech.utterances[i].text.split() for i in chosen]
        items = [
            (edit_distance(right, text.split()), len(right))
            for right, text in zip(sentences, texts)
        ]
        return word_error_metric(name, items)

    def transcribe_recordings(self, chosen: list[int]) -> list[str]:
        """What the model writes of some recordings of the test."""
        waves = [self.teacher.speech.wave(i) for i in chosen]
        asked = [
            [{"type": "audio", "audio": wave}, {"type": "text", "text": TRANSCRIBE}]
            for wave in waves
        ]
        return self.replies([[{"role": "user", "content": content}] for content in asked])

    def english(self) -> list[Metric]:
        """English words in a sentence, written down and said; nothing where a model knows the
        world's words alone.

        The rows in _new are of words that no training has had.
        """
        words = self.teacher.english
        groups = {"": told_apart(words.trained), "_new": told_apart(words.held)}
        return [row for end, few in groups.items() if few for row in self.english_words(end, few)]

    def english_words(self, end: str, few: list[str]) -> list[Metric]:
        """Error of some words, the sentence around them aside: written down by the Thinker, said by
        it, and recorded.
        """
        speech, errors, judge = (
            self.teacher.speech,
            {"asr": [], "speech": [], "natural_speech": []},
            SpeechRecognizer(ENGLISH, few),
        )
        chosen = [i for i, u in enumerate(speech.utterances) if set(u.text.split()) & set(few)][
            : self.items
        ]
        for i, text in zip(chosen, self.transcribe_recordings(chosen)):
            utterance = speech.utterances[i]
            reply = self.say(utterance.text, utterance.voice, seed=i)
            right = [word for word in utterance.text.split() if word in few]
            heard = {
                "asr": text.split(),
                "speech": recognized_words(judge, reply.wave, reply.sample_rate),
                "natural_speech": recognized_words(judge, speech.wave(i), LISTENING_RATE),
            }
            for name, said in heard.items():
                errors[name].append(
                    (edit_distance(right, [word for word in said if word not in FRAME]), len(right))
                )
        return [
            word_error_metric(f"english_{name}_wer{end}", items) for name, items in errors.items()
        ]

    def long_rows(self, count: int) -> list[Metric]:
        """Half a minute of speech and a minute of pictures; and the same of short ones, for
        comparison.
        """
        random = Random("held-out-long")
        rows = []
        for name, seconds in (("word error, 30 s of speech", 30), ("word error, one sentence", 0)):
            asked = [self.teacher.dictation(random, seconds) for _ in range(count)]
            texts = self.replies([self.teacher.conversation(example, random) for example in asked])
            right = [example.answer.split() for example in asked]
            rows.append(
                word_error_metric(
                    name,
                    [(edit_distance(r, text.split()), len(r)) for r, text in zip(right, texts)],
                )
            )
        long = [scenes.long_clip(random, scenes.LONG_PAIRS) for _ in range(count)]
        short = [scenes.ordered_clip(random) for _ in range(count)]
        for name, asked in (
            ("right, clips of about 45 s", long),
            ("right, clips of about 3 s", short),
        ):
            rows.append(Metric(name, sum(self.right(asked, random)) / count, count))
        return rows

    def speech(self) -> list[Metric]:
        """Word error of spoken held-out sentences by the outside judge, beside that of recordings;
        and the voice.
        """
        judge, recordings = SpeechRecognizer(), self.teacher.speech
        made, streamed, natural, stopped, voices = [], [], [], 0, []
        said = [
            i
            for i, u in enumerate(recordings.utterances)
            if u.voice in grammar.VOICES and u.text in grammar.statements()
        ][: self.items]
        own_voices = set(grammar.VOICES) <= set(
            self.omni.voices
        )  # another model has voices of its own
        known = (
            VoiceClassifier(corpus("speaking", self.cache, self.teacher.english))
            if own_voices
            else None
        )
        for i in said:
            utterance = recordings.utterances[i]
            reply = self.say(utterance.text, utterance.voice if own_voices else None, seed=i)
            right = utterance.text.split()
            made.append(
                (
                    edit_distance(right, recognized_words(judge, reply.wave, reply.sample_rate)),
                    len(right),
                )
            )
            live = self.say_live(utterance.text, utterance.voice if own_voices else None, seed=i)
            streamed.append(
                (edit_distance(right, recognized_words(judge, live, reply.sample_rate)), len(right))
            )
            natural.append(
                (
                    edit_distance(
                        right, recognized_words(judge, recordings.wave(i), LISTENING_RATE)
                    ),
                    len(right),
                )
            )
            longest = self.omni.config.talker_sampling.max_new_tokens
            pace = reply.seconds / (len(recordings.wave(i)) / LISTENING_RATE)
            stopped += not 0.5 < pace < 2 or len(reply.codes) == longest
            voices.append(
                own_voices and len(reply.wave) > 0 and known.name(reply.wave) == utterance.voice
            )
        return [
            word_error_metric("speech_wer", made),
            word_error_metric("streamed_speech_wer", streamed),
            word_error_metric("natural_speech_wer", natural),
            Metric("stop_errors", stopped / len(said), len(said)),
            Metric("voice_accuracy", sum(voices) / len(said) if own_voices else None, len(said)),
        ]

    def preference(self, stages: Path) -> list[Metric]:
        """Word error on hard sentences before and after DPO, the same seeds; None where the stages
        are not kept.
        """
        names = "dpo_wer_before", "dpo_wer_after"
        if not all((stages / f"{stage}.safetensors").exists() for stage in ("talker", "dpo")):
            return [Metric(name, None) for name in names]
        rows, kept = (
            [],
            {name: tensor.clone() for name, tensor in self.omni.talker.state_dict().items()},
        )
        for name, stage in zip(names, ("talker", "dpo")):
            load_stages(self.omni, stages, [stage])
            sentences = hard_sentences()[: self.items]
            rows.append(
                word_error_metric(
                    name, self.preference_metrics(sentences, self.spoken(sentences), LONG)
                )
            )
        self.omni.talker.load_state_dict(kept)
        return rows

    def spoken(self, sentences: list[str]) -> list[Reply]:
        """Sentences said in all voices by turns, each with a seed of its own."""
        voices = list(self.omni.voices)
        return [self.say(text, voices[i % len(voices)], seed=i) for i, text in enumerate(sentences)]

    def preference_metrics(
        self, sentences: list[str], replies: list[Reply], said: str = STATEMENT
    ) -> list[tuple[int, int]]:
        """What the judge makes of the sentences' replies -> (edits, words) each."""
        judge = SpeechRecognizer(said)
        heard = [recognized_words(judge, reply.wave, reply.sample_rate) for reply in replies]
        return [
            (edit_distance(text.split(), words), len(text.split()))
            for text, words in zip(sentences, heard)
        ]

    def say(self, text: str, voice: str | None, seed: int):
        """A typed wish, spoken."""
        return self.omni.respond(
            [{"role": "user", "content": f"say {text}"}], voice=voice, seed=seed
        )

    def say_live(self, text: str, voice: str | None, seed: int) -> Tensor:
        """The same wish, spoken while it is thought: the same codes, painted chunk by chunk -> its
        sound [samples].
        """
        *_, end = self.omni.stream(
            [{"role": "user", "content": f"say {text}"}], voice=voice, seed=seed
        )
        return end.reply.wave


def recognized_words(judge: SpeechRecognizer, wave: Tensor, sample_rate: int) -> list[str]:
    """The words the judge hears; none in silence."""
    return judge.transcribe(wave, sample_rate).split() if len(wave) else []


def hard_sentences(held: bool = True, count: int = 400) -> list[str]:
    """Long sentences, two held-out statements (or trained ones) in one breath, in which a word
    comes back.
    """
    random = Random("hard")
    return [grammar.long_statement(random, held) for _ in range(count)]


class VoiceClassifier:
    """Says whose voice a recording is. Learnt from recordings alone: linear discriminants of
    long-term mel means.
    """

    def __init__(self, speech, each: int = 60):
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        chosen = [
            i
            for name in grammar.VOICES
            for i in [i for i, u in enumerate(speech.utterances) if u.voice == name][:each]
        ]
        rows = np.stack([timbre(speech.wave(i)) for i in chosen])
        self.model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        self.model.fit(rows, [speech.utterances[i].voice for i in chosen])

    def name(self, wave: Tensor) -> str:
        """The voice of a wave at 16 kHz."""
        return str(self.model.predict(timbre(wave)[None])[0])


def timbre(wave: Tensor) -> np.ndarray:
    """Mean and spread of each mel band over the louder half of a wave's frames [2 * bands]."""
    mel = voice_mel(wave)  # [T, bands]
    loud = mel[mel.mean(1) >= mel.mean(1).median()]
    return torch.cat([loud.mean(0), loud.std(0)]).numpy()
