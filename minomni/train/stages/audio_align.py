"""Stage audio_align: the audio encoder learns to output word embeddings."""

from random import Random

import torch
from torch import Tensor

from minomni.data.oracle_features import tone_token
from minomni.inputs.mel import log_mel
from minomni.train import losses
from minomni.train.stages.alignment import (
    MSE_WEIGHT,
    AlignStage,
    classes_of,
    embedding_mse,
    word_log_probs,
)

Batch = tuple[list[Tensor], list[Tensor], float]  # mels, labels, weight of the MSE


class AudioAlignStage(AlignStage):
    """CTC over word embeddings; later also regression onto the predicted embeddings."""

    name = "audio_align"
    trainable = ("thinker.audio_tower.",)
    description = (
        "the audio encoder learns to predict the spoken words by CTC (instead of Whisper's weights)"
    )
    data = "spoken questions and sentences, tones"

    def whole_batch(self, number: int) -> Batch:
        # The seed keeps a former name of the stage, so that runs repeat.
        random = Random(f"{self.seed}-ears-{number}")
        mels = []
        labels = []
        for i in range(self.recipe.batch):
            wave, words = self.clip(random, with_tone=i % 6 == 0)
            mels.append(log_mel(wave))
            labels.append(torch.tensor(words) + 1)  # class 0 is silence
        # In the second half of the stage the weight of the regression rises from 0.
        progress = number / (self.recipe.steps * self.recipe.accumulate)
        weight = MSE_WEIGHT * max(0.0, 2 * progress - 1)
        return mels, labels, weight

    def clip(self, random: Random, with_tone: bool) -> tuple[Tensor, list[int]]:
        """A waveform [samples] and its token ids: the audio of a video with a tone, or speech."""
        text = self.builder.recorded_text(random)  # drawn in either case, so that runs repeat
        if with_tone:
            example = self.builder.example("sync-typed", random)
            return torch.from_numpy(example.sound), [tone_token(self.encode)]
        return self.builder.recording(text, random), self.encode(text)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        mels, labels, weight = batch
        thinker = self.omni.thinker
        features = thinker.audio_tower(mels)
        log_probs, counts = word_log_probs(thinker, mels, features)

        # Regression targets: the expected embedding under the model's own predictions.
        valid = torch.cat([row[:count] for row, count in zip(log_probs, counts)])
        probs = valid.detach().exp()  # [sum of tokens, classes]
        target = probs @ classes_of(thinker, self.tokens.audio)
        return {
            "ctc": losses.ctc(log_probs, counts, labels),
            "mse": weight * embedding_mse(features, target),
        }

    def preview_text(self) -> str:
        mel = log_mel(self.builder.speech.wave(len(self.builder.speech) - 1))
        features = self.omni.thinker.audio_tower([mel])
        log_probs, _ = word_log_probs(self.omni.thinker, [mel], features)
        # Greedy CTC decoding: merge repeats, drop blanks.
        classes = torch.unique_consecutive(log_probs[0].argmax(-1))
        ids = (classes[classes > 0] - 1).tolist()
        transcript = self.builder.processor.tokenizer.decode(ids)
        return f"{self.builder.spoken[-1]!r} -> {transcript!r}"
