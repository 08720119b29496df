"""The whole model: Thinker, Talker, Token2Wav, and the codec that a size trained here has. Messages in, a reply out."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minomni.config import OmniConfig
from minomni.errors import UserError
from minomni.files import write_atomically
from minomni.inputs.prompt import Inputs, Processor
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


@dataclass
class Reply:
    """One answer. In a notebook it shows its text and a player."""

    text: str
    wave: Tensor  # float32 [samples] in [-1, 1]; empty where no speech was asked for
    sample_rate: int  # Hz
    codes: Tensor  # the codec ids that were spoken [n]
    total_s: float  # seconds from messages to the last sample

    @property
    def seconds(self) -> float:
        """Length of the speech."""
        return len(self.wave) / self.sample_rate

    def save(self, path: str | Path) -> None:
        """Write the speech as a 16-bit wav file, whole or not at all."""
        import soundfile

        samples = self.wave.cpu().numpy()
        wav = dict(subtype="PCM_16", format="WAV")
        write_atomically(Path(path), lambda f: soundfile.write(f, samples, self.sample_rate, **wav))

    def _repr_html_(self) -> str:
        from html import escape

        from IPython.display import Audio

        player = Audio(self.wave.cpu().numpy(), rate=self.sample_rate)._repr_html_() if len(self.wave) else ""
        return f"<p>{escape(self.text)}</p>{player}"


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
            there = ", ".join(self.voices) or "none (no spk_dict.pt)"
            raise UserError(f"unknown voice {name!r}; this model has {there}")
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
        voices, config = [speaker.bos_token] * len(reply.tokens), self.config
        lines = script(reply, voices, config.thinker.tokens, self.thinker.model.embed_tokens)
        codes = self.talker.generate(lines, config.talker_sampling, self.table_rows, generator)
        waves = [self.token2wav(row[None], speaker, config.flow, generator) if len(row) else torch.zeros(0)
                 for row in codes]
        return Spoken(reply.tokens, codes, waves)

    def respond(self, messages: list[dict], voice: str | None = None, speech: bool = True,
                use_audio_in_video: bool = False, seed: int = 0) -> Reply:
        """Answer a conversation of message dictionaries, the ones Qwen's and transformers' users write.

        voice: a name in self.voices, the first one by default; speech=False answers in text alone. A conversation
        without a system message gets the one that this size was trained with. Same seed, same answer.
        Raises UserError for what cannot be read, does not fit the context, or names no voice.
        """
        began = time.perf_counter()
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer; load() a folder that holds one")
        if not messages:
            raise UserError("no messages were given; give at least one with role 'user'")
        if speech:
            voice = self.voice(voice or next(iter(self.voices), "")).name
        if messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.config.media.system_prompt}, *messages]
        inputs = Processor(self.config, self.tokenizer)([messages], use_audio_in_video)
        spoken = self.generate(inputs, voice if speech else None, seed)
        nothing = torch.zeros(0)
        return Reply(self.tokenizer.decode(spoken.tokens[0], skip_special=True), *(spoken.waves or [nothing]),
                     self.config.token2wav.sample_rate, *(spoken.codes or [nothing.long()]),
                     time.perf_counter() - began)
