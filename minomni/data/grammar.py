"""The language of the generated world: words, statements, questions, and what is held out."""

import re
import zlib
from collections.abc import Sequence
from functools import cache
from random import Random

from minomni.data import neural_tts

COLORS = {
    "red": (214, 40, 40),
    "green": (44, 160, 44),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 20),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# The model's own speakers, as voices of espeak-ng and as natural voices of neural_tts.
ESPEAK_VOICES = {
    "Anna": "en-us+f5",
    "Karl": "en-us+klatt",
    "Fiona": "en-us+f3",
    "Adam": "en-us+adam",
}
NATURAL_VOICES = {
    "Anna": "natural:heart",
    "Karl": "natural:baritone",
    "Fiona": "natural:young",
    "Adam": "natural:tenor",
}


def installed(voices: dict[str, str]) -> dict[str, str]:
    """The same speakers with voices that this machine has: those of espeak-ng where the package of
    natural voices is missing.
    """
    is_natural = any(voice.startswith(neural_tts.PREFIX) for voice in voices.values())
    if is_natural and not neural_tts.available():
        return {name: ESPEAK_VOICES[name] for name in voices}
    return voices


VOICES = installed(NATURAL_VOICES)  # by name
LISTENING_VOICES = {
    **VOICES,
    "Mike": "en-us+m1",
    "Max": "en-us+m3",
    "Nora": "en-us+f4",
    "Paul": "en-us",
    "Flora": "en-us+f2",
    "Kurt": "en-us+klatt",
}
# In evaluation only
UNSEEN_VOICES = {"Faye": "en-us+f1", "Klaus": "en-us+klatt2"}
UNSEEN_NATURAL_VOICES = {"Clara": "natural:alto", "Bruno": "natural:bass"}
if not neural_tts.available():
    UNSEEN_NATURAL_VOICES = {}

# The language as templates. The speech recognizer of the evaluation uses the same grammar.
GRAMMAR = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "number": NUMBERS,
    "relation": tuple(RELATIONS),
    "move": tuple(MOVES),
    "count": ("there is one shape", "there are two shapes", "there are three shapes"),
}
STATEMENTS = (
    "the <color> <shape> is <relation> the <color> <shape>",
    "the <color> <shape> moves <move>",
    "the <shape> is <color>",
    "the <color> shape is a <shape>",
    "a <color> <shape> and a <color> <shape>",
    "the digit is <number>",
    "<count>",
    "it was the <color> <shape>",
)
STATEMENT_WEIGHTS = (6, 3, 1, 1, 4, 1, 1, 1)  # how often each is drawn
WORDS = (*COLORS, *SHAPES, *NUMBERS, *MOVES)
TRANSCRIBE = "write what you hear"  # the request to transcribe a recording
# Statements with the words left out.
STATEMENT_FRAMES = (
    *(re.sub(r"<\w+>", "<>", statement) for statement in STATEMENTS if statement != "<count>"),
    "there is one <>",
    "there are two <>",
    "there are three <>",
)
QUESTIONS = (
    "what color is the <shape>",
    "which shape is <color>",
    "how many shapes are there",
    "where is the <color> <shape>",
    "what do you see",
    "which digit is this",
    "where does the shape go",
    "what was there at the sound",
    "what was there first",
    "what was there last",
)


def is_held_out(text: str) -> bool:
    """Whether a sentence belongs to the held-out tenth, chosen by a hash of its text.

    Digits and counts are never held out: "six" occurs in one sentence only, and a word that was
    never trained cannot be spoken.
    """
    if text.startswith(("the digit is ", "there ")):
        return False
    return zlib.crc32(text.encode()) % 10 == 0


def first_slot(template: str) -> str:
    """The name of a template's first <name>."""
    return template[template.index("<") + 1 : template.index(">")]


def fill_template(template: str, random: Random) -> str:
    """Replace every <name> of a template by one of its words."""
    while "<" in template:
        name = first_slot(template)
        template = template.replace(f"<{name}>", random.choice(GRAMMAR[name]), 1)
    return template


def statement(random: Random, held_out: bool) -> str:
    """A random statement, from the held-out tenth or from the rest."""
    while True:
        template = random.choices(STATEMENTS, weights=STATEMENT_WEIGHTS)[0]
        text = fill_template(template, random)
        if is_held_out(text) == held_out:
            return text


def long_statement(random: Random, held_out: bool) -> str:
    """Two statements joined by "and" in which a word repeats, both held out or both trained."""
    while True:
        text = f"{statement(random, held_out)} and {statement(random, held_out)}"
        words = text.split()
        content_words = [word for word in words if word not in ("a", "and", "is", "the")]
        has_repeat = len(set(content_words)) < len(content_words)
        if len(words) >= 9 and has_repeat:
            return text


def word_string(random: Random, words: Sequence[str] = WORDS) -> str:
    """Random words in random order: few different ones, so that they repeat. Never a statement."""
    few = random.sample(words, random.randint(2, 8))
    return " ".join(random.choices(few, k=random.randint(2, 14)))


def framed_words(random: Random, words: Sequence[str] = WORDS) -> str:
    """Random words in the frame of a statement: "the seven is circle". Never a statement."""
    while True:
        text = random.choice(STATEMENT_FRAMES)
        for _ in range(text.count("<>")):
            text = text.replace("<>", random.choice([*words, *RELATIONS]), 1)
        if text not in statements():
            return text


@cache
def statements() -> dict[str, str]:
    """Every statement of the language, with its template."""
    template_of = {}
    for template in STATEMENTS:
        for text in expand(template):
            template_of[text] = template
    return template_of


def expand(template: str) -> list[str]:
    """Every text that matches a template."""
    if "<" not in template:
        return [template]
    name = first_slot(template)
    texts = []
    for word in GRAMMAR[name]:
        texts += expand(template.replace(f"<{name}>", word, 1))
    return texts


def all_questions() -> list[str]:
    """Every question. They are few, so none is held out; the images and clips differ instead."""
    return sum(map(expand, QUESTIONS), [])
