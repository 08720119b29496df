"""What the two alignment stages share: features that point at the Thinker's own word embeddings."""

import torch
from torch import Tensor, nn

from minomni.data.examples import ExampleBuilder
from minomni.train.loop import Stage

PLAIN = 0.5  # weight of features being the very words that they point at


def classes_of(thinker, nothing: int) -> Tensor:
    """What can be pointed at: the embedding of `nothing`, then those of all words [1 + vocabulary,
    D].
    """
    table, words = thinker.model.embed_tokens.weight, min(vars(thinker.config.tokens).values())
    return torch.cat([table[nothing : nothing + 1], table[:words]])


def embedding_similarity(features: Tensor, thinker, nothing: int) -> Tensor:
    """Features [N, D] -> log-probabilities [N, 1 + vocabulary]: 0 is `nothing`, i + 1 the word of
    id i.
    """
    return (features @ classes_of(thinker, nothing).T / features.shape[1] ** 0.5).log_softmax(-1)


def embedding_mse(features: Tensor, meant: Tensor) -> Tensor:
    """How far features [N, D] are from the embeddings [N, D] that they stand for, squared, as a
    share of those.

    Pointing alone leaves them several times too long, and half of that is a denial of all other
    words: the decoder, which has met ideal senses only, would understand little of it.
    """
    return ((features - meant).square().sum(-1) / meant.square().sum(-1)).mean()


def word_log_probs(thinker, mels: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """Word log-probabilities [B, T, classes] of what the ears make of clips [bands, F], and their
    lengths [B].

    features: the ears' tokens of all clips, packed [sum of tokens, D].
    """
    counts = [thinker.audio_tower.token_count(mel.shape[-1]) for mel in mels]
    rows = embedding_similarity(
        features, thinker, thinker.config.tokens.audio
    )  # [sum of tokens, classes]
    return nn.utils.rnn.pad_sequence(rows.split(counts), batch_first=True), torch.tensor(
        counts, device=rows.device
    )


class AlignStage(Stage):
    """What both share: the teacher's examples. The word embeddings that are pointed at stay as they
    were drawn.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.teacher = ExampleBuilder(self.omni.config, self.cache)
        self.tokens, self.encode = (
            self.omni.config.thinker.tokens,
            self.teacher.processor.tokenizer.encode,
        )
