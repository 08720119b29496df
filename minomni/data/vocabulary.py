"""The vocabulary of the generated world, opened where there is room: its tokenizer, and the English
words beside its own.

The tokenizer is byte-level BPE trained on every sentence the language has. English comes in pieces,
so that words which nobody has said in training can be spelled, heard and said like the others.
"""

from functools import cache
from random import Random
from typing import NamedTuple

from minomni import paths
from minomni.config import TokenIds
from minomni.data import grammar
from minomni.inputs.tokenizer import Tokenizer, special_tokens

TESTED, LONG = 40, 6  # words in a test, and letters that they have at least
OWN, PIECES = 480, 320  # ids that the world's own words take, and those for pieces of English


class English(NamedTuple):
    """English words beside the world's own."""

    trained: tuple[str, ...] = ()
    held: tuple[str, ...] = ()  # never trained on: one in ten


@cache
def english(tokens: TokenIds) -> English:
    """The words that a vocabulary has room for: none in one of OWN ids."""
    if min(special_tokens(tokens).values()) < OWN + PIECES:
        return English()
    # words.txt: common in the notebooks, known to the judge, each sounds like no other
    words = (paths.data_samples() / "words.txt").read_text(encoding="utf-8").split()
    return English(
        *(tuple(word for word in words if grammar.held_out(word) == held) for held in (False, True))
    )


def told_apart(words: tuple[str, ...]) -> list[str]:
    """Some long ones of them, which a judge can tell from each other."""
    long = [word for word in words if len(word) >= LONG]
    return Random(6).sample(long, min(TESTED, len(long)))


@cache
def world_tokenizer(tokens: TokenIds) -> Tokenizer:
    """A tokenizer whose ordinary ids end below the first special one. Trained anew each time: it
    takes a second.
    """
    texts = [t for s in grammar.STATEMENTS + grammar.QUESTIONS for t in grammar.expand(s)]
    texts = texts + list(grammar.QUESTIONS) * 100
    texts += [
        "system\nYou are a helpful assistant.",
        "user\n",
        "assistant\n",
        "write what you hear",
    ] * 400
    texts += [
        f"say {word} {word}s"
        for words in (grammar.COLORS, grammar.SHAPES, grammar.NUMBERS)
        for word in words
    ]
    texts += [f"say {word}" for word in english(tokens).trained] * 3
    room = min(OWN + PIECES, *special_tokens(tokens).values())
    return Tokenizer.train(texts, vocab_size=room, special_tokens=special_tokens(tokens))
