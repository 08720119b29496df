"""Independent speech recognizer for the evaluation: pocketsphinx with its own acoustic model.

It decodes with a closed grammar of the generated world's sentences. Its model was never trained on
our speech. bestpath=False recognizes more of these sentences than the default.
"""

from collections.abc import Sequence

import numpy as np
import soxr
from torch import Tensor

from minomni.config import INPUT_SAMPLE_RATE
from minomni.data import grammar
from minomni.errors import UserError

# What one utterance may consist of, as the right-hand side of a JSGF rule.
STATEMENT = "<statement>"
LONG_STATEMENT = "<statement> and <statement>"
ENGLISH = "the <word> <word> is <relation> the <word> <word>"


def jsgf_grammar(utterance: str = STATEMENT, words: Sequence[str] = grammar.WORDS) -> str:
    """The world's statements as a JSGF grammar.

    utterance: the rule of one utterance. words: the choices for <word> in ENGLISH.
    """
    word_lists = {**grammar.GRAMMAR, "word": words}
    rules = [f"<{name}> = {' | '.join(choices)};" for name, choices in word_lists.items()]
    rules.append(f"<statement> = {' | '.join(grammar.STATEMENTS)};")
    rules.append(f"public <utterance> = {utterance};")
    return "#JSGF V1.0;\ngrammar world;\n" + "\n".join(rules) + "\n"


class SpeechRecognizer:
    """Transcribes one utterance of a closed grammar: a statement, or what `utterance` allows.

    Raises UserError if pocketsphinx is not installed.
    """

    def __init__(self, utterance: str = STATEMENT, words: Sequence[str] = grammar.WORDS):
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise UserError(
                "the speech recognizer of the evaluation is not installed: pip install pocketsphinx"
            ) from None
        self.decoder = Decoder(bestpath=False, loglevel="FATAL")
        self.decoder.add_jsgf_string("world", jsgf_grammar(utterance, words))
        self.decoder.activate_search("world")

    def transcribe(self, wave: Tensor, sample_rate: int) -> str:
        """Float waveform [samples] -> the recognized sentence, or '' if there is none."""
        samples = soxr.resample(wave.detach().numpy(), sample_rate, INPUT_SAMPLE_RATE)
        # The recognizer needs silence around speech.
        silence = np.zeros(INPUT_SAMPLE_RATE // 5, np.float32)
        samples = np.concatenate([silence, samples, silence])
        pcm = (np.clip(samples, -1, 1) * 32767).astype(np.int16)

        self.decoder.start_utt()
        self.decoder.process_raw(pcm.tobytes(), full_utt=True)
        self.decoder.end_utt()
        hypothesis = self.decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""
