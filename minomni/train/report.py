"""The report card: what share of held-out items is right, and how much of the speech an outsider understands."""

import time
from dataclasses import dataclass
from math import sqrt
from random import Random

import torch

from .. import ROOT, load
from ..files import write_atomically
from . import world
from .judge import Judge, edits
from .speech import corpus
from .thinker_stages import TRANSCRIBE, Teacher
from .world import Example


@dataclass
class Row:
    """One line of the card: a share of `n` items, or of `n` words where it is a word error."""

    name: str
    value: float | None  # None where it cannot be measured here
    n: int

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of a share (Wilson's score interval); word errors above 1 are cut at 1."""
        p, n, z = min(max(self.value, 0.0), 1.0), max(self.n, 1), 1.96
        centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


@dataclass
class Card:
    """All rows of one measurement."""

    model: str
    rows: list[Row]
    seconds: float

    def fractions(self) -> dict[str, float | None]:
        """Row values by name, as fractions."""
        return {row.name: None if row.value is None else round(row.value, 4) for row in self.rows}

    def markdown(self) -> str:
        """The card as a Markdown table."""
        lines = [f"| {self.model} | value | 95 % interval | items |", "|---|---|---|---|"]
        for row in self.rows:
            if row.value is None:
                lines.append(f"| {row.name} | not measurable here | | |")
            else:
                low, high = row.interval()
                lines.append(f"| {row.name} | {row.value:.1%} | {low:.1%} to {high:.1%} | {row.n} |")
        return "\n".join(lines) + f"\n\nmeasured in {self.seconds:.0f} s"


def measure(model: str, items: int = 100) -> Card:
    """Score a model by name or folder on held-out material. Raises UserError where there is no such model."""
    began = time.perf_counter()
    omni = load(model)
    examiner = Examiner(omni, items)
    rows = [examiner.answers(name, kinds) for name, kinds in ANSWERS.items()]
    rows += [
        examiner.hearing("asr_wer", world.LISTENING_VOICES),
        examiner.hearing("asr_wer_unseen_voices", world.UNSEEN_VOICES),
    ]
    rows += examiner.speech()
    card = Card(model, rows, time.perf_counter() - began)
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


class Examiner:
    """Asks one model and counts. Its examples come from seeds and sentences that training never draws."""

    def __init__(self, omni, items: int):
        self.omni, self.items = omni, items
        self.cache = ROOT / "runs" / "corpus"
        self.teacher = Teacher(omni.config, self.cache, held=True)

    def reply(self, example: Example, random: Random) -> str:
        """The model's text."""
        reply = self.omni.thinker.generate(self.teacher.prompt(example, random), self.omni.config.thinker_sampling)
        return self.omni.tokenizer.decode(reply.tokens[0], skip_special=True)

    @torch.no_grad()
    def answers(self, name: str, kinds: tuple[str, ...]) -> Row:
        """Share of answers that are right to the letter."""
        random, right = Random(f"held-out-{name}"), 0
        for i in range(self.items):
            example = self.teacher.example(kinds[i % len(kinds)], random)
            right += self.reply(example, random) == example.answer
        return Row(name, right / self.items, self.items)

    @torch.no_grad()
    def hearing(self, name: str, voices: dict) -> Row:
        """Word error of writing down held-out spoken sentences."""
        wrong = words = 0
        chosen = [
            i for i, u in enumerate(self.teacher.speech.utterances) if u.voice in voices and u.text.startswith("say ")
        ]
        for i in chosen[: self.items]:
            text = self.teacher.speech.utterances[i].text
            messages = [
                {
                    "role": "user",
                    "content": [
                        {"type": "audio", "audio": self.teacher.speech.wave(i)},
                        {"type": "text", "text": TRANSCRIBE},
                    ],
                }
            ]
            reply = self.omni.thinker.generate(self.teacher.processor([messages]), self.omni.config.thinker_sampling)
            wrong += edits(text.split(), self.omni.tokenizer.decode(reply.tokens[0], skip_special=True).split())
            words += len(text.split())
        return Row(name, wrong / words if words else None, words)

    def speech(self) -> list[Row]:
        """Word error of spoken held-out sentences by the outside judge, beside that of recordings."""
        judge, recordings = Judge(), corpus("test", self.cache)
        made = natural = words = stopped = 0
        said = [
            i for i, u in enumerate(recordings.utterances) if u.voice in world.VOICES and u.text in self.statements()
        ]
        for i in said[: self.items]:
            utterance = recordings.utterances[i]
            voice = (
                utterance.voice if utterance.voice in self.omni.voices else None
            )  # another model has voices of its own
            reply = self.omni.respond([{"role": "user", "content": f"say {utterance.text}"}], voice=voice, seed=i)
            right, longest = utterance.text.split(), self.omni.config.talker_sampling.max_new_tokens
            made += edits(right, judge.hear(reply.wave, reply.sample_rate).split() if len(reply.wave) else [])
            natural += edits(right, judge.hear(recordings.wave(i), 16_000).split())
            words += len(right)
            stopped += not 0.5 < reply.seconds / (len(recordings.wave(i)) / 16_000) < 2 or len(reply.codes) == longest
        n = len(said[: self.items])
        return [
            Row("speech_wer", made / words, words),
            Row("natural_speech_wer", natural / words, words),
            Row("stop_errors", stopped / n, n),
        ]

    def statements(self) -> set[str]:
        return {u.text for u in self.teacher.speech.utterances if not u.text.startswith("say ")} - set(
            world.every_question()
        )
