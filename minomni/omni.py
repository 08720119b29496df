"""The whole model: Thinker, Talker, Token2Wav, and the codec that a size trained here has. Messages
in, a reply out.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minomni.arguments import flag, seed_of, shown, whole_number
from minomni.chat.generate import (
    check_flow,
    check_schedule,
    check_wave,
    generate_tokens,
    seeded,
    stream_reply,
)
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
from minomni.chat.user_turn import ONLY_SILENCE
from minomni.config import FlowConfig, OmniConfig, SamplingConfig
from minomni.errors import UserError
from minomni.inputs.audio import SILENCE
from minomni.inputs.prompt import Inputs, Processor, join, messages_of
from minomni.inputs.tokenizer import Tokenizer
from minomni.talker.codec import Codec
from minomni.talker.talker import Talker
from minomni.thinker.thinker import Thinker
from minomni.token2wav.streaming import Schedule
from minomni.token2wav.token2wav import Token2Wav, check_voice
from minomni.token2wav.voice import Voice

TEXT_HEAD = "thinker.lm_head.weight"


class Omni(nn.Module):
    """Qwen2.5-Omni of any size. Its attributes are the prefixes of the checkpoint's tensor names."""

    def __init__(self, config: OmniConfig):
        super().__init__()
        self.config = config
        self.thinker = Thinker(config.thinker)
        self.talker = None if config.talker is None else Talker(config.talker)
        self.token2wav = None if config.token2wav is None else Token2Wav(config.token2wav)
        self.codec = None if config.codec is None else Codec(config.codec)
        self.voices: dict[str, Voice] = {}
        self.tokenizer: Tokenizer | None = None
        self.loaded_from: Path | None = None  # the folder; saving keeps what else it holds

    @property
    def num_codes(self) -> int:
        """Codec ids that Token2Wav can look up."""
        return self.config.token2wav.dit.num_embeds + 1

    @property
    def sample_rate(self) -> int:
        """Hz of the speech; 0 for a model that answers in text alone."""
        return 0 if self.config.token2wav is None else self.config.token2wav.sample_rate

    def stored_tensors(self) -> dict[str, Tensor]:
        """What a folder holds of the model: all tensors, but for a text head that is the embedding
        table.
        """
        tied = self.config.thinker.tie_word_embeddings
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not tied or name != TEXT_HEAD
        }

    def voice(self, name: str) -> Voice:
        """A voice by name. Raises UserError naming the voices there are, and for one that does not
        fit the model.
        """
        if not isinstance(name, str):
            raise UserError(f"voice is {shown(name)}; expected the name of a voice")
        if name not in self.voices:
            there = ", ".join(self.voices) or "none (no spk_dict.pt)"
            raise UserError(f"unknown voice {shown(name)}; this model has {there}")
        voice, rows = self.voices[name], self.config.thinker.text.vocab_size
        if not isinstance(voice, Voice):
            raise UserError(
                f"voices[{name!r}] is {shown(voice)}; expected a Voice, such as make_voice() makes"
            )
        whole_number(voice.bos_token, f"bos_token of voice {name!r}", 0, rows - 1)
        if self.token2wav is not None:
            check_voice(voice, self.config.token2wav.dit)
        if not (voice.cond.isfinite().all() and voice.ref_mel.isfinite().all()):
            raise UserError(
                f"voice {name!r} holds NaN or infinite numbers; make it again from its recording"
            )
        return voice

    def speaker(self, voice: str | None, speech: bool) -> Voice | None:
        """Who speaks, by default the first voice; None without speech. A name that is given is
        checked in any case.

        Raises UserError.
        """
        if flag(speech, "speech") and (self.talker is None or self.token2wav is None):
            raise UserError(
                "this model has no voice: its folder holds the Thinker alone; give speech=False, or "
                "--no-speech, for an answer in text"
            )
        chosen = None if voice is None else self.voice(voice)
        if not speech:
            return None
        if not self.voices and chosen is None:
            raise UserError(
                "this model has no voices, as its folder holds no spk_dict.pt; give speech=False, or "
                "--no-speech, for an answer in text"
            )
        return chosen or self.voice(next(iter(self.voices)))

    def generate(
        self, inputs: Inputs, voice: str | list[str] | None, seed: int | list[int] = 0, **options
    ) -> GenerateOutput:
        """Answer a batch of prompts in text and, unless voice is None, in speech; one seed gives
        one answer.

        voice and seed: one for all rows, or a list of one for each. options: as in respond(). A row
        draws what it draws alone, so it gives the same answer in any batch. A row whose reply is
        only a stop id has no codes and a wave of no samples. Raises UserError.
        """
        if not isinstance(inputs, Inputs):
            raise UserError(
                f"generate() was given {shown(inputs)}; expected what a Processor makes; respond() takes "
                f"messages"
            )
        rows = len(inputs.input_ids)
        speakers = [
            None if name is None else self.speaker(name, speech=True)
            for name in each(voice, rows, "voice")
        ]
        if None in speakers and any(speakers):
            raise UserError(
                "some rows have a voice and some have none; give all of them a voice, or none"
            )
        seeds = [seed_of(one) for one in each(seed, rows, "seed")]
        return self.answer(inputs, speakers, seeds, sampling_configs(self.config, options))

    @torch.no_grad()
    def answer(
        self,
        inputs: Inputs,
        speakers: list[Voice | None],
        seeds: list[int],
        sampling: tuple[SamplingConfig, SamplingConfig],
    ) -> GenerateOutput:
        """generate(), all arguments checked; speakers and seeds are those of each row."""
        config, reading = self.config, self.thinker.read(inputs, self.thinker.model.new_cache())
        bos_tokens = None if None in speakers else [speaker.bos_token for speaker in speakers]
        steps = {"text": [], "code": []}
        for kind, ids in generate_tokens(self, reading, bos_tokens, seeds, sampling):
            steps[kind].append(ids)
        tokens = [
            row.tolist()
            for row in until_stop(
                steps["text"], len(speakers), [config.thinker.tokens.im_end], keep=True
            )
        ]
        if bos_tokens is None:
            return GenerateOutput(tokens, [], [])
        codes = until_stop(
            steps["code"], len(tokens), [config.talker.codec_pad, config.talker.codec_eos]
        )
        waves = [
            check_wave(self.token2wav(row[None], speaker, config.flow, seeded(seed)))
            if len(row)
            else torch.zeros(0)
            for row, speaker, seed in zip(codes, speakers, seeds)
        ]
        return GenerateOutput(tokens, codes, waves)

    def stream(
        self,
        messages: list[dict],
        voice: str | None = None,
        speech: bool = True,
        use_audio_in_video: bool = False,
        seed: int = 0,
        schedule: Schedule | str | None = "eager",
        flow: FlowConfig | None = None,
        **options,
    ) -> Iterator[TextChunk | AudioChunk | ReplyDone]:
        """Answer a conversation as respond() does, in pieces and while it is still being thought:
        text and sound in order of readiness, at last End with the reply.

        schedule: how the sound is cut, "eager" to begin as soon as can be; None makes it at the
        end, in one go. flow: how the DiT's equation is solved, by default as the model's
        configuration says, but by Euler's steps where the sound is cut. options: as in respond().
        Text and codes are respond()'s. Closing the iterator, or letting go of it, ends all work and
        frees the memory. Raises UserError before the first piece.
        """
        trace = Timings()
        if is_batch(messages):
            raise UserError(
                "stream() answers one conversation, a list of messages; respond() takes several"
            )
        sampling, seed = sampling_configs(self.config, options), seed_of(seed)
        check_schedule(schedule)
        check_flow(flow)
        speaker, inputs = self.prepare(messages, voice, speech, use_audio_in_video)
        trace.mark("input")
        with torch.no_grad():
            reading = self.thinker.read(inputs, self.thinker.model.new_cache(), trace.mark)
        return stream_reply(self, reading, speaker, schedule, flow, seed, trace, [], sampling)

    def respond(
        self,
        messages: list[dict] | list[list[dict]],
        voice: str | list[str] | None = None,
        speech: bool = True,
        use_audio_in_video: bool = False,
        seed: int | list[int] = 0,
        **options,
    ) -> Reply | Replies:
        """Answer a conversation of message dictionaries, the ones Qwen's and transformers' users
        write.

        A list of conversations gives a list of replies, each as the conversation alone would get
        it; voice and seed may then be lists of one for each.

        voice: a name in self.voices, the first one by default; speech=False answers in text alone.
        A conversation without a system message gets the one that this size was trained with. Same
        seed, same answer. options: max_new_tokens, temperature, top_p, top_k, repetition_penalty
        and do_sample for the Thinker, and the same with talker_ in front for the Talker; see
        generation_options.py. Raises UserError for what cannot be read, does not fit the context, names
        no voice, or is nothing but silence.
        """
        sampling_configs(self.config, options)  # names what is no option
        if is_batch(messages):
            return self.respond_to_all(messages, voice, speech, use_audio_in_video, seed, options)
        *_, end = self.stream(
            messages, voice, speech, use_audio_in_video, seed, schedule=None, **options
        )
        return end.reply

    def respond_to_all(
        self,
        conversations: list[list[dict]],
        voice,
        speech: bool,
        use_audio_in_video: bool,
        seed,
        options: dict,
    ) -> Replies:
        """respond() for several conversations, as one batch. A reply's total_s is the time of the
        whole batch.

        Padding to the longest prompt takes room that a shorter one has when it is alone. Where an
        answer might need that room, the conversations are answered one by one.
        """
        trace, count, sampling = (
            Timings(),
            len(conversations),
            sampling_configs(self.config, options),
        )
        seeds = [seed_of(one) for one in each(seed, count, "seed")]
        speakers, rows = [], []
        for number, (messages, name) in enumerate(
            zip(conversations, each(voice, count, "voice")), 1
        ):
            try:
                speaker, row = self.prepare(messages, name, speech, use_audio_in_video)
            except UserError as error:
                raise UserError(f"conversation {number} of {count}: {error}") from None
            speakers.append(speaker)
            rows.append(row)
        trace.mark("input")
        if not self.have_room(
            [row.input_ids.shape[1] for row in rows], sampling, speakers[0] is not None
        ):
            spoken = [
                self.answer(*one, sampling)
                for one in zip(rows, [[s] for s in speakers], [[s] for s in seeds])
            ]
            tokens, codes, waves = (
                [one for row in spoken for one in getattr(row, name)]
                for name in ("tokens", "codes", "waves")
            )
        else:
            batch = self.answer(
                join(rows, self.config.thinker.tokens.endoftext), speakers, seeds, sampling
            )
            tokens, codes, waves = batch.tokens, batch.codes, batch.waves
        total_s, silence = trace.mark("end"), [torch.zeros(0)] * count
        texts = [self.tokenizer.decode(row, skip_special=True) for row in tokens]
        no_codes = [torch.zeros(0, dtype=torch.long)] * count
        return Replies(
            Reply(text, wave.cpu(), self.sample_rate, ids.cpu(), total_s, trace)
            for text, wave, ids in zip(texts, waves or silence, codes or no_codes)
        )

    def have_room(
        self, lengths: list[int], sampling: tuple[SamplingConfig, SamplingConfig], speech: bool
    ) -> bool:
        """Whether prompts of these lengths, padded to the longest, leave each answer all tokens
        that it may have.
        """
        thinker, talker = sampling
        room = (
            max(lengths) + thinker.max_new_tokens
            <= self.config.thinker.text.max_position_embeddings
        )
        if speech:
            room &= (
                max(lengths) + 2 + talker.max_new_tokens
                <= self.config.talker.decoder.max_position_embeddings
            )
        return room or len(set(lengths)) == 1

    def listen(
        self, voice: str | None = None, speech: bool = True, system: str | None = None
    ) -> Session:
        """Begin a conversation that is read while it is being said and shown; see session.py. Raises
        UserError.
        """
        return Session(self, voice, speech, system)

    def prepare(
        self, messages: list[dict], voice: str | None, speech: bool, use_audio_in_video: bool
    ) -> tuple[Voice | None, Inputs]:
        """Who speaks, None without speech, and what the Thinker is to read. Raises UserError."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer; load() a folder that holds one")
        messages = messages_of(messages)
        if not messages:
            raise UserError("no messages were given; give at least one with role 'user'")
        speaker = self.speaker(voice, speech)
        flag(use_audio_in_video, "use_audio_in_video")
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.media.system_prompt}, *messages]
        inputs = Processor(self.config, self.tokenizer)([messages], use_audio_in_video)
        self.refuse_silence(inputs)
        return speaker, inputs

    def refuse_silence(self, inputs: Inputs) -> None:
        """Raise UserError where the last message is nothing but sound, and the sound nothing but
        silence.

        The same rule holds in Turn.finish(): a model that is trained to write down speech would
        make some up.
        """
        tokens, ids = self.config.thinker.tokens, inputs.input_ids[0].tolist()
        starts = [i for i, token in enumerate(ids) if token == tokens.im_start]
        turn = (
            ids[starts[-2] : starts[-1]] if len(starts) > 1 else []
        )  # the last im_start begins the answer
        sounds = turn.count(tokens.audio_bos)
        words = self.tokenizer.decode(turn, skip_special=True).split()
        if (
            words == ["user"]
            and sounds
            and tokens.vision_bos not in turn
            and max(inputs.peaks[-sounds:]) < SILENCE
        ):
            raise UserError(ONLY_SILENCE)


def is_batch(messages) -> bool:
    """Whether these are several conversations. Raises UserError for a mixture of conversations and
    messages.
    """
    if not isinstance(messages, (list, tuple)) or not any(
        isinstance(one, (list, tuple)) for one in messages
    ):
        return False
    if not all(isinstance(one, (list, tuple)) for one in messages):
        raise UserError(
            "some of the messages are lists and some are not; give one list of message dictionaries, or a "
            "list of such lists"
        )
    return True


def each(value, rows: int, name: str) -> list:
    """A list with an entry for each row, or one value for all of them -> the list. Raises
    UserError.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * rows
    if len(value) != rows:
        raise UserError(
            f"{name} has {len(value)} entries for {rows} conversations; give one for each, or one for all"
        )
    return list(value)


def until_stop(
    steps: list[Tensor], rows: int, stops: list[int], keep: bool = False
) -> list[Tensor]:
    """Ids of a batch step by step, each [B] -> per row those before the first stop id, or with it,
    [n].
    """
    table = torch.stack(steps, dim=1) if steps else torch.zeros(rows, 0, dtype=torch.long)  # [B, n]
    ends = torch.isin(table, torch.tensor(stops, device=table.device))
    return [
        row[: int(end.long().argmax()) + keep if end.any() else len(row)]
        for row, end in zip(table, ends)
    ]
