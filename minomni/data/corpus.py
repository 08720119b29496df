"""The spoken side of the world: which sentence is said by whom, synthesised once and kept in a
cache file.

Without the synthesiser the few recordings in data_samples/speech stand in: enough to run every
stage, not more.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from minomni import paths
from minomni.data import grammar, text_to_speech
from minomni.data.vocabulary import English, told_apart
from minomni.files import write_atomically
from minomni.inputs.mel import voice_mel
from minomni.token2wav.voice import Voice, voice_of

LONG, STRINGS, FRAMED = (
    2400,
    1200,
    2000,
)  # said: two statements in one breath, and words without sense
HEARD, HEARD_STRINGS, HEARD_FRAMED = (
    2200,
    400,
    600,
)  # listened to: sentences, and words without sense
FEW = 100  # a kind of sentence of which there are fewer is said by every voice
FAIR = 0.5  # share of all draws that treats kinds of sentences alike
FIRST_VOICE = 5  # the voices' token ids begin this far behind tts_text_pad
ACCENTS = ("en-us", "en", "gmw/en-GB-scotland", "gmw/en-029")  # of a crowd that says digits
CROWD = [
    "m1",
    "m2",
    "m3",
    "m4",
    "m5",
    "m6",
    "m7",
    "m8",
    "f1",
    "f2",
    "f3",
    "f4",
    "f5",
    "klatt",
    "klatt2",
    "klatt3",
    "klatt4",
    "klatt5",
    "klatt6",
    "adam",
    "Alex",
    "Alicia",
    "Andrea",
    "Andy",
    "Annie",
    "aunty",
    "belinda",
    "benjamin",
    "boris",
    "caleb",
    "david",
    "ed",
    "edward",
    "Gene",
    "grandma",
    "grandpa",
    "gustave",
    "Hugo",
    "ian",
    "iven",
    "Jacky",
    "john",
    "Lee",
    "linda",
    "Marco",
    "Mario",
    "max",
    "Michael",
    "michel",
    "miguel",
    "Mike",
    "norbert",
    "pablo",
    "paul",
    "pedro",
    "quincy",
    "Reed",
    "rob",
    "robert",
    "sandro",
    "shelby",
    "steph",
    "Storm",
    "travis",
    "victor",
    "zac",
]
PACES = [
    (rate, pitch) for rate in range(120, 221, 20) for pitch in range(20, 81, 20)
]  # of the crowd
NORMAL = dict(rate=180, pitch=50)  # how the model's own voices speak


@dataclass(frozen=True)
class Utterance:
    """One recording: its words, who speaks, and where its samples lie in the corpus."""

    text: str
    voice: str
    start: int
    end: int


class SpeechCorpus:
    """A corpus of recordings: `utterances` and, by index, float32 waves at 16 kHz."""

    def __init__(self, samples: np.ndarray, utterances: list[Utterance]):
        self.samples, self.utterances = samples, utterances

    def __len__(self) -> int:
        return len(self.utterances)

    def wave(self, index: int) -> Tensor:
        """The samples of one utterance, float32 in [-1, 1] at 16 kHz, a whole number of codes long
        (40 ms).
        """
        u = self.utterances[index]
        wave = torch.from_numpy(self.samples[u.start : u.end].astype(np.float32) / 32768)
        return torch.nn.functional.pad(wave, (0, -len(wave) % 640))

    def find(self, text: str, random: Random) -> int:
        """Index of one of the utterances that say this text. Raises KeyError where none does."""
        if not hasattr(self, "_by_text"):
            self._by_text = {}
            for i, u in enumerate(self.utterances):
                self._by_text.setdefault(u.text, []).append(i)
        return random.choice(self._by_text[text])


def all_statements(held: bool) -> list[str]:
    """Every statement of the language on one side of the held-out border, in a fixed order."""
    return sorted(text for text in grammar.statements() if grammar.held_out(text) == held)


@cache
def rare_statements() -> set[str]:
    """The statements of kinds of which there are few."""
    counts = Counter(grammar.statements().values())
    return {text for text, template in grammar.statements().items() if counts[template] < FEW}


def speaking_jobs(english=English()) -> list[tuple[str, text_to_speech.Job]]:
    """What the model's voices say in training: every trained sentence, by two of the voices or all,
    and long ones.

    And words without sense, English ones where there are any, loose and in the frames of sentences:
    nothing helps to say them but to know which word comes next.
    """
    random, voices, words = Random(1), list(grammar.VOICES), [*grammar.WORDS, *english.trained]
    strings, framed = STRINGS + 3 * len(english.trained), FRAMED + len(english.trained)
    said = [
        (name, text)
        for text in all_statements(held=False)
        for name in random.sample(voices, len(voices) if text in rare_statements() else 2)
    ]
    said += [
        (random.choice(voices), grammar.long_statement(random, held=False)) for _ in range(LONG)
    ]
    said += [(random.choice(voices), grammar.word_string(random, words)) for _ in range(strings)]
    said += [(random.choice(voices), grammar.framed_words(random, words)) for _ in range(framed)]
    return [(name, text_to_speech.Job(text, grammar.VOICES[name], **NORMAL)) for name, text in said]


def listening_jobs(english=English()) -> list[tuple[str, text_to_speech.Job]]:
    """What the model hears in training, at many rates and pitches: questions by every voice and
    sentences by some.

    And words without sense, which cannot be guessed from those before, so that it listens to every
    one.
    """
    random, voices, words = (
        Random(2),
        list(grammar.LISTENING_VOICES),
        [*grammar.WORDS, *english.trained],
    )
    strings = HEARD_STRINGS + 2 * len(english.trained)
    said = random.sample(all_statements(held=False), HEARD)
    said += [grammar.word_string(random, words) for _ in range(strings)]
    said += [grammar.framed_words(random, words) for _ in range(HEARD_FRAMED)]
    jobs = [(name, q) for name in voices for q in grammar.all_questions() for _ in range(4)]
    jobs += [(random.choice(voices), "say " + text) for text in said]
    return [
        (
            name,
            text_to_speech.Job(
                t, grammar.LISTENING_VOICES[name], random.randint(150, 210), random.randint(35, 65)
            ),
        )
        for name, t in jobs
    ]


def test_jobs(english=English()) -> list[tuple[str, text_to_speech.Job]]:
    """Held-out sentences: by the model's voices as they speak, and spoken questions at unheard
    rates and pitches.

    Drawn as the answers of a conversation are, not from all there are, of which most say where
    something is. And sentences of English words, where there are any: of those that were trained
    on, and of those that were not.
    """
    random = Random(3)
    texts = [grammar.statement(random, held=True) for _ in range(100)]
    jobs = [
        (name, text_to_speech.Job(t, grammar.VOICES[name], **NORMAL))
        for t, name in zip(texts, list(grammar.VOICES) * 25)
    ]
    for names in (grammar.LISTENING_VOICES, grammar.UNSEEN_VOICES):
        for t in ["say " + t for t in texts] + grammar.all_questions():
            name = random.choice(list(names))
            jobs.append(
                (
                    name,
                    text_to_speech.Job(
                        t, names[name], random.randint(150, 210), random.randint(35, 65)
                    ),
                )
            )
    for words in filter(None, english):
        for name in list(grammar.VOICES) * 12:
            a, b, c, d = random.sample(told_apart(words), 4)
            text = f"the {a} {b} is {random.choice(list(grammar.RELATIONS))} the {c} {d}"
            jobs.append((name, text_to_speech.Job(text, grammar.VOICES[name], **NORMAL)))
    return jobs


def digit_jobs() -> list[tuple[str, text_to_speech.Job]]:
    """Digits alone, in many throats and some accents: a crowd to stand beside the few real people
    of a small set.
    """
    random = Random(4)
    return [
        (
            variant,
            text_to_speech.Job(
                number, f"{random.choice(ACCENTS)}+{variant}", *random.choice(PACES)
            ),
        )
        for variant in CROWD
        for _ in range(4)
        for number in grammar.NUMBERS
    ]


def corpus(name: str, cache: Path, english=English(), seed: int = 0) -> SpeechCorpus:
    """The "speaking", "listening", "test" or "digits" corpus, synthesised on first use into the
    cache folder.

    english: words that are spoken in it beside the world's own. The cache file is named by a hash
    of all jobs, so a changed recipe never meets an old recording.
    """
    if not text_to_speech.available():
        return sample_recordings(held=name == "test")
    makers = {"speaking": speaking_jobs, "listening": listening_jobs, "test": test_jobs}
    jobs = digit_jobs() if name == "digits" else makers[name](english)
    key = hashlib.sha256(json.dumps([seed, text_to_speech.PART, jobs]).encode()).hexdigest()[:12]
    path = cache / f"{name}-{key}.npy"
    if not path.exists():
        waves = text_to_speech.synthesize([job for _, job in jobs], seed)
        ends = np.cumsum([len(w) for w in waves]).tolist()
        index = [
            (job.text, who, end - len(w), end) for (who, job), w, end in zip(jobs, waves, ends)
        ]
        write_atomically(path.with_suffix(".json"), lambda f: f.write(json.dumps(index).encode()))
        write_atomically(path, lambda f: np.save(f, np.concatenate(waves)))
    index = json.loads(path.with_suffix(".json").read_text())
    return SpeechCorpus(np.load(path, mmap_mode="r"), [Utterance(*row) for row in index])


def drop_long(speech: SpeechCorpus) -> SpeechCorpus:
    """The recordings of a corpus but those of two statements in one breath."""
    return SpeechCorpus(
        speech.samples, [u for u in speech.utterances if sentence_kind(u.text) != "long"]
    )


def sentence_kind(text: str) -> str:
    """The template of a statement; "long" for two of them in one breath, "words" for words without
    sense.
    """
    statements, parts = (
        grammar.statements(),
        text.split(" and "),
    )  # there may be one within a statement too
    pairs = ((" and ".join(parts[:i]), " and ".join(parts[i:])) for i in range(1, len(parts)))
    other = "long" if any(a in statements and b in statements for a, b in pairs) else "words"
    return statements.get(text, other)


def sampling_weights(texts: list[str]) -> list[float]:
    """How often each recording of these texts is drawn: all alike, or, in a share FAIR of the
    draws, all kinds alike.

    Three quarters of all sentences say where something is; of "the digit is nine" there are four
    recordings.
    """
    kinds = [sentence_kind(text) for text in texts]
    counts = Counter(kinds)
    return [(1 - FAIR) / len(texts) + FAIR / (len(counts) * counts[kind]) for kind in kinds]


def sample_recordings(held: bool) -> SpeechCorpus:
    """The committed recordings of data_samples/speech: those of held-out sentences, or the rest."""
    import soundfile

    folder = paths.data_samples() / "speech"
    rows = json.loads((folder / "index.json").read_text())
    rows = [row for row in rows if grammar.held_out(row["text"].removeprefix("say ")) == held]
    waves = [soundfile.read(folder / row["file"], dtype="int16")[0] for row in rows]
    ends = np.cumsum([len(w) for w in waves]).tolist()
    return SpeechCorpus(
        np.concatenate(waves),
        [
            Utterance(row["text"], row["voice"], e - len(w), e)
            for row, w, e in zip(rows, waves, ends)
        ],
    )


def make_voices(speech: SpeechCorpus, first_bos: int) -> dict[str, Voice]:
    """A Voice for each of the model's speakers from its first recordings: reference mel and speaker
    vector.
    """
    voices = {}
    for i, name in enumerate(grammar.VOICES):
        own = (j for j, u in enumerate(speech.utterances) if u.voice == name)
        voices[name] = voice_of(
            torch.cat([voice_mel(speech.wave(j)) for j in islice(own, 4)]), name, first_bos + i
        )
    return voices
