"""Shared by the stages codec, vocoder and dit: the corpus, its mels and its voices."""

from random import Random

import torch
from torch import Tensor

from minomni.data.corpus import corpus, drop_long, sampling_weights, voices_of_corpus
from minomni.data.vocabulary import english
from minomni.inputs.mel import voice_mel
from minomni.token2wav.voice import Voice
from minomni.train.loop import Stage


class MelStage(Stage):
    """A stage that trains on mels of the recordings of the model's voices."""

    data = "spoken sentences"

    def setup(self) -> None:
        """Read the corpus, and make its voices and sampling weights."""
        super().setup()
        tokens = self.omni.config.thinker.tokens
        self.spoken = corpus("speaking", self.cache, english(tokens))
        self.speech = drop_long(self.spoken)  # long sentences cost time and add nothing new
        utterances = self.speech.utterances
        self.weights = sampling_weights([utterance.text for utterance in utterances])
        self.voices = voices_of_corpus(self.speech, first_bos=0)
        self.lengths = [utterance.end - utterance.start for utterance in utterances]
        self.text = utterances[0].text  # of the utterance in previews

    def draw(self, random: Random) -> int:
        """Index of a random utterance."""
        return random.choices(range(len(self.speech)), self.weights)[0]

    def mel(self, index: int) -> Tensor:
        """Voice mel [T, bands] of an utterance."""
        return voice_mel(self.speech.wave(index))

    def conds(self, indices: list[int]) -> Tensor:
        """Speaker vectors [B, E] of the voices of utterances."""
        return torch.cat([self.voice(i).cond for i in indices])

    def voice(self, index: int) -> Voice:
        """The voice of an utterance."""
        return self.voices[self.speech.utterances[index].voice]
