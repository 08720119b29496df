"""Training examples of every kind for the Thinker, and batches of model inputs with targets."""

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minomni.config import IGNORE_INDEX, INPUT_SAMPLE_RATE, OmniConfig
from minomni.data import grammar, scenes
from minomni.data.corpus import corpus, sampling_weights
from minomni.data.grammar import TRANSCRIBE
from minomni.data.scenes import Example
from minomni.data.vocabulary import english, world_tokenizer
from minomni.inputs.audio import TOKENS_PER_S
from minomni.inputs.media import Clip
from minomni.inputs.prompt import Inputs, Processor, collate

GENERATORS = {
    "scene": [scenes.random_scene],
    "video": [scenes.moving_clip, scenes.ordered_clip],
    "sync": [scenes.clip_with_tone],
}
# At most this many questions about one image, each in a turn of its own: encoding an image
# costs more than another question.
MAX_TURNS = 4
# Seconds of speech in a long dictation. Longer ones (up to 30 s) learn less in as many steps.
LONG_SECONDS = (3, 10)
NOISE_LEVELS = (0.0, 0.002, 0.006)  # standard deviations, full scale is 1
# Seconds of silence before and after a recording in training, at most: a microphone is open before
# the speaker begins. Half of the recordings have none.
MAX_SILENCE_BEFORE = 0.5
MAX_SILENCE_AFTER = 0.25


def estimated_tokens(example: Example) -> int:
    """Rough number of tokens in an example, to sort batches by length."""
    tokens = 20
    if example.image is not None:
        tokens += 16
    if example.clip is not None:
        frames = len(example.clip[0])
        tokens += 5 * frames
        if example.sound is not None:
            tokens += 13 * frames
    if example.voice is not None:
        tokens += 50
    return tokens


class ExampleBuilder:
    """Makes examples of every kind from training or held-out data, and model inputs from them."""

    def __init__(self, config: OmniConfig, cache: Path, held_out: bool = False):
        """held_out: draw from the held-out set. cache: folder of the synthesized corpora."""
        self.processor = Processor(config, world_tokenizer(config.thinker.tokens))
        self.held_out = held_out
        self.digits = scenes.handwritten_digits(held_out)
        self.english = english(config.thinker.tokens)
        self.words = [*grammar.WORDS, *self.english.trained]
        self.speech = corpus("test" if held_out else "listening", cache, self.english)
        self.spoken = [u.text for u in self.speech.utterances]
        self.recorded = set(self.spoken)
        # Training balances the kinds of sentences; evaluation draws uniformly.
        self.weights = None
        if not held_out:
            self.weights = sampling_weights([text.removeprefix("say ") for text in self.spoken])
        self.end = config.thinker.tokens.im_end

    def example(self, kind: str, random: Random) -> Example:
        """One example: `kind` is scene, handwriting, video, sync or say, with `-typed` or
        `-spoken`; or hear.

        say-long is typed and has two statements. say-words has random words, which can only be
        learned by copying. hear-long and video-long last up to 10 and 60 seconds.
        """
        task, _, variant = kind.partition("-")
        if kind == "hear-long":
            return self.dictation(random, random.uniform(*LONG_SECONDS))
        if task == "hear":
            text = self.recorded_text(random)
            return Example(TRANSCRIBE, text, voice="any", transcript=text, kind=kind)
        example = replace(self._typed_example(kind, random), kind=kind)
        return self.with_voice(example) if variant == "spoken" else example

    def with_voice(self, example: Example) -> Example:
        """The same example with a spoken question, if there is a recording of it."""
        return replace(example, voice="any") if example.question in self.recorded else example

    def _typed_example(self, kind: str, random: Random) -> Example:
        """An example whose question is typed, of any kind but hear."""
        task, _, variant = kind.partition("-")
        if kind == "say-long":
            return self.say(grammar.long_statement(random, self.held_out))
        if kind == "say-words":
            return self.say(grammar.word_string(random, self.words))
        if kind == "video-long":
            return scenes.long_clip(random, random.randint(10, scenes.LONG_PAIRS))
        if task == "say":
            return self.say(self._statement(variant, random))
        if task == "handwriting":
            return scenes.handwriting(random, self.digits)
        generate = random.choice(GENERATORS[task])
        return generate(random)

    def dictation(self, random: Random, seconds: float) -> Example:
        """Recordings joined up to a length in seconds (at least one), to be transcribed."""
        waves: list[Tensor] = []
        texts: list[str] = []
        while True:
            text = self.recorded_text(random)
            wave = self.recording(text, random)
            samples = sum(map(len, waves)) + len(wave)
            if waves and samples > seconds * INPUT_SAMPLE_RATE:
                break
            waves.append(wave)
            texts.append(text)
        transcript = " ".join(texts)
        return Example(
            TRANSCRIBE,
            transcript,
            voice="any",
            transcript=transcript,
            wave=torch.cat(waves),
            kind="hear-long",
        )

    def recorded_text(self, random: Random) -> str:
        """The text of a random recording."""
        return random.choices(self.spoken, self.weights)[0]

    def _statement(self, variant: str, random: Random) -> str:
        """A statement to repeat. If it is spoken, it must have been recorded."""
        if variant == "typed":
            return grammar.statement(random, self.held_out)
        while True:
            text = self.recorded_text(random)
            if text.startswith("say "):
                return text.removeprefix("say ")

    def wave(self, example: Example, random: Random) -> Tensor | None:
        """The recording of an example [samples], None if the question is typed."""
        if example.voice is None or example.wave is not None:
            return example.wave
        return self.recording(example.transcript or example.question, random)

    def recording(self, text: str, random: Random) -> Tensor:
        """A recording of a text [samples], with random silence, gain and noise in training."""
        wave = self.speech.wave(self.speech.find(text, random))
        if self.held_out:
            return wave
        if random.random() < 0.5:
            before = int(random.uniform(0, MAX_SILENCE_BEFORE) * INPUT_SAMPLE_RATE)
            after = int(random.uniform(0, MAX_SILENCE_AFTER) * INPUT_SAMPLE_RATE)
            wave = F.pad(wave, (before, after))
        generator = np.random.RandomState(random.randrange(1 << 31))
        noise = torch.from_numpy(generator.randn(len(wave)).astype(np.float32))
        gain = random.uniform(0.5, 1.2)
        noise_level = random.choice(NOISE_LEVELS)
        return wave * gain + noise * noise_level

    def question_messages(self, example: Example, random: Random) -> list[dict]:
        """Messages of the question alone, with a recording of it if it is spoken."""
        wave = self.wave(example, random)
        content = []
        if example.image is not None:
            content.append({"type": "image", "image": example.image})
        if example.clip is not None:
            frames, seconds = example.clip
            audio = None if example.sound is None else torch.from_numpy(example.sound)
            clip = Clip(torch.from_numpy(frames), torch.from_numpy(seconds), audio)
            content.append({"type": "video", "video": clip})
        if wave is not None:
            content.append({"type": "audio", "audio": wave})
        # A recording that is not the question itself comes with the question as text.
        if wave is None or example.transcript is not None:
            content.append({"type": "text", "text": example.question})
        return [{"role": "user", "content": content}]

    def prompt(self, example: Example, random: Random) -> Inputs:
        """Model inputs of the question alone."""
        messages = self.question_messages(example, random)
        return self.processor([messages], use_audio_in_video=example.sound is not None)

    def say(self, text: str) -> Example:
        """A typed request to say a sentence."""
        return Example(f"say {text}", text)

    def dialogue(self, kind: str, random: Random) -> list[Example]:
        """A dialogue: one example, and further turns if there is more to ask about it.

        Kinds that end in -alone have one turn: an earlier answer could give away a later one.
        """
        first = self.example(kind, random)
        turns = 1 if first.voice or kind.endswith("-alone") else MAX_TURNS
        count = min(turns - 1, len(first.follow_ups))
        examples = [first]
        for question, answer in random.sample(first.follow_ups, count):
            examples.append(Example(question, answer, kind=first.kind))
        return examples

    def collate(
        self, dialogues: list[list[Example]], randoms: list[Random]
    ) -> tuple[Inputs, Tensor]:
        """Dialogues of one or more turns -> inputs and targets [B, L] at every answer.

        randoms: what varies the recordings of each dialogue.
        """
        rows = []
        masks = []
        for examples, random in zip(dialogues, randoms, strict=True):
            inputs, loss_mask = self._dialogue_row(examples, random)
            rows.append(inputs)
            masks.append(loss_mask)
        inputs = collate(rows, pad=self.processor.config.thinker.tokens.endoftext)
        return inputs, shifted_targets(inputs.input_ids, masks)

    def _dialogue_row(self, examples: list[Example], random: Random) -> tuple[Inputs, list[bool]]:
        """One dialogue -> inputs [1, L] and a loss mask [L], true at the tokens of answers."""
        prompts = [self.prompt(example, random) for example in examples]
        input_ids: list[int] = []
        loss_mask: list[bool] = []
        for turn, (prompt, example) in enumerate(zip(prompts, examples, strict=True)):
            question = prompt.input_ids[0].tolist() if turn == 0 else self._next_turn(prompt)
            answer = self.processor.tokenizer.encode(example.answer) + [self.end]
            input_ids += question + answer
            loss_mask += [False] * len(question) + [True] * len(answer)
        # The media of all turns, in reading order, under the ids of the whole dialogue.
        return with_ids(collate(prompts, pad=0), torch.tensor([input_ids])), loss_mask

    def frame_targets(
        self, dialogues: list[list[Example]], inputs: Inputs, randoms: list[Random]
    ) -> Tensor:
        """Targets [B, L] at the audio tokens of clips: the color or the shape that is visible then.

        This answers every 40 ms what the question about the tone asks once. IGNORE_INDEX everywhere
        else. randoms: what chooses color or shape in each dialogue.
        """
        tokens = self.processor.config.thinker.tokens
        ids = inputs.input_ids
        targets = torch.full_like(ids, IGNORE_INDEX)
        # A clip with audio is the only medium that opens with these two tokens.
        starts = (ids[:, :-1] == tokens.vision_bos) & (ids[:, 1:] == tokens.audio_bos)  # [B, L - 1]
        with_audio = []
        for examples in dialogues:
            with_audio += [example for example in examples if example.sound is not None]
        for (row, begin), example in zip(starts.nonzero().tolist(), with_audio, strict=True):
            # Positions of the clip's audio tokens, and the grid step that is visible at each.
            length = int((ids[row, begin:] == tokens.audio_eos).nonzero()[0, 0])
            is_audio = ids[row, begin : begin + length] == tokens.audio
            positions = begin + is_audio.nonzero()[:, 0]  # [n]
            step = visible_steps(example, len(positions))  # [n]
            words = self._color_and_shape(example)  # [steps, 2]
            choices = randoms[row].choices(range(2), k=len(step))
            targets[row, positions] = words[step, choices]
        return targets

    def _color_and_shape(self, example: Example) -> Tensor:
        """First token ids of the color and the shape that each grid step shows [steps, 2]."""
        encode = self.processor.tokenizer.encode
        rows = []
        for objects in example.objects:
            color, shape, *_ = objects[0]
            rows.append([encode(f" {color}")[0], encode(f" {shape}")[0]])
        return torch.tensor(rows)

    def _next_turn(self, prompt: Inputs) -> list[int]:
        """Ids of a prompt as a later turn: a line end, then the prompt without its system turn."""
        ids = prompt.input_ids[0]
        im_start = self.processor.config.thinker.tokens.im_start
        user_turn = (ids == im_start).nonzero()[1]
        return self.processor.tokenizer.encode("\n") + ids[user_turn:].tolist()


def visible_steps(example: Example, count: int) -> Tensor:
    """The grid step of a clip that is visible at each of its first `count` audio tokens [count]."""
    assert example.clip is not None
    _, seconds = example.clip
    step_starts = torch.from_numpy(seconds[::2].copy())  # a grid step has two frames
    token_times = torch.arange(count) / TOKENS_PER_S
    return torch.bucketize(token_times, step_starts, right=True) - 1


def append_answer(
    prompts: list[Inputs], answers: list[list[int]], pad: int
) -> tuple[Inputs, Tensor]:
    """Single prompts and the token ids of their answers -> one batch and its targets [B, L].

    Only the answers are targets.
    """
    rows = []
    masks = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.cat([prompt.input_ids, torch.tensor([answer])], 1)
        rows.append(with_ids(prompt, ids))
        masks.append([True] * len(answer))
    inputs = collate(rows, pad)
    return inputs, shifted_targets(inputs.input_ids, masks)


def with_ids(inputs: Inputs, ids: Tensor) -> Inputs:
    """The same media with other token ids [1, L], none of them padding."""
    return replace(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))


def shifted_targets(input_ids: Tensor, masks: list[list[bool]]) -> Tensor:
    """Next-token targets [B, L] of left-padded ids [B, L]; IGNORE_INDEX where the loss mask is off.

    masks: for each row the loss mask of its last tokens, aligned with the ids.
    """
    loss_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    length = input_ids.shape[1]
    for row, mask in enumerate(masks):
        loss_mask[row, length - len(mask) :] = torch.tensor(mask)
    # Position i predicts token i + 1.
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    targets[:, :-1] = torch.where(loss_mask[:, 1:], input_ids[:, 1:], IGNORE_INDEX)
    return targets
