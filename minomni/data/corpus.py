"""The generated world's speech: who says which sentence, synthesized once and cached in a file.

Without the synthesizer the few recordings in data_samples/speech are used: enough to run every
stage, not enough to train a good model.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from minomni import paths
from minomni.data import grammar, text_to_speech
from minomni.data.text_to_speech import Job
from minomni.data.vocabulary import NO_ENGLISH, English, evaluation_words
from minomni.files import write_atomically
from minomni.inputs.mel import voice_mel
from minomni.token2wav.voice import Voice, voice_of

# Utterances of the speaking corpus beside the plain statements.
VOICES_PER_STATEMENT = 2
SPEAKING_LONG = 2400  # two statements joined by "and"
SPEAKING_STRINGS = 700  # random words
SPEAKING_FRAMED = 1000  # random words in the frame of a statement
# Utterances of the listening corpus beside the questions.
LISTENING_STATEMENTS = 2200  # statements
LISTENING_STRINGS = 400  # random words
LISTENING_FRAMED = 600  # random words in the frame of a statement

JUDGED_STATEMENTS = 400  # utterances of the judged corpus

FEW = 100  # every voice says a kind of statement that has fewer members than this
BALANCED_SHARE = 0.5  # share of all draws that balances the kinds of sentences
FIRST_VOICE_OFFSET = 5  # offset of the voices' token ids from tts_text_pad
REFERENCE_RECORDINGS = 4  # recordings from which a voice is made
CODE_SAMPLES = 640  # samples of one code (40 ms)
SEED = 0  # of the synthesizer's noise

NamedJob = tuple[str, Job]  # speaker's name and the utterance


@dataclass(frozen=True)
class Utterance:
    """One recording: its text, its speaker, and its range of samples in the corpus."""

    text: str
    voice: str
    start: int
    end: int


def is_own_statement(utterance: Utterance) -> bool:
    """Whether an utterance is a statement in one of the model's own voices."""
    return utterance.voice in grammar.VOICES and utterance.text in grammar.statements()


class SpeechCorpus:
    """A corpus of recordings: `utterances` and, by index, float32 waves at 16 kHz."""

    def __init__(self, samples: np.ndarray, utterances: list[Utterance]):
        """samples: int16, all recordings one after the other."""
        self.samples = samples
        self.utterances = utterances
        self._by_text: dict[str, list[int]] = {}  # filled by the first call of find()

    def __len__(self) -> int:
        return len(self.utterances)

    def wave(self, index: int) -> Tensor:
        """Samples of one utterance, float32 in [-1, 1] at 16 kHz, padded to whole codes (40 ms)."""
        utterance = self.utterances[index]
        samples = self.samples[utterance.start : utterance.end]
        wave = torch.from_numpy(samples.astype(np.float32) / 32768)
        padding = -len(wave) % CODE_SAMPLES
        return torch.nn.functional.pad(wave, (0, padding))

    def find(self, text: str, random: Random) -> int:
        """Index of a random utterance of this text. Raises KeyError if there is none."""
        if not self._by_text:
            for i, utterance in enumerate(self.utterances):
                self._by_text.setdefault(utterance.text, []).append(i)
        return random.choice(self._by_text[text])


# ----------------------------------------------------------------------------------------------
# which sentences are spoken


def all_statements(held_out: bool) -> list[str]:
    """Every held-out statement of the language, or every other one, sorted."""
    return sorted(text for text in grammar.statements() if grammar.is_held_out(text) == held_out)


@cache
def rare_statements() -> set[str]:
    """The statements whose kind has few members."""
    counts = Counter(grammar.statements().values())
    return {text for text, template in grammar.statements().items() if counts[template] < FEW}


def speaker_job(name: str, text: str) -> NamedJob:
    """A sentence in one of the model's own voices."""
    return name, Job(text, grammar.VOICES[name])


def varied_job(name: str, text: str, voices: dict[str, str], random: Random) -> NamedJob:
    """A sentence at a random rate and pitch. voices: espeak-ng voices by name."""
    rate = random.randint(150, 210)
    pitch = random.randint(35, 65)
    return name, Job(text, voices[name], rate, pitch)


def speaking_jobs(english: English = NO_ENGLISH) -> list[NamedJob]:
    """The model's voices in training: every trained statement by some voices or all, long
    statements, and random words.

    The random words include English ones if there are any, loose and in the frames of statements.
    They can only be spoken by knowing which word comes next.
    """
    random = Random(1)
    voices = list(grammar.VOICES)
    words = [*grammar.WORDS, *english.trained]
    # Every trained statement.
    pairs = []  # (voice, text)
    for text in all_statements(held_out=False):
        count = len(voices) if text in rare_statements() else VOICES_PER_STATEMENT
        pairs += [(name, text) for name in random.sample(voices, count)]
    # Long statements.
    for _ in range(SPEAKING_LONG):
        pairs.append((random.choice(voices), grammar.long_statement(random, held_out=False)))
    # Random words, loose and in frames.
    for _ in range(SPEAKING_STRINGS + 3 * len(english.trained)):
        pairs.append((random.choice(voices), grammar.word_string(random, words)))
    for _ in range(SPEAKING_FRAMED + len(english.trained)):
        pairs.append((random.choice(voices), grammar.framed_words(random, words)))
    return [speaker_job(name, text) for name, text in pairs]


def listening_jobs(english: English = NO_ENGLISH) -> list[NamedJob]:
    """The model's input in training, at many rates and pitches: questions by every voice,
    statements and random words by some.

    Random words cannot be guessed from the words before them, so every word has to be recognized.
    """
    random = Random(2)
    voices = list(grammar.LISTENING_VOICES)
    words = [*grammar.WORDS, *english.trained]
    # Sentences to repeat.
    texts = random.sample(all_statements(held_out=False), LISTENING_STATEMENTS)
    for _ in range(LISTENING_STRINGS + 2 * len(english.trained)):
        texts.append(grammar.word_string(random, words))
    for _ in range(LISTENING_FRAMED):
        texts.append(grammar.framed_words(random, words))
    # Each voice asks each question four times; a random voice says each sentence.
    pairs = [
        (name, question) for name, question, _ in product(voices, grammar.all_questions(), range(4))
    ]
    pairs += [(random.choice(voices), "say " + text) for text in texts]
    return [varied_job(name, text, grammar.LISTENING_VOICES, random) for name, text in pairs]


def evaluation_jobs(english: English = NO_ENGLISH) -> list[NamedJob]:
    """Held-out sentences for evaluation: statements by the model's voices, and spoken questions at
    unseen rates and pitches.

    Statements are drawn like the answers of a conversation, not from the list of all statements,
    most of which describe where something is. If there are English words, sentences of them are
    added: trained words first, then held-out words.
    """
    random = Random(3)
    # Statements, as the model speaks them.
    texts = [grammar.statement(random, held_out=True) for _ in range(100)]
    speakers = list(grammar.VOICES) * 25
    jobs = [speaker_job(name, text) for name, text in zip(speakers, texts, strict=True)]
    # Questions and requests, by voices of the training and by unseen voices.
    questions = ["say " + text for text in texts] + grammar.all_questions()
    unseen = grammar.UNSEEN_VOICES
    unseen_natural = grammar.UNSEEN_NATURAL_VOICES
    for voices in (grammar.LISTENING_VOICES, unseen, unseen_natural):
        if not voices:
            continue
        for text in questions:
            name = random.choice(list(voices))
            jobs.append(varied_job(name, text, voices, random))
    # Sentences of English words.
    for words in english:
        if not words:
            continue
        for name in list(grammar.VOICES) * 12:
            a, b, c, d = random.sample(evaluation_words(words), 4)
            relation = random.choice(list(grammar.RELATIONS))
            jobs.append(speaker_job(name, f"the {a} {b} is {relation} the {c} {d}"))
    return jobs


def judged_jobs() -> list[NamedJob]:
    """Held-out statements by the model's voices in turn, for the outside judges of the report.

    More than the statements of evaluation_jobs(), so that intervals are narrow.
    """
    random = Random(5)
    speakers = list(grammar.VOICES) * (JUDGED_STATEMENTS // len(grammar.VOICES))
    return [speaker_job(name, grammar.statement(random, held_out=True)) for name in speakers]


# ----------------------------------------------------------------------------------------------
# corpora


def corpus(name: str, cache: Path, english: English = NO_ENGLISH) -> SpeechCorpus:
    """The "speaking", "listening", "test" or "judged" corpus, synthesized on first use into the
    cache folder.

    english: words that occur in it beside the world's own. The cache file is named by a hash of
    all jobs, so a changed recipe never reads an old file.
    """
    if not text_to_speech.available():
        return sample_recordings(held_out=name in ("test", "judged"))
    makers = {"speaking": speaking_jobs, "listening": listening_jobs, "test": evaluation_jobs}
    jobs = judged_jobs() if name == "judged" else makers[name](english)
    recipe = json.dumps([SEED, text_to_speech.PART, jobs])
    key = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    samples_path = cache / f"{name}-{key}.npy"
    index_path = samples_path.with_suffix(".json")
    if not samples_path.exists():
        # The samples are written last: where they exist, the index does too.
        waves = text_to_speech.synthesize([job for _, job in jobs], SEED)
        index = index_of([(job.text, voice) for voice, job in jobs], waves)
        write_atomically(index_path, lambda file: file.write(json.dumps(index).encode()))
        write_atomically(samples_path, lambda file: np.save(file, np.concatenate(waves)))
    utterances = [Utterance(*row) for row in json.loads(index_path.read_text())]
    return SpeechCorpus(np.load(samples_path, mmap_mode="r"), utterances)


def index_of(
    labels: list[tuple[str, str]], waves: list[np.ndarray]
) -> list[tuple[str, str, int, int]]:
    """(text, voice) of waves that are stored one after the other -> the fields of Utterance."""
    rows = []
    start = 0
    for (text, voice), wave in zip(labels, waves, strict=True):
        end = start + len(wave)
        rows.append((text, voice, start, end))
        start = end
    return rows


def sample_recordings(held_out: bool) -> SpeechCorpus:
    """The recordings in data_samples/speech: those of held-out sentences, or the rest."""
    import soundfile

    folder = paths.data_samples() / "speech"
    labels = []
    waves = []
    for row in json.loads((folder / "index.json").read_text()):
        if grammar.is_held_out(row["text"].removeprefix("say ")) != held_out:
            continue
        wave, _ = soundfile.read(folder / row["file"], dtype="int16")
        labels.append((row["text"], row["voice"]))
        waves.append(wave)
    utterances = [Utterance(*row) for row in index_of(labels, waves)]
    return SpeechCorpus(np.concatenate(waves), utterances)


def drop_long(speech: SpeechCorpus) -> SpeechCorpus:
    """A corpus without its recordings of two joined statements."""
    kept = [u for u in speech.utterances if sentence_kind(u.text) != "long"]
    return SpeechCorpus(speech.samples, kept)


def sentence_kind(text: str) -> str:
    """The template of a statement, "long" for two joined statements, "words" for random words."""
    statements = grammar.statements()
    if text in statements:
        return statements[text]
    # A statement may itself contain "and", so try every split.
    parts = text.split(" and ")
    for i in range(1, len(parts)):
        first = " and ".join(parts[:i])
        second = " and ".join(parts[i:])
        if first in statements and second in statements:
            return "long"
    return "words"


def sampling_weights(texts: Sequence[str]) -> list[float]:
    """How often to draw the recording of each text: a share BALANCED_SHARE of the draws
    balances the kinds of sentences, the rest is uniform.

    Three quarters of all sentences describe where something is; "the digit is nine" has four
    recordings.
    """
    kinds = [sentence_kind(text) for text in texts]
    counts = Counter(kinds)
    uniform = (1 - BALANCED_SHARE) / len(texts)
    return [uniform + BALANCED_SHARE / (len(counts) * counts[kind]) for kind in kinds]


def voices_of_corpus(speech: SpeechCorpus, first_bos: int) -> dict[str, Voice]:
    """A Voice for each of the model's speakers: reference mel and speaker vector of its first
    recordings.
    """
    voices = {}
    for i, name in enumerate(grammar.VOICES):
        indices = [j for j, u in enumerate(speech.utterances) if u.voice == name]
        mels = [voice_mel(speech.wave(j)) for j in indices[:REFERENCE_RECORDINGS]]
        voices[name] = voice_of(torch.cat(mels), name, first_bos + i)
    return voices
