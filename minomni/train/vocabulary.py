"""The tokenizer of the generated world: byte-level BPE trained on every sentence the language has."""

from functools import cache

from ..config import TokenIds
from ..inputs.tokenizer import Tokenizer, special_tokens
from . import world


@cache
def world_tokenizer(tokens: TokenIds) -> Tokenizer:
    """A tokenizer whose ordinary ids end below the first special one. Trained anew each time: it takes a second."""
    texts = [t for s in world.STATEMENTS + world.QUESTIONS for t in world.expand(s)]
    texts = texts + list(world.QUESTIONS) * 100
    texts += ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "write what you hear"] * 400
    texts += [f"say {word} {word}s" for words in (world.COLORS, world.SHAPES, world.NUMBERS) for word in words]
    return Tokenizer.train(
        texts, vocab_size=min(special_tokens(tokens).values()), special_tokens=special_tokens(tokens)
    )
