"""The Talker: reads the Thinker's hidden states and text, and generates speech codes.

Source: paper sec. 2.4; the input layout is that of the release.

    position  0 ... L-1          L                 L+1             L+2           ...
    input     state + embedding  voice + pad code  r_0 + bos code  r_1 + code_0  ... pad + code
    output                                         code_0          code_1        ... codec_eos

r_i is the Thinker's final hidden state at reply token i plus that token's embedding. After the last
r_i comes the text embedding `end` once, then the text embedding `pad`, each plus the last code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minomni.config import IGNORE_INDEX, SamplingConfig, TalkerConfig, TokenIds
from minomni.decoder import Decoder, next_position
from minomni.kv_cache import KVCache
from minomni.layers import init_weights
from minomni.sampling import Generators, cut_at_stop, sample
from minomni.thinker.thinker import ThinkerOutput


class ReplyEmbeds(Protocol):
    """Text embeddings [E] of one reply by step: a tensor [n, E], or a list that still grows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass
class TalkerInputs:
    """What the Talker generates speech from; all in the Thinker's width E."""

    prompt: Tensor  # [B, L, E] final hidden states plus text embeddings, which are 0 at media
    position_ids: Tensor  # [3, B, L]
    attention_mask: Tensor  # [B, L]
    voice: Tensor  # [B, E] embedding of the voice's token
    # Per row the result of reply_embeds(): one embedding per step, the last one repeats.
    reply_embeds: Sequence[ReplyEmbeds]


@dataclass
class TalkerState:
    """The state of a Talker between two steps."""

    cache: KVCache
    attention_mask: Tensor  # [B, positions so far]
    position: Tensor  # [B] position id of the next input


def reply_embeds(states: Tensor, end: Tensor, pad: Tensor) -> Tensor:
    """The text input: r_0 ... r_{n-2} [n - 1, E], `end` [E], `pad` [E] -> [n + 1, E].

    A reply of one token has no states, so nothing is spoken: [0, E].
    """
    if not len(states):
        return states
    return torch.cat((states, end[None], pad[None]))


def special_embeds(
    tokens: TokenIds, voices: list[int], table: nn.Embedding
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of the Talker's special tokens: text end [E], text pad [E] and the voices [B, E].

    voices: token id of the voice of each row; table: the Thinker's embedding table.
    """
    ids = [tokens.tts_text_end, tokens.tts_text_pad, *voices]
    embeds = table(torch.tensor(ids, device=table.weight.device)).detach()
    return embeds[0], embeds[1], embeds[2:]


def talker_inputs(
    reply: ThinkerOutput, voices: list[int], tokens: TokenIds, table: nn.Embedding
) -> TalkerInputs:
    """The Talker's inputs for a reply; voices and table as in special_embeds()."""
    end, pad, voice_embeds = special_embeds(tokens, voices, table)
    return TalkerInputs(
        prompt=reply.prompt_hidden + reply.prompt_text_embeds,
        position_ids=reply.position_ids,
        attention_mask=reply.attention_mask,
        voice=voice_embeds,
        reply_embeds=[reply_embeds(states, end, pad) for states in reply.reply_states],
    )


class Talker(nn.Module):
    """A decoder over codec ids. Its inputs have the Thinker's width and are projected down."""

    def __init__(self, config: TalkerConfig):
        super().__init__()
        self.config = config
        self.thinker_to_talker_proj = nn.Linear(config.embedding_size, config.decoder.hidden_size)
        self.model = Decoder(config.decoder, config.embedding_size)
        self.codec_head = nn.Linear(
            config.decoder.hidden_size, config.decoder.vocab_size, bias=False
        )
        init_weights(self.thinker_to_talker_proj, depth=1)
        init_weights(self.codec_head, depth=1)

    def forward(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [B, L, V] in fp32.

        embeds [B, L, E], position_ids [3, B, L], attention_mask [B, past + L].
        """
        hidden = self.hidden_states(embeds, position_ids, attention_mask, cache)
        return self.codec_head(hidden).float()

    def hidden_states(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The hidden states [B, L, D] from which forward() computes its logits."""
        projected = self.thinker_to_talker_proj(embeds)  # [B, L, D]
        return self.model(projected, position_ids, attention_mask, cache)

    def code_embeds(self, codes: Tensor | int) -> Tensor:
        """Codec ids [...] -> their embeddings [..., E]."""
        return self.model.embed_tokens(torch.as_tensor(codes, device=self.codec_head.weight.device))

    def prefill_inputs(self, inputs: TalkerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt, voice and first reply embedding, as the decoder reads them.

        -> (embeds [B, L + 2, E], position_ids [3, B, L + 2], attention_mask [B, L + 2])
        """
        # A row without text is never spoken; zeros take the place of its first embedding.
        zeros = torch.zeros_like(inputs.voice[0])
        first_text = [row[0] if len(row) else zeros for row in inputs.reply_embeds]
        voice = inputs.voice + self.code_embeds(self.config.codec_pad)  # [B, E]
        start = torch.stack(first_text) + self.code_embeds(self.config.codec_bos)  # [B, E]
        parts = [inputs.prompt, voice[:, None], start[:, None]]
        embeds = torch.cat(parts, dim=1)

        # The prompt ends in text, so the next two positions follow its last one.
        last = inputs.position_ids[:, :, -1:]
        position_ids = torch.cat((inputs.position_ids, last + 1, last + 2), dim=2)
        ones = inputs.attention_mask.new_ones(len(voice), 2)
        attention_mask = torch.cat((inputs.attention_mask, ones), dim=1)
        return embeds, position_ids, attention_mask

    def prefill(self, inputs: TalkerInputs) -> tuple[Tensor, TalkerState]:
        """Run the prefill -> (logits [B, V] of the first code, state)."""
        embeds, position_ids, mask = self.prefill_inputs(inputs)
        cache = self.model.new_cache()
        logits = self(embeds, position_ids, mask, cache)[:, -1]
        return logits, TalkerState(cache, mask, next_position(position_ids, mask))

    def step(self, codes: Tensor, text: Tensor, state: TalkerState) -> Tensor:
        """One decoding step: updates state.

        The last codes [B] and the text embeddings of this step [B, E] -> logits [B, V].
        """
        embeds = (self.code_embeds(codes) + text)[:, None]  # [B, 1, E]
        position_ids = state.position.expand(3, -1)[..., None]  # [3, B, 1]
        ones = torch.ones_like(codes)[:, None]
        state.attention_mask = torch.cat((state.attention_mask, ones), dim=1)
        logits = self(embeds, position_ids, state.attention_mask, state.cache)[:, -1]
        state.position = state.position + 1
        return logits

    def suppressed_ids(self, num_codes: int) -> Tensor:
        """Which ids are never sampled: bos, and all from num_codes on but the stop ids.

        -> bool [V] on the device of the weights.
        """
        vocab_size = self.config.decoder.vocab_size
        ids = torch.arange(vocab_size, device=self.codec_head.weight.device)
        outside = (ids >= num_codes) & ~self.is_stop(ids)
        return (ids == self.config.codec_bos) | outside

    def is_stop(self, ids: Tensor) -> Tensor:
        """Which ids end speech."""
        pad, eos = self.config.stop_codes
        return (ids == pad) | (ids == eos)

    def max_steps(self, prompt_length: int, sampling: SamplingConfig) -> int:
        """How many codes a reply may have: as many as the sampling and the context allow."""
        prefill_length = prompt_length + 2  # voice and bos
        context_left = self.config.decoder.max_position_embeddings - prefill_length
        return min(sampling.max_new_tokens, context_left)

    def initial_history(self, rows: int, device: torch.device) -> Tensor:
        """The ids before the first code, for the repetition penalty -> bool [B, V]."""
        config = self.config
        history = torch.zeros(rows, config.decoder.vocab_size, dtype=torch.bool, device=device)
        # These stand for the prompt in the release's id history.
        history[:, [config.codec_mask, config.codec_pad, config.codec_bos]] = True
        return history

    @torch.no_grad()
    def steps(
        self,
        inputs: TalkerInputs,
        sampling: SamplingConfig,
        num_codes: int,
        generator: Generators = None,
    ) -> Iterator[Tensor]:
        """Generate code by code: yields ids [B]; rows that stopped or have no text yield codec_pad.

        inputs.reply_embeds is read one embedding per step, so a caller may extend its rows between
        steps.
        """
        suppressed = self.suppressed_ids(num_codes)
        silent = [len(row) == 0 for row in inputs.reply_embeds]
        done = torch.tensor(silent, device=inputs.prompt.device)
        history = self.initial_history(len(done), done.device)
        limit = self.max_steps(inputs.prompt.shape[1], sampling)
        if limit < 1 or done.all():
            return

        logits, state = self.prefill(inputs)
        for step in range(1, limit + 1):
            codes = sample(logits, history, sampling, suppressed, generator)
            codes = codes.masked_fill(done, self.config.codec_pad)
            history.scatter_(1, codes[:, None], True)
            yield codes
            done = done | self.is_stop(codes)
            if step == limit or done.all():
                return
            logits = self.step(codes, text_at(inputs, step), state)

    def generate(
        self,
        inputs: TalkerInputs,
        sampling: SamplingConfig,
        num_codes: int,
        generator: Generators = None,
    ) -> list[Tensor]:
        """Generate a batch -> per row its codes before the stop id [n], all below num_codes.

        A row without text has none.
        """
        steps = list(self.steps(inputs, sampling, num_codes, generator))
        return cut_at_stop(steps, len(inputs.reply_embeds), self.config.stop_codes)

    def teacher_forced(
        self, inputs: TalkerInputs, codes: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs and targets for given codes [m] per row, rows padded on the right.

        -> (embeds [B, T, E], position_ids [3, B, T], attention_mask [B, T], targets [B, T]), with
        T = L + 2 + the longest m and targets -100 where there is no loss. The layout is that at the
        top of this file: forward() on the first three gives the logits of generate(), step by step.
        """
        embeds, position_ids, mask = self.prefill_inputs(inputs)
        device = embeds.device
        lengths = torch.tensor([len(row) for row in codes], device=device)
        steps = torch.arange(int(lengths.max()), device=device)

        total = embeds.shape[1] + len(steps)
        targets = mask.new_full((len(codes), total), IGNORE_INDEX)
        begin = embeds.shape[1] - 1  # the last input of the prefill predicts the first code
        code_embeds = []  # [m, E] each
        texts = cast(Sequence[Tensor], inputs.reply_embeds)  # whole replies: none grows here
        for row, (row_codes, text) in enumerate(zip(codes, texts, strict=True)):
            # Input i + 1 is code i plus the text of step i + 1, the last of which repeats.
            text_steps = torch.arange(1, len(row_codes) + 1, device=device)
            text_steps = text_steps.clamp(max=len(text) - 1)
            code_embeds.append(text[text_steps] + self.code_embeds(row_codes))
            if len(text):
                end = begin + len(row_codes)
                targets[row, begin:end] = row_codes.to(device)
                targets[row, end] = self.config.codec_eos

        positions = next_position(position_ids, mask)[:, None] + steps  # [B, longest m]
        position_ids = torch.cat((position_ids, positions.expand(3, -1, -1)), dim=2)
        embeds = torch.cat((embeds, pad_sequence(code_embeds, batch_first=True)), dim=1)
        code_mask = (steps < lengths[:, None]).to(mask.dtype)
        return embeds, position_ids, torch.cat((mask, code_mask), dim=1), targets


def text_at(inputs: TalkerInputs, step: int) -> Tensor:
    """The text embedding of every row at a step [B, E]; the last one of a row repeats."""
    embeds = []
    for row, voice in zip(inputs.reply_embeds, inputs.voice, strict=True):
        if len(row):
            embeds.append(row[min(step, len(row) - 1)])
        else:
            embeds.append(voice)  # any vector: a row without text yields only padding
    return torch.stack(embeds)
