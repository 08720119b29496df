"""The whole model: Thinker, Talker, Token2Wav, and the codec that a size trained here has. Messages in, a reply out."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minomni.config import FlowConfig, OmniConfig
from minomni.errors import UserError
from minomni.inputs.prompt import Inputs, Processor
from minomni.inputs.tokenizer import Tokenizer
from minomni.listen import Session
from minomni.reply import End, Reply, SoundPiece, Spoken, TextPiece, Trace
from minomni.stream import converse, seeded, think_and_talk
from minomni.talker.codec import Codec
from minomni.talker.talker import Talker
from minomni.thinker.thinker import Thinker
from minomni.token2wav.speaker import Voice
from minomni.token2wav.stream import Schedule
from minomni.token2wav.token2wav import Token2Wav


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
        self.loaded_from: Path | None = None  # the folder; saving keeps what else it holds

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
        speaker, config = None if voice is None else self.voice(voice), self.config
        reading = self.thinker.read(inputs, self.thinker.model.new_cache())
        bos_tokens = None if speaker is None else [speaker.bos_token] * len(reading.hidden)
        steps = {"text": [], "code": []}
        for kind, ids in think_and_talk(self, reading, bos_tokens, seed):
            steps[kind].append(ids)
        tokens = [row.tolist() for row in until_stop(steps["text"], len(reading.hidden), [config.thinker.tokens.im_end],
                                                     keep=True)]
        if speaker is None:
            return Spoken(tokens, [], [])
        codes = until_stop(steps["code"], len(tokens), [config.talker.codec_pad, config.talker.codec_eos])
        generator = seeded(seed)
        waves = [self.token2wav(row[None], speaker, config.flow, generator) if len(row) else torch.zeros(0)
                 for row in codes]
        return Spoken(tokens, codes, waves)

    def stream(self, messages: list[dict], voice: str | None = None, speech: bool = True,
               use_audio_in_video: bool = False, seed: int = 0, schedule: Schedule | str | None = "eager",
               flow: FlowConfig | None = None) -> Iterator[TextPiece | SoundPiece | End]:
        """Answer a conversation as respond() does, in pieces and while it is still being thought: text and sound in
        order of readiness, at last End with the reply.

        schedule: how the sound is cut, "eager" to begin as soon as can be; None makes it at the end, in one go. flow:
        how the DiT's equation is solved, by default as the model's configuration says, but by Euler's steps where the
        sound is cut. Text and codes are respond()'s. Closing the iterator, or letting go of it, ends all work and frees the memory. Raises UserError
        before the first piece.
        """
        trace = Trace()
        speaker, inputs = self.prepare(messages, voice, speech, use_audio_in_video)
        trace.note("input")
        with torch.no_grad():
            reading = self.thinker.read(inputs, self.thinker.model.new_cache(), trace.note)
        return converse(self, reading, speaker, schedule, flow, seed, trace, [])

    def respond(self, messages: list[dict], voice: str | None = None, speech: bool = True,
                use_audio_in_video: bool = False, seed: int = 0) -> Reply:
        """Answer a conversation of message dictionaries, the ones Qwen's and transformers' users write.

        voice: a name in self.voices, the first one by default; speech=False answers in text alone. A conversation
        without a system message gets the one that this size was trained with. Same seed, same answer.
        Raises UserError for what cannot be read, does not fit the context, or names no voice.
        """
        *_, end = self.stream(messages, voice, speech, use_audio_in_video, seed, schedule=None)
        return end.reply

    def listen(self, voice: str | None = None, speech: bool = True, system: str | None = None) -> Session:
        """Begin a conversation that is read while it is being said and shown; see listen.py. Raises UserError."""
        return Session(self, voice, speech, system)

    def prepare(self, messages: list[dict], voice: str | None, speech: bool,
                use_audio_in_video: bool) -> tuple[Voice | None, Inputs]:
        """Who speaks, None without speech, and what the Thinker is to read. Raises UserError."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer; load() a folder that holds one")
        if not messages:
            raise UserError("no messages were given; give at least one with role 'user'")
        speaker = self.voice(voice or next(iter(self.voices), "")) if speech else None
        if messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.config.media.system_prompt}, *messages]
        return speaker, Processor(self.config, self.tokenizer)([messages], use_audio_in_video)


def until_stop(steps: list[Tensor], rows: int, stops: list[int], keep: bool = False) -> list[Tensor]:
    """Ids of a batch step by step, each [B] -> per row those before the first stop id, or with it, [n]."""
    table = torch.stack(steps, dim=1) if steps else torch.zeros(rows, 0, dtype=torch.long)  # [B, n]
    ends = torch.isin(table, torch.tensor(stops, device=table.device))
    return [row[:int(end.long().argmax()) + keep if end.any() else len(row)] for row, end in zip(table, ends)]
