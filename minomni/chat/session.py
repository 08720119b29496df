"""A conversation that is prefilled while the user speaks: audio and frames are encoded in parts of
two seconds as they arrive.

    session = omni.listen(voice="Anna")
    session.add_audio(chunk)  # once per audio chunk: float [samples] at 16 kHz
    session.add_frame(frame, at_seconds=0.5)  # once per frame: uint8 [height, width, 3]
    for event in session.respond():  # only the last part is still to be encoded
        ...

At the end of a turn the prefilled tokens and states are those of the same turn prefilled at once
(paper sec. 2.2 and 2.4).
"""

from collections.abc import Generator, Iterator, Sequence
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minomni.arguments import check_number
from minomni.chat.generate import reply_steps, stream_reply
from minomni.chat.reply import AudioChunk, ReplyDone, TextChunk, Timings
from minomni.chat.stream_options import LOW_LATENCY, StreamOptions, stream_options
from minomni.chat.user_turn import UserTurn
from minomni.config import INPUT_SAMPLE_RATE, FlowConfig
from minomni.devices import ANSWER_ADVICE, memory_errors
from minomni.errors import UserError, quote
from minomni.inputs.prompt import Processor
from minomni.kv_cache import KVCache
from minomni.thinker.thinker import PrefillState, Thinker
from minomni.thinker.tmrope import text_positions
from minomni.token2wav.streaming import Schedule

if TYPE_CHECKING:
    from minomni.omni import Omni

USER_START = "<|im_start|>user\n"
ASSISTANT_START = "<|im_start|>assistant\n"
MESSAGE_END = "<|im_end|>\n"
TEXT_RATE = 4.0  # text tokens per second of speech: about three words


class Session:
    """A conversation whose tokens stay in the Thinker's KV cache from turn to turn."""

    def __init__(
        self, omni: "Omni", voice: str | None = None, speech: bool = True, system: str | None = None
    ):
        """voice and speech: as in omni.respond(). system: the system message, by default the one
        that this model size was trained with.

        Raises UserError for a model without a tokenizer, and for an unknown voice.
        """
        if system is not None and not isinstance(system, str):
            raise UserError(f"system is {quote(system)}; expected the text of the system message")
        if system is None:
            system = omni.config.media.system_prompt
        self.omni = omni
        self.voice, _ = omni.prepare([{"role": "system", "content": system}], voice, speech, False)
        self.processor = Processor(omni.config, omni.require_tokenizer())

        self.cache: KVCache = omni.thinker.model.new_cache()
        self.prefill = empty_prefill(omni.thinker, self.cache)
        self.position = 0  # of the next text token
        self.append_text(f"<|im_start|>system\n{system}{MESSAGE_END}{USER_START}")
        # The user's current turn; None while and after the model replies.
        self.turn: UserTurn | None = UserTurn(self)

        self.reply_stream: Generator | None = None
        self.reset_reply()

    def reset_reply(self) -> None:
        """Clear the record of the last reply."""
        self.reply_ids: list[int] = []
        self.audio_s = 0.0  # seconds of audio handed out
        self.ended = False  # whether the reply was generated to its end
        # Seconds that the user heard, where interrupt() was given them.
        self.played_s: float | None = None

    @property
    def length(self) -> int:
        """Number of tokens prefilled so far."""
        return self.prefill.hidden.shape[1]

    @memory_errors(ANSWER_ADVICE)
    def add_audio(self, chunk, rate: int = INPUT_SAMPLE_RATE) -> None:
        """Add the next audio chunk, float [samples] at 16 kHz. Interrupts a running reply.

        Raises UserError for another rate, shape or type, for NaN, and where the context is full.
        """
        self.begin_turn().add_audio(chunk, rate)

    @memory_errors(ANSWER_ADVICE)
    def add_frame(self, frame, at_seconds: float) -> None:
        """Add the next video frame, uint8 [height, width, 3]. Interrupts a running reply.

        at_seconds: its time on any clock, as only differences count; the first frame is aligned
        with the first audio sample. Raises UserError for a frame of another size, for one that is
        not later than the one before it, and where the context is full.
        """
        self.begin_turn().add_frame(frame, at_seconds)

    @memory_errors(ANSWER_ADVICE)
    def add_image(self, image) -> None:
        """Add a still image, of any source that load_image() reads. Interrupts a running reply.

        Images come before the audio and the frames of a turn. Raises UserError for an image that
        cannot be read or comes later, and where the context is full.
        """
        self.begin_turn().add_image(image)

    def respond(
        self,
        text: str = "",
        seed: int = 0,
        schedule: Schedule | str | None = LOW_LATENCY,
        flow: FlowConfig | None = None,
        **options,
    ) -> Iterator[TextChunk | AudioChunk | ReplyDone]:
        """End the user's turn with `text` and answer it, in chunks and with the options of
        omni.stream().

        Raises UserError for an empty turn, for one with nothing but silence, and where the context
        is full; the turn is then discarded.
        """
        checked, timings = self.end_turn(text, seed, schedule, flow, options)
        events = stream_reply(self.omni, self.prefill, self.voice, checked, timings, self.reply_ids)
        self.reply_stream = self.track_reply(events)
        return self.reply_stream

    def respond_steps(
        self, text: str = "", seed: int = 0, **options
    ) -> Iterator[TextChunk | AudioChunk | ReplyDone | None]:
        """respond() that also yields None after each step without a chunk; see reply_steps().
        Raises UserError.
        """
        checked, timings = self.end_turn(text, seed, LOW_LATENCY, None, options)
        events = reply_steps(self.omni, self.prefill, self.voice, checked, timings, self.reply_ids)
        self.reply_stream = self.track_reply(events)
        return self.reply_stream

    def end_turn(
        self,
        text: str,
        seed: int,
        schedule: Schedule | str | None,
        flow: FlowConfig | None,
        options: dict,
    ) -> tuple[StreamOptions, Timings]:
        """End the user's turn and prefill all of it -> the checked options of the reply, and its
        timings so far. Raises UserError as respond() does.
        """
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise UserError(f"text is {quote(text)}; expected a str")
        checked = stream_options(self.omni.config, seed, schedule, flow, options)

        turn = self.begin_turn()
        timings = Timings()
        timings.mark("input")
        try:
            with memory_errors(ANSWER_ADVICE):
                turn.finish(has_text=bool(text.strip()))
                timings.mark("encode")
                self.append_text(f"{text}{MESSAGE_END}{ASSISTANT_START}")
                timings.mark("prefill")
        except UserError:
            self.discard_turn()
            raise

        self.turn = None
        self.reset_reply()
        return checked, timings

    def discard_turn(self) -> None:
        """Forget what the user has given since the last reply."""
        turn = self.begin_turn()
        self.truncate(turn.length, turn.position)
        self.turn = UserTurn(self)

    def track_reply(self, events: Iterator[TextChunk | AudioChunk | ReplyDone | None]) -> Generator:
        """The events of a reply, recording how much of it was handed out."""
        for event in events:
            if isinstance(event, AudioChunk):
                self.audio_s += len(event.wave) / event.sample_rate
            self.ended = isinstance(event, ReplyDone)
            yield event

    def interrupt(self, played_s: float | None = None) -> None:
        """Stop the reply if it is running, and keep in the conversation only the text that the user
        heard.

        played_s: seconds of the reply's audio that were played, by default all that was handed out;
        see played_ids(). May also be called after the reply's end, since audio is generated faster
        than it is played. Raises UserError where played_s is not a time.
        """
        if played_s is not None:
            played_s = check_number(played_s, "played_s", 0, 1e12)
        if self.reply_stream is not None:
            self.reply_stream.close()
            self.reply_stream = None
        if played_s is not None:
            self.played_s = played_s

    def played_ids(self) -> list[int]:
        """The text ids of the last reply that the user heard, without the stop id.

        The model does not align text and audio, so the number of ids is estimated from the time
        played: at the reply's own rate if it was generated to its end, at TEXT_RATE otherwise.
        Without speech all ids count.
        """
        im_end = self.omni.config.thinker.tokens.im_end
        ids = [token for token in self.reply_ids if token != im_end]
        if self.voice is None:
            return ids

        played_s = self.audio_s
        if self.played_s is not None:
            played_s = min(self.played_s, self.audio_s)
        if not self.ended:
            return ids[: ceil(played_s * TEXT_RATE)]
        if played_s == self.audio_s:
            return ids
        return ids[: ceil(played_s * (len(ids) / self.audio_s))]

    def begin_turn(self) -> UserTurn:
        """The user's current turn. A new one first stops the last reply and adds its played text to
        the conversation.
        """
        self.interrupt()
        if self.turn is None:
            self.append_text(f"{MESSAGE_END}{USER_START}", prefix_ids=self.played_ids())
            self.turn = UserTurn(self)
        return self.turn

    # ---------------------------------------------------------------------------- prefilling
    def append_text(self, text: str, prefix_ids: Sequence[int] = ()) -> None:
        """Prefill the tokens prefix_ids and then those of the text."""
        ids = torch.tensor([*prefix_ids, *self.processor.encode(text)])
        positions = text_positions(self.position, len(ids))
        self.append_tokens(ids, None, positions, self.position + len(ids))

    @torch.no_grad()
    def append_tokens(
        self, ids: Tensor, features: Tensor | None, positions: Tensor, next_position: int
    ) -> None:
        """Prefill tokens.

        ids: [n]. features: [n, D] of media, or None for text. positions: [3, n]. next_position: of
        the text token that follows. Raises UserError, and changes nothing, where the context has no
        room for them.
        """
        thinker = self.omni.thinker
        context = self.omni.config.thinker.text.max_position_embeddings
        if self.length + len(ids) > context:
            raise UserError(
                f"the conversation has {self.length} tokens, {len(ids)} more do not fit the "
                f"context of {context}; begin a new session"
            )

        # Embed the tokens; media positions have no text embedding.
        ids = ids[None].to(thinker.device)
        positions = positions[:, None].to(thinker.device)
        token_embeds = thinker.model.embed_tokens(ids)  # [1, n, D]
        if features is None:
            embeds = token_embeds
            text_embeds = token_embeds
        else:
            embeds = features[None].to(token_embeds.dtype)
            text_embeds = torch.zeros_like(token_embeds)

        # The cache may still hold a reply, or a part that is prefilled again: drop it first.
        self.cache.truncate(self.length)
        hidden = thinker.model(embeds, positions, None, self.cache)

        old = self.prefill
        self.prefill = PrefillState(
            hidden=torch.cat((old.hidden, hidden), 1),
            text_embeds=torch.cat((old.text_embeds, text_embeds), 1),
            position_ids=torch.cat((old.position_ids, positions), 2),
            attention_mask=torch.cat((old.attention_mask, torch.ones_like(ids)), 1),
            input_ids=torch.cat((old.input_ids, ids), 1),
            cache=self.cache,
        )
        self.position = next_position

    def truncate(self, length: int, position: int) -> None:
        """Keep only the first `length` tokens; position: of the next text token."""
        old = self.prefill
        self.prefill = PrefillState(
            hidden=old.hidden[:, :length],
            text_embeds=old.text_embeds[:, :length],
            position_ids=old.position_ids[:, :, :length],
            attention_mask=old.attention_mask[:, :length],
            input_ids=old.input_ids[:, :length],
            cache=self.cache,
        )
        self.position = position


def empty_prefill(thinker: Thinker, cache: KVCache) -> PrefillState:
    """The state of a conversation without tokens: batch 1, length 0."""
    ids = torch.zeros(1, 0, dtype=torch.long, device=thinker.device)
    embeds = thinker.model.embed_tokens(ids).detach()  # [1, 0, D]
    return PrefillState(
        hidden=embeds,
        text_embeds=embeds,
        position_ids=ids.expand(3, -1, -1),
        attention_mask=ids,
        input_ids=ids,
        cache=cache,
    )
