"""The senses' first lessons, in place of Whisper's and Qwen2.5-VL's weights.

Both encoders learn to point at words: what they make of a piece of sound or picture is compared
with the decoder's own word embeddings. So they speak the decoder's language before the decoder ever
hears or sees anything (imagination.py).
"""

from random import Random

import torch
from torch import Tensor, nn

from minomni.inputs.mel import log_mel
from minomni.inputs.patches import image_patches, video_patches
from minomni.train import losses
from minomni.train.imagination import beep, cell_words, heard_words
from minomni.train.loop import Stage, to_device
from minomni.train.teacher import Teacher
from minomni.train.world import Example

PLAIN = 0.5  # weight of features being the very words that they point at


def classes_of(thinker, nothing: int) -> Tensor:
    """What can be pointed at: the embedding of `nothing`, then those of all words [1 + vocabulary,
    D].
    """
    table, words = thinker.model.embed_tokens.weight, min(vars(thinker.config.tokens).values())
    return torch.cat([table[nothing : nothing + 1], table[:words]])


def likeness(features: Tensor, thinker, nothing: int) -> Tensor:
    """Features [N, D] -> log-probabilities [N, 1 + vocabulary]: 0 is `nothing`, i + 1 the word of
    id i.
    """
    return (features @ classes_of(thinker, nothing).T / features.shape[1] ** 0.5).log_softmax(-1)


def plainness(features: Tensor, meant: Tensor) -> Tensor:
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
    rows = likeness(features, thinker, thinker.config.tokens.audio)  # [sum of tokens, classes]
    return nn.utils.rnn.pad_sequence(rows.split(counts), batch_first=True), torch.tensor(
        counts, device=rows.device
    )


class SenseStage(Stage):
    """What both share: the teacher's examples. The word embeddings that are pointed at stay as they
    were drawn.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.teacher = Teacher(self.omni.config, self.cache)
        self.tokens, self.encode = (
            self.omni.config.thinker.tokens,
            self.teacher.processor.tokenizer.encode,
        )


class EarsStage(SenseStage):
    name, learns = "ears", ("thinker.audio_tower.",)
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
                torch.tensor(heard_words(example, self.encode) or [beep(self.encode)]) + 1
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
            "plain": weight * plainness(features, found @ classes_of(thinker, self.tokens.audio)),
        }

    def sample(self):
        last = log_mel(self.teacher.speech.wave(len(self.teacher.speech) - 1))
        log_probs, _ = word_log_probs(
            self.omni.thinker, [last], self.omni.thinker.audio_tower([last])
        )
        heard = torch.unique_consecutive(log_probs[0].argmax(-1))
        written = self.teacher.processor.tokenizer.decode((heard[heard > 0] - 1).tolist())
        return f"{self.teacher.spoken[-1]!r} -> {written!r}"


class EyesStage(SenseStage):
    name, learns = "eyes", ("thinker.visual.",)
    about = "the vision encoder learns to point at the words for what it sees (in place of Qwen2.5-VL's weights)"
    data = "generated pictures and clips, handwritten digits"

    def batch(self, number):
        return self.draw(Random(f"{self.seed}-eyes-{number}"), self.recipe.batch)

    def draw(self, random, count):
        """Patches [N, patch_dim], grids and classes [N / 4, 4] of some pictures and clips."""
        patches, grids, classes = [], [], []
        vision, media = self.omni.config.thinker.vision, self.omni.config.media
        for i in range(count):
            example = self.teacher.example(
                ("handwriting", "scene", "scene", "video")[i % 4], random
            )
            rows, grid = (
                image_patches(example.image, vision, media)
                if example.clip is None
                else video_patches(torch.from_numpy(example.clip[0]), vision, media)
            )
            patches.append(rows)
            grids.append(grid)
            words = cell_words(example, grid, vision, self.encode)
            classes.append(torch.where(words == losses.IGNORE, words, words + 1))
        return torch.cat(patches), grids, torch.cat(classes)

    def losses(self, batch):
        patches, grids, classes = batch
        features = self.omni.thinker.visual(patches, grids)
        scores = likeness(features, self.omni.thinker, self.tokens.image)
        repeated = scores.repeat(classes.shape[1], 1)  # each word of a cell is a target of its own
        said = (classes != losses.IGNORE)[..., None]  # [N, 4, 1]
        meant = (classes_of(self.omni.thinker, self.tokens.image)[classes.clamp_min(0)] * said).sum(
            1
        )  # [N, D]
        clear, full = said.any(1)[:, 0], classes[:, 0] > 0
        return {
            "cells": nn.functional.nll_loss(
                repeated, classes.T.flatten(), ignore_index=losses.IGNORE
            ),
            "plain": PLAIN
            * (plainness(features[full], meant[full]) + plainness(features[clear], meant[clear])),
        }

    def sample(self):
        patches, grids, classes = to_device(self.draw(Random(7), 32), self.device)
        scores = likeness(
            self.omni.thinker.visual(patches, grids), self.omni.thinker, self.tokens.image
        )
        best = scores.topk(classes.shape[1]).indices
        full = classes[:, 0] > 0
        right = ((classes[..., None] == best[:, None]).any(-1) | (classes == losses.IGNORE)).all(1)
        return f"{right[full].float().mean().item():.0%} of full cells named right"
