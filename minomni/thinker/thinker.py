"""The Thinker: text, audio, images and video in one sequence, and a decoder that replies in text.

Source: paper sec. 2.1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minomni.config import SamplingConfig, ThinkerConfig
from minomni.decoder import Decoder, next_position
from minomni.errors import UserError
from minomni.inputs.patches import Grid
from minomni.inputs.prompt import Inputs
from minomni.kv_cache import KVCache
from minomni.layers import init_weights
from minomni.sampling import Generators, cut_at_stop, sample
from minomni.thinker.audio_encoder import AudioEncoder
from minomni.thinker.tmrope import position_ids as tmrope_ids
from minomni.thinker.vision_encoder import VisionEncoder


@dataclass
class PrefillState:
    """The result of a prefill: enough to generate a reply and the Talker's context."""

    hidden: Tensor  # [B, L, D] after the final norm
    text_embeds: Tensor  # [B, L, D] input embeddings, zero at media positions
    position_ids: Tensor  # [3, B, L]
    attention_mask: Tensor  # [B, L]
    input_ids: Tensor  # [B, L]
    cache: KVCache | None


@dataclass
class ThinkerOutput:
    """A reply, and all that the Talker gets of it."""

    tokens: list[list[int]]  # per row n ids, including the stop id if there is one
    prompt_hidden: Tensor  # [B, L, D]
    prompt_text_embeds: Tensor  # [B, L, D]
    # Per row [n - 1, D]: final hidden state plus embedding of each token but the last.
    reply_states: list[Tensor]
    position_ids: Tensor  # [3, B, L] of the prompt
    attention_mask: Tensor  # [B, L] of the prompt


def scatter_features(
    embeds: Tensor,
    where: Tensor,
    features: Tensor,
    name: str,
) -> Tensor:
    """Write features [n, D] in order to the n positions where the mask is true.

    embeds [B, L, D], where [B, L] bool -> [B, L, D]. Raises UserError if the number of
    positions is not n.
    """
    positions = int(where.sum())
    if positions != len(features):
        raise UserError(
            f"the prompt has {positions} places for {name}, and the {name} given make "
            f"{len(features)} tokens; build prompts with Processor, or give exactly "
            f"the media that the prompt names"
        )
    features = features.to(embeds.dtype)
    return embeds.masked_scatter(where[..., None], features)  # [B, L, D]


MEDIA = {"audio": "audio", "vision": "images and videos"}  # that each encoder reads
ENCODER_NAMES = {"audio": "audio_tower", "vision": "visual"}  # attributes of the Thinker


class LeftOut(nn.Module):
    """Stands for an encoder that was not loaded."""

    def __init__(self, name: str):
        """name: audio or vision."""
        super().__init__()
        self.name = name

    def forward(self, *inputs) -> Tensor:
        """Raises UserError."""
        raise UserError(
            f"the {self.name} encoder was left out when this model was loaded; load it with parts "
            f"(--parts) that hold +{self.name}, or give no {MEDIA[self.name]}"
        )


class Thinker(nn.Module):
    """Audio encoder, vision encoder, decoder and text head."""

    position_ids = staticmethod(tmrope_ids)  # an attribute, so that an ablation can replace it

    def __init__(self, config: ThinkerConfig):
        super().__init__()
        self.config = config
        self.audio_tower = AudioEncoder(config.audio)
        self.visual = VisionEncoder(config.vision)
        self.model = Decoder(config.text, config.text.hidden_size)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        init_weights(self.lm_head, depth=1)
        self.tie_head()
        # Whether the encoders stay on the host, and are copied to the device when they run.
        self.encoders_on_host = False

    def leave_out(self, name: str) -> None:
        """Replace an encoder, audio or vision, by one that says that it is not there."""
        self.register_module(ENCODER_NAMES[name], LeftOut(name))

    def tie_head(self) -> None:
        """Share the embedding table with the text head, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def encode_audio(self, mels: list[Tensor]) -> Tensor:
        """Log-mels [128, F] -> features [N, D]. Raises UserError without an encoder."""
        return self.run_encoder(self.audio_tower, mels)

    def encode_vision(self, patches: Tensor | None, grids: list[Grid]) -> Tensor:
        """Patches [N, patch_dim] -> features [N / 4, D]. Raises UserError without an encoder."""
        return self.run_encoder(self.visual, patches, grids)

    def run_encoder(self, encoder: nn.Module, *inputs) -> Tensor:
        """The features of an encoder. Its weights are on the Thinker's device only during the call,
        if it stays on the host.
        """
        if not self.encoders_on_host:
            return encoder(*inputs)
        tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
        copies = {name: tensor.to(self.device) for name, tensor in tensors}
        return functional_call(encoder, copies, inputs)

    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Token embeddings with the media features at their positions.

        -> (inputs_embeds [B, L, D], the same with zeros at media positions). Raises UserError if
        positions and media do not match.
        """
        tokens = self.config.tokens
        ids = inputs.input_ids.to(self.device)
        text_embeds = self.model.embed_tokens(ids)  # [B, L, D]

        # Encode the media of each kind, packed over the batch: [N, D]
        audio = images = videos = text_embeds.new_zeros(0, text_embeds.shape[2])
        if inputs.mels:
            audio = self.encode_audio(inputs.mels)
        if inputs.image_grids:
            images = self.encode_vision(inputs.image_patches, inputs.image_grids)
        if inputs.video_grids:
            videos = self.encode_vision(inputs.video_patches, inputs.video_grids)

        # Write the features over the embeddings of their placeholder tokens.
        is_audio = ids == tokens.audio
        is_image = ids == tokens.image
        is_video = ids == tokens.video
        embeds = scatter_features(text_embeds, is_audio, audio, "audio")
        embeds = scatter_features(embeds, is_image, images, "images")
        embeds = scatter_features(embeds, is_video, videos, "videos")
        is_media = is_audio | is_image | is_video
        return embeds, text_embeds.masked_fill(is_media[..., None], 0)

    def prefill(
        self,
        inputs: Inputs,
        cache: KVCache | None = None,
        mark: Callable[[str], object] = lambda event: None,
    ) -> PrefillState:
        """Run the decoder over a batch of prompts, or of whole conversations in training.

        mark("encode") is called after the encoders, mark("prefill") after the decoder. Raises
        UserError for a prompt that is longer than the context.
        """
        length = inputs.input_ids.shape[1]
        context = self.config.text.max_position_embeddings
        if length > context:
            raise UserError(
                f"the prompt has {length} tokens and the context holds {context}; "
                f"shorten the text or the media"
            )
        embeds, text_embeds = self.embed(inputs)
        mark("encode")
        mask = inputs.attention_mask.to(self.device)
        position_ids = self.position_ids(inputs, self.config).to(self.device)
        hidden = self.model(embeds, position_ids, mask, cache)
        mark("prefill")
        input_ids = inputs.input_ids.to(self.device)
        return PrefillState(hidden, text_embeds, position_ids, mask, input_ids, cache)

    def forward(self, inputs: Inputs) -> Tensor:
        """-> logits [B, L, V], row i for token i + 1."""
        return self.lm_head(self.prefill(inputs).hidden)

    @torch.no_grad()
    def steps(
        self, prefill: PrefillState, sampling: SamplingConfig, generator: Generators = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Generate a reply token by token; extends the cache of the prefill.

        Yields ids [B] as soon as they are known, with the Talker's input for the ids *before* them:
        final hidden state plus embedding [B, D], None in the first step. Rows that have stopped
        yield `endoftext`. Ends when all rows have stopped.
        """
        tokens = self.config.tokens
        mask = prefill.attention_mask
        position = next_position(prefill.position_ids, mask)  # [B]
        history = self.id_history(prefill)  # [B, V]
        done = torch.zeros_like(position, dtype=torch.bool)
        limit = self.max_steps(mask.shape[1], sampling)

        hidden = prefill.hidden[:, -1]  # [B, D]
        state = None
        for step in range(1, limit + 1):
            # Choose the next id of every row.
            ids = sample(self.lm_head(hidden), history, sampling, generator=generator)  # [B]
            ids = ids.masked_fill(done, tokens.endoftext)
            history.scatter_(1, ids[:, None], True)
            yield ids, state
            done = done | (ids == tokens.im_end)
            if step == limit or done.all():
                return

            # Run the decoder on it.
            embeds = self.model.embed_tokens(ids)[:, None]  # [B, 1, D]
            ones = torch.ones_like(mask[:, :1])
            mask = torch.cat((mask, ones), dim=1)  # [B, L + step]
            position_ids = position.expand(3, -1)[..., None]  # [3, B, 1]
            hidden = self.model(embeds, position_ids, mask, prefill.cache)[:, 0]  # [B, D]
            state = hidden + embeds[:, 0]
            position = position + 1

    def max_steps(self, prompt_length: int, sampling: SamplingConfig) -> int:
        """How many tokens a reply may have: as many as the sampling and the context allow."""
        context_left = self.config.text.max_position_embeddings - prompt_length
        return min(sampling.max_new_tokens, context_left)

    def id_history(self, prefill: PrefillState) -> Tensor:
        """The ids of each prompt without its padding, for the repetition penalty -> bool [B, V]."""
        mask, endoftext = prefill.attention_mask, self.config.tokens.endoftext
        history = mask.new_zeros(len(mask), self.config.text.vocab_size, dtype=torch.bool)
        history.scatter_(1, prefill.input_ids, True)
        # Padding is endoftext too: only a real one counts.
        is_real = prefill.input_ids.eq(endoftext) & mask.bool()
        history[:, endoftext] = is_real.any(1)
        return history

    @torch.no_grad()
    def generate(
        self, inputs: Inputs, sampling: SamplingConfig, generator: Generators = None
    ) -> ThinkerOutput:
        """Reply to a batch of prompts.

        Raises UserError for a prompt that is longer than the context.
        """
        prefill = self.prefill(inputs, self.model.new_cache())
        ids: list[Tensor] = []  # [B] each
        states = [prefill.hidden[:, :0]]  # [B, 0 or 1, D] each
        for step_ids, state in self.steps(prefill, sampling, generator):
            ids.append(step_ids)
            if state is not None:
                states.append(state[:, None])

        rows = cut_at_stop(ids, len(prefill.hidden), [self.config.tokens.im_end], keep_stop=True)
        tokens = [row.tolist() for row in rows]
        all_states = torch.cat(states, dim=1)  # [B, n - 1, D]
        reply_states = [
            row_states[: max(len(row) - 1, 0)]
            for row_states, row in zip(all_states, tokens, strict=True)
        ]
        return ThinkerOutput(
            tokens=tokens,
            prompt_hidden=prefill.hidden,
            prompt_text_embeds=prefill.text_embeds,
            reply_states=reply_states,
            position_ids=prefill.position_ids,
            attention_mask=prefill.attention_mask,
        )
