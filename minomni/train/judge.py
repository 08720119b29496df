"""The outside judge of speech: pocketsphinx, which carries its own model and has never seen ours.

It listens with a closed grammar of the world's sentences. bestpath=False finds more of them than
the default does.
"""

import numpy as np
import soxr
from torch import Tensor

from minomni.config import LISTENING_RATE
from minomni.errors import UserError
from minomni.train import world

# What one utterance may be made of.
STATEMENT, LONG, ENGLISH = (
    "<statement>",
    "<statement> and <statement>",
    "the <word> <word> is <relation> the <word> <word>",
)


def grammar(said: str = STATEMENT, words=world.WORDS) -> str:
    """The world's statements as a JSGF grammar; `said` is what one utterance is made of, `words`
    those of ENGLISH.
    """
    lists = {**world.GRAMMAR, "word": words}
    rules = [f"<{name}> = {' | '.join(choices)};" for name, choices in lists.items()]
    rules += [f"<statement> = {' | '.join(world.STATEMENTS)};", f"public <said> = {said};"]
    return "#JSGF V1.0;\ngrammar world;\n" + "\n".join(rules) + "\n"


class Judge:
    """Writes down what it hears: a statement, or what else `said` allows. UserError where there is
    no pocketsphinx.
    """

    def __init__(self, said: str = STATEMENT, words=world.WORDS):
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise UserError(
                "the outside judge is not installed: pip install pocketsphinx"
            ) from None
        self.decoder = Decoder(bestpath=False, loglevel="FATAL")
        self.decoder.add_jsgf_string("world", grammar(said, words))
        self.decoder.activate_search("world")

    def hear(self, wave: Tensor, sample_rate: int) -> str:
        """Float wave [samples] -> the sentence heard, or '' where none is."""
        samples = soxr.resample(wave.detach().numpy(), sample_rate, LISTENING_RATE)
        quiet = np.zeros(
            LISTENING_RATE // 5, np.float32
        )  # the recogniser wants silence around speech
        samples = np.concatenate([quiet, samples, quiet])
        self.decoder.start_utt()
        self.decoder.process_raw(
            (np.clip(samples, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True
        )
        self.decoder.end_utt()
        heard = self.decoder.hyp()
        return heard.hypstr if heard else ""


def edits(right, heard) -> int:
    """Fewest insertions, deletions and substitutions between two sequences."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(right, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def word_error(pairs: list[tuple[str, str]]) -> float:
    """Word error rate of (right, heard) sentences: edits over right words."""
    return sum(edits(r.split(), h.split()) for r, h in pairs) / sum(
        len(r.split()) for r, _ in pairs
    )
