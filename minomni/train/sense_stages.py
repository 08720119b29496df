"""The senses' first lessons, in place of Whisper's and Qwen2.5-VL's weights.

Both encoders learn to point at words: what they make of a piece of sound or picture is compared with the decoder's own
word embeddings. So they speak the decoder's language before the decoder ever hears or sees anything.
"""

from random import Random

import torch
from torch import Tensor, nn

from ..inputs.mel import log_mel
from ..inputs.patches import image_patches
from . import losses, world
from .loop import Stage
from .thinker_stages import Teacher
from .world import Example

WORDS = (tuple(world.COLORS), world.SHAPES, world.NUMBERS)  # what a piece of a picture can be called, in three ways


class SenseStage(Stage):
    """What both share: the teacher's examples, and likeness to the word embeddings, which stay as they are."""

    needs = ("language",)

    def __init__(self, *args):
        super().__init__(*args)
        self.teacher = Teacher(self.omni.config, self.cache)
        self.width = self.omni.config.thinker.text.hidden_size
        self.head = nn.Linear(self.width, len(WORDS))  # how much a piece is like no word at all; thrown away afterwards

    def parameters(self):
        return {**super().parameters(), **{f"head.{n}": p for n, p in self.head.named_parameters()}}

    def likeness(self, features: Tensor, ids: Tensor | slice) -> Tensor:
        """Features [..., D] -> how alike they are to the words of some ids [..., words]."""
        return features @ self.omni.thinker.model.embed_tokens.weight[ids].T / self.width**0.5


class EarsStage(SenseStage):
    name, learns = "ears", ("thinker.audio_tower.",)
    about = "the audio encoder learns to point at the words it hears, by CTC (in place of Whisper's weights)"

    def batch(self, step):
        random = Random(f"{self.seed}-ears-{step}")
        texts = random.choices(self.teacher.spoken, k=self.recipe.batch)
        waves = [self.teacher.wave(Example("", "", voice="any", heard=t), random) for t in texts]
        encode = self.teacher.processor.tokenizer.encode
        return [log_mel(w) for w in waves], [torch.tensor(encode(t)) + 1 for t in texts]  # class 0 is blank

    def losses(self, batch):
        mels, words = batch
        log_probs, counts = self.log_probs(mels)
        return {"ctc": losses.ctc(log_probs, counts, words)}

    def log_probs(self, mels):
        """Word log-probabilities [B, T, 1 + words] of several clips, and their lengths [B]."""
        counts = torch.tensor([self.omni.thinker.audio_tower.token_count(m.shape[-1]) for m in mels])
        features = self.omni.thinker.audio_tower(mels)  # [sum of tokens, D]
        scores = torch.cat([self.head(features)[:, :1], self.likeness(features, slice(None))], -1).log_softmax(-1)
        return nn.utils.rnn.pad_sequence(scores.split(counts.tolist()), batch_first=True), counts

    def sample(self):
        log_probs, _ = self.log_probs([log_mel(self.teacher.speech.wave(len(self.teacher.speech) - 1))])
        heard = torch.unique_consecutive(log_probs[0].argmax(-1))
        return f"{self.teacher.spoken[-1]!r} -> {self.teacher.processor.tokenizer.decode((heard[heard > 0] - 1).tolist())!r}"


class EyesStage(SenseStage):
    name, learns = "eyes", ("thinker.visual.",)
    about = "the vision encoder learns to point at the words for what it sees (in place of Qwen2.5-VL's weights)"

    def __init__(self, *args):
        super().__init__(*args)
        encode = self.teacher.processor.tokenizer.encode
        self.ids = [torch.tensor([encode(f" {word}")[0] for word in words]) for words in WORDS]

    def batch(self, step):
        return self.draw(Random(f"{self.seed}-eyes-{step}"), self.recipe.batch)

    def draw(self, random, count):
        """Patches [N, patch_dim], grids and classes [N / 4, 3] of some pictures, one in four a handwritten digit."""
        vision, media = self.omni.config.thinker.vision, self.omni.config.media
        patches, grids, classes = [], [], []
        for i in range(count):
            example = world.handwriting(random, self.teacher.digits) if i % 4 == 0 else world.scene(random)
            rows, grid = image_patches(example.image, vision, media)
            patches.append(rows)
            grids.append(grid)
            classes.append(cell_classes(example, grid, vision))
        return torch.cat(patches), grids, torch.cat(classes)

    def scores(self, patches, grids) -> list[Tensor]:
        """For each way of naming: scores [cells, words + 1], the last for none of the words."""
        features = self.omni.thinker.visual(patches, grids)  # [cells, D]
        none = self.head(features)
        return [torch.cat([self.likeness(features, ids), none[:, i : i + 1]], -1) for i, ids in enumerate(self.ids)]

    def losses(self, batch):
        patches, grids, classes = batch
        scores = self.scores(patches, grids)
        return {name: losses.next_token(s[None], classes[None, :, i]) for i, (name, s) in enumerate(zip(("color", "shape", "digit"), scores))}

    def sample(self):
        patches, grids, classes = self.draw(Random(7), 32)
        named = torch.stack([s.argmax(-1) for s in self.scores(patches, grids)], -1)
        none = torch.tensor([len(words) for words in WORDS])
        full = (classes != losses.IGNORE).all(-1) & (classes != none).any(-1)
        return f"{(named[full] == classes[full]).all(-1).float().mean():.0%} of full cells named right"


def cell_classes(example: Example, grid, vision) -> Tensor:
    """What each merge cell of a picture holds -> [cells, 3] words of color, shape and digit.

    A cell holds the thing whose centre is in it; IGNORE where a thing only reaches in, the class behind the words for none.
    """
    rows, columns = (n // vision.spatial_merge_size for n in grid[1:])
    classes = torch.tensor([len(words) for words in WORDS]).repeat(rows, columns, 1)
    if not example.objects:
        classes[..., 2] = world.NUMBERS.index(example.answer.split()[-1])
    for _, _, (x, y), radius in example.objects:
        (left, right), (top, bottom) = ((int(max(0, v - radius) // vision.cell_size), int((v + radius) // vision.cell_size) + 1)
                                        for v in (x, y))
        classes[top:bottom, left:right] = losses.IGNORE
    for color, shape, (x, y), _ in example.objects:
        cell = classes[int(y // vision.cell_size), int(x // vision.cell_size)]
        cell[:] = torch.tensor([list(world.COLORS).index(color), world.SHAPES.index(shape), len(world.NUMBERS)])
    return classes.flatten(0, 1)
