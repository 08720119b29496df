"""Listening while it is being said: sound and frames are encoded and read as they arrive, two
seconds at a time.

    session = omni.listen(voice="Anna")
    session.add_audio(chunk)  # as often as there is sound: float [samples] at 16 kHz
    session.add_frame(frame, at_seconds=0.5)  # as often as there is a frame: uint8 [height, width, 3]
    for piece in session.respond():  # only the last part of what was heard and seen is left to read
        ...

What the Thinker has read when a turn ends is what it reads of that turn all at once (paper sec. 2.2
and 2.4).
"""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

from minomni.arguments import number, seed_of, shown
from minomni.chat.generate import check_flow, check_schedule, stream_reply
from minomni.chat.generation_options import sampling_configs
from minomni.chat.reply import AudioChunk, ReplyDone, TextChunk, Timings
from minomni.chat.user_turn import UserTurn
from minomni.config import LISTENING_RATE, FlowConfig, SamplingConfig
from minomni.errors import UserError
from minomni.inputs.prompt import Processor
from minomni.thinker.thinker import PrefillState
from minomni.thinker.tmrope import text_positions
from minomni.token2wav.streaming import Schedule

OPENS, ENDS = "<|im_start|>user\n", "<|im_end|>\n"
TEXT_RATE = 4.0  # tokens of text in a second of speech, about: three words


class Session:
    """A conversation that is read while it happens. All that was read stays in the Thinker's cache,
    turn after turn.
    """

    def __init__(
        self, omni, voice: str | None = None, speech: bool = True, system: str | None = None
    ):
        """voice and speech: as in omni.respond(); system: the first message, by default the size's
        own.

        Raises UserError for a model without tokenizer, and for an unknown voice.
        """
        if system is not None and not isinstance(system, str):
            raise UserError(f"system is {shown(system)}; expected the text of the first message")
        system = omni.config.media.system_prompt if system is None else system
        self.omni = omni
        self.speaker, _ = omni.prepare(
            [{"role": "system", "content": system}], voice, speech, False
        )
        self.processor = Processor(omni.config, omni.tokenizer)
        nowhere = torch.zeros(1, 0, dtype=torch.long, device=omni.thinker.device)
        nothing = omni.thinker.model.embed_tokens(nowhere).detach()  # [1, 0, D]
        self.prefill = PrefillState(
            nothing,
            nothing,
            nowhere.expand(3, -1, -1),
            nowhere,
            nowhere,
            omni.thinker.model.new_cache(),
        )
        self.position = 0  # of the next token of text
        self.append_text(f"<|im_start|>system\n{system}{ENDS}{OPENS}")
        self.turn: UserTurn | None = UserTurn(
            self
        )  # None from an answer on until the next turn begins
        self.answering: Iterator | None = None
        self.reply_ids, self.sound_s, self.ended, self.played_s = (
            [],
            0.0,
            False,
            None,
        )  # of the last answer

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.prefill.hidden.shape[1]

    def add_audio(self, chunk, rate: int = LISTENING_RATE) -> None:
        """The next bit of sound, float [samples] at 16 kHz. An answer that is being given is cut.

        Raises UserError for another rate, shape or type, for NaN, and where the context is full.
        """
        self.begin_turn().add_audio(chunk, rate)

    def add_frame(self, frame, at_seconds: float) -> None:
        """The next frame, uint8 [height, width, 3], shown at that time on a clock of which only
        differences matter.

        The first frame belongs to the first sound. An answer that is being given is cut. Raises
        UserError for a frame of another size, for one that is not later than the one before it, and
        where the context is full.
        """
        self.begin_turn().add_frame(frame, at_seconds)

    def respond(
        self,
        text: str = "",
        seed: int = 0,
        schedule: Schedule | str | None = "eager",
        flow: FlowConfig | None = None,
        **options,
    ) -> Iterator[TextChunk | AudioChunk | ReplyDone]:
        """Answer what was heard and seen, and then `text`, in pieces as omni.stream() does, with
        the same options.

        Raises UserError where nothing was heard or seen, or nothing but silence, and where the
        context is full; that turn is forgotten then.
        """
        text = "" if text is None else text
        if not isinstance(text, str):
            raise UserError(f"text is {shown(text)}; expected a str")
        sampling, seed = sampling_configs(self.omni.config, options), seed_of(seed)
        check_schedule(schedule)
        check_flow(flow)
        turn, trace = self.begin_turn(), Timings()
        trace.mark("input")
        try:
            turn.finish(something_said=bool(text.strip()))
            trace.mark("encode")
            self.append_text(f"{text}{ENDS}<|im_start|>assistant\n")
            trace.mark("prefill")
        except UserError:
            self.truncate(turn.length, turn.position)
            self.turn = UserTurn(self)
            raise
        self.turn, self.reply_ids, self.sound_s, self.ended, self.played_s = (
            None,
            [],
            0.0,
            False,
            None,
        )
        self.answering = self.answer(seed, schedule, flow, trace, sampling)
        return self.answering

    def answer(
        self,
        seed: int,
        schedule: Schedule | str | None,
        flow: FlowConfig | None,
        trace: Timings,
        sampling: tuple[SamplingConfig, SamplingConfig],
    ) -> Iterator:
        """stream_reply(), and note what of it the user may have heard."""
        for piece in stream_reply(
            self.omni,
            self.prefill,
            self.speaker,
            schedule,
            flow,
            seed,
            trace,
            self.reply_ids,
            sampling,
        ):
            if isinstance(piece, AudioChunk):
                self.sound_s += len(piece.wave) / piece.sample_rate
            self.ended = isinstance(piece, ReplyDone)
            yield piece

    def interrupt(self, heard_s: float | None = None) -> None:
        """Stop the answer, if one is being given. heard_s: seconds of its sound that the user has
        heard, by default all that was handed out; only so much of its text, about, stays in the
        conversation. May come after the answer's end, as sound is made faster than it is played.
        Raises UserError where heard_s is no time.
        """
        if heard_s is not None:
            heard_s = number(heard_s, "heard_s", 0, 1e12)
        if self.answering is not None:
            self.answering.close()
            self.answering = None
        if heard_s is not None:
            self.played_s = heard_s

    def played_ids(self) -> list[int]:
        """The ids of the last answer that the user has heard; a stop id is none of them.

        Nothing says which sound belongs to which word, so time decides: the answer's own rate where
        it has ended, or else TEXT_RATE. Without speech all was read.
        """
        ids = [i for i in self.reply_ids if i != self.omni.config.thinker.tokens.im_end]
        heard_s = self.sound_s if self.played_s is None else min(self.played_s, self.sound_s)
        if self.speaker is None or self.ended and heard_s == self.sound_s:
            return ids
        return ids[: ceil(heard_s * (len(ids) / self.sound_s if self.ended else TEXT_RATE))]

    def begin_turn(self) -> UserTurn:
        """The turn that is going on; if there is none, the last answer is put on record and one
        begins.
        """
        self.interrupt()
        if self.turn is None:
            self.append_text(f"{ENDS}{OPENS}", before=self.played_ids())
            self.turn = UserTurn(self)
        return self.turn

    # ----------------------------------------------------------------------------------------------------
    # the reading
    def append_text(self, text: str, before: list[int] = ()) -> None:
        """Read ids and then text."""
        ids = torch.tensor([*before, *self.processor.encode(text)])
        self.append_tokens(
            ids, None, text_positions(self.position, len(ids)), self.position + len(ids)
        )

    @torch.no_grad()
    def append_tokens(
        self, ids: Tensor, features: Tensor | None, places: Tensor, then: int
    ) -> None:
        """Read tokens: ids [n], features [n, D] of media or None for text, places [3, n]; then: the
        next position.

        Raises UserError, and reads nothing, where the context has no room for them.
        """
        thinker, old, context = (
            self.omni.thinker,
            self.prefill,
            self.omni.config.thinker.text.max_position_embeddings,
        )
        if self.length + len(ids) > context:
            raise UserError(
                f"the conversation has {self.length} tokens, {len(ids)} more do not fit the context of "
                f"{context}; begin a new session"
            )
        ids, places = ids[None].to(thinker.device), places[:, None].to(thinker.device)
        words = thinker.model.embed_tokens(ids)  # [1, n, D]
        embeds, text_embeds = (
            (words, words) if features is None else (features[None], torch.zeros_like(words))
        )
        old.cache.truncate(
            self.length
        )  # forget what an answer, or a part that is read again, has left there
        hidden = thinker.model(embeds.to(words.dtype), places, None, old.cache)
        self.prefill = PrefillState(
            torch.cat((old.hidden, hidden), 1),
            torch.cat((old.text_embeds, text_embeds), 1),
            torch.cat((old.position_ids, places), 2),
            torch.cat((old.attention_mask, torch.ones_like(ids)), 1),
            torch.cat((old.input_ids, ids), 1),
            old.cache,
        )
        self.position = then

    def truncate(self, length: int, position: int) -> None:
        """Forget all but the first tokens; position: where the next one goes."""
        old = self.prefill
        self.prefill = PrefillState(
            old.hidden[:, :length],
            old.text_embeds[:, :length],
            old.position_ids[:, :, :length],
            old.attention_mask[:, :length],
            old.input_ids[:, :length],
            old.cache,
        )
        self.position = position
