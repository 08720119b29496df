"""The generated world's tokenizer, and the English words of a larger vocabulary.

The tokenizer is byte-level BPE trained on every sentence of the language. English words are split
into pieces, so words that never occur in training can be read, recognized and spoken like others.
"""

from functools import cache
from random import Random
from typing import NamedTuple

from minomni import paths
from minomni.config import TokenIds
from minomni.data import grammar
from minomni.inputs.tokenizer import Tokenizer, special_tokens

EVALUATED_WORDS = 40  # English words in an evaluation
MIN_LETTERS = 6  # letters that each of them has at least
WORLD_IDS = 480  # token ids of the world's own words
ENGLISH_IDS = 320  # token ids of pieces of English words


class English(NamedTuple):
    """English words beside the world's own."""

    trained: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()  # never trained on: one in ten


NO_ENGLISH = English()


@cache
def english(tokens: TokenIds) -> English:
    """The English words of a vocabulary; none if it has fewer than WORLD_IDS + ENGLISH_IDS ids."""
    if min(special_tokens(tokens).values()) < WORLD_IDS + ENGLISH_IDS:
        return NO_ENGLISH
    # words.txt: common in the notebooks, known to the speech recognizer, no two sound alike.
    words = (paths.data_samples() / "words.txt").read_text(encoding="utf-8").split()
    trained = tuple(word for word in words if not grammar.is_held_out(word))
    held_out = tuple(word for word in words if grammar.is_held_out(word))
    return English(trained, held_out)


def evaluation_words(words: tuple[str, ...]) -> list[str]:
    """A sample of long words, which a speech recognizer distinguishes reliably."""
    long = [word for word in words if len(word) >= MIN_LETTERS]
    return Random(6).sample(long, min(EVALUATED_WORDS, len(long)))


@cache
def world_tokenizer(tokens: TokenIds) -> Tokenizer:
    """A tokenizer whose ordinary ids end below the first special one, trained in about a second."""
    special = special_tokens(tokens)
    vocab_size = min(WORLD_IDS + ENGLISH_IDS, *special.values())
    return Tokenizer.train(tokenizer_texts(tokens), vocab_size=vocab_size, special_tokens=special)


def tokenizer_texts(tokens: TokenIds) -> list[str]:
    """The training corpus of the tokenizer; repetition sets how often a text counts."""
    # Every sentence of the language.
    texts = sum(map(grammar.expand, grammar.STATEMENTS + grammar.QUESTIONS), [])
    texts += list(grammar.QUESTIONS) * 100
    # The chat template.
    template = [
        "system\nYou are a helpful assistant.",
        "user\n",
        "assistant\n",
        grammar.TRANSCRIBE,
    ]
    texts += template * 400
    # Requests to say single words, singular and plural.
    words = [*grammar.COLORS, *grammar.SHAPES, *grammar.NUMBERS]
    texts += [f"say {word} {word}s" for word in words]
    # English words.
    texts += [f"say {word}" for word in english(tokens).trained] * 3
    return texts
