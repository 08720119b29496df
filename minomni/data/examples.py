"""What the Thinker is taught: examples of every kind, and lessons (model inputs with targets) made
of them.
"""

from dataclasses import replace
from random import Random

import numpy as np
import torch

from minomni.config import IGNORE_INDEX, LISTENING_RATE
from minomni.data import grammar, scenes
from minomni.data.corpus import corpus, sampling_weights
from minomni.data.oracle_features import AUDIO_TOKENS_PER_SECOND
from minomni.data.scenes import Example
from minomni.data.vocabulary import english, world_tokenizer
from minomni.inputs.media import Clip
from minomni.inputs.prompt import Inputs, Processor, join

TRANSCRIBE = "write what you hear"
SHOWN = {
    "scene": [scenes.scene],
    "video": [scenes.moving_clip, scenes.ordered_clip],
    "sync": [scenes.clip_with_tone],
}
# questions about one picture, at most, each in a turn of its own: a picture costs more than a
# question
TURNS = 4
LONG_SECONDS = (
    3,
    10,
)  # of speech: what is learnt from longer ones in as many steps is worse, half a minute included


def conversation(example: Example, wave: torch.Tensor | None) -> list[dict]:
    """Messages of an example's question; `wave` is the recording where it is spoken."""
    content = []
    if example.image is not None:
        content.append({"type": "image", "image": example.image})
    if example.clip is not None:
        frames, seconds = example.clip
        sound = None if example.sound is None else torch.from_numpy(example.sound)
        content.append(
            {
                "type": "video",
                "video": Clip(torch.from_numpy(frames), torch.from_numpy(seconds), sound),
            }
        )
    if wave is not None:
        content.append({"type": "audio", "audio": wave})
    if wave is None or example.heard is not None:
        content.append({"type": "text", "text": example.question})
    return [{"role": "user", "content": content}]


def estimated_tokens(example: Example) -> int:
    """About how many tokens the media of an example take."""
    frames = 0 if example.clip is None else len(example.clip[0])
    return (
        20
        + 16 * (example.image is not None)
        + 5 * frames
        + 13 * frames * (example.sound is not None)
        + 50 * (example.voice is not None)
    )


class ExampleBuilder:
    """Makes examples of every kind, from trained or from held-out material, and turns them into
    model inputs.
    """

    def __init__(self, config, cache, held: bool = False):
        self.processor = Processor(config, world_tokenizer(config.thinker.tokens))
        self.held, self.digits = held, scenes.digits(held)
        self.english = english(config.thinker.tokens)
        self.words = [*grammar.WORDS, *self.english.trained]
        self.speech = corpus("test" if held else "listening", cache, self.english)
        self.spoken = [u.text for u in self.speech.utterances]
        # Kinds of sentences fairly, in training; in a test as they are.
        self.weights = (
            None if held else sampling_weights([text.removeprefix("say ") for text in self.spoken])
        )
        self.recorded = set(self.spoken)
        self.end = config.thinker.tokens.im_end

    def example(self, kind: str, random: Random) -> Example:
        """One example: `kind` is scene, handwriting, video, sync or say, with `-typed` or
        `-spoken`; or hear.

        say-long is typed and has two statements, say-words words without sense, which are learnt
        only by copying; hear-long and video-long last up to 10 and 60 seconds.
        """
        what, _, how = kind.partition("-")
        if kind == "hear-long":
            return self.dictation(random, random.uniform(*LONG_SECONDS))
        if kind == "say-long":
            return replace(self.say(grammar.long_statement(random, self.held)), kind=kind)
        if kind == "say-words":
            return replace(self.say(grammar.word_string(random, self.words)), kind=kind)
        if kind == "video-long":
            return replace(
                scenes.long_clip(random, random.randint(10, scenes.LONG_PAIRS)), kind=kind
            )
        if what == "hear":
            text = self.recorded_text(random)
            return Example(TRANSCRIBE, text, voice="any", heard=text, kind=kind)
        if what == "say":
            text = self._sayable(random, how)
            made = Example(f"say {text}", text)
        elif what == "handwriting":
            made = scenes.handwriting(random, self.digits)
        else:
            made = random.choice(SHOWN[what])(random)
        recorded = how == "spoken" and made.question in self.recorded
        return replace(made, voice="any" if recorded else None, kind=kind)

    def dictation(self, random: Random, seconds: float) -> Example:
        """Recordings one after the other, as many as fit into some seconds, to be written down."""
        waves, texts = [], []
        while True:
            text = self.recorded_text(random)
            wave = self.wave(Example("", "", voice="any", heard=text), random)
            if waves and sum(map(len, waves)) + len(wave) > seconds * LISTENING_RATE:
                said = " ".join(texts)
                return Example(
                    TRANSCRIBE,
                    said,
                    voice="any",
                    heard=said,
                    wave=torch.cat(waves),
                    kind="hear-long",
                )
            waves.append(wave)
            texts.append(text)

    def recorded_text(self, random: Random) -> str:
        """What one of the recordings says."""
        return random.choices(self.spoken, self.weights)[0]

    def _sayable(self, random, how):
        """A statement to repeat; spoken ones must have been recorded."""
        if how == "typed":
            return grammar.statement(random, self.held)
        while not (text := self.recorded_text(random)).startswith("say "):
            pass
        return text.removeprefix("say ")

    def wave(self, example: Example, random: Random) -> torch.Tensor | None:
        """The recording of an example's question (or what is to be written down), louder or noisier
        each time.
        """
        if example.voice is None or example.wave is not None:
            return example.wave
        wave = self.speech.wave(self.speech.find(example.heard or example.question, random))
        if self.held:
            return wave
        noise = np.random.RandomState(random.randrange(1 << 31)).randn(len(wave)).astype(np.float32)
        return wave * random.uniform(0.5, 1.2) + torch.from_numpy(noise) * random.choice(
            (0.0, 0.002, 0.006)
        )

    def conversation(self, example: Example, random: Random) -> list[dict]:
        """Messages of the question alone, spoken in some recording of it where it is spoken."""
        return conversation(example, self.wave(example, random))

    def prompt(self, example: Example, random: Random) -> Inputs:
        """Model inputs of the question alone."""
        return self.processor(
            [self.conversation(example, random)], use_audio_in_video=example.sound is not None
        )

    def say(self, text: str) -> Example:
        """The typed wish to hear a sentence."""
        return Example(f"say {text}", text)

    def dialogue(self, kind: str, random: Random) -> list[Example]:
        """A conversation: one example, and where its kind has more to ask, some of that in further
        turns.

        None in those of a kind that ends in -alone: there an earlier answer could give a later one
        away.
        """
        first = self.example(kind, random)
        turns = 1 if first.voice or kind.endswith("-alone") else TURNS
        more = random.sample(first.more, min(turns - 1, len(first.more)))
        later = [Example(question, answer, kind=first.kind) for question, answer in more]
        return [first, *later]

    def collate(self, talks: list[list[Example]], random: Random) -> tuple[Inputs, torch.Tensor]:
        """Inputs of conversations of some turns, and targets [B, L] that look at the answers, at
        every one.
        """
        rows, asked = [], []
        for examples in talks:
            parts = [self.prompt(example, random) for example in examples]
            row, wanted = parts[0], []
            for turn, (part, example) in enumerate(zip(parts, examples)):
                answer = self.processor.tokenizer.encode(example.answer) + [self.end]
                before = (
                    row.input_ids
                    if turn == 0
                    else torch.cat([row.input_ids, self._next_turn(part)], 1)
                )
                wanted += [IGNORE_INDEX] * (before.shape[1] - len(wanted) - 1) + answer
                row = append_turn(
                    row, part if turn else None, torch.cat([before, torch.tensor([answer])], 1)
                )
            rows.append(row)
            asked.append(torch.tensor(wanted + [IGNORE_INDEX]))
        inputs = join(rows, pad=self.processor.config.thinker.tokens.endoftext)
        targets = torch.full_like(inputs.input_ids, IGNORE_INDEX)
        for row, wanted in enumerate(asked):
            targets[row, -len(wanted) :] = wanted
        return inputs, targets

    def frame_targets(self, examples: list[Example], inputs: Inputs) -> torch.Tensor:
        """Targets [B, L] at the sound of clips: a word for what is seen just then, its color or its
        shape by chance.

        That is an answer at every 40 ms to what the question about the sound asks once. IGNORE_INDEX
        everywhere else.
        """
        tokens, encode = self.processor.config.thinker.tokens, self.processor.tokenizer.encode
        targets = torch.full_like(inputs.input_ids, IGNORE_INDEX)
        ids = inputs.input_ids
        opened = (ids[:, :-1] == tokens.vision_bos) & (ids[:, 1:] == tokens.audio_bos)  # [B, L - 1]
        sounding = [example for example in examples if example.sound is not None]
        for (row, begin), example in zip(opened.nonzero().tolist(), sounding):
            end = begin + int((ids[row, begin:] == tokens.audio_eos).nonzero()[0, 0])
            places = begin + (ids[row, begin:end] == tokens.audio).nonzero()[:, 0]  # [n]
            shown = torch.from_numpy(example.clip[1][::2].copy())  # when each grid step begins
            step = (
                torch.bucketize(
                    torch.arange(len(places)) / AUDIO_TOKENS_PER_SECOND, shown, right=True
                )
                - 1
            )  # [n]
            words = torch.tensor(
                [[encode(f" {word}")[0] for word in seen[0][:2]] for seen in example.objects]
            )
            targets[row, places] = words[step, torch.randint(2, step.shape)]
        return targets

    def _next_turn(self, prompt: Inputs) -> torch.Tensor:
        """Ids [1, n] of a prompt's own turn: without the system turn, the line end before it put in
        front.
        """
        start = (prompt.input_ids[0] == self.processor.config.thinker.tokens.im_start).nonzero()[1]
        return torch.cat(
            [torch.tensor(self.processor.tokenizer.encode("\n")), prompt.input_ids[0, start:]]
        )[None]


def append_answer(
    prompts: list[Inputs], answers: list[list[int]], pad: int
) -> tuple[Inputs, torch.Tensor]:
    """One batch of single prompts with their answers' ids behind them, and targets [B, L] that look
    at those alone.
    """
    rows = []
    for prompt, answer in zip(prompts, answers):
        ids = torch.cat([prompt.input_ids, torch.tensor([answer])], 1)
        rows.append(replace(prompt, input_ids=ids, attention_mask=torch.ones_like(ids)))
    inputs = join(rows, pad)
    targets = torch.full_like(inputs.input_ids, IGNORE_INDEX)
    for row, answer in enumerate(answers):
        targets[row, -len(answer) - 1 : -1] = torch.tensor(
            answer
        )  # position i predicts token i + 1
    return inputs, targets


def append_turn(row: Inputs, part: Inputs | None, input_ids: torch.Tensor) -> Inputs:
    """One row that goes on with the media of another; input_ids [1, L] are those of both."""
    media = row if part is None else join([row, part], pad=0)
    return replace(media, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
