"""Stage audio_align: the audio encoder learns to give the Thinker what it hears."""

from random import Random

import torch

from minomni.data.oracle_features import audio_words, tone_token
from minomni.data.scenes import Example
from minomni.inputs.mel import log_mel
from minomni.train import losses
from minomni.train.stages.alignment import (
    PLAIN,
    AlignStage,
    classes_of,
    embedding_mse,
    word_log_probs,
)


class AudioAlignStage(AlignStage):
    name, learns = "audio_align", ("thinker.audio_tower.",)
    about = "the audio encoder learns to point at the words it hears, by CTC (in place of Whisper's weights)"
    data = "spoken questions and sentences, sounds"

    def batch(self, number):
        random = Random(f"{self.seed}-ears-{number}")
        mels, words = [], []
        for i in range(self.recipe.batch):
            text = self.teacher.recorded_text(random)
            example = (
                Example("", "", voice="any", heard=text)
                if i % 6
                else self.teacher.example("sync-typed", random)
            )
            wave = (
                torch.from_numpy(example.sound)
                if example.voice is None
                else self.teacher.wave(example, random)
            )
            mels.append(log_mel(wave))
            words.append(
                torch.tensor(audio_words(example, self.encode) or [tone_token(self.encode)]) + 1
            )  # class 0 is silence
        progress = number / (self.recipe.steps * self.recipe.accumulate)
        return (
            mels,
            words,
            PLAIN * max(0.0, 2 * progress - 1),
        )  # first to point at all, then plainly

    def losses(self, batch):
        mels, words, weight = batch
        thinker = self.omni.thinker
        features = thinker.audio_tower(mels)
        log_probs, counts = word_log_probs(thinker, mels, features)
        found = (
            torch.cat([row[:n] for row, n in zip(log_probs, counts)]).detach().exp()
        )  # [sum of tokens, classes]
        return {
            "ctc": losses.ctc(log_probs, counts, words),
            "plain": weight
            * embedding_mse(features, found @ classes_of(thinker, self.tokens.audio)),
        }

    def sample(self):
        last = log_mel(self.teacher.speech.wave(len(self.teacher.speech) - 1))
        log_probs, _ = word_log_probs(
            self.omni.thinker, [last], self.omni.thinker.audio_tower([last])
        )
        heard = torch.unique_consecutive(log_probs[0].argmax(-1))
        written = self.teacher.processor.tokenizer.decode((heard[heard > 0] - 1).tolist())
        return f"{self.teacher.spoken[-1]!r} -> {written!r}"
