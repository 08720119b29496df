"""The generated world's language: words, sentences, questions, and which of them are held out."""

import re
import zlib
from functools import cache
from random import Random

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

# How each voice is made: espeak-ng voice. The first four are the voices the model speaks with.
VOICES = {"Anna": "en-us+f5", "Karl": "en-us+klatt", "Fiona": "en-us+f3", "Adam": "en-us+adam"}
LISTENING_VOICES = {
    **VOICES,
    "Mike": "en-us+m1",
    "Max": "en-us+m3",
    "Nora": "en-us+f4",
    "Paul": "en-us",
}
UNSEEN_VOICES = {"Faye": "en-us+f1", "Klaus": "en-us+klatt2"}  # heard in tests only

# Every sentence the language has, as a grammar: the judge of speech listens with the same one.
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
WORDS = (*COLORS, *SHAPES, *NUMBERS, *MOVES)
FRAMES = (
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


def held_out(text: str) -> bool:
    """Whether a sentence belongs to the tenth that is never trained on.

    Digits and counts never do: "six" stands in one sentence alone, and who has not heard a word
    cannot say it.
    """
    return zlib.crc32(text.encode()) % 10 == 0 and not text.startswith(("the digit is ", "there "))


def fill_template(template: str, random: Random) -> str:
    """Replace every <name> of a template by one of its words."""
    while "<" in template:
        name = template[template.index("<") + 1 : template.index(">")]
        template = template.replace(f"<{name}>", random.choice(GRAMMAR[name]), 1)
    return template


def statement(random: Random, held: bool) -> str:
    """A statement of the language, from the held-out tenth or from the rest."""
    while True:
        text = fill_template(
            random.choices(STATEMENTS, weights=(6, 3, 1, 1, 4, 1, 1, 1))[0], random
        )
        if held_out(text) == held:
            return text


def long_statement(random: Random, held: bool) -> str:
    """Two statements in one breath, both from the held-out tenth or both from the rest, in which a
    word comes back.
    """
    while True:
        text = f"{statement(random, held)} and {statement(random, held)}"
        words = [word for word in text.split() if word not in ("a", "and", "is", "the")]
        if len(text.split()) >= 9 and len(set(words)) < len(words):
            return text


def word_string(random: Random, words=WORDS) -> str:
    """Words in no order that means anything, few different ones, so that they come back: no
    statement is in them.
    """
    few = random.sample(words, random.randint(2, 8))
    return " ".join(random.choices(few, k=random.randint(2, 14)))


def framed_words(random: Random, words=WORDS) -> str:
    """Words in the frame of a statement that they do not belong into: "the seven is circle". No
    statement either.
    """
    while True:
        text = random.choice(FRAMES)
        for _ in range(text.count("<>")):
            text = text.replace("<>", random.choice([*words, *RELATIONS]), 1)
        if text not in statements():
            return text


@cache
def statements() -> dict[str, str]:
    """Every statement of the language, with its template."""
    return {text: template for template in STATEMENTS for text in expand(template)}


def expand(template: str) -> list[str]:
    """Every text that a template stands for."""
    if "<" not in template:
        return [template]
    name = template[template.index("<") + 1 : template.index(">")]
    return [t for word in GRAMMAR[name] for t in expand(template.replace(f"<{name}>", word, 1))]


def all_questions() -> list[str]:
    """All questions there are; few, so none is held out: what is asked about is."""
    return [text for template in QUESTIONS for text in expand(template)]
