"""The whole model: Thinker, Talker, Token2Wav, and the codec of sizes that are trained here.
Messages in, a reply out.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeGuard, overload

import torch
from torch import Tensor, nn

from minomni.arguments import check_bool, check_int, check_seed
from minomni.chat.generate import generate_tokens, seeded_generator, stream_reply
from minomni.chat.generation_options import sampling_configs
from minomni.chat.reply import (
    AudioChunk,
    GenerateOutput,
    Replies,
    Reply,
    ReplyDone,
    TextChunk,
    Timings,
)
from minomni.chat.session import Session
from minomni.chat.static_generate import StaticGenerator
from minomni.chat.stream_options import LOW_LATENCY, stream_options
from minomni.chat.user_turn import ONLY_SILENCE
from minomni.config import FlowConfig, OmniConfig, SamplingConfig
from minomni.errors import UserError, quote
from minomni.inputs.audio import SILENCE_LEVEL
from minomni.inputs.prompt import Inputs, Processor, checked_messages, collate
from minomni.inputs.tokenizer import Tokenizer
from minomni.sampling import cut_at_stop
from minomni.talker.codec import make_codec
from minomni.talker.talker import Talker
from minomni.thinker.thinker import Thinker
from minomni.token2wav.streaming import Schedule
from minomni.token2wav.token2wav import Token2Wav, check_voice, check_wave
from minomni.token2wav.voice import Voice

TEXT_HEAD = "thinker.lm_head.weight"


class Omni(nn.Module):
    """Qwen2.5-Omni of any size. Its attributes are the prefixes of the checkpoint's tensors."""

    def __init__(self, config: OmniConfig):
        super().__init__()
        self.config = config
        self.thinker = Thinker(config.thinker)
        self.talker = None if config.talker is None else Talker(config.talker)
        self.token2wav = None if config.token2wav is None else Token2Wav(config.token2wav)
        self.codec = None if config.codec is None else make_codec(config.codec)
        self.voices: dict[str, Voice] = {}
        self.tokenizer: Tokenizer | None = None
        # Set by use_static_steps(); None decodes by the plain steps of Thinker and Talker.
        self.static_generator: StaticGenerator | None = None
        # What load(quantize=) was given. Quantized weights can be neither saved nor trained.
        self.quantized: str | None = None
        # Parts that load(parts=) left out: audio, vision, speech. Such a model cannot be saved.
        self.left_out: tuple[str, ...] = ()
        # The folder the model was loaded from; saving copies its other files.
        self.loaded_from: Path | None = None

    @property
    def num_codes(self) -> int:
        """Number of codec ids in Token2Wav's embedding table."""
        assert self.config.token2wav is not None
        return self.config.token2wav.dit.num_embeds + 1

    @property
    def sample_rate(self) -> int:
        """Sample rate of the speech in Hz; 0 for a model that answers in text only."""
        return 0 if self.config.token2wav is None else self.config.token2wav.sample_rate

    def require_speech(self) -> tuple[Talker, Token2Wav]:
        """The parts that speak. Raises UserError for a model that answers in text only."""
        if "speech" in self.left_out:
            raise UserError(
                "speech was left out when this model was loaded; load it with parts (--parts) that "
                "hold +speech, or give speech=False, or --no-speech, for an answer in text"
            )
        if self.talker is None or self.token2wav is None:
            raise UserError(
                "this model has no voice: its folder holds the Thinker alone; give speech=False, "
                "or --no-speech, for an answer in text"
            )
        return self.talker, self.token2wav

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds: all of them, except a text head that is tied to the
        embedding table.
        """
        tensors = dict(self.state_dict())
        if self.config.thinker.tie_word_embeddings:
            tensors.pop(TEXT_HEAD)
        return tensors

    def use_static_steps(self, on: bool = True) -> None:
        """Decode by steps of fixed shapes, which on CUDA are graphs that one launch replays.

        In fp32 texts and codes stay the same. The caches of the answers so far stay allocated until
        use_static_steps(False). There is nothing to gain on a CPU. Call it again after replacing
        parameters.
        """
        self.static_generator = StaticGenerator(self) if on else None

    # ---------------------------------------------------------------------------------- voices
    def voice(self, name: str) -> Voice:
        """A voice by name. Raises UserError for an unknown name, listing the voices there are, and
        for a voice that does not fit the model.
        """
        if not isinstance(name, str):
            raise UserError(f"voice is {quote(name)}; expected the name of a voice")
        if name not in self.voices:
            available = ", ".join(self.voices) or "none (no spk_dict.pt)"
            raise UserError(f"unknown voice {quote(name)}; this model has {available}")
        voice = self.voices[name]
        if not isinstance(voice, Voice):
            raise UserError(
                f"voices[{name!r}] is {quote(voice)}; expected a Voice, such as make_voice() makes"
            )
        vocab_size = self.config.thinker.text.vocab_size
        check_int(voice.bos_token, f"bos_token of voice {name!r}", 0, vocab_size - 1)
        if self.token2wav is not None:
            check_voice(voice, self.token2wav.config.dit)
        if not (voice.cond.isfinite().all() and voice.ref_mel.isfinite().all()):
            raise UserError(
                f"voice {name!r} holds NaN or infinite numbers; make it again from its recording"
            )
        return voice

    def choose_voice(self, name: str | None, speech: bool) -> Voice | None:
        """The voice of a reply, by default the first one; None without speech.

        A name is checked even without speech. Raises UserError.
        """
        if check_bool(speech, "speech"):
            self.require_speech()
        voice = None if name is None else self.voice(name)
        if not speech:
            return None
        if voice is not None:
            return voice
        if not self.voices:
            raise UserError(
                "this model has no voices, as its folder holds no spk_dict.pt; give speech=False, "
                "or --no-speech, for an answer in text"
            )
        return self.voice(next(iter(self.voices)))

    # ------------------------------------------------------------------- batches of token ids
    def generate(
        self, inputs: Inputs, voice: str | list[str] | None, seed: int | list[int] = 0, **options
    ) -> GenerateOutput:
        """Answer a batch of prompts in text and, unless voice is None, in speech.

        voice and seed: one for all rows, or a list with one for each. options: as in respond(). A
        row draws the same random numbers as it does alone, so it gives the same answer in any
        batch. A row whose reply is only a stop id has no codes and an empty waveform. Raises
        UserError.
        """
        if not isinstance(inputs, Inputs):
            raise UserError(
                f"generate() was given {quote(inputs)}; expected the output of a Processor; "
                f"respond() takes messages"
            )
        rows = len(inputs.input_ids)
        voices: list[Voice | None] = []
        for name in broadcast(voice, rows, "voice"):
            voices.append(None if name is None else self.choose_voice(name, speech=True))
        if None in voices and any(voices):
            raise UserError(
                "some rows have a voice and some have none; give all of them a voice, or none"
            )
        seeds = [check_seed(row_seed) for row_seed in broadcast(seed, rows, "seed")]
        return self._generate(inputs, voices, seeds, sampling_configs(self.config, options))

    @torch.no_grad()
    def _generate(
        self,
        inputs: Inputs,
        voices: Sequence[Voice | None],
        seeds: list[int],
        sampling: tuple[SamplingConfig, SamplingConfig],
    ) -> GenerateOutput:
        """generate() with checked arguments. voices: one for each row, or None for each;
        seeds: one for each row.
        """
        prefill = self.thinker.prefill(inputs, self.thinker.model.new_cache())
        chosen = [voice for voice in voices if voice is not None]
        bos_tokens = [voice.bos_token for voice in chosen] or None
        steps: dict[str, list[Tensor]] = {"text": [], "code": []}
        for kind, ids in generate_tokens(self, prefill, bos_tokens, seeds, sampling):
            steps[kind].append(ids)

        im_end = self.config.thinker.tokens.im_end
        text_ids = cut_at_stop(steps["text"], len(voices), [im_end], keep_stop=True)
        tokens = [row.tolist() for row in text_ids]
        if not chosen:
            return GenerateOutput(tokens, [], [])

        talker, token2wav = self.require_speech()
        codes = cut_at_stop(steps["code"], len(voices), talker.config.stop_codes)
        waves = []
        for row, voice, seed in zip(codes, chosen, seeds, strict=True):
            wave = torch.zeros(0)
            if len(row):
                wave = token2wav(row[None], voice, self.config.flow, seeded_generator(seed))
            waves.append(check_wave(wave))
        return GenerateOutput(tokens, codes, waves)

    # --------------------------------------------------------------------------- conversations
    def stream(
        self,
        messages: list[dict],
        voice: str | None = None,
        speech: bool = True,
        use_audio_in_video: bool = False,
        seed: int = 0,
        schedule: Schedule | str | None = LOW_LATENCY,
        flow: FlowConfig | None = None,
        **options,
    ) -> Iterator[TextChunk | AudioChunk | ReplyDone]:
        """Answer a conversation as respond() does, in chunks of text and audio that are yielded
        while the reply is generated; the last event is ReplyDone with the reply.

        schedule: how the audio is split into chunks; "low_latency", or None for all audio at the
        end. flow: how the DiT's ODE is solved, by default as the model's configuration says,
        but with Euler steps where the audio is split. options: as in respond(). Text and codes are
        those of respond(). Closing or dropping the iterator stops all work and frees the memory.
        Raises UserError before the first chunk.
        """
        timings = Timings()
        if is_batch(messages):
            raise UserError(
                "stream() answers one conversation, a list of messages; respond() takes several"
            )
        checked = stream_options(self.config, seed, schedule, flow, options)
        chosen, inputs = self.prepare(messages, voice, speech, use_audio_in_video)
        timings.mark("input")
        with torch.no_grad():
            prefill = self.thinker.prefill(inputs, self.thinker.model.new_cache(), timings.mark)
        return stream_reply(self, prefill, chosen, checked, timings, [])

    @overload
    def respond(
        self,
        messages: list[dict],
        voice: str | None = None,
        speech: bool = True,
        use_audio_in_video: bool = False,
        seed: int = 0,
        **options,
    ) -> Reply: ...

    @overload
    def respond(
        self,
        messages: list[list[dict]],
        voice: str | list[str] | None = None,
        speech: bool = True,
        use_audio_in_video: bool = False,
        seed: int | list[int] = 0,
        **options,
    ) -> Replies: ...

    def respond(
        self,
        messages: list[dict] | list[list[dict]],
        voice: str | list[str] | None = None,
        speech: bool = True,
        use_audio_in_video: bool = False,
        seed: int | list[int] = 0,
        **options,
    ) -> Reply | Replies:
        """Answer a conversation, given as message dictionaries in the format of Qwen and
        transformers.

        A list of conversations gives a list of replies, each the same as for the conversation
        alone; voice and seed may then be lists with one entry for each.

        voice: a name in self.voices, the first one by default; speech=False answers in text only.
        A conversation without a system message gets the one that this size was trained with. The
        same seed gives the same answer. options: max_new_tokens, temperature, top_p, top_k,
        repetition_penalty and do_sample for the Thinker, and the same with the prefix talker_ for
        the Talker; see generation_options.py. Raises UserError for input that cannot be read, does
        not fit the context or is only silence, and for unknown voices and options.
        """
        sampling_configs(self.config, options)  # raises UserError for wrong options first
        if is_batch(messages):
            return self._respond_batch(messages, voice, speech, use_audio_in_video, seed, options)
        *_, done = self.stream(  # which checks the types of its arguments
            messages,  # type: ignore[arg-type]
            voice,  # type: ignore[arg-type]
            speech,
            use_audio_in_video,
            seed,  # type: ignore[arg-type]
            schedule=None,
            **options,
        )
        assert isinstance(done, ReplyDone)
        return done.reply

    def _respond_batch(
        self,
        conversations: list[list[dict]],
        voice: str | list[str] | None,
        speech: bool,
        use_audio_in_video: bool,
        seed: int | list[int],
        options: dict,
    ) -> Replies:
        """respond() for several conversations, as one batch. A reply's total_s is the time of the
        whole batch.

        Left padding to the longest prompt takes context from the shorter ones. Where an answer may
        need that context, the conversations are answered one by one.
        """
        timings = Timings()
        count = len(conversations)
        sampling = sampling_configs(self.config, options)
        seeds = [check_seed(row_seed) for row_seed in broadcast(seed, count, "seed")]

        # Check and encode all conversations before the first one is answered.
        voices = []
        rows = []
        names = broadcast(voice, count, "voice")
        for number, (messages, name) in enumerate(zip(conversations, names, strict=True), 1):
            try:
                chosen, inputs = self.prepare(messages, name, speech, use_audio_in_video)
            except UserError as error:
                raise UserError(f"conversation {number} of {count}: {error}") from None
            voices.append(chosen)
            rows.append(inputs)
        timings.mark("input")

        lengths = [row.input_ids.shape[1] for row in rows]
        if self.fits_padded(lengths, sampling, speech):
            batch = collate(rows, self.config.thinker.tokens.endoftext)
            output = self._generate(batch, voices, seeds, sampling)
        else:
            output = self._generate_one_by_one(rows, voices, seeds, sampling)
        return self.to_replies(output, timings)

    def _generate_one_by_one(
        self,
        rows: list[Inputs],
        voices: Sequence[Voice | None],
        seeds: list[int],
        sampling: tuple[SamplingConfig, SamplingConfig],
    ) -> GenerateOutput:
        """_generate() for prompts of batch size 1, without padding."""
        joined = GenerateOutput([], [], [])
        for inputs, voice, seed in zip(rows, voices, seeds, strict=True):
            output = self._generate(inputs, [voice], [seed], sampling)
            joined.tokens.extend(output.tokens)
            joined.codes.extend(output.codes)
            joined.waves.extend(output.waves)
        return joined

    def to_replies(self, output: GenerateOutput, timings: Timings) -> Replies:
        """Decode the text ids of each row; rows without speech get empty codes and waveforms."""
        total_s = timings.mark("end")
        has_speech = bool(output.codes)
        replies = Replies()
        for row, ids in enumerate(output.tokens):
            reply = Reply(
                text=self.decode(ids),
                wave=output.waves[row].cpu() if has_speech else torch.zeros(0),
                sample_rate=self.sample_rate,
                codes=output.codes[row].cpu() if has_speech else torch.zeros(0, dtype=torch.long),
                total_s=total_s,
                timings=timings,
            )
            replies.append(reply)
        return replies

    def fits_padded(
        self, lengths: list[int], sampling: tuple[SamplingConfig, SamplingConfig], speech: bool
    ) -> bool:
        """Whether prompts of these lengths, padded to the longest, leave each answer all tokens
        that it may have.
        """
        if len(set(lengths)) == 1:  # no padding
            return True
        thinker, talker = sampling
        longest = max(lengths)
        if longest + thinker.max_new_tokens > self.config.thinker.text.max_position_embeddings:
            return False
        if not speech:
            return True
        # The Talker's prompt has two more positions: the voice and the first code.
        assert self.config.talker is not None
        talker_length = longest + 2 + talker.max_new_tokens
        return talker_length <= self.config.talker.decoder.max_position_embeddings

    def listen(
        self, voice: str | None = None, speech: bool = True, system: str | None = None
    ) -> Session:
        """Begin a conversation that is prefilled while the user speaks; see session.py. Raises
        UserError.
        """
        return Session(self, voice, speech, system)

    # --------------------------------------------------------------------- prompts and text
    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError for a model without one."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer; load() a folder that holds one")
        return self.tokenizer

    def decode(self, ids: list[int]) -> str:
        """Token ids -> text without special tokens. Raises UserError without a tokenizer."""
        return self.require_tokenizer().decode(ids, skip_special=True)

    def prepare(
        self, messages: list[dict], voice: str | None, speech: bool, use_audio_in_video: bool
    ) -> tuple[Voice | None, Inputs]:
        """Check the arguments of respond() -> voice of the reply, None without speech, and the
        encoded prompt. Raises UserError.
        """
        tokenizer = self.require_tokenizer()
        messages = checked_messages(messages)
        if not messages:
            raise UserError("no messages were given; give at least one with role 'user'")
        chosen = self.choose_voice(voice, speech)
        check_bool(use_audio_in_video, "use_audio_in_video")
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.media.system_prompt}, *messages]
        inputs = Processor(self.config, tokenizer)([messages], use_audio_in_video)
        self.refuse_silence(inputs)
        return chosen, inputs

    def refuse_silence(self, inputs: Inputs) -> None:
        """Raise UserError where the last message holds only audio, and the audio only silence.

        A model that is trained to transcribe speech would invent some. UserTurn.finish() has the
        same rule.
        """
        tokens = self.config.thinker.tokens
        ids = inputs.input_ids[0].tolist()
        starts = [i for i, token in enumerate(ids) if token == tokens.im_start]
        if len(starts) < 2:
            return
        # The last im_start opens the answer, the one before it the last message.
        message = ids[starts[-2] : starts[-1]]
        num_clips = message.count(tokens.audio_bos)
        if num_clips == 0 or tokens.vision_bos in message:
            return
        words = self.decode(message).split()
        if words == ["user"] and max(inputs.peaks[-num_clips:]) < SILENCE_LEVEL:
            raise UserError(ONLY_SILENCE)


def is_batch(messages) -> TypeGuard[list[list[dict]]]:
    """Whether these are several conversations. Raises UserError for a mixture of conversations and
    messages.
    """
    if not isinstance(messages, (list, tuple)):
        return False
    is_list = [isinstance(entry, (list, tuple)) for entry in messages]
    if not any(is_list):
        return False
    if not all(is_list):
        raise UserError(
            "some of the messages are lists and some are not; give one list of message "
            "dictionaries, or a list of such lists"
        )
    return True


def broadcast(value, rows: int, name: str) -> list:
    """A list with one entry for each row, or one value for all of them -> the list. Raises
    UserError.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * rows
    if len(value) != rows:
        raise UserError(
            f"{name} has {len(value)} entries for {rows} conversations; give one for each, or one "
            f"for all"
        )
    return list(value)
