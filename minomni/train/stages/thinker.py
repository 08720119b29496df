"""The Thinker's stages: language, three pre-training stages, ChatML tuning (paper, sec. 3 and 4.2).

The release starts from Qwen2.5's weights. Stage `language` replaces them with a decoder that is
trained on the generated world's sentences. The encoders' first stages are audio_align.py and
vision_align.py; the examples are in data/examples.py.
"""

from dataclasses import dataclass
from math import ceil
from random import Random

from torch import Tensor

from minomni.data.batching import batched
from minomni.data.examples import ExampleBuilder, estimated_tokens
from minomni.data.oracle_features import oracle_embeds
from minomni.data.scenes import Example
from minomni.inputs.prompt import Inputs
from minomni.train import losses
from minomni.train.loop import Stage

# Parts of a batch, so that short prompts are not padded to the length of long videos.
BATCH_PARTS = 2
# Stage `language` sees only images until the first fraction of its steps, and mostly videos until
# the second.
IMAGES_UNTIL = 0.25
VIDEOS_UNTIL = 0.45
# Kinds of the later turns of a conversation that are not about what its first turn shows.
LATER_KINDS = ("hear", "say-spoken", "say-typed", "scene-typed", "scene-spoken")
MAX_LATER_TURNS = 2  # of each sort: about what the first turn shows, and of other kinds
FRAME_WEIGHT = 0.5  # weight of the loss on the object that is visible at each audio token

Row = tuple[list[Example], int]  # the turns of a dialogue, and the seed of what varies them


@dataclass
class Part:
    """Dialogues of similar length, as a batch for the Thinker."""

    dialogues: list[list[Example]]
    inputs: Inputs
    targets: Tensor  # [B, L] the answers; IGNORE_INDEX elsewhere
    # [B, L] what is visible at audio tokens; None where the batch has no clip with audio
    frame_targets: Tensor | None
    seeds: list[int]  # [B]


class ThinkerStage(Stage):
    """Next-token loss on the answers to a mixture of kinds of examples."""

    mixture: dict[str, float] = {}  # kinds of examples with sampling weights
    fixed: tuple[str, ...] = ("say-typed",)  # kinds of the prompts in previews

    def setup(self) -> None:
        """Read what the examples are made of."""
        super().setup()
        self.builder = ExampleBuilder(self.omni.config, self.cache)

    def whole_batch(self, number: int) -> tuple[list[Row], bool]:
        """Dialogues, sorted by length, and whether there is a clip with audio among them."""
        random = Random(f"{self.seed}-{self.name}-{number}")
        mixture = self.mixture_at(number)
        kinds = random.choices(list(mixture), weights=list(mixture.values()), k=self.recipe.batch)
        dialogues = [self.dialogue(kind, random) for kind in kinds]
        dialogues.sort(key=lambda dialogue: sum(map(estimated_tokens, dialogue)))
        with_audio = any(example.sound is not None for row in dialogues for example in row)
        return [(dialogue, random.getrandbits(32)) for dialogue in dialogues], with_audio

    def collate(self, batch: tuple[list[Row], bool]) -> list[Part]:
        """Dialogues in BATCH_PARTS parts, each of dialogues of similar length."""
        rows, with_audio = batch
        parts = []
        for part in batched(rows, ceil(len(rows) / BATCH_PARTS)):
            dialogues = [dialogue for dialogue, _ in part]
            seeds = [seed for _, seed in part]
            randoms = [Random(seed) for seed in seeds]
            inputs, targets = self.builder.collate(dialogues, randoms)
            frames = self.builder.frame_targets(dialogues, inputs, randoms) if with_audio else None
            parts.append(Part(dialogues, inputs, targets, frames, seeds))
        return parts

    def mixture_at(self, number: int) -> dict[str, float]:
        """The mixture from which batch `number` is sampled."""
        return self.mixture

    def dialogue(self, kind: str, random: Random) -> list[Example]:
        """One dialogue of a batch, as examples for its turns."""
        return self.builder.dialogue(kind, random)

    def losses(self, batch: list[Part]) -> dict[str, Tensor]:
        text_parts = []
        frame_parts = []
        for part in batch:
            logits = self.logits(part)
            text_parts.append((logits, part.targets))
            if part.frame_targets is not None:
                frame_parts.append((logits, part.frame_targets))
        result = {"text": losses.in_parts(text_parts)}
        if frame_parts:
            result["frames"] = FRAME_WEIGHT * losses.in_parts(frame_parts)
        return result

    def logits(self, part: Part) -> Tensor:
        """The Thinker's next-token logits [B, L, V]."""
        return self.omni.thinker(part.inputs)

    def preview_text(self) -> str:
        random = Random(7)
        tokenizer = self.builder.processor.tokenizer
        lines = []
        for kind in self.fixed:
            example = self.builder.example(kind, random)
            prompt = self.builder.prompt(example, random)
            reply = self.omni.thinker.generate(prompt, self.omni.config.thinker_sampling)
            text = tokenizer.decode(reply.tokens[0], skip_special=True)
            lines.append(f"{example.answer!r} -> {text!r}")
        return "; ".join(lines)


class LanguageStage(ThinkerStage):
    """The decoder alone, with oracle features instead of the encoders' outputs.

    The embeddings keep their random values, because the encoders are aligned with them meanwhile.
    """

    name = "language"
    trainable = ("thinker.model.layers.", "thinker.model.norm.", "thinker.lm_head.")
    description = (
        "the decoder learns the world's sentences, with word embeddings as media features "
        "(instead of Qwen2.5's weights)"
    )
    data = "sentences and questions, typed, and media as oracle features"
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

    def mixture_at(self, number: int) -> dict[str, float]:
        """Only images, then mostly videos with some images, then everything.

        From a mixture alone, the model never learns which object has which color, and learns the
        order of events only with some seeds.
        """
        progress = number / (self.recipe.steps * self.recipe.accumulate)
        if progress < IMAGES_UNTIL:
            return {"scene-alone": 1}
        if progress < VIDEOS_UNTIL:
            return {"sync-typed": 3, "video-typed": 2, "scene-typed": 1}
        return self.mixture

    def logits(self, part: Part) -> Tensor:
        thinker = self.omni.thinker
        inputs = part.inputs
        encode = self.builder.processor.tokenizer.encode
        embeds = oracle_embeds(part.dialogues, inputs, part.seeds, thinker, encode)
        position_ids = thinker.position_ids(inputs, thinker.config).to(self.device)
        hidden = thinker.model(embeds, position_ids, inputs.attention_mask.to(self.device))
        return thinker.lm_head(hidden)


class Thinker1Stage(ThinkerStage):
    """Pre-training 1: the encoders, with a frozen decoder."""

    name = "thinker1"
    needs = ("language", "audio_align", "vision_align")
    trainable = ("thinker.audio_tower.", "thinker.visual.")
    description = "pre-training 1: the decoder is frozen, the encoders adapt to it"
    data = "audio to transcribe, typed questions about images, digits and videos"
    mixture = {"hear": 3, "scene-typed": 4, "handwriting-typed": 1, "video-typed": 1}
    fixed = ("hear", "scene-typed")


class Thinker2Stage(ThinkerStage):
    """Pre-training 2: all parameters."""

    name = "thinker2"
    needs = ("language", "audio_align", "vision_align", "thinker1")
    trainable = ("thinker.",)
    description = "pre-training 2: all parameters, all kinds of input"
    data = "the same, sentences to say, and videos with audio"
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
    """Pre-training 3: longer sequences."""

    name = "thinker3"
    needs = ("language", "audio_align", "vision_align", "thinker1", "thinker2")
    trainable = ("thinker.",)
    description = (
        "pre-training 3: longer sequences: several sentences, a minute of video, three examples in "
        "one dialogue"
    )
    data = (
        "speech of 3 to 10 s to transcribe, videos of 10 to 60 s, and dialogues of three earlier "
        "examples"
    )
    mixture = {**Thinker2Stage.mixture, "hear-long": 6, "video-long": 6}
    fixed = ("hear-long", "video-long")

    def dialogue(self, kind: str, random: Random) -> list[Example]:
        if kind.endswith("-long"):
            return [self.builder.example(kind, random)]
        short_kinds = [name for name in self.mixture if not name.endswith("-long")]
        kinds = [kind, *random.choices(short_kinds, k=2)]
        return [self.builder.example(name, random) for name in kinds]


class ChatStage(ThinkerStage):
    """ChatML tuning: typed and spoken requests about all kinds of input."""

    name = "chat"
    needs = ("language", "audio_align", "vision_align", "thinker1", "thinker2", "thinker3")
    trainable = ("thinker.",)
    description = "ChatML tuning: typed and spoken questions about all kinds of input"
    data = "requests and questions, typed and spoken, about all kinds of input"
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

    def dialogue(self, kind: str, random: Random) -> list[Example]:
        """Half of the dialogues without a clip are conversations: further questions about what is
        shown, then requests of other kinds, each typed or spoken.
        """
        examples = super().dialogue(kind, random)
        first = examples[0]
        if first.clip is not None or random.random() < 0.5:
            return examples

        count = min(MAX_LATER_TURNS, len(first.follow_ups))
        about_first = [
            Example(question, answer, kind=first.kind)
            for question, answer in random.sample(first.follow_ups, count)
        ]
        about_first = [
            self.builder.with_voice(example) if random.random() < 0.5 else example
            for example in about_first
        ]
        kinds = random.choices(LATER_KINDS, k=random.randint(1, MAX_LATER_TURNS))
        others = [self.builder.example(name, random) for name in kinds]
        return [first, *about_first, *others]
