"""The Talker: reads the Thinker's states and words, speaks in codec ids (spec: paper sec. 2.4;
hand-over: release).

    position   0 ... L-1          L                  L+1            L+2             ...
    input      state + embedding  voice + pad code   r_0 + bos code r_1 + code_0    ... end + code, pad + code, ...
    output                                           code_0         code_1          ... codec_eos

r_i is the Thinker's final state at reply token i plus that token's embedding; `end` and `pad` are
text embeddings.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minomni.config import IGNORE_INDEX, SamplingConfig, TalkerConfig, TokenIds
from minomni.decoder import Decoder, next_position
from minomni.layers import KVCache, init_weights
from minomni.sampling import sample
from minomni.thinker.thinker import ThinkerOutput


@dataclass
class TalkerInputs:
    """What the Talker speaks from; all in the Thinker's width E."""

    prompt: Tensor  # [B, L, E] final states plus embeddings, media embeddings left out
    position_ids: Tensor  # [3, B, L]
    attention_mask: Tensor  # [B, L]
    voice: Tensor  # [B, E] embedding of the voice's token
    reply_embeds: list[
        Tensor
    ]  # per row what reply_embeds() makes, one line for each step and the last one for ever


@dataclass
class TalkerState:
    """Where a Talker is in its sequence."""

    cache: KVCache
    attention_mask: Tensor  # [B, seen so far]
    position: Tensor  # [B] id of the next input


def reply_embeds(states: Tensor, end: Tensor, pad: Tensor) -> Tensor:
    """The text a Talker speaks: r_0 ... r_{n-2} [n - 1, E], then `end` [E], then `pad` [E]. -> [n +
    1, E].

    A reply of one token has no states: nothing to say, no line at all [0, E].
    """
    return torch.cat((states, end[None], pad[None])) if len(states) else states


def talker_inputs(
    reply: ThinkerOutput, voices: list[int], tokens: TokenIds, table: nn.Embedding
) -> TalkerInputs:
    """Turn an answer into a script. voices: token id of the voice of each row; table: the Thinker's
    embeddings.
    """
    ids = torch.tensor(
        [tokens.tts_text_end, tokens.tts_text_pad, *voices], device=table.weight.device
    )
    end, pad, *voices = table(ids)  # [E] each
    return TalkerInputs(
        reply.prompt_hidden + reply.prompt_text_embeds,
        reply.position_ids,
        reply.attention_mask,
        torch.stack(voices),
        [reply_embeds(row, end, pad) for row in reply.reply_states],
    )


class Talker(nn.Module):
    """A decoder over codec ids whose inputs live in the Thinker's width and are projected down."""

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
        """embeds [B, L, E], position_ids [3, B, L], attention_mask [B, past + L] -> logits [B, L,
        V] in fp32.
        """
        return self.codec_head(
            self.hidden_states(embeds, position_ids, attention_mask, cache)
        ).float()

    def hidden_states(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """What forward() makes its logits of [B, L, D]."""
        return self.model(self.thinker_to_talker_proj(embeds), position_ids, attention_mask, cache)

    def code_embeds(self, codes: Tensor | int) -> Tensor:
        """Codec ids -> their embeddings [..., E]."""
        return self.model.embed_tokens(torch.as_tensor(codes, device=self.codec_head.weight.device))

    def prefill_inputs(self, script: TalkerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt, voice, line 0 -> (embeds [B, L + 2, E], position_ids [3, B, L + 2],
        attention_mask [B, L + 2]).
        """
        silence = torch.zeros_like(script.voice[0])
        first = torch.stack([row[0] if len(row) else silence for row in script.text])  # [B, E]
        voice = script.voice + self.code_embeds(self.config.codec_pad)  # [B, E]
        start = first + self.code_embeds(self.config.codec_bos)  # [B, E]
        last = script.position_ids[
            :, :, -1:
        ]  # the prompt ends in text, and the two go on from there
        return (
            torch.cat((script.prompt, voice[:, None], start[:, None]), dim=1),
            torch.cat((script.position_ids, last + 1, last + 2), dim=2),
            torch.cat(
                (script.attention_mask, script.attention_mask.new_ones(len(voice), 2)), dim=1
            ),
        )

    def prefill(self, script: TalkerInputs) -> tuple[Tensor, TalkerState]:
        """Read prompt, voice and first line -> (logits [B, V] of the first code, state)."""
        embeds, position_ids, mask = self.prefill_inputs(script)
        cache = self.model.new_cache()
        logits = self(embeds, position_ids, mask, cache)[:, -1]
        return logits, TalkerState(cache, mask, next_position(position_ids, mask))

    def step(self, codes: Tensor, line: Tensor, state: TalkerState) -> Tensor:
        """Feed the codes just spoken [B] with the next line of text [B, E] -> logits [B, V]; the
        state moves on.
        """
        embeds = (self.code_embeds(codes) + line)[:, None]  # [B, 1, E]
        state.attention_mask = torch.cat(
            (state.attention_mask, torch.ones_like(codes)[:, None]), dim=1
        )
        logits = self(
            embeds, state.position.expand(3, -1)[..., None], state.attention_mask, state.cache
        )[:, -1]
        state.position = state.position + 1
        return logits

    def suppressed_ids(self, table_rows: int) -> Tensor:
        """Ids that are never spoken: bos, and all beyond the DiT's table but the two that end
        speech.
        """
        ids = torch.arange(self.config.decoder.vocab_size)
        stops = (ids == self.config.codec_pad) | (ids == self.config.codec_eos)
        return ids[(ids == self.config.codec_bos) | ((ids >= table_rows) & ~stops)]

    @torch.no_grad()
    def steps(
        self,
        script: TalkerInputs,
        sampling: SamplingConfig,
        table_rows: int,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Speak code by code: yields ids [B]; rows that have stopped, or have no text, yield
        codec_pad.

        The repetition penalty also sees what stands in for the prompt in the release's id history:
        mask, pad and bos. script.text is read one line a step, so a caller may make it longer
        between steps.
        """
        config, suppress = self.config, self.suppressed_ids(table_rows)
        done = torch.tensor([not len(row) for row in script.text], device=script.prompt.device)
        history = done.new_zeros(len(done), config.decoder.vocab_size)
        history[:, [config.codec_mask, config.codec_pad, config.codec_bos]] = True
        room = config.decoder.max_position_embeddings - script.prompt.shape[1] - 2
        for step in range(min(sampling.max_new_tokens, room)):
            if done.all():
                return
            if step:
                line = torch.stack(
                    [
                        row[min(step, len(row) - 1)]
                        if len(row)
                        else voice  # any vector: the row is silent
                        for row, voice in zip(script.text, script.voice)
                    ]
                )
                logits = self.step(codes, line, state)
            else:
                logits, state = self.prefill(script)
            codes = sample(logits, history, sampling, suppress, generator).masked_fill(
                done, config.codec_pad
            )
            history.scatter_(1, codes[:, None], True)
            yield codes
            done = done | (codes == config.codec_pad) | (codes == config.codec_eos)

    def generate(
        self,
        script: TalkerInputs,
        sampling: SamplingConfig,
        table_rows: int,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Speak a batch of scripts -> per row codes before the stop id [n], all below table_rows;
        none without text.
        """
        steps = list(self.steps(script, sampling, table_rows, generator))
        rows = (
            torch.stack(steps, dim=1)
            if steps
            else torch.zeros(len(script.text), 0, dtype=torch.long)
        )  # [B, n]
        ends = (rows == self.config.codec_pad) | (rows == self.config.codec_eos)
        return [
            row[: int(end.long().argmax()) if end.any() else len(row)]
            for row, end in zip(rows, ends)
        ]

    def teacher_forced(
        self, script: TalkerInputs, codes: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layout at the top of this file for spoken codes [m] per row, rows padded on the
        right.

        -> (embeds [B, T, E], position_ids [3, B, T], attention_mask [B, T], targets [B, T] with -100 where nothing is
        asked), T = L + 2 + the longest m. forward() on the first three gives the logits of generate(), step by step.
        """
        embeds, position_ids, mask = self.prefill_inputs(script)
        device, lengths = (
            embeds.device,
            torch.tensor([len(row) for row in codes], device=embeds.device),
        )
        tails = [
            lines[torch.arange(1, len(row) + 1, device=device).clamp(max=len(lines) - 1)]
            + self.code_embeds(row)
            for lines, row in zip(script.text, codes)
        ]  # [m, E] each
        later = torch.arange(int(lengths.max()), device=device)
        positions = (next_position(position_ids, mask)[:, None] + later).expand(
            3, -1, -1
        )  # [3, B, longest m]
        targets = mask.new_full((len(codes), embeds.shape[1] + len(later)), IGNORE_INDEX)
        for row, spoken in enumerate(codes):
            if len(script.text[row]):
                begin = embeds.shape[1] - 1
                targets[row, begin : begin + len(spoken)] = spoken.to(device)
                targets[row, begin + len(spoken)] = self.config.codec_eos
        embeds = torch.cat((embeds, pad_sequence(tails, batch_first=True)), dim=1)  # [B, T, E]
        mask = torch.cat((mask, (later < lengths[:, None]).to(mask.dtype)), dim=1)  # [B, T]
        return embeds, torch.cat((position_ids, positions), dim=2), mask, targets
