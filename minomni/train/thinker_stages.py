"""Stages that raise the Thinker: language, three steps of pre-training, ChatML tuning (paper, sec. 3 and 4.2).

The release starts from Qwen2.5's weights; here `language` takes their place: a decoder that has read the world's
sentences. The encoders' first lessons are in sense_stages.py.
"""

from dataclasses import replace
from random import Random

import numpy as np
import torch

from ..config import LISTENING_RATE
from ..inputs.media import Clip
from ..inputs.prompt import Inputs, Processor, join
from . import losses, world
from .imagination import AUDIO_TOKENS_PER_SECOND, imagine
from .loop import Stage
from .speech import corpus
from .vocabulary import world_tokenizer
from .world import Example

TRANSCRIBE = "write what you hear"
SHOWN = {"scene": [world.scene], "video": [world.moving, world.ordered], "sync": [world.sounding]}
TURNS = 4  # questions about one picture, at most, each in a turn of its own: a picture costs more than a question
PARTS = 2  # of a batch, so that short questions are not padded to the length of long clips
LONG_SECONDS = 3, 10  # of speech: what is learnt from longer ones in as many steps is worse, half a minute included
ALONE = 0.3  # of the steps of `language` that show pictures and nothing else
MOMENTS = 0.5  # weight of the loss on what is seen while a clip sounds


def conversation(example: Example, wave: torch.Tensor | None) -> list[dict]:
    """Messages of an example's question; `wave` is the recording where it is spoken."""
    content = []
    if example.image is not None:
        content.append({"type": "image", "image": example.image})
    if example.clip is not None:
        frames, seconds = example.clip
        sound = None if example.sound is None else torch.from_numpy(example.sound)
        content.append({"type": "video", "video": Clip(torch.from_numpy(frames), torch.from_numpy(seconds), sound)})
    if wave is not None:
        content.append({"type": "audio", "audio": wave})
    if wave is None or example.heard is not None:
        content.append({"type": "text", "text": example.question})
    return [{"role": "user", "content": content}]


def about_tokens(example: Example) -> int:
    """About how many tokens the media of an example take."""
    frames = 0 if example.clip is None else len(example.clip[0])
    return 20 + 16 * (example.image is not None) + 5 * frames + 13 * frames * (example.sound is not None) + 50 * (
        example.voice is not None
    )


class Teacher:
    """Makes examples of every kind, from trained or from held-out material, and turns them into model inputs."""

    def __init__(self, config, cache, held: bool = False):
        self.processor = Processor(config, world_tokenizer(config.thinker.tokens))
        self.held, self.digits = held, world.digits(held)
        self.speech = corpus("test" if held else "listening", cache)
        self.spoken = [u.text for u in self.speech.utterances]
        self.recorded = set(self.spoken)
        self.end = config.thinker.tokens.im_end

    def example(self, kind: str, random: Random) -> Example:
        """One example: `kind` is scene, handwriting, video, sync or say, with `-typed` or `-spoken`; or hear.

        say-long is typed and has two statements, say-words words without sense, which are learnt only by copying;
        hear-long and video-long last up to 10 and 60 seconds.
        """
        what, _, how = kind.partition("-")
        if kind == "hear-long":
            return self.dictation(random, random.uniform(*LONG_SECONDS))
        if kind == "say-long":
            return replace(self.say(world.long_statement(random, self.held)), kind=kind)
        if kind == "say-words":
            return replace(self.say(world.word_string(random)), kind=kind)
        if kind == "video-long":
            return replace(world.long_clip(random, random.randint(10, world.LONG_PAIRS)), kind=kind)
        if what == "hear":
            text = random.choice(self.spoken)
            return Example(TRANSCRIBE, text, voice="any", heard=text, kind=kind)
        if what == "say":
            text = self._sayable(random, spoken=how == "spoken")
            made = Example(f"say {text}", text)
        elif what == "handwriting":
            made = world.handwriting(random, self.digits)
        else:
            made = random.choice(SHOWN[what])(random)
        recorded = how == "spoken" and made.question in self.recorded
        return replace(made, voice="any" if recorded else None, kind=kind)

    def dictation(self, random: Random, seconds: float) -> Example:
        """Recordings one after the other, as many as fit into some seconds, to be written down."""
        waves, texts = [], []
        while True:
            text = random.choice(self.spoken)
            wave = self.wave(Example("", "", voice="any", heard=text), random)
            if waves and sum(map(len, waves)) + len(wave) > seconds * LISTENING_RATE:
                said = " ".join(texts)
                return Example(TRANSCRIBE, said, voice="any", heard=said, wave=torch.cat(waves), kind="hear-long")
            waves.append(wave)
            texts.append(text)

    def _sayable(self, random, spoken):
        """A statement to repeat; spoken ones must have been recorded."""
        if not spoken:
            return world.statement(random, self.held)
        return random.choice([t for t in self.spoken if t.startswith("say ")])[4:]

    def wave(self, example: Example, random: Random) -> torch.Tensor | None:
        """The recording of an example's question (or what is to be written down), louder or noisier each time."""
        if example.voice is None or example.wave is not None:
            return example.wave
        wave = self.speech.wave(self.speech.find(example.heard or example.question, random))
        if self.held:
            return wave
        noise = np.random.RandomState(random.randrange(1 << 31)).randn(len(wave)).astype(np.float32)
        return wave * random.uniform(0.5, 1.2) + torch.from_numpy(noise) * random.choice((0.0, 0.002, 0.006))

    def conversation(self, example: Example, random: Random) -> list[dict]:
        """Messages of the question alone, spoken in some recording of it where it is spoken."""
        return conversation(example, self.wave(example, random))

    def prompt(self, example: Example, random: Random) -> Inputs:
        """Model inputs of the question alone."""
        return self.processor([self.conversation(example, random)], use_audio_in_video=example.sound is not None)

    def say(self, text: str) -> Example:
        """The typed wish to hear a sentence."""
        return Example(f"say {text}", text)

    def talk(self, kind: str, random: Random) -> list[Example]:
        """A conversation: one example, and where its kind has more to ask, some of that in further turns.

        None in those of a kind that ends in -alone: there an earlier answer could give a later one away.
        """
        first = self.example(kind, random)
        turns = 1 if first.voice or kind.endswith("-alone") else TURNS
        more = random.sample(first.more, min(turns - 1, len(first.more)))
        later = [Example(question, answer, kind=first.kind) for question, answer in more]
        return [first, *later]

    def lesson(self, talks: list[list[Example]], random: Random) -> tuple[Inputs, torch.Tensor]:
        """Inputs of conversations of some turns, and targets [B, L] that look at the answers, at every one."""
        rows, asked = [], []
        for examples in talks:
            parts = [self.prompt(example, random) for example in examples]
            row, wanted = parts[0], []
            for turn, (part, example) in enumerate(zip(parts, examples)):
                answer = self.processor.tokenizer.encode(example.answer) + [self.end]
                before = row.input_ids if turn == 0 else torch.cat([row.input_ids, self._next_turn(part)], 1)
                wanted += [losses.IGNORE] * (before.shape[1] - len(wanted) - 1) + answer
                row = follow(row, part if turn else None, torch.cat([before, torch.tensor([answer])], 1))
            rows.append(row)
            asked.append(torch.tensor(wanted + [losses.IGNORE]))
        inputs = join(rows, pad=self.processor.config.thinker.tokens.endoftext)
        targets = torch.full_like(inputs.input_ids, losses.IGNORE)
        for row, wanted in enumerate(asked):
            targets[row, -len(wanted) :] = wanted
        return inputs, targets

    def moments(self, examples: list[Example], inputs: Inputs) -> torch.Tensor:
        """Targets [B, L] at the sound of clips: a word for what is seen just then, its color or its shape by chance.

        That is an answer at every 40 ms to what the question about the sound asks once. IGNORE everywhere else.
        """
        tokens, encode = self.processor.config.thinker.tokens, self.processor.tokenizer.encode
        targets = torch.full_like(inputs.input_ids, losses.IGNORE)
        ids = inputs.input_ids
        opened = (ids[:, :-1] == tokens.vision_bos) & (ids[:, 1:] == tokens.audio_bos)  # [B, L - 1]
        sounding = [example for example in examples if example.sound is not None]
        for (row, begin), example in zip(opened.nonzero().tolist(), sounding):
            end = begin + int((ids[row, begin:] == tokens.audio_eos).nonzero()[0, 0])
            places = begin + (ids[row, begin:end] == tokens.audio).nonzero()[:, 0]  # [n]
            shown = torch.from_numpy(example.clip[1][::2].copy())  # when each grid step begins
            step = torch.bucketize(torch.arange(len(places)) / AUDIO_TOKENS_PER_SECOND, shown, right=True) - 1  # [n]
            words = torch.tensor([[encode(f" {word}")[0] for word in seen[0][:2]] for seen in example.objects])
            targets[row, places] = words[step, torch.randint(2, step.shape)]
        return targets

    def _next_turn(self, prompt: Inputs) -> torch.Tensor:
        """Ids [1, n] of a prompt's own turn: without the system turn, the line end before it put in front."""
        start = (prompt.input_ids[0] == self.processor.config.thinker.tokens.im_start).nonzero()[1]
        return torch.cat([torch.tensor(self.processor.tokenizer.encode("\n")), prompt.input_ids[0, start:]])[None]


def answered(prompts: list[Inputs], answers: list[list[int]], pad: int) -> tuple[Inputs, torch.Tensor]:
    """One batch of single prompts with their answers' ids behind them, and targets [B, L] that look at those alone."""
    rows = []
    for prompt, answer in zip(prompts, answers):
        ids = torch.cat([prompt.input_ids, torch.tensor([answer])], 1)
        rows.append(replace(prompt, input_ids=ids, attention_mask=torch.ones_like(ids)))
    inputs = join(rows, pad)
    targets = torch.full_like(inputs.input_ids, losses.IGNORE)
    for row, answer in enumerate(answers):
        targets[row, -len(answer) - 1 : -1] = torch.tensor(answer)  # position i predicts token i + 1
    return inputs, targets


def follow(row: Inputs, part: Inputs | None, input_ids: torch.Tensor) -> Inputs:
    """One row that goes on with the media of another; input_ids [1, L] are those of both."""
    media = row if part is None else join([row, part], pad=0)
    return replace(media, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))


class ThinkerStage(Stage):
    """A mixture of kinds of examples and next-token loss on the answers."""

    mixture: dict[str, float] = {}
    fixed = ("say-typed",)  # kinds of the prompts sampled as it learns

    def __init__(self, *args):
        super().__init__(*args)
        self.teacher = Teacher(self.omni.config, self.cache)

    def batch(self, number):
        """Parts of a batch: examples of conversations of about equal length, with inputs, targets and moments."""
        random = Random(f"{self.seed}-{self.name}-{number}")
        mixture = self.mixture_at(number)
        kinds = random.choices(list(mixture), weights=list(mixture.values()), k=self.recipe.batch)
        talks = sorted((self.talk(kind, random) for kind in kinds), key=lambda talk: sum(map(about_tokens, talk)))
        size = -(-len(talks) // PARTS)
        parts = [talks[i : i + size] for i in range(0, len(talks), size)]
        return [(sum(part, []), *self.teacher.lesson(part, random)) for part in parts]

    def mixture_at(self, number: int) -> dict[str, float]:
        """The mixture from which a batch is drawn."""
        return self.mixture

    def talk(self, kind: str, random: Random) -> list[Example]:
        """One conversation of a batch."""
        return self.teacher.talk(kind, random)

    def losses(self, batch):
        answers, seen = [], []
        for examples, inputs, targets in batch:
            logits, moments = self.logits(examples, inputs), self.teacher.moments(examples, inputs)
            answers.append((logits, targets))
            seen += [(logits, moments)] if (moments != losses.IGNORE).any() else []
        text = {"text": losses.in_parts(answers)}
        return text | {"moments": MOMENTS * losses.in_parts(seen)} if seen else text

    def logits(self, examples: list[Example], inputs: Inputs) -> torch.Tensor:
        """What the Thinker expects after each position [B, L, V]."""
        return self.omni.thinker(inputs)

    def sample(self):
        random, shown = Random(7), []
        for kind in self.fixed:
            example = self.teacher.example(kind, random)
            reply = self.omni.thinker.generate(self.teacher.prompt(example, random), self.omni.config.thinker_sampling)
            text = self.teacher.processor.tokenizer.decode(reply.tokens[0], skip_special=True)
            shown.append(f"{example.answer!r} -> {text!r}")
        return "; ".join(shown)


class LanguageStage(ThinkerStage):
    """The table of words stays as it was drawn, so that ears and eyes can be taught to point at it meanwhile."""

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
        """Pictures alone at first: among everything else, which thing has which color is not learnt at all."""
        return {"scene-alone": 1} if number < ALONE * self.recipe.steps * self.recipe.accumulate else self.mixture

    def logits(self, examples, inputs):
        thinker, encode = self.omni.thinker, self.teacher.processor.tokenizer.encode
        embeds = imagine(examples, inputs, thinker, encode)
        positions = thinker.position_ids(inputs, thinker.config).to(self.device)
        hidden = thinker.model(embeds, positions, inputs.attention_mask.to(self.device))
        return thinker.lm_head(hidden)


class Thinker1Stage(ThinkerStage):
    name, needs, learns = "thinker1", ("language", "ears", "eyes"), ("thinker.audio_tower.", "thinker.visual.")
    about = "pre-training 1: the decoder is locked, the encoders learn to speak its language"
    data = "sound to write down, typed questions about pictures, digits and clips"
    mixture = {"hear": 3, "scene-typed": 4, "handwriting-typed": 1, "video-typed": 1}
    fixed = ("hear", "scene-typed")


class Thinker2Stage(ThinkerStage):
    name, needs, learns = "thinker2", ("language", "ears", "eyes", "thinker1"), ("thinker.",)
    about = "pre-training 2: everything unlocked, all kinds of input"
    data = "the same, sentences to say, and clips with sound"
    mixture = {
        "hear": 2,
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
    name, needs, learns = "thinker3", ("language", "ears", "eyes", "thinker1", "thinker2"), ("thinker.",)
    about = "pre-training 3: longer sequences: sentences in a row, a minute of pictures, three things in one talk"
    data = "speech of 3 to 10 s to write down, clips of 10 to 60 s, and three of the things before in a conversation"
    mixture = {**Thinker2Stage.mixture, "hear-long": 6, "video-long": 6}
    fixed = ("hear-long", "video-long")

    def talk(self, kind, random):
        if kind.endswith("-long"):
            return [self.teacher.example(kind, random)]
        others = [name for name in self.mixture if not name.endswith("-long")]
        return [self.teacher.example(name, random) for name in (kind, *random.choices(others, k=2))]


class ChatStage(ThinkerStage):
    name, needs, learns = "chat", ("language", "ears", "eyes", "thinker1", "thinker2", "thinker3"), ("thinker.",)
    about = "ChatML tuning: questions typed and spoken, about all that can be seen and heard"
    data = "wishes and questions, typed and spoken, about all kinds of input"
    mixture = {
        "hear": 1,
        "say-typed": 3,
        "say-long": 2,
        "say-words": 2,
        "say-spoken": 2,
        "scene-typed": 3,
        "scene-spoken": 3,
        "handwriting-typed": 0.5,
        "handwriting-spoken": 0.5,
        "video-typed": 1,
        "video-spoken": 0.7,
        "sync-typed": 3,
    }
    fixed = ("say-spoken", "scene-spoken", "video-spoken", "sync-typed")
