"""The report card: what share of held-out items is right, and how much of the speech an outsider
understands.
"""

import json
import os
import platform
import time
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from minomni import ROOT, folder_of, load
from minomni.files import write_atomically
from minomni.inputs.mel import voice_mel
from minomni.reply import Reply
from minomni.train import world
from minomni.train.judge import ENGLISH, LONG, STATEMENT, Judge, edits
from minomni.train.real_digits import check_recordings, leave_one_out
from minomni.train.run_folder import graduate
from minomni.train.speech import corpus
from minomni.train.stages import TRAINED, commit
from minomni.train.teacher import TRANSCRIBE, Teacher
from minomni.train.vocabulary import told_apart
from minomni.train.world import Example

BATCH = 16  # questions that are answered together
MROPE = "sync_mrope.json"  # in the run folder: what `ablate tmrope` measured
FRAME = {"the", "is", *" ".join(world.RELATIONS).split()}  # around the English words of a test
RESAMPLED = 1000  # draws of the bootstrap


@dataclass
class Row:
    """One line of the card: a share of `n` items, or of `n` words where it is a word error."""

    name: str
    value: float | None  # None where it cannot be measured here
    n: int = 0
    bounds: tuple[float, float] | None = None  # where the value is no plain share

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of a share: Wilson's score interval, or the bounds given."""
        if self.bounds is not None:
            return self.bounds
        p, n, z = min(max(self.value, 0.0), 1.0), max(self.n, 1), 1.96
        centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - half) / (1 + z * z / n)), min(
            1.0, (centre + half) / (1 + z * z / n)
        )


@dataclass
class Card:
    """All rows of one measurement."""

    model: str
    rows: list[Row]
    seconds: float  # that measuring took
    train_seconds: float | None = None  # that training took, where the model's folder says so
    device: str = "cpu"  # where it was measured

    def fractions(self) -> dict[str, float | None]:
        """Row values by name, as fractions."""
        rows = {row.name: None if row.value is None else round(row.value, 4) for row in self.rows}
        return {**rows, "train_seconds": self.train_seconds}

    def markdown(self) -> str:
        """The card as a Markdown table."""
        lines = [f"| {self.model} | value | 95 % interval | items |", "|---|---|---|---|"]
        for row in self.rows:
            if row.value is None:
                lines.append(f"| {row.name} | not measurable here | | |")
            else:
                low, high = row.interval()
                lines.append(
                    f"| {row.name} | {row.value:.1%} | {low:.1%} to {high:.1%} | {row.n} |"
                )
        trained = "" if self.train_seconds is None else f"trained in {self.train_seconds:.0f} s; "
        return (
            "\n".join(lines)
            + f"\n\n{trained}measured in {self.seconds:.0f} s on {hardware(self.device)}, commit {commit()}"
        )


def hardware(device: str = "cpu") -> str:
    """The machine in a few words, with its GPU where that did the work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"one {torch.cuda.get_device_name()} and " if device == "cuda" else ""
    return f"{gpu}{cores} cores ({platform.system()}, {platform.machine()})"


def measure(model: str, items: int = 100, digits: Path | None = None, device: str = "cpu") -> Card:
    """Score a model by name or folder on held-out material, and on a folder of real spoken digits
    where one is given.

    Raises UserError where there is no such model, folder or device.
    """
    began = time.perf_counter()
    folder = folder_of(model)
    if digits is not None:
        check_recordings(digits)  # before an hour is spent on the other rows
    omni = load(model, device)
    examiner = Examiner(omni, items)
    rows = [examiner.answers(name, kinds) for name, kinds in ANSWERS.items()]
    rows += [
        mrope_row(folder.parent / MROPE),
        examiner.spoken_over_typed(),
        examiner.hearing("asr_wer", world.LISTENING_VOICES),
        examiner.hearing("asr_wer_unseen_voices", world.UNSEEN_VOICES),
    ]
    rows.append(real_digits_row(model, digits))
    rows += examiner.speech() + examiner.preference(folder.parent / "stages") + examiner.english()
    trained = folder / TRAINED
    spent = json.loads(trained.read_text(encoding="utf-8"))["seconds"] if trained.exists() else None
    card = Card(model, rows, time.perf_counter() - began, spent, omni.thinker.device.type)
    write_atomically(ROOT / "runs" / "report.md", lambda f: f.write(card.markdown().encode()))
    return card


ANSWERS = {
    "typed_accuracy": ("say-typed",),
    "spoken_accuracy": ("say-spoken", "scene-spoken"),
    "scene_accuracy": ("scene-typed",),
    "handwriting_accuracy": ("handwriting-typed",),
    "video_accuracy": ("video-typed",),
    "sync_accuracy": ("sync-typed",),
}
SPOKEN = ("say-spoken", "scene-spoken", "handwriting-spoken", "video-spoken")


def bootstrap(value, items: list) -> tuple[float, float]:
    """95 % interval of value(items) by drawing the items anew, with a fixed seed."""
    random = Random(0)
    values = sorted(value(random.choices(items, k=len(items))) for _ in range(RESAMPLED))
    return values[int(0.025 * RESAMPLED)], values[int(0.975 * RESAMPLED)]


def word_error(items: list[tuple[int, int]]) -> float:
    """Word error of (edits, words) pairs."""
    return sum(wrong for wrong, _ in items) / max(1, sum(words for _, words in items))


def word_error_row(name: str, items: list[tuple[int, int]]) -> Row:
    """A row of (edits, words) a sentence; its interval draws sentences, since words of one go wrong
    together.
    """
    if not items:
        return Row(name, None)
    return Row(
        name, word_error(items), sum(words for _, words in items), bootstrap(word_error, items)
    )


def mrope_row(file: Path) -> Row:
    """What the same model answers about sounds in clips where it was raised without absolute time;
    None if unknown.
    """
    if not file.exists():
        return Row("sync_accuracy_mrope", None)
    measured = json.loads(file.read_text(encoding="utf-8"))
    return Row("sync_accuracy_mrope", measured["sync_accuracy_mrope"], measured["items"])


def real_digits_row(model: str, digits: Path | None) -> Row:
    """Right answers about real spoken digits; the interval draws speakers anew: those of one go
    wrong together.
    """
    if digits is None:
        return Row("real_digits_accuracy", None)
    speakers = list(leave_one_out(model, digits, ROOT / "runs" / "corpus").values())
    share = lambda rows: sum(right for right, _ in rows) / sum(count for _, count in rows)  # noqa: E731
    return Row(
        "real_digits_accuracy",
        share(speakers),
        sum(n for _, n in speakers),
        bootstrap(share, speakers),
    )


class Examiner:
    """Asks one model and counts. Its examples come from seeds and sentences that training never
    draws.
    """

    def __init__(self, omni, items: int):
        self.omni, self.items = omni, items
        self.cache = ROOT / "runs" / "corpus"
        self.teacher = Teacher(omni.config, self.cache, held=True)

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

    def answers(self, name: str, kinds: tuple[str, ...]) -> Row:
        """Share of answers that are right."""
        random = Random(f"held-out-{name}")
        examples = [self.teacher.example(kinds[i % len(kinds)], random) for i in range(self.items)]
        return Row(name, sum(self.right(examples, random)) / self.items, self.items)

    def spoken_over_typed(self) -> Row:
        """Right answers to spoken questions over right answers to the same questions typed (paper,
        table 2).
        """
        random = Random("held-out-spoken")
        spoken = [self.teacher.example(SPOKEN[i % len(SPOKEN)], random) for i in range(self.items)]
        typed = [replace(example, voice=None) for example in spoken]
        pairs = list(zip(self.right(spoken, random), self.right(typed, random)))
        ratio = lambda rows: sum(a for a, _ in rows) / max(1, sum(b for _, b in rows))  # noqa: E731
        return Row("spoken_over_typed", ratio(pairs), self.items, bootstrap(ratio, pairs))

    def hearing(self, name: str, voices: dict) -> Row:
        """Word error of writing down held-out spoken sentences."""
        speech = self.teacher.speech
        chosen = [
            i
            for i, u in enumerate(speech.utterances)
            if u.voice in voices and u.text.startswith("say ")
        ]
        chosen = chosen[: self.items]
        texts = self.written_down(chosen)
        sentences = [speech.utterances[i].text.split() for i in chosen]
        items = [(edits(right, text.split()), len(right)) for right, text in zip(sentences, texts)]
        return word_error_row(name, items)

    def written_down(self, chosen: list[int]) -> list[str]:
        """What the model writes of some recordings of the test."""
        waves = [self.teacher.speech.wave(i) for i in chosen]
        asked = [
            [{"type": "audio", "audio": wave}, {"type": "text", "text": TRANSCRIBE}]
            for wave in waves
        ]
        return self.replies([[{"role": "user", "content": content}] for content in asked])

    def english(self) -> list[Row]:
        """English words in a sentence, written down and said; nothing where a model knows the
        world's words alone.

        The rows in _new are of words that no training has had.
        """
        words = self.teacher.english
        groups = {"": told_apart(words.trained), "_new": told_apart(words.held)}
        return [row for end, few in groups.items() if few for row in self.english_words(end, few)]

    def english_words(self, end: str, few: list[str]) -> list[Row]:
        """Error of some words, the sentence around them aside: written down by the Thinker, said by
        it, and recorded.
        """
        speech, errors, judge = (
            self.teacher.speech,
            {"asr": [], "speech": [], "natural_speech": []},
            Judge(ENGLISH, few),
        )
        chosen = [i for i, u in enumerate(speech.utterances) if set(u.text.split()) & set(few)][
            : self.items
        ]
        for i, text in zip(chosen, self.written_down(chosen)):
            utterance = speech.utterances[i]
            reply = self.say(utterance.text, utterance.voice, seed=i)
            right = [word for word in utterance.text.split() if word in few]
            heard = {
                "asr": text.split(),
                "speech": hear(judge, reply.wave, reply.sample_rate),
                "natural_speech": hear(judge, speech.wave(i), world.LISTENING_RATE),
            }
            for name, said in heard.items():
                errors[name].append(
                    (edits(right, [word for word in said if word not in FRAME]), len(right))
                )
        return [word_error_row(f"english_{name}_wer{end}", items) for name, items in errors.items()]

    def long_rows(self, count: int) -> list[Row]:
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
                word_error_row(
                    name, [(edits(r, text.split()), len(r)) for r, text in zip(right, texts)]
                )
            )
        long = [world.long_clip(random, world.LONG_PAIRS) for _ in range(count)]
        short = [world.ordered(random) for _ in range(count)]
        for name, asked in (
            ("right, clips of about 45 s", long),
            ("right, clips of about 3 s", short),
        ):
            rows.append(Row(name, sum(self.right(asked, random)) / count, count))
        return rows

    def speech(self) -> list[Row]:
        """Word error of spoken held-out sentences by the outside judge, beside that of recordings;
        and the voice.
        """
        judge, recordings = Judge(), self.teacher.speech
        made, streamed, natural, stopped, voices = [], [], [], 0, []
        said = [
            i
            for i, u in enumerate(recordings.utterances)
            if u.voice in world.VOICES and u.text in world.statements()
        ][: self.items]
        own_voices = set(world.VOICES) <= set(
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
            made.append((edits(right, hear(judge, reply.wave, reply.sample_rate)), len(right)))
            live = self.say_live(utterance.text, utterance.voice if own_voices else None, seed=i)
            streamed.append((edits(right, hear(judge, live, reply.sample_rate)), len(right)))
            natural.append(
                (edits(right, hear(judge, recordings.wave(i), world.LISTENING_RATE)), len(right))
            )
            longest = self.omni.config.talker_sampling.max_new_tokens
            pace = reply.seconds / (len(recordings.wave(i)) / world.LISTENING_RATE)
            stopped += not 0.5 < pace < 2 or len(reply.codes) == longest
            voices.append(
                own_voices and len(reply.wave) > 0 and known.name(reply.wave) == utterance.voice
            )
        return [
            word_error_row("speech_wer", made),
            word_error_row("streamed_speech_wer", streamed),
            word_error_row("natural_speech_wer", natural),
            Row("stop_errors", stopped / len(said), len(said)),
            Row("voice_accuracy", sum(voices) / len(said) if own_voices else None, len(said)),
        ]

    def preference(self, stages: Path) -> list[Row]:
        """Word error on hard sentences before and after DPO, the same seeds; None where the stages
        are not kept.
        """
        names = "dpo_wer_before", "dpo_wer_after"
        if not all((stages / f"{stage}.safetensors").exists() for stage in ("talker", "dpo")):
            return [Row(name, None) for name in names]
        rows, kept = (
            [],
            {name: tensor.clone() for name, tensor in self.omni.talker.state_dict().items()},
        )
        for name, stage in zip(names, ("talker", "dpo")):
            graduate(self.omni, stages, [stage])
            sentences = hard_sentences()[: self.items]
            rows.append(
                word_error_row(name, self.understood(sentences, self.spoken(sentences), LONG))
            )
        self.omni.talker.load_state_dict(kept)
        return rows

    def spoken(self, sentences: list[str]) -> list[Reply]:
        """Sentences said in all voices by turns, each with a seed of its own."""
        voices = list(self.omni.voices)
        return [self.say(text, voices[i % len(voices)], seed=i) for i, text in enumerate(sentences)]

    def understood(
        self, sentences: list[str], replies: list[Reply], said: str = STATEMENT
    ) -> list[tuple[int, int]]:
        """What the judge makes of the sentences' replies -> (edits, words) each."""
        judge = Judge(said)
        heard = [hear(judge, reply.wave, reply.sample_rate) for reply in replies]
        return [
            (edits(text.split(), words), len(text.split())) for text, words in zip(sentences, heard)
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


def hear(judge: Judge, wave: Tensor, sample_rate: int) -> list[str]:
    """The words the judge hears; none in silence."""
    return judge.hear(wave, sample_rate).split() if len(wave) else []


def hard_sentences(held: bool = True, count: int = 400) -> list[str]:
    """Long sentences, two held-out statements (or trained ones) in one breath, in which a word
    comes back.
    """
    random = Random("hard")
    return [world.long_statement(random, held) for _ in range(count)]


class VoiceClassifier:
    """Says whose voice a recording is. Learnt from recordings alone: linear discriminants of
    long-term mel means.
    """

    def __init__(self, speech, each: int = 60):
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        chosen = [
            i
            for name in world.VOICES
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
