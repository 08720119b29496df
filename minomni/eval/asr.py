"""The outside judge of speech: pocketsphinx, which carries its own model and has never seen ours.

It listens with a closed grammar of the world's sentences. bestpath=False finds more of them than
the default does.
"""

import numpy as np
import soxr
from torch import Tensor

from minomni.config import LISTENING_RATE
from minomni.data import grammar
from minomni.errors import UserError

# What one utterance may be made of.
STATEMENT, LONG, ENGLISH = (
    "<statement>",
    "<statement> and <statement>",
    "the <word> <word> is <relation> the <word> <word>",
)


def jsgf_grammar(said: str = STATEMENT, words=grammar.WORDS) -> str:
    """The world's statements as a JSGF grammar; `said` is what one utterance is made of, `words`
    those of ENGLISH.
    """
    lists = {**grammar.GRAMMAR, "word": words}
    rules = [f"<{name}> = {' | '.join(choices)};" for name, choices in lists.items()]
    rules += [f"<statement> = {' | '.join(grammar.STATEMENTS)};", f"public <said> = {said};"]
    return "#JSGF V1.0;\ngrammar world;\n" + "\n".join(rules) + "\n"


class SpeechRecognizer:
    """Writes down what it hears: a statement, or what else `said` allows. UserError where there is
    no pocketsphinx.
    """

    def __init__(self, said: str = STATEMENT, words=grammar.WORDS):
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise UserError(
                "the outside judge is not installed: pip install pocketsphinx"
            ) from None
        self.decoder = Decoder(bestpath=False, loglevel="FATAL")
        self.decoder.add_jsgf_string("world", jsgf_grammar(said, words))
        self.decoder.activate_search("world")

    def transcribe(self, wave: Tensor, sample_rate: int) -> str:
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
