"""What the stages that train on mels share: corpus, crops and speaker conditions."""

from random import Random

import torch

from minomni.data.corpus import corpus, drop_long, make_voices, sampling_weights
from minomni.data.vocabulary import english
from minomni.inputs.mel import voice_mel
from minomni.train.loop import Stage

CROP_BLOCKS = (
    3,
    4,
)  # attention blocks of mel in a training crop of the DiT; short sentences have no more than three


class MelStage(Stage):
    """What the three stages share: the speaking corpus and the voices in it."""

    data = "spoken sentences"

    def __init__(self, *args):
        super().__init__(*args)
        self.spoken = corpus("speaking", self.cache, english(self.omni.config.thinker.tokens))
        self.speech = drop_long(self.spoken)  # long ones would take steps and teach nothing new
        self.weights = sampling_weights([u.text for u in self.speech.utterances])
        self.voices = make_voices(self.speech, first_bos=0)
        self.lengths = [u.end - u.start for u in self.speech.utterances]
        self.text = self.speech.utterances[0].text  # of the utterance that is sampled

    def draw(self, random: Random) -> int:
        """Index of an utterance."""
        return random.choices(range(len(self.speech)), self.weights)[0]

    def mel(self, index: int) -> torch.Tensor:
        """Voice mel [T, bands] of one utterance."""
        return voice_mel(self.speech.wave(index))

    def conds(self, indices: list[int]) -> torch.Tensor:
        """Speaker vectors [B, E] of the utterances' voices."""
        return torch.cat([self.voices[self.speech.utterances[i].voice].cond for i in indices])
