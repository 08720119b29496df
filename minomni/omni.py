"""The whole model: Thinker, Talker, Token2Wav, and the codec that a size trained here has."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minomni.config import OmniConfig
from minomni.errors import UserError
from minomni.inputs.prompt import Inputs
from minomni.inputs.tokenizer import Tokenizer
from minomni.talker.codec import Codec
from minomni.talker.talker import Talker, script
from minomni.thinker.thinker import Thinker
from minomni.token2wav.speaker import Voice
from minomni.token2wav.token2wav import Token2Wav


@dataclass
class Spoken:
    """Answers to a batch, as the parts made them."""

    tokens: list[list[int]]  # per row the text ids, stop id included
    codes: list[Tensor]  # per row the codec ids [n]
    waves: list[Tensor]  # per row the sound [samples], float32


class Omni(nn.Module):
    """Qwen2.5-Omni of any size. Its attributes are the prefixes of the checkpoint's tensor names."""

    def __init__(self, config: OmniConfig):
        super().__init__()
        self.config = config
        self.thinker = Thinker(config.thinker)
        self.talker = Talker(config.talker)
        self.token2wav = Token2Wav(config.token2wav)
        self.codec = None if config.codec is None else Codec(config.codec)
        self.voices: dict[str, Voice] = {}
        self.tokenizer: Tokenizer | None = None

    @property
    def table_rows(self) -> int:
        """Codec ids that Token2Wav can look up."""
        return self.config.token2wav.dit.num_embeds + 1

    def voice(self, name: str) -> Voice:
        """A voice by name. Raises UserError naming the voices there are."""
        if name not in self.voices:
            raise UserError(f"unknown voice {name!r}; this model has {', '.join(self.voices) or 'none (no spk_dict.pt)'}")
        return self.voices[name]

    @torch.no_grad()
    def generate(self, inputs: Inputs, voice: str | None, seed: int = 0) -> Spoken:
        """Answer a batch of prompts in text and, unless voice is None, in speech; one seed gives one answer.

        A row whose reply is only a stop id has no codes and a wave of no samples. Raises UserError.
        """
        generator = torch.Generator(self.thinker.device).manual_seed(seed)
        speaker = None if voice is None else self.voice(voice)
        reply = self.thinker.generate(inputs, self.config.thinker_sampling, generator)
        if speaker is None:
            return Spoken(reply.tokens, [], [])
        lines = script(reply, [speaker.bos_token] * len(reply.tokens), self.config.thinker.tokens, self.thinker.model.embed_tokens)
        codes = self.talker.generate(lines, self.config.talker_sampling, self.table_rows, generator)
        waves = [self.token2wav(row[None], speaker, self.config.flow, generator) if len(row) else torch.zeros(0) for row in codes]
        return Spoken(reply.tokens, codes, waves)
