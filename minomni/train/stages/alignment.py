"""Shared by the alignment stages: encoder features that predict the Thinker's word embeddings."""

from typing import Any

import torch
from torch import Tensor, nn

from minomni.data.examples import ExampleBuilder
from minomni.inputs.mel import num_audio_tokens
from minomni.thinker.thinker import Thinker
from minomni.train import losses
from minomni.train.loop import Stage

MSE_WEIGHT = 0.5  # weight of embedding_mse()


def classes_of(thinker: Thinker, blank: int) -> Tensor:
    """Embeddings of the classes: token `blank`, then all words [1 + vocabulary, D]."""
    table = thinker.model.embed_tokens.weight
    first_special = min(vars(thinker.config.tokens).values())
    return torch.cat([table[blank : blank + 1], table[:first_special]])


def embedding_similarity(features: Tensor, thinker: Thinker, blank: int) -> Tensor:
    """Features [N, D] -> log-probabilities [N, 1 + vocabulary] from scaled dot products.

    Class 0 is `blank`, class i + 1 the word with id i.
    """
    logits = features @ classes_of(thinker, blank).T / features.shape[1] ** 0.5
    return logits.log_softmax(-1)


def embedding_mse(features: Tensor, target: Tensor) -> Tensor:
    """Squared error of features [N, D] against embeddings [N, D], relative to the embeddings' norm.

    Classification alone makes features several times too long, and half of their norm suppresses
    other words. The decoder was trained on oracle features, so it would not understand them.
    """
    error = (features - target).square().sum(-1)
    return losses.mean(error / target.square().sum(-1))


def word_log_probs(thinker: Thinker, mels: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """Word log-probabilities [B, T, classes] of clips, and their lengths [B].

    mels: log-mels [bands, F] of the clips. features: the audio encoder's outputs for all clips,
    packed [sum of tokens, D].
    """
    counts = [num_audio_tokens(mel.shape[-1]) for mel in mels]
    log_probs = embedding_similarity(features, thinker, thinker.config.tokens.audio)
    rows = log_probs.split(counts)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.tensor(counts, device=log_probs.device)


class AlignStage(Stage):
    """A stage that aligns an encoder with the Thinker's word embeddings, which stay fixed."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.tokens = self.omni.config.thinker.tokens

    def setup(self) -> None:
        """Read what the examples are made of."""
        super().setup()
        self.builder = ExampleBuilder(self.omni.config, self.cache)
        self.encode = self.builder.processor.tokenizer.encode
