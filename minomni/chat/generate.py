"""The decode loop behind omni.respond(), omni.stream() and omni.generate().

    Thinker    t0  t1  t2  t3  ...              Thinker and Talker take one step each in turn
    Talker         c0  c1  c2  ...              step i reads the Thinker's state of token i
    Token2Wav              [mel, audio] ...     one chunk as soon as its codes are complete

The Thinker computes the state of token i when that token is fed back to choose token i + 1. The
Talker therefore runs one step behind.

There are no threads. Each request for the next event advances the loop, and closing the iterator
releases all caches.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minomni.chat.generation_options import sampling_configs
from minomni.chat.reply import AudioChunk, Reply, ReplyDone, TextChunk, Timings
from minomni.chat.stream_options import StreamOptions
from minomni.config import SamplingConfig
from minomni.devices import ANSWER_ADVICE, memory_errors
from minomni.talker.talker import TalkerInputs, special_embeds
from minomni.thinker.thinker import PrefillState
from minomni.token2wav.streaming import SpeechStream, low_latency_schedule
from minomni.token2wav.token2wav import check_wave
from minomni.token2wav.voice import Voice

if TYPE_CHECKING:
    from minomni.omni import Omni


class GrowingReplyEmbeds(list[Tensor]):
    """The Talker's text input of one reply: a vector [E] per step, appended while the Talker reads.

    close() ends it as reply_embeds() does, with the embeddings `end` and `pad` [E]; the Talker
    repeats the last vector from then on.
    """

    def __init__(self, end: Tensor, pad: Tensor):
        super().__init__()
        self.end = end
        self.pad = pad
        self.closed = False

    def append(self, state: Tensor) -> None:
        """Add the state plus embedding [E] of the next reply token; ignored after close()."""
        if not self.closed:
            super().append(state)

    def close(self) -> None:
        """Mark the reply as complete. A reply of one token has no states and stays empty."""
        if self and not self.closed:
            self.extend((self.end, self.pad))
        self.closed = True


def seeded_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator with this seed.

    Thinker, Talker and Token2Wav each draw from their own generator, so that the draws of one do
    not depend on when the others run.
    """
    return torch.Generator(device).manual_seed(seed)


def generators(
    seed: int | list[int], device: torch.device | str
) -> torch.Generator | list[torch.Generator]:
    """One generator for a whole batch, or one for each row."""
    if isinstance(seed, list):
        return [seeded_generator(row_seed, device) for row_seed in seed]
    return seeded_generator(seed, device)


@torch.no_grad()
def generate_tokens(
    omni: "Omni",
    prefill: PrefillState,
    bos_tokens: list[int] | None,
    seed: int | list[int],
    sampling: tuple[SamplingConfig, SamplingConfig] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Decode a batch of prefilled prompts: yields ("text", ids [B]) and ("code", ids [B]) as soon
    as they are known.

    bos_tokens: the voice's token of each row; None for no speech. seed: one for the batch, or one
    for each row, which then draws the same numbers as it does alone. sampling: for Thinker and
    Talker, by default the model's. Finished rows yield padding, as in Thinker.steps() and
    Talker.steps(). Text and codes equal those of Thinker.generate() followed by Talker.generate().
    """
    sampling = sampling or sampling_configs(omni.config, {})
    if omni.static_generator is not None:
        yield from omni.static_generator.generate_tokens(prefill, bos_tokens, seed, sampling)
        return

    # Without speech the Thinker's ids are all.
    thinker_sampling, talker_sampling = sampling
    device = omni.thinker.device
    thinker_steps = omni.thinker.steps(prefill, thinker_sampling, generators(seed, device))
    if bos_tokens is None:
        yield from text_tokens(thinker_steps)
        return

    # The Talker reads `replies` while the loop below appends to them.
    talker, _ = omni.require_speech()
    tokens = omni.config.thinker.tokens
    talker_inputs, replies = growing_talker_inputs(omni, prefill, bos_tokens)
    talker_steps = talker.steps(
        talker_inputs, talker_sampling, omni.num_codes, generators(seed, device)
    )

    # One Talker step per Thinker step, once there are states.
    for ids, states in thinker_steps:
        yield "text", ids
        add_states(replies, ids, states, tokens.im_end)
        if states is not None:
            codes = next(talker_steps, None)
            if codes is not None:
                yield "code", codes

    # Replies that reached the length limit end here. The Talker then finishes its speech.
    for reply in replies:
        reply.close()
    for codes in talker_steps:
        yield "code", codes


def text_tokens(
    thinker_steps: Iterator[tuple[Tensor, Tensor | None]],
) -> Iterator[tuple[str, Tensor]]:
    """The events of an answer without speech, from Thinker.steps()."""
    for ids, _ in thinker_steps:
        yield "text", ids


def growing_talker_inputs(
    omni: "Omni", prefill: PrefillState, bos_tokens: list[int]
) -> tuple[TalkerInputs, list[GrowingReplyEmbeds]]:
    """What the Talker reads of each row, and the part of it that grows with the reply."""
    tokens = omni.config.thinker.tokens
    end, pad, voice_embeds = special_embeds(tokens, bos_tokens, omni.thinker.model.embed_tokens)
    replies = [GrowingReplyEmbeds(end, pad) for _ in bos_tokens]
    inputs = TalkerInputs(
        prefill.hidden + prefill.text_embeds,
        prefill.position_ids,
        prefill.attention_mask,
        voice_embeds,
        replies,
    )
    return inputs, replies


def add_states(
    replies: list[GrowingReplyEmbeds], ids: Tensor, states: Tensor | None, im_end: int
) -> None:
    """Append what Thinker.steps() has yielded, ids [B] and states [B, E], to the reply of each row.

    The states belong to the ids before these; None in the first step. im_end closes a reply.
    """
    if states is not None:
        for reply, state in zip(replies, states, strict=True):
            reply.append(state)
    for reply, token in zip(replies, ids.tolist(), strict=True):
        if token == im_end:
            reply.close()


class SpeechDecoder:
    """Codes of one reply in, AudioChunks out: while the codes arrive, or all at the end."""

    def __init__(self, omni: "Omni", voice: Voice, options: StreamOptions, timings: Timings):
        talker, token2wav = omni.require_speech()
        self.token2wav = token2wav
        self.voice = voice
        self.flow = options.flow
        self.timings = timings
        self.generator = seeded_generator(options.seed)
        self.stop_codes = talker.config.stop_codes
        self.codes: list[int] = []
        self.waves: list[Tensor] = []
        self.stream: SpeechStream | None = None
        schedule = options.schedule
        if isinstance(schedule, str):  # LOW_LATENCY
            schedule = low_latency_schedule(token2wav)
        if schedule is not None:
            self.stream = SpeechStream(
                token2wav, voice, self.flow, schedule, self.generator, timings.mark
            )

    def feed(self, ids: Tensor) -> Iterator[AudioChunk]:
        """The next code [1] -> the audio that it completes. Stop codes make no audio."""
        code = int(ids)
        if code in self.stop_codes:
            return
        self.codes.append(code)
        if self.stream is not None:
            for wave in self.stream.feed(ids[None]):
                yield self.audio_chunk(wave)

    def finish(self) -> Iterator[AudioChunk]:
        """There are no more codes -> the rest of the audio; without a schedule, all of it."""
        if not self.codes:
            return
        if self.stream is not None:
            for wave in self.stream.finish():
                yield self.audio_chunk(wave)
        else:
            codes = torch.tensor([self.codes])
            wave = self.token2wav(codes, self.voice, self.flow, self.generator)
            yield self.audio_chunk(wave)

    def audio_chunk(self, wave: Tensor) -> AudioChunk:
        """Check a waveform [samples], keep it for the whole reply and record its time."""
        wave = check_wave(wave).cpu()
        self.waves.append(wave)
        sample_rate = self.token2wav.config.sample_rate
        return AudioChunk(wave, sample_rate, self.timings.mark("audio"))


def stream_reply(
    omni: "Omni",
    prefill: PrefillState,
    voice: Voice | None,
    options: StreamOptions,
    timings: Timings,
    reply_ids: list[int],
) -> Iterator[TextChunk | AudioChunk | ReplyDone]:
    """Answer one prefilled prompt in chunks of text and audio; the last event is ReplyDone.

    voice: None for no speech. timings: records each event. reply_ids: the text ids are appended to
    it. Raises UserError for weights that give no finite numbers.
    """
    for event in reply_steps(omni, prefill, voice, options, timings, reply_ids):
        if event is not None:
            yield event


def reply_steps(
    omni: "Omni",
    prefill: PrefillState,
    voice: Voice | None,
    options: StreamOptions,
    timings: Timings,
    reply_ids: list[int],
) -> Iterator[TextChunk | AudioChunk | ReplyDone | None]:
    """stream_reply() that also yields None after each step that completes no chunk, so that a
    caller can stop or do other work between any two steps.
    """
    with memory_errors(ANSWER_ADVICE):
        yield from decode_reply(omni, prefill, voice, options, timings, reply_ids)


def decode_reply(
    omni: "Omni",
    prefill: PrefillState,
    voice: Voice | None,
    options: StreamOptions,
    timings: Timings,
    reply_ids: list[int],
) -> Iterator[TextChunk | AudioChunk | ReplyDone | None]:
    """The events of reply_steps()."""
    bos_tokens = None
    speech = None
    if voice is not None:
        bos_tokens = [voice.bos_token]
        speech = SpeechDecoder(omni, voice, options, timings)

    text = ""
    steps = generate_tokens(omni, prefill, bos_tokens, options.seed, options.sampling)
    for kind, ids in steps:
        token = int(ids)
        at_s = timings.mark(kind)
        if kind == "text":
            reply_ids.append(token)
            decoded = omni.decode(reply_ids)
            # A character whose bytes are not complete yet decodes to U+FFFD: wait for the rest.
            if len(decoded) > len(text) and not decoded.endswith("\N{REPLACEMENT CHARACTER}"):
                yield TextChunk(decoded[len(text) :], at_s)
                text = decoded
        elif speech is not None:
            yield from speech.feed(ids)
        yield None

    codes: list[int] = []
    waves: list[Tensor] = []
    if speech is not None:
        yield from speech.finish()
        codes = speech.codes
        waves = speech.waves
    reply = Reply(
        text=omni.decode(reply_ids),
        wave=torch.cat(waves) if waves else torch.zeros(0),
        sample_rate=omni.sample_rate,
        codes=torch.tensor(codes, dtype=torch.long),
        total_s=timings.mark("end"),
        timings=timings,
    )
    yield ReplyDone(reply)
