"""The senses' first lessons, in place of Whisper's and Qwen2.5-VL's weights: ears by CTC, eyes by naming what is where."""

from random import Random

import torch
from torch import nn

from ..inputs.mel import log_mel
from ..inputs.patches import image_patches
from ..talker.codec import LETTERS, ids_to_letters, letters_to_ids
from . import losses, world
from .loop import Stage
from .thinker_stages import Teacher
from .world import Example

NOTHING = len(world.COLORS) * len(world.SHAPES)  # class of an empty cell; a digit d is NOTHING + 1 + d


class EarsStage(Stage):
    name, learns = "ears", ("thinker.audio_tower.",)
    about = "the audio encoder learns letters by CTC (in place of Whisper's weights)"

    def __init__(self, *args):
        super().__init__(*args)
        self.head = nn.Linear(self.omni.config.thinker.audio.output_dim, len(LETTERS) + 1)  # thrown away afterwards
        self.teacher = Teacher(self.omni.config, self.cache)

    def batch(self, step):
        random = Random(f"{self.seed}-ears-{step}")
        texts = random.choices(self.teacher.spoken, k=self.recipe.batch)
        waves = [self.teacher.wave(Example("", "", voice="any", heard=t), random) for t in texts]
        return [log_mel(w) for w in waves], [letters_to_ids(t) for t in texts]

    def losses(self, batch):
        mels, letters = batch
        log_probs, counts = self.log_probs(mels)
        return {"ctc": losses.ctc(log_probs, counts, letters)}

    def parameters(self):
        return {**super().parameters(), **{f"head.{n}": p for n, p in self.head.named_parameters()}}

    def log_probs(self, mels):
        """Letter log-probabilities [B, T, classes] of several clips, and their lengths [B]."""
        counts = torch.tensor([self.omni.thinker.audio_tower.token_count(m.shape[-1]) for m in mels])
        scores = self.head(self.omni.thinker.audio_tower(mels)).log_softmax(-1)  # [sum of tokens, classes]
        return nn.utils.rnn.pad_sequence(scores.split(counts.tolist()), batch_first=True), counts

    def sample(self):
        wave = self.teacher.speech.wave(len(self.teacher.speech) - 1)
        log_probs, _ = self.log_probs([log_mel(wave)])
        return f"{self.teacher.spoken[-1]!r} -> {ids_to_letters(log_probs[0].argmax(-1))!r}"


class EyesStage(Stage):
    name, learns = "eyes", ("thinker.visual.",)
    about = "the vision encoder learns to name what every cell holds (in place of Qwen2.5-VL's weights)"

    def __init__(self, *args):
        super().__init__(*args)
        self.head = nn.Linear(self.omni.config.thinker.vision.out_hidden_size, NOTHING + 1 + len(world.NUMBERS))  # thrown away
        self.digits = world.digits(held=False)

    def batch(self, step):
        return self.draw(Random(f"{self.seed}-eyes-{step}"), self.recipe.batch)

    def draw(self, random, count):
        """Patches [N, patch_dim], grids and classes [N / 4] of some pictures, one in four a handwritten digit."""
        vision, media = self.omni.config.thinker.vision, self.omni.config.media
        patches, grids, classes = [], [], []
        for i in range(count):
            example = world.handwriting(random, self.digits) if i % 4 == 0 else world.scene(random)
            rows, grid = image_patches(example.image, vision, media)
            patches.append(rows)
            grids.append(grid)
            classes.append(cell_classes(example, grid, vision))
        return torch.cat(patches), grids, torch.cat(classes)

    def losses(self, batch):
        patches, grids, classes = batch
        return {"cells": losses.next_token(self.head(self.omni.thinker.visual(patches, grids))[None], classes[None])}

    def parameters(self):
        return {**super().parameters(), **{f"head.{n}": p for n, p in self.head.named_parameters()}}

    def sample(self):
        patches, grids, classes = self.draw(Random(7), 32)
        named = self.head(self.omni.thinker.visual(patches, grids)).argmax(-1)
        full = (classes != losses.IGNORE) & (classes != NOTHING)
        return f"{(named[full] == classes[full]).float().mean():.0%} of full cells named right"


def cell_classes(example: Example, grid, vision) -> torch.Tensor:
    """What each merge cell of a picture holds [cells]: the thing whose centre is in it, nothing, or IGNORE where one reaches in."""
    rows, columns = (n // vision.spatial_merge_size for n in grid[1:])
    if not example.objects:
        return torch.full((rows * columns,), NOTHING + 1 + world.NUMBERS.index(example.answer.split()[-1]))
    size, classes = vision.cell_size, torch.full((rows, columns), NOTHING)
    for _, _, (x, y), radius in example.objects:
        low, high = [int(max(0, v - radius) // size) for v in (x, y)], [int((v + radius) // size) + 1 for v in (x, y)]
        classes[low[1] : high[1], low[0] : high[0]] = losses.IGNORE
    for color, shape, (x, y), _ in example.objects:
        classes[int(y // size), int(x // size)] = list(world.COLORS).index(color) * len(world.SHAPES) + world.SHAPES.index(shape)
    return classes.flatten()
