"""The Thinker: text, sound and pictures in one sequence, and a decoder that answers in text (spec:
paper sec. 2.1).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minomni.config import SamplingConfig, ThinkerConfig
from minomni.decoder import Decoder, next_position
from minomni.errors import UserError
from minomni.inputs.prompt import Inputs
from minomni.layers import KVCache, init_weights
from minomni.sampling import sample
from minomni.thinker.audio_encoder import AudioEncoder
from minomni.thinker.tmrope import position_ids as tmrope_ids
from minomni.thinker.vision_encoder import VisionEncoder


@dataclass
class PrefillState:
    """What reading a prompt leaves behind: enough to answer, and to give the Talker its context."""

    hidden: Tensor  # [B, L, D] after the final norm
    text_embeds: Tensor  # [B, L, D] input embeddings, zero where media are
    position_ids: Tensor  # [3, B, L]
    attention_mask: Tensor  # [B, L]
    input_ids: Tensor  # [B, L]
    cache: KVCache | None


@dataclass
class ThinkerOutput:
    """An answer, and all that the Talker is given of it."""

    tokens: list[list[int]]  # per row n ids, the stop id included where there is one
    prompt_hidden: Tensor  # [B, L, D]
    prompt_text_embeds: Tensor  # [B, L, D]
    reply_states: list[
        Tensor
    ]  # per row [n - 1, D], final state + embedding of each token but the last
    position_ids: Tensor  # [3, B, L] of the prompt
    attention_mask: Tensor  # [B, L] of the prompt


def scatter_features(embeds: Tensor, where: Tensor, features: Tensor, name: str) -> Tensor:
    """Put features [n, D] in order into the n places where [B, L] is true of embeds [B, L, D]."""
    places = int(where.sum())
    if places != len(features):
        raise UserError(
            f"the prompt has {places} places for {name}, and the {name} given make {len(features)} tokens; "
            f"build prompts with Processor, or give exactly the media that the prompt names"
        )
    return embeds.masked_scatter(where[..., None], features.to(embeds.dtype))  # [B, L, D]


class Thinker(nn.Module):
    """Ears, eyes, decoder and text head."""

    position_ids = staticmethod(tmrope_ids)  # an ablation puts plain M-RoPE in its place

    def __init__(self, config: ThinkerConfig):
        super().__init__()
        self.config = config
        self.audio_tower = AudioEncoder(config.audio)
        self.visual = VisionEncoder(config.vision)
        self.model = Decoder(config.text, config.text.hidden_size)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        init_weights(self.lm_head, depth=1)
        self.tie_head()

    def tie_head(self) -> None:
        """Make the embedding table the weight of the text head, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Token embeddings with media in their places -> (inputs_embeds [B, L, D], the same with
        media rows zero).

        Raises UserError where places and media do not match.
        """
        tokens, ids = self.config.tokens, inputs.input_ids.to(self.device)
        words = self.model.embed_tokens(ids)  # [B, L, D]
        nothing = words.new_zeros(0, words.shape[2])
        heard = self.audio_tower(inputs.mels) if inputs.mels else nothing  # [N, D]
        pictures = (
            self.visual(inputs.image_patches, inputs.image_grids) if inputs.image_grids else nothing
        )
        videos = (
            self.visual(inputs.video_patches, inputs.video_grids) if inputs.video_grids else nothing
        )
        embeds, media = words, torch.zeros_like(ids, dtype=torch.bool)
        for token, name, features in (
            (tokens.audio, "audio", heard),
            (tokens.image, "images", pictures),
            (tokens.video, "videos", videos),
        ):
            embeds = scatter_features(embeds, ids == token, features, name)
            media = media | (ids == token)
        return embeds, words.masked_fill(media[..., None], 0)

    def read(
        self,
        inputs: Inputs,
        cache: KVCache | None = None,
        note: Callable[[str], object] = lambda what: None,
    ) -> PrefillState:
        """Run the decoder over a batch of prompts, or of whole conversations in training.

        note("encode") is called when all has been heard and seen, note("prefill") when all has been
        read. Raises UserError for a prompt that is longer than the context.
        """
        length, context = inputs.input_ids.shape[1], self.config.text.max_position_embeddings
        if length > context:
            raise UserError(
                f"the prompt has {length} tokens and the context holds {context}; "
                f"shorten the text or the media"
            )
        embeds, text_embeds = self.embed(inputs)
        note("encode")
        mask, ids = inputs.attention_mask.to(self.device), inputs.input_ids.to(self.device)
        position_ids = self.position_ids(inputs, self.config).to(self.device)
        hidden = self.model(embeds, position_ids, mask, cache)
        note("prefill")
        return PrefillState(hidden, text_embeds, position_ids, mask, ids, cache)

    def forward(self, inputs: Inputs) -> Tensor:
        """-> logits [B, L, V], row i for token i + 1."""
        return self.lm_head(self.read(inputs).hidden)

    @torch.no_grad()
    def steps(
        self,
        reading: PrefillState,
        sampling: SamplingConfig,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Answer token by token, extending the reading's cache.

        Yields ids [B] as soon as they are known, and what the Talker gets for the ids *before*
        them: final state plus embedding [B, D], None in the first step. Rows that have stopped
        yield `endoftext`. Ends when all rows have.
        """
        tokens, mask = self.config.tokens, reading.attention_mask
        position = next_position(reading.position_ids, mask)  # [B]
        history = mask.new_zeros(len(mask), self.config.text.vocab_size, dtype=torch.bool)
        history.scatter_(1, reading.input_ids, True)
        said = reading.input_ids.eq(tokens.endoftext) & mask.bool()  # padding is not history
        history[:, tokens.endoftext] = said.any(1)
        done, hidden, state = (
            torch.zeros_like(position, dtype=torch.bool),
            reading.hidden[:, -1],
            None,
        )
        for step in range(
            min(sampling.max_new_tokens, self.config.text.max_position_embeddings - mask.shape[1])
        ):
            if step:
                words = self.model.embed_tokens(ids)[:, None]  # [B, 1, D]
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)  # [B, L + step]
                here = (position + step - 1).expand(3, -1)[..., None]  # [3, B, 1]
                hidden = self.model(words, here, mask, reading.cache)[:, 0]  # [B, D]
                state = hidden + words[:, 0]
            ids = sample(self.lm_head(hidden), history, sampling, generator=generator)  # [B]
            ids = ids.masked_fill(done, tokens.endoftext)
            history.scatter_(1, ids[:, None], True)
            yield ids, state
            done = done | (ids == tokens.im_end)
            if done.all():
                return

    @torch.no_grad()
    def generate(
        self, inputs: Inputs, sampling: SamplingConfig, generator: torch.Generator | None = None
    ) -> ThinkerOutput:
        """Answer a batch of prompts. Raises UserError for a prompt that is longer than the context."""
        reading, end = self.read(inputs, self.model.new_cache()), self.config.tokens.im_end
        steps = list(self.steps(reading, sampling, generator))
        rows = (
            torch.stack([ids for ids, _ in steps], dim=1).tolist()
            if steps
            else [[]] * len(reading.hidden)
        )
        tokens = [row[: row.index(end) + 1] if end in row else row for row in rows]
        nothing = reading.hidden[:, 0, None][:, :0]  # [B, 0, D]
        states = torch.cat(
            [nothing, *(state[:, None] for _, state in steps[1:])], dim=1
        )  # [B, n - 1, D]
        return ThinkerOutput(
            tokens,
            reading.hidden,
            reading.text_embeds,
            [row[: max(len(ids) - 1, 0)] for row, ids in zip(states, tokens)],
            reading.position_ids,
            reading.attention_mask,
        )
