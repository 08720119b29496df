"""Stage encoder: the codes of a frozen model from its own sound."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minomni.config import IGNORE_INDEX
from minomni.data.batching import SILENT_MEL, pad_mels, similar_lengths
from minomni.data.word_errors import word_error_rate, word_errors
from minomni.errors import UserError
from minomni.talker.codec import LETTERS, CodeClassifier, ids_to_letters, letters_to_ids
from minomni.train import losses
from minomni.train.code_pairs import CHUNK, MAX_SECONDS, MIN_SECONDS, CodePairs, PairMaker
from minomni.train.loop import Recipe, Stage

if TYPE_CHECKING:
    from minomni.omni import Omni

CTC_WEIGHT = 0.3
MIN_SPOKEN = 0.5  # the share of its texts that a Talker has to speak
LEVEL = 1.5  # a recording is up to so much louder or softer, in the units of the mel
NOISE = -6.0  # the loudest noise that is added, in the same units
WARP = 0.12  # formants are moved up or down by up to this share of the bands

# Mels [B, T, bands] and their frames, codes [B, C], letters, none where they are unknown
Batch = tuple[Tensor, Tensor, Tensor, list[Tensor]]


class EncoderStage(Stage):
    """Cross-entropy on the codes of each frame, and CTC loss on the letters where they are known.

    Token2Wav, Talker and Thinker are frozen. The recordings that are encoded later have other
    voices, levels and rooms than the model's own sound, so its mels are varied.
    """

    name = "encoder"
    trainable = ("codec.",)
    description = "encoder for the codes of a frozen Talker and Token2Wav, from their own sound"

    def __init__(
        self, omni: "Omni", recipe: Recipe, cache: Path, seed: int, maker: PairMaker, count: int
    ):
        """count: pairs to train on; CHUNK more are held out."""
        super().__init__(omni, recipe, cache, seed)
        self.maker = maker
        self.count = count

    @property
    def classifier(self) -> CodeClassifier:
        assert isinstance(self.omni.codec, CodeClassifier)
        return self.omni.codec

    def setup(self) -> None:
        """Make the pairs. Raises UserError where the Talker spoke too few of its texts."""
        self.omni.eval()
        # Many pairs take hours, so the first file of them is judged before the others are made.
        self.check_spoken(CodePairs(self.maker, self.cache, CHUNK))
        pairs = CodePairs(self.maker, self.cache, CHUNK + self.count)
        self.check_spoken(pairs)
        self.held_out = pairs[:CHUNK]
        self.pairs = pairs[CHUNK:]
        self.lengths = [len(pair.codes) for pair in self.pairs]

    def check_spoken(self, pairs: CodePairs) -> None:
        """Count what the Talker spoke. Raises UserError where it is too few of its texts."""
        self.num_texts = len(pairs) - self.maker.num_random(len(pairs))
        self.num_spoken = sum(bool(pair.text) for pair in pairs)
        if self.num_spoken < MIN_SPOKEN * self.num_texts:
            raise UserError(
                f"the Talker spoke {self.num_spoken} of {self.num_texts} texts, expected at least "
                f"{MIN_SPOKEN:.0%}, each in {MIN_SECONDS} to {MAX_SECONDS} seconds; give --data "
                f"with short answers that the model can speak, or --random-codes 1 for no texts"
            )

    def whole_batch(self, number: int) -> Batch:
        indices = similar_lengths(self.lengths, self.recipe.batch, self.seed, number)
        chosen = [self.pairs[i] for i in indices]
        mels, frames = pad_mels([varied(pair.mel.float()) for pair in chosen])
        codes = pad_sequence([pair.codes for pair in chosen], True, IGNORE_INDEX)
        texts = [known_letters(pair.text) for pair in chosen]
        return mels, frames, codes, [letters_to_ids(text) for text in texts]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        mels, frames, codes, letters = batch
        logits, log_probs = self.classifier(mels)
        lengths = frames // self.classifier.config.downsample
        ctc = losses.ctc(log_probs, lengths, letters)
        return {"codes": losses.next_token(logits, codes), "ctc": CTC_WEIGHT * ctc}

    def preview_text(self) -> str:
        """The share of held-out codes that are right, the word error rate of the CTC head, and how
        many of its texts the Talker spoke.
        """
        right = []
        errors = []
        for pair in self.held_out:
            logits, log_probs = self.classifier(pair.mel.float()[None].to(self.device))
            right.append((logits[0].argmax(-1).cpu() == pair.codes).float())
            reference = known_letters(pair.text)
            if reference:
                transcript = ids_to_letters(log_probs[0].argmax(-1))
                errors.append(word_errors(reference, transcript.split()))
        line = f"{torch.cat(right).mean():.1%} of the held-out codes"
        if errors:
            line += f"; word error rate of the letters {word_error_rate(errors):.0%}"
        if self.num_texts:
            line += f"; the Talker spoke {self.num_spoken} of {self.num_texts} texts"
        return line


def known_letters(text: str) -> str:
    """The text in LETTERS, without punctuation; empty where it has letters beyond a to z."""
    text = text.lower().replace("'", "")
    words = text.translate(str.maketrans(".,;:!?-", "       ")).split()
    spoken = " ".join(words)
    return spoken if set(spoken) <= set(LETTERS) else ""


def varied(mel: Tensor) -> Tensor:
    """A mel [T, bands] as if of another speaker, level and room; which codes it has stays.

    The bands are stretched (vocal tract length perturbation, Jaitly and Hinton 2013), the level is
    changed and noise is added. Draws from torch's random generator.
    """
    stretch, level, noise = torch.rand(3).tolist()
    # Band k takes the value at k * (1 + WARP * ...), between two bands.
    bands = mel.shape[1]
    positions = torch.arange(bands) * (1 + WARP * (2 * stretch - 1))
    positions = positions.clamp_max(bands - 1)
    left = positions.long().clamp_max(bands - 2)
    mel = torch.lerp(mel[:, left], mel[:, left + 1], positions - left)

    louder = mel + LEVEL * (2 * level - 1)
    floor = SILENT_MEL + noise * (NOISE - SILENT_MEL)
    noise_mel = floor + 0.5 * torch.randn_like(mel)
    return torch.logaddexp(louder, noise_mel).clamp_min(SILENT_MEL)
