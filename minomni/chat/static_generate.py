"""generate_tokens() with steps that a CUDA graph replays: the same ids and codes in the same order.

    host     launch 0, launch 1, read 0, launch 2, read 1, ...
    device   step 0    step 1            step 2

A step chooses ids from the logits that the step before it has left, runs the decoder on them, and
leaves new logits. The host reads the ids of a step while the next one runs, so one
step more than needed is launched; its result is not used. The Thinker's step also writes the
Talker's text input, so the two follow each other without the host.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minomni.chat.generate import generators
from minomni.config import SamplingConfig
from minomni.cuda_graphs import Replay
from minomni.decoder import Decoder, next_position
from minomni.kv_cache import KVCache
from minomni.sampling import Generators, check_ranges, logit_ranges
from minomni.static_decode import StaticCache, cache_capacity, choose, decoder_step
from minomni.talker.talker import Talker, TalkerInputs, special_embeds
from minomni.thinker.thinker import PrefillState, Thinker

if TYPE_CHECKING:
    from minomni.omni import Omni

MAX_CACHED_STEPS = 4  # of one workspace, each with a cache and, on CUDA, a graph


class ReplyEmbedsBuffer:
    """The Talker's text input of all rows: embeds [B, capacity, E], of which count [B] are written.

    The buffers hold what GrowingReplyEmbeds holds: a state per token, and at the end `end` and
    `pad` [E]. A row without states stays empty.
    """

    def __init__(self, rows: int, capacity: int, end: Tensor, pad: Tensor):
        self.embeds = end.new_zeros(rows, capacity + 2, len(end))  # + 2: end and pad
        self.count = torch.zeros(rows, dtype=torch.long, device=end.device)
        self.closed = torch.zeros(rows, dtype=torch.bool, device=end.device)
        self.rows = torch.arange(rows, device=end.device)
        self.end = end.clone()
        self.pad = pad.clone()

    def reset(self, end: Tensor, pad: Tensor) -> None:
        """Begin new replies."""
        self.count.zero_()
        self.closed.zero_()
        self.end.copy_(end)
        self.pad.copy_(pad)

    def add(self, state: Tensor, is_last: Tensor) -> None:
        """Append state [B, E] to the open rows, or close those whose token is_last [B].

        Other rows write after their embeddings, where nothing is read before it is written again.
        """
        ends = (is_last & ~self.closed)[:, None]
        first = torch.where(ends, self.end, state)
        self.embeds.index_put_((self.rows, self.count), first)
        self.embeds.index_put_((self.rows, self.count + 1), self.pad.expand_as(first))
        # 1 for a state, 2 for `end` and `pad`, 0 for a row that is closed or has no states.
        closes = is_last & ~self.closed & (self.count > 0)
        appends = ~is_last & ~self.closed
        self.closed.logical_or_(is_last)
        self.count.add_(appends.long() + 2 * closes.long())

    def at(self, step: Tensor) -> Tensor:
        """The embedding of every row at a step [1] -> [B, E]; the last one of a row repeats."""
        index = torch.minimum(step, self.count - 1).clamp(min=0)
        return self.embeds[self.rows, index]


class StaticStep:
    """What the steps of Thinker and Talker share: sampling state, cache, and reading ids late."""

    def __init__(
        self,
        decoder: Decoder,
        head: nn.Linear,
        rows: int,
        capacity: int,
        sampling: SamplingConfig,
        suppressed: Tensor | None,
    ):
        weight = head.weight
        self.decoder = decoder
        self.head = head
        self.sampling = sampling
        self.suppressed = suppressed
        self.cache = StaticCache(decoder.config, rows, capacity, weight.device, weight.dtype)
        self.logits = torch.zeros(rows, decoder.config.vocab_size, device=weight.device)
        self.position = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=weight.device)
        self.ids = torch.zeros_like(self.position)
        self.ranges = torch.zeros(rows, device=weight.device)
        self.history = torch.zeros(
            rows, decoder.config.vocab_size, dtype=torch.bool, device=weight.device
        )
        self.noise: Tensor | None = None
        if sampling.temperature > 0:
            self.noise = torch.ones(self.history.shape, device=weight.device)
        self.count = torch.zeros(1, dtype=torch.long, device=weight.device)  # steps taken
        self.limit = torch.zeros_like(self.count)
        self.replay = Replay(self.step, self.state())

    def state(self) -> list[Tensor]:
        """All buffers that a step changes."""
        return [
            self.logits,
            self.position,
            self.done,
            self.ids,
            self.ranges,
            self.history,
            self.count,
            self.cache.lengths,
        ]

    def step(self) -> None:
        """One step, in place."""
        raise NotImplementedError

    def next_ids(self, stopped_id: int) -> Tensor:
        """Choose the next ids [B]; `stopped_id` for rows that have stopped."""
        self.ranges.copy_(logit_ranges(self.logits))
        ids = choose(self.logits, self.history, self.sampling, self.suppressed, self.noise)
        ids = ids.masked_fill(self.done, stopped_id)
        self.history.scatter_(1, ids[:, None], True)
        self.ids.copy_(ids)
        return ids

    def load_prefill(
        self, cache: KVCache, attention_mask: Tensor, position: Tensor, logits: Tensor
    ) -> None:
        """Take over a prefill: its cache, next position ids [B] and last logits [B, V]."""
        self.cache.fill(cache, attention_mask)
        self.position.copy_(position)
        self.logits.copy_(logits)
        self.done.zero_()
        self.count.zero_()

    def decode(self, x: Tensor) -> Tensor:
        """Run the decoder on x [B, D] and leave new logits -> hidden states [B, D]."""
        hidden = decoder_step(self.decoder, x, self.position, self.cache)
        self.logits.copy_(self.head(hidden))
        self.position.add_(1)
        return hidden

    def launch(self, generator: Generators) -> "PendingIds":
        """Draw the noise of a step, run it, and begin to copy its ids to the host."""
        if self.noise is not None:
            if isinstance(generator, list):
                for row, row_generator in zip(self.noise.split(1), generator, strict=True):
                    row.exponential_(generator=row_generator)
            else:
                self.noise.exponential_(generator=generator)
        self.replay()
        return PendingIds(self.ids, self.ranges)

    def run(self, limit: int, stops: list[int], generator: Generators) -> Iterator[Tensor]:
        """Yields ids [B] of step after step, until all rows have stopped or `limit` is reached.

        Raises UserError for logits that are not finite.
        """
        self.limit.fill_(limit)
        done = [False] * len(self.ids)
        current = self.launch(generator)
        for step in range(1, limit + 1):
            following = self.launch(generator) if step < limit else None
            ids = current.read()
            yield ids
            values = ids.tolist()
            done = [was or value in stops for was, value in zip(done, values, strict=True)]
            if following is None or all(done):
                return
            current = following


class PendingIds:
    """Ids on their way to the host."""

    def __init__(self, ids: Tensor, ranges: Tensor):
        self.event: torch.cuda.Event | None = None
        if not ids.is_cuda:
            self.ids = ids.clone()
            self.ranges = ranges.clone()
            return
        self.ids = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
        self.ranges = torch.empty(ranges.shape, dtype=ranges.dtype, pin_memory=True)
        self.ids.copy_(ids, non_blocking=True)
        self.ranges.copy_(ranges, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def read(self) -> Tensor:
        """Wait for the ids [B], which are on the host. Raises UserError for broken weights."""
        if self.event is not None:
            self.event.synchronize()
        check_ranges(self.ranges.tolist())
        return self.ids


class ThinkerStep(StaticStep):
    """The Thinker's step. With `reply_embeds` it also writes the Talker's text input."""

    def __init__(
        self,
        thinker: Thinker,
        rows: int,
        capacity: int,
        sampling: SamplingConfig,
        reply_embeds: ReplyEmbedsBuffer | None,
    ):
        self.reply_embeds = reply_embeds
        self.tokens = thinker.config.tokens
        super().__init__(thinker.model, thinker.lm_head, rows, capacity, sampling, None)

    def state(self) -> list[Tensor]:
        if self.reply_embeds is None:
            return super().state()
        return [*super().state(), self.reply_embeds.count, self.reply_embeds.closed]

    def step(self) -> None:
        ids = self.next_ids(self.tokens.endoftext)
        is_end = ids == self.tokens.im_end
        self.done.logical_or_(is_end)
        embeds = self.decoder.embed_tokens(ids)  # [B, D]
        hidden = self.decode(embeds)
        self.count.add_(1)
        if self.reply_embeds is not None:
            self.reply_embeds.add(hidden + embeds, is_end | (self.count >= self.limit))


class TalkerStep(StaticStep):
    """The Talker's step, which reads `reply_embeds`."""

    def __init__(
        self,
        talker: Talker,
        rows: int,
        capacity: int,
        sampling: SamplingConfig,
        suppressed: Tensor,
        reply_embeds: ReplyEmbedsBuffer,
    ):
        self.reply_embeds = reply_embeds
        self.talker = talker
        super().__init__(talker.model, talker.codec_head, rows, capacity, sampling, suppressed)

    def step(self) -> None:
        codes = self.next_ids(self.talker.config.codec_pad)
        self.done.logical_or_(self.talker.is_stop(codes))
        self.count.add_(1)
        embeds = self.decoder.embed_tokens(codes) + self.reply_embeds.at(self.count)  # [B, E]
        self.decode(self.talker.thinker_to_talker_proj(embeds))


def without_limit(sampling: SamplingConfig) -> SamplingConfig:
    """The settings that a step depends on; the limit of tokens is a buffer of it."""
    return replace(sampling, max_new_tokens=1)


class StaticGenerator:
    """generate_tokens() by static steps. Answers that are generated in turns do not share buffers.

    A graph belongs to its buffers and to the weights: make a new generator after replacing
    parameters.
    """

    def __init__(self, omni: "Omni"):
        self.omni = omni
        self.free: list[Workspace] = []  # those of answers that have ended

    @torch.no_grad()
    def generate_tokens(
        self,
        prefill: PrefillState,
        bos_tokens: list[int] | None,
        seed: int | list[int],
        sampling: tuple[SamplingConfig, SamplingConfig],
    ) -> Iterator[tuple[str, Tensor]]:
        """As generate_tokens() of generate.py, except that the ids yielded are on the host.

        The KV cache of the prefill is not changed.
        """
        workspace = self.free.pop() if self.free else Workspace(self.omni)
        try:
            yield from workspace.generate_tokens(prefill, bos_tokens, seed, sampling)
        finally:  # also where the caller stops early
            self.free.append(workspace)


class Workspace:
    """The steps and buffers of one answer at a time, kept for the next answer."""

    def __init__(self, omni: "Omni"):
        self.omni = omni
        self.steps: dict[tuple, StaticStep] = {}
        self.reply_embeds: dict[tuple, ReplyEmbedsBuffer] = {}

    def generate_tokens(
        self,
        prefill: PrefillState,
        bos_tokens: list[int] | None,
        seed: int | list[int],
        sampling: tuple[SamplingConfig, SamplingConfig],
    ) -> Iterator[tuple[str, Tensor]]:
        """See StaticGenerator.generate_tokens()."""
        thinker, tokens = self.omni.thinker, self.omni.config.thinker.tokens
        rows, length = prefill.attention_mask.shape
        limit = thinker.max_steps(length, sampling[0])
        if limit < 1:
            return
        capacity = cache_capacity(length + limit)
        reply_embeds = None
        if bos_tokens is not None:
            end, pad, voices = special_embeds(tokens, bos_tokens, thinker.model.embed_tokens)
            reply_embeds = self.get_reply_embeds(rows, capacity, end, pad)
        thinker_step = self.get_thinker_step(prefill, capacity, sampling[0], reply_embeds)
        thinker_ids = thinker_step.run(limit, [tokens.im_end], generators(seed, thinker.device))
        if reply_embeds is None:
            for ids in thinker_ids:
                yield "text", ids
            return

        inputs = TalkerInputs(
            prefill.hidden + prefill.text_embeds,
            prefill.position_ids,
            prefill.attention_mask,
            voices,
            [],
        )
        first_ids = next(thinker_ids)
        yield "text", first_ids
        if limit == 1:
            return  # a reply of one token has no states, so nothing is spoken

        # A generator: the Talker starts after the second ids of the Thinker.
        silent = first_ids.eq(tokens.im_end).tolist()
        codes = self.talker_codes(inputs, reply_embeds, silent, sampling[1], seed)
        for ids in thinker_ids:
            yield "text", ids
            step_codes = next(codes, None)
            if step_codes is not None:
                yield "code", step_codes
        for step_codes in codes:
            yield "code", step_codes

    def get_step(self, key: tuple, make: Callable[[], StaticStep]) -> StaticStep:
        """The step of a key: a cached one, or a new one that replaces the longest unused."""
        step = self.steps.pop(key, None) or make()
        while len(self.steps) >= MAX_CACHED_STEPS:
            self.steps.pop(next(iter(self.steps)))
        self.steps[key] = step
        return step

    def get_reply_embeds(
        self, rows: int, capacity: int, end: Tensor, pad: Tensor
    ) -> ReplyEmbedsBuffer:
        """An empty buffer for new replies."""
        key = (rows, capacity)
        if key not in self.reply_embeds:
            self.reply_embeds[key] = ReplyEmbedsBuffer(rows, capacity, end, pad)
        self.reply_embeds[key].reset(end, pad)
        return self.reply_embeds[key]

    def get_thinker_step(
        self,
        prefill: PrefillState,
        capacity: int,
        sampling: SamplingConfig,
        reply_embeds: ReplyEmbedsBuffer | None,
    ) -> StaticStep:
        """The Thinker's step, which continues a prefill."""
        thinker, mask = self.omni.thinker, prefill.attention_mask
        key = (thinker.config, len(mask), capacity, without_limit(sampling), reply_embeds is None)
        step = self.get_step(
            key, lambda: ThinkerStep(thinker, len(mask), capacity, sampling, reply_embeds)
        )
        assert prefill.cache is not None
        position = next_position(prefill.position_ids, mask)
        step.load_prefill(prefill.cache, mask, position, thinker.lm_head(prefill.hidden[:, -1]))
        step.history.copy_(thinker.id_history(prefill))
        return step

    def talker_codes(
        self,
        inputs: TalkerInputs,
        reply_embeds: ReplyEmbedsBuffer,
        silent: list[bool],
        sampling: SamplingConfig,
        seed: int | list[int],
    ) -> Iterator[Tensor]:
        """Prefill the Talker and yield codes [B]."""
        talker, _ = self.omni.require_speech()
        limit = talker.max_steps(inputs.prompt.shape[1], sampling)
        if limit < 1 or all(silent):
            return

        # Prefill by the plain path, which reads only the first text embedding of each row.
        inputs.reply_embeds = [
            row[:0] if is_silent else row[:1] for row, is_silent in zip(reply_embeds.embeds, silent)
        ]
        logits, state = talker.prefill(inputs)

        rows = len(silent)
        capacity = cache_capacity(inputs.prompt.shape[1] + 2 + limit)
        suppressed = talker.suppressed_ids(self.omni.num_codes)
        key = (talker.config, rows, capacity, without_limit(sampling), id(reply_embeds))
        step = self.get_step(
            key, lambda: TalkerStep(talker, rows, capacity, sampling, suppressed, reply_embeds)
        )
        step.load_prefill(state.cache, state.attention_mask, state.position, logits)
        step.done.copy_(torch.tensor(silent))
        step.history.copy_(talker.initial_history(rows, step.history.device))
        stops = list(talker.config.stop_codes)
        yield from step.run(limit, stops, generators(seed, reply_embeds.embeds.device))
