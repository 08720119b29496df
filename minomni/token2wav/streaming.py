"""Sound while codes still arrive: the DiT paints the mel chunk by chunk, and BigVGAN follows,
losing nothing.

The vocoder's part is exact: its convolutions see a fixed stretch of mel, so a sample is made as
soon as that stretch is there, and the pieces together are the waveform of the whole mel. The DiT's
part cannot be: in one look at the field a block sees one block ahead, in the next look that block
has seen another, and after all looks of a solve the first frame depends on everything that follows.
A schedule says where the looking ends, and what it makes depends on the codes, the noise and the
schedule alone, never on when the codes came. Source: paper sec. 2.4 (sliding window); the serving
recipe that goes with the release (3 blocks, 2 back, 1 ahead).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minomni.arguments import shown, whole_number
from minomni.config import DiTConfig, FlowConfig
from minomni.errors import UserError
from minomni.token2wav.bigvgan import BigVGAN, UpsampleStage, normalize
from minomni.token2wav.dit import BlockCache, DiT, both_branches, guided
from minomni.token2wav.ode_solver import evaluation_times, solve, time_grid
from minomni.token2wav.token2wav import Token2Wav, check_codes, check_voice
from minomni.token2wav.voice import Voice

MOST_BLOCKS = 1_000_000  # of a schedule's numbers: days of speech


@dataclass(frozen=True)
class Schedule:
    """How an utterance is cut, counted in the DiT's blocks of frames.

    chunks: for each chunk the blocks that it adds and the blocks beyond them that it looks at; the
    last pair goes on for ever. back: how many blocks before a chunk are computed again with it, as
    if nothing had been before them; None computes none again: what they were to each look at the
    field is remembered. lead: codes in the first block, fewer than in the others, so that sound
    begins sooner; None for as many.
    """

    chunks: tuple[tuple[int, int], ...]
    back: int | None = None
    first_chunk_codes: int | None = None

    def __post_init__(self):
        pairs = self.chunks if isinstance(self.chunks, (list, tuple)) else ()
        if not pairs or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
        ):
            raise UserError(
                f"a schedule of chunks {shown(self.chunks)}; expected pairs of blocks, such as ((1, 0), "
                f"(2, 1)): how many a chunk adds, and how many it looks ahead"
            )
        for blocks, ahead in pairs:
            whole_number(blocks, "a schedule of chunks: the blocks of one", 1, MOST_BLOCKS)
            whole_number(
                ahead, "a schedule of chunks: the blocks that one looks ahead", 0, MOST_BLOCKS
            )
        for name, value in (("back", self.back), ("lead", self.first_chunk_codes)):
            if value is not None:
                whole_number(value, f"a schedule of chunks: {name}", 0, MOST_BLOCKS)

    def first_block_missing(self, dit: DiTConfig) -> int:
        """Frames that the first block has less than the others. Raises UserError for a lead that
        fits into no block.
        """
        whole = dit.block_size // dit.repeats
        if self.first_chunk_codes is not None and not 1 <= self.first_chunk_codes <= whole:
            raise UserError(
                f"a schedule whose first block has {self.first_chunk_codes} codes; a block of this model has {whole}, "
                f"give 1 to that many"
            )
        return (
            0 if self.first_chunk_codes is None else (whole - self.first_chunk_codes) * dit.repeats
        )

    def first_codes(self, dit: DiTConfig) -> int:
        """How many codes must be there before the first piece of mel."""
        return (sum(self.chunks[0]) * dit.block_size - self.first_block_missing(dit)) // dit.repeats


RELEASE_SCHEDULE = Schedule(chunks=((3, 1),), back=2)  # how the release is served
FIRST_CHUNK_FRAMES = (
    5  # frames of sound in the first piece at least: while they are played the next piece is made
)


def low_latency_schedule(token2wav: Token2Wav) -> Schedule:
    """Soon, then well, then cheaply: no more codes in the first block than the vocoder needs to
    sound for a MOMENT.
    """
    dit = token2wav.config.dit
    frames = (
        math.ceil(token2wav.code2wav_bigvgan_model.context_frames + FIRST_CHUNK_FRAMES)
        % dit.block_size
        or dit.block_size
    )
    return Schedule(
        chunks=((1, 0), (1, 0), (2, 1), (4, 1), (8, 1)), first_chunk_codes=-(-frames // dit.repeats)
    )


def codes_until_audio(schedule: Schedule, token2wav: Token2Wav) -> int:
    """How many codes must be there before the first piece of sound: the vocoder may want more than
    one chunk's mel.
    """
    dit, chunks = token2wav.config.dit, [*schedule.chunks]
    end = -schedule.first_block_missing(dit)
    while True:
        blocks, ahead = chunks.pop(0) if len(chunks) > 1 else chunks[0]
        end += blocks * dit.block_size
        if end > token2wav.code2wav_bigvgan_model.context_frames:
            return (end + ahead * dit.block_size) // dit.repeats


class MelStream:
    """Codes of one utterance in, pieces of its mel out."""

    def __init__(
        self,
        dit: DiT,
        voice: Voice,
        flow: FlowConfig,
        schedule: Schedule,
        generator: torch.Generator,
    ):
        """generator: on the CPU, draws the utterance's noise, the same however the utterance is
        cut.
        """
        self.dit, self.flow, self.schedule, self.generator = dit, flow, schedule, generator
        device, size = dit.proj_out.weight.device, dit.config
        cond, ref_mel = (
            both_branches(x.float().to(device), flow) for x in (voice.cond, voice.ref_mel)
        )
        with torch.no_grad():
            self.speaker = cond, dit.input_embed.spk_encoder(ref_mel)
            times = torch.stack(evaluation_times(flow)).to(device)
            parts = [
                torch.stack(norm, dim=1) for norm in dit.modulations(times)
            ]  # [looks, parts, 1, D] each
        self.looks = [[tuple(norm[i][:, None]) for norm in parts] for i in range(len(times))]
        self.pasts = (
            None
            if schedule.back is not None
            else [[BlockCache() for _ in dit.transformer_blocks] for _ in times]
        )
        self.first_block_missing = schedule.first_block_missing(size)
        self.codes = torch.zeros(1, 0, dtype=torch.long, device=device)
        self.noise = torch.zeros(1, 0, size.mel_dim, device=device)
        self.chunk = self.done = 0  # chunks and frames that are out

    def feed(self, codes: Tensor) -> Iterator[Tensor]:
        """The next codes [1, n] -> the mel [1, 80, frames] of each chunk that they complete."""
        self.codes = torch.cat([self.codes, codes.to(self.codes.device)], dim=1)
        frames, block = self.codes.shape[1] * self.dit.config.repeats, self.dit.config.block_size
        while True:
            blocks, ahead = self.schedule.chunks[min(self.chunk, len(self.schedule.chunks) - 1)]
            end = self.done + blocks * block - (self.first_block_missing if self.done == 0 else 0)
            if end + ahead * block > frames:
                return
            yield self.paint(end, end + ahead * block)

    def finish(self) -> Iterator[Tensor]:
        """No more codes come -> the rest of the mel, if there is one."""
        frames = self.codes.shape[1] * self.dit.config.repeats
        if self.done < frames:
            yield self.paint(frames, frames)

    @torch.no_grad()
    def paint(self, end: int, seen: int) -> Tensor:
        """The mel [1, 80, frames] from the last chunk's end to frame `end`, looking as far as frame
        `seen`.
        """
        block, repeats, back = (
            self.dit.config.block_size,
            self.dit.config.repeats,
            self.schedule.back,
        )
        begin = max(self.done - (back or 0) * block, 0)
        lacking = self.first_block_missing if begin == 0 else 0
        finished = (lacking + end - begin) // block
        codes = both_branches(self.codes[:, begin // repeats : seen // repeats], self.flow)
        context = self.dit.input_embed.context(
            self.dit.text_embed(codes), *self.speaker
        )  # [1 or 2, seen - begin, D]
        ahead = iter(zip(self.looks, self.pasts or [None] * len(self.looks)))

        def field(_, x: Tensor) -> Tensor:
            modulations, pasts = next(ahead)
            x = x.expand(len(context), -1, -1)
            return guided(
                self.dit.look(x, context, modulations, begin, pasts, finished, lacking), self.flow
            )

        mel = solve(
            field, self.draw(begin, seen), time_grid(self.flow, self.noise.device), self.flow.solver
        )
        mel = mel[:, self.done - begin : end - begin].transpose(1, 2)
        self.chunk, self.done = self.chunk + 1, end
        return mel

    def draw(self, begin: int, end: int) -> Tensor:
        """Frames begin to end of the utterance's one noise tensor, of which no more is drawn than
        is needed.
        """
        more = end - self.noise.shape[1]
        if more > 0:
            noise = torch.randn(1, more, self.noise.shape[2], generator=self.generator)
            self.noise = torch.cat([self.noise, noise.to(self.noise.device)], dim=1)
        return self.noise[:, begin:end]


class StageStream:
    """One stage of the vocoder, piece by piece: pieces [B, T, C] in, what of the output is final
    out.
    """

    def __init__(self, stage: UpsampleStage):
        self.stage = stage
        self.tail: Tensor | None = None  # inputs that are needed again
        self.out = 0  # outputs that are out, in inputs of the tail

    def __call__(self, x: Tensor | None, last: bool) -> Tensor | None:
        """x, or None for no new input -> [B, rate * (0 and more), C'], or None for nothing yet."""
        pieces = [piece for piece in (self.tail, x) if piece is not None]
        if not pieces:
            return None
        x = torch.cat(pieces, dim=1)
        final = x.shape[1] if last else x.shape[1] - self.stage.context_frames
        if final <= self.out:
            self.tail = x
            return None
        y = self.stage.run(x)[:, self.out * self.stage.rate : final * self.stage.rate]
        dropped = max(final - self.stage.context_frames, 0)
        self.tail, self.out = x[:, dropped:], final - dropped
        return y


class VocoderStream:
    """Pieces of a mel in, pieces of its waveform out; together they are the waveform of the whole
    mel.
    """

    def __init__(self, vocoder: BigVGAN):
        self.stages = [StageStream(stage) for stage in vocoder.stages()]

    @torch.no_grad()
    def feed(self, mel: Tensor | None, last: bool = False) -> Tensor:
        """The next piece [1, 80, T], or None -> samples [n] that are final now; last: nothing comes
        after it.
        """
        x = None if mel is None else normalize(mel).transpose(1, 2).contiguous()  # [1, T, 80]
        for stage in self.stages:
            x = stage(x, last)
        return torch.zeros(0) if x is None else x[0, :, 0]


class SpeechStream:
    """Codes of one utterance in, pieces of its waveform out."""

    def __init__(
        self,
        token2wav: Token2Wav,
        voice: Voice,
        flow: FlowConfig,
        schedule: Schedule,
        generator: torch.Generator,
        note: Callable[[str], object] = lambda what: None,
    ):
        """note("mel") is called for each piece of mel. Raises UserError for a voice that does not
        fit the model.
        """
        self.config, self.mark = token2wav.config.dit, note
        check_voice(voice, self.config)
        self.mel = MelStream(token2wav.code2wav_dit_model, voice, flow, schedule, generator)
        self.vocoder = VocoderStream(token2wav.code2wav_bigvgan_model)

    def feed(self, codes: Tensor) -> Iterator[Tensor]:
        """The next codes [1, n] -> waveforms [samples], one for each chunk that makes something
        audible of them.

        Raises UserError.
        """
        check_codes(codes, self.config)
        for mel in self.mel.feed(codes):
            self.mark("mel")
            wave = self.vocoder.feed(mel)
            if len(wave):
                yield wave

    def finish(self) -> Iterator[Tensor]:
        """No more codes come -> the rest of the waveform, in one piece if there is any."""
        mel = next(self.mel.finish(), None)
        if mel is not None:
            self.mark("mel")
        wave = self.vocoder.feed(mel, last=True)
        if len(wave):
            yield wave
