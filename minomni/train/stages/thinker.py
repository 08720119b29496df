"""Stages that raise the Thinker: language, three steps of pre-training, ChatML tuning (paper, sec.
3 and 4.2).

The release starts from Qwen2.5's weights; here `language` takes their place: a decoder that has
read the world's sentences. The encoders' first lessons are in alignment.py; what all are taught
is in examples.py.
"""

from random import Random

import torch

from minomni.config import IGNORE_INDEX
from minomni.data.examples import ExampleBuilder, estimated_tokens
from minomni.data.oracle_features import oracle_embeds
from minomni.data.scenes import Example
from minomni.inputs.prompt import Inputs
from minomni.train import losses
from minomni.train.loop import Stage

PARTS = 2  # of a batch, so that short questions are not padded to the length of long clips
PICTURES, CLIPS = (
    0.25,
    0.45,
)  # of the steps of `language`: until the first pictures alone, until the second mostly clips
MOMENTS = 0.5  # weight of the loss on what is seen while a clip sounds


class ThinkerStage(Stage):
    """A mixture of kinds of examples and next-token loss on the answers."""

    mixture: dict[str, float] = {}
    fixed = ("say-typed",)  # kinds of the prompts sampled as it learns

    def __init__(self, *args):
        super().__init__(*args)
        self.teacher = ExampleBuilder(self.omni.config, self.cache)

    def batch(self, number):
        """Parts of a batch: examples of conversations of about equal length, with inputs, targets
        and moments.
        """
        random = Random(f"{self.seed}-{self.name}-{number}")
        mixture = self.mixture_at(number)
        kinds = random.choices(list(mixture), weights=list(mixture.values()), k=self.recipe.batch)
        talks = sorted(
            (self.dialogue(kind, random) for kind in kinds),
            key=lambda talk: sum(map(estimated_tokens, talk)),
        )
        size = -(-len(talks) // PARTS)
        parts = [talks[i : i + size] for i in range(0, len(talks), size)]
        return [(sum(part, []), *self.teacher.collate(part, random)) for part in parts]

    def mixture_at(self, number: int) -> dict[str, float]:
        """The mixture from which a batch is drawn."""
        return self.mixture

    def dialogue(self, kind: str, random: Random) -> list[Example]:
        """One conversation of a batch."""
        return self.teacher.dialogue(kind, random)

    def losses(self, batch):
        answers, seen = [], []
        for examples, inputs, targets in batch:
            logits, moments = (
                self.logits(examples, inputs),
                self.teacher.frame_targets(examples, inputs),
            )
            answers.append((logits, targets))
            seen += [(logits, moments)] if (moments != IGNORE_INDEX).any() else []
        text = {"text": losses.in_parts(answers)}
        return text | {"moments": MOMENTS * losses.in_parts(seen)} if seen else text

    def logits(self, examples: list[Example], inputs: Inputs) -> torch.Tensor:
        """What the Thinker expects after each position [B, L, V]."""
        return self.omni.thinker(inputs)

    def sample(self):
        random, shown = Random(7), []
        for kind in self.fixed:
            example = self.teacher.example(kind, random)
            reply = self.omni.thinker.generate(
                self.teacher.prompt(example, random), self.omni.config.thinker_sampling
            )
            text = self.teacher.processor.tokenizer.decode(reply.tokens[0], skip_special=True)
            shown.append(f"{example.answer!r} -> {text!r}")
        return "; ".join(shown)


class LanguageStage(ThinkerStage):
    """The table of words stays as it was drawn, so that ears and eyes can be taught to point at it
    meanwhile.
    """

    name, learns = "language", ("thinker.model.layers.", "thinker.model.norm.", "thinker.lm_head.")
    about = "the decoder reads of the world, senses imagined as words in their places (in place of Qwen2.5's weights)"
    data = "sentences and questions, typed and imagined as heard or seen"
    mixture = {
        "hear": 1.5,
        "say-typed": 1.5,
        "say-long": 1,
        "say-words": 3,
        "say-spoken": 1,
        "scene-typed": 3,
        "scene-spoken": 1,
        "handwriting-typed": 0.3,
        "handwriting-spoken": 0.2,
        "video-typed": 4,
        "video-spoken": 0.5,
        "sync-typed": 6,
    }
    fixed = ("scene-typed", "say-typed")

    def mixture_at(self, number):
        """Pictures alone, then clips with some pictures, then everything.

        In a mixture, which thing has which color is not learnt at all, and what came first is a
        matter of luck.
        """
        progress = number / (self.recipe.steps * self.recipe.accumulate)
        if progress < PICTURES:
            return {"scene-alone": 1}
        return (
            {"sync-typed": 3, "video-typed": 2, "scene-typed": 1}
            if progress < CLIPS
            else self.mixture
        )

    def logits(self, examples, inputs):
        thinker, encode = self.omni.thinker, self.teacher.processor.tokenizer.encode
        embeds = oracle_embeds(examples, inputs, thinker, encode)
        positions = thinker.position_ids(inputs, thinker.config).to(self.device)
        hidden = thinker.model(embeds, positions, inputs.attention_mask.to(self.device))
        return thinker.lm_head(hidden)


class Thinker1Stage(ThinkerStage):
    name, needs, learns = (
        "thinker1",
        ("language", "audio_align", "vision_align"),
        ("thinker.audio_tower.", "thinker.visual."),
    )
    about = "pre-training 1: the decoder is locked, the encoders learn to speak its language"
    data = "sound to write down, typed questions about pictures, digits and clips"
    mixture = {"hear": 3, "scene-typed": 4, "handwriting-typed": 1, "video-typed": 1}
    fixed = ("hear", "scene-typed")


class Thinker2Stage(ThinkerStage):
    name, needs, learns = (
        "thinker2",
        ("language", "audio_align", "vision_align", "thinker1"),
        ("thinker.",),
    )
    about = "pre-training 2: everything unlocked, all kinds of input"
    data = "the same, sentences to say, and clips with sound"
    mixture = {
        "hear": 2.5,
        "say-typed": 1,
        "say-long": 1,
        "say-words": 1,
        "scene-typed": 4,
        "handwriting-typed": 1,
        "video-typed": 3,
        "sync-typed": 5,
    }
    fixed = ("hear", "scene-typed", "video-typed", "sync-typed")


class Thinker3Stage(ThinkerStage):
    name, needs, learns = (
        "thinker3",
        ("language", "audio_align", "vision_align", "thinker1", "thinker2"),
        ("thinker.",),
    )
    about = "pre-training 3: longer sequences: sentences in a row, a minute of pictures, three things in one talk"
    data = "speech of 3 to 10 s to write down, clips of 10 to 60 s, and three of the things before in a conversation"
    mixture = {**Thinker2Stage.mixture, "hear-long": 6, "video-long": 6}
    fixed = ("hear-long", "video-long")

    def dialogue(self, kind, random):
        if kind.endswith("-long"):
            return [self.teacher.example(kind, random)]
        others = [name for name in self.mixture if not name.endswith("-long")]
        return [self.teacher.example(name, random) for name in (kind, *random.choices(others, k=2))]


class ChatStage(ThinkerStage):
    name, needs, learns = (
        "chat",
        ("language", "audio_align", "vision_align", "thinker1", "thinker2", "thinker3"),
        ("thinker.",),
    )
    about = "ChatML tuning: questions typed and spoken, about all that can be seen and heard"
    data = "wishes and questions, typed and spoken, about all kinds of input"
    mixture = {
        "hear": 2,
        "say-typed": 1.5,
        "say-long": 1.5,
        "say-words": 1,
        "say-spoken": 4,
        "scene-typed": 3,
        "scene-spoken": 3.5,
        "handwriting-typed": 0.5,
        "handwriting-spoken": 0.5,
        "video-typed": 1,
        "video-spoken": 2,
        "sync-typed": 3,
    }
    fixed = ("say-spoken", "scene-spoken", "video-spoken", "sync-typed")
