"""Streaming Token2Wav: mel and waveform are generated chunk by chunk while codes still arrive.

The vocoder is exact: its convolutions have a finite receptive field, so each sample is computed as
soon as its mel context is there, and the chunks together equal the waveform of the whole mel. The
DiT cannot be exact. In one evaluation of the velocity field a block sees one block ahead, in the
next one that block has seen another, and after a whole solve the first frame depends on everything
that follows. A schedule limits this look-ahead. Its output depends on the codes, the noise and the
schedule alone, never on when the codes arrive. Source: paper sec. 2.4 (sliding window); the serving
recipe of the release (3 blocks, 2 back, 1 ahead).
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minomni.arguments import check_int
from minomni.config import DiTConfig, FlowConfig
from minomni.errors import UserError, quote
from minomni.token2wav.bigvgan import BigVGAN, VocoderLayer, normalize
from minomni.token2wav.dit import BlockCache, BlockKV, DiT, both_branches, guided
from minomni.token2wav.ode_solver import evaluation_times, solve, time_grid
from minomni.token2wav.token2wav import Token2Wav, check_codes, check_voice
from minomni.token2wav.voice import Voice

MAX_BLOCKS = 1_000_000  # largest number in a schedule: days of speech


@dataclass(frozen=True)
class Schedule:
    """How an utterance is cut into chunks, counted in the DiT's blocks of frames.

    chunks: for each chunk, the blocks that it adds and the blocks of look-ahead after them; the
    last pair repeats. back: how many blocks before a chunk are recomputed with it, without any
    context before them; None recomputes none and keeps a cache of their keys and values for each
    evaluation of the velocity field instead. first_block_codes: codes in the first block, fewer
    than in the others, so that audio starts earlier; None for as many.
    """

    chunks: tuple[tuple[int, int], ...]
    back: int | None = None
    first_block_codes: int | None = None

    def __post_init__(self):
        pairs = self.chunks if isinstance(self.chunks, (list, tuple)) else ()
        are_pairs = all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
        if not pairs or not are_pairs:
            raise UserError(
                f"a schedule of chunks {quote(self.chunks)}; expected pairs of blocks, such as "
                f"((1, 0), (2, 1)): how many a chunk adds, and how many it looks ahead"
            )
        for blocks, ahead in pairs:
            check_int(blocks, "a schedule of chunks: the blocks of one", 1, MAX_BLOCKS)
            check_int(ahead, "a schedule of chunks: the look-ahead of one", 0, MAX_BLOCKS)
        if self.back is not None:
            check_int(self.back, "a schedule of chunks: back", 0, MAX_BLOCKS)
        if self.first_block_codes is not None:
            name = "a schedule of chunks: first_block_codes"
            check_int(self.first_block_codes, name, 0, MAX_BLOCKS)

    def chunk(self, index: int) -> tuple[int, int]:
        """Blocks and look-ahead blocks of a chunk; the last pair repeats."""
        return self.chunks[min(index, len(self.chunks) - 1)]

    def left_pad(self, dit: DiTConfig) -> int:
        """How many frames shorter the first block is than the others.

        Raises UserError if first_block_codes does not fit into a block.
        """
        if self.first_block_codes is None:
            return 0
        codes_per_block = dit.block_size // dit.repeats
        if not 1 <= self.first_block_codes <= codes_per_block:
            raise UserError(
                f"a schedule whose first block has {self.first_block_codes} codes; a block of this "
                f"model has {codes_per_block}, give 1 to that many"
            )
        return (codes_per_block - self.first_block_codes) * dit.repeats

    def first_codes(self, dit: DiTConfig) -> int:
        """How many codes must arrive before the first chunk of mel."""
        blocks, ahead = self.chunks[0]
        frames = (blocks + ahead) * dit.block_size - self.left_pad(dit)
        return frames // dit.repeats


RELEASE_SCHEDULE = Schedule(chunks=((3, 1),), back=2)  # how the release is served
# Least length of the first chunk of audio in mel frames: while it plays, the next one is generated.
FIRST_CHUNK_FRAMES = 5


def low_latency_schedule(token2wav: Token2Wav) -> Schedule:
    """Chunks of 1, 1, 2, 4, then 8 blocks.

    Small ones for latency, larger ones for quality and cost. The first block holds only
    the codes that the vocoder needs for FIRST_CHUNK_FRAMES of audio.
    """
    dit = token2wav.config.dit
    context_frames = token2wav.code2wav_bigvgan_model.context_frames
    frames = math.ceil(context_frames + FIRST_CHUNK_FRAMES) % dit.block_size
    if frames == 0:
        frames = dit.block_size
    return Schedule(
        chunks=((1, 0), (1, 0), (2, 1), (4, 1), (8, 1)),
        first_block_codes=math.ceil(frames / dit.repeats),
    )


def codes_until_audio(schedule: Schedule, token2wav: Token2Wav) -> int:
    """How many codes must arrive before the first chunk of audio.

    The vocoder may need the mel of more than one chunk.
    """
    dit = token2wav.config.dit
    context_frames = token2wav.code2wav_bigvgan_model.context_frames
    end = -schedule.left_pad(dit)
    index = 0
    while True:
        blocks, ahead = schedule.chunk(index)
        end += blocks * dit.block_size
        if end > context_frames:
            return (end + ahead * dit.block_size) // dit.repeats
        index += 1


CachedBlocks = list[list[BlockKV | None]]  # the entries of a BlockCache: [evaluations][layers]


@dataclass(frozen=True)
class ChunkShape:
    """What the solve of a chunk depends on besides tensors."""

    flow: FlowConfig
    num_final: int  # blocks at the beginning of the chunk that are final after it
    left_pad: int  # how many frames shorter its first block is than the others
    use_cache: bool  # whether earlier blocks come from a cache


def solve_chunk(
    dit: DiT,
    shape: ChunkShape,
    codes: Tensor,
    noise: Tensor,
    start: Tensor,
    speaker: tuple[Tensor, Tensor],
    modulations: Sequence[Tensor],
    cached: CachedBlocks,
) -> tuple[Tensor, CachedBlocks]:
    """Integrate one chunk from noise to mel: [1, T, 80], and the cache for the next chunk.

    codes [1, n] with T = n * repeats, noise [1, T, 80], start []: frame of the utterance at which
    the chunk begins. speaker: of both branches. modulations: of each layer [evaluations, parts, 1,
    D]. It depends on tensors only through its inputs, so that a CUDA graph can repeat it.
    """
    codes = both_branches(codes, shape.flow)
    context = dit.input_embed.context(dit.text_embed(codes), *speaker)  # [1 or 2, T, D]
    caches = [[BlockCache(entries) for entries in layers] for layers in cached]
    evaluations = itertools.count()  # in the order in which solve() evaluates the velocity field

    def velocity_fn(_: Tensor, x: Tensor) -> Tensor:
        i = next(evaluations)
        at_time = [tuple(parts[i][:, None]) for parts in modulations]
        x = x.expand(len(context), -1, -1)
        velocity = dit.velocity(
            x,
            context,
            at_time,
            start,
            caches[i] if shape.use_cache else None,
            shape.num_final,
            shape.left_pad,
        )
        return guided(velocity, shape.flow)

    grid = time_grid(shape.flow, noise.device)
    mel = solve(velocity_fn, noise, grid, shape.flow.solver)
    return mel, [[cache.entries for cache in layers] for layers in caches]


RunChunk = Callable[..., Any]  # as Token2Wav.run_chunk(): key, function, inputs


def run_plainly(key: Hashable, function: Callable, *inputs: Any) -> Any:
    """function(*inputs)."""
    return function(*inputs)


class MelStream:
    """Codes of one utterance in, chunks of its mel out."""

    def __init__(
        self,
        dit: DiT,
        voice: Voice,
        flow: FlowConfig,
        schedule: Schedule,
        generator: torch.Generator,
        run_chunk: RunChunk = run_plainly,
    ):
        """generator: on the CPU, draws the noise of the utterance, the same for every schedule.

        run_chunk: solves a chunk; that of Token2Wav does it by CUDA graphs where they are on.
        """
        self.dit = dit
        self.flow = flow
        self.schedule = schedule
        self.generator = generator
        self.run_chunk = run_chunk
        device = dit.proj_out.weight.device
        self.left_pad = schedule.left_pad(dit.config)

        # Speaker inputs and modulations do not depend on the codes: computed once.
        cond = both_branches(voice.cond.float().to(device), flow)
        ref_mel = both_branches(voice.ref_mel.float().to(device), flow)
        with torch.no_grad():
            self.speaker = dit.speaker(cond, ref_mel)
            times = torch.stack(evaluation_times(flow)).to(device)  # [evaluations]
            # One batched call for all times: of each layer [evaluations, parts, 1, D].
            layers = dit.modulations(times)
        self.modulations = [torch.stack(parts, dim=1) for parts in layers]
        self.cached: CachedBlocks = [
            [None] * len(dit.transformer_blocks) for _ in range(len(times))
        ]

        self.codes = torch.zeros(1, 0, dtype=torch.long, device=device)
        self.noise = torch.zeros(1, 0, dit.config.mel_dim, device=device)
        self.chunks_done = 0  # chunks that were returned
        self.frames_done = 0  # frames that were returned

    def feed(self, codes: Tensor) -> Iterator[Tensor]:
        """Append codes [1, n] -> the mel [1, 80, frames] of each chunk now complete."""
        self.codes = torch.cat([self.codes, codes.to(self.codes.device)], dim=1)
        frames = self.codes.shape[1] * self.dit.config.repeats
        block = self.dit.config.block_size
        while True:
            blocks, ahead = self.schedule.chunk(self.chunks_done)
            end = self.frames_done + blocks * block
            if self.frames_done == 0:
                end -= self.left_pad
            seen = end + ahead * block
            if seen > frames:
                return
            yield self.decode_chunk(end, seen)

    def finish(self) -> Iterator[Tensor]:
        """After the last codes -> the rest of the mel, if any."""
        frames = self.codes.shape[1] * self.dit.config.repeats
        if self.frames_done < frames:
            yield self.decode_chunk(frames, frames, last=True)

    @torch.no_grad()
    def decode_chunk(self, end: int, seen: int, last: bool = False) -> Tensor:
        """Generate the next chunk of mel [1, 80, frames].

        It ends at frame `end`, and the DiT sees context up to frame `seen`.
        """
        block, repeats = self.dit.config.block_size, self.dit.config.repeats

        # A schedule without caches starts `back` blocks earlier and drops their mel afterwards.
        recomputed = (self.schedule.back or 0) * block
        begin = max(self.frames_done - recomputed, 0)
        left_pad = self.left_pad if begin == 0 else 0
        num_final = (left_pad + end - begin) // block

        shape = ChunkShape(self.flow, num_final, left_pad, self.schedule.back is None)
        mel, self.cached = self.run_chunk(
            None if last else shape,  # the last chunk's length seldom comes again
            partial(solve_chunk, self.dit, shape),
            self.codes[:, begin // repeats : seen // repeats],
            self.draw(begin, seen),
            torch.tensor(begin, device=self.codes.device),
            self.speaker,
            self.modulations,
            self.cached,
        )  # [1, seen - begin, 80]
        mel = mel[:, self.frames_done - begin : end - begin].transpose(1, 2)
        self.chunks_done += 1
        self.frames_done = end
        return mel

    def draw(self, begin: int, end: int) -> Tensor:
        """Noise [1, end - begin, 80] of frames begin to end.

        It is one tensor for the utterance, extended only as far as needed.
        """
        missing = end - self.noise.shape[1]
        if missing > 0:
            noise = torch.randn(1, missing, self.noise.shape[2], generator=self.generator)
            self.noise = torch.cat([self.noise, noise.to(self.noise.device)], dim=1)
        return self.noise[:, begin:end]


class LayerStream:
    """One layer of the vocoder, streamed: chunks [B, T, C] in, final output frames out."""

    def __init__(self, layer: VocoderLayer, tail: Tensor | None = None):
        """tail: inputs that later outputs still depend on, None at the beginning."""
        self.layer = layer
        self.tail = tail

    def __call__(self, x: Tensor | None, last: bool) -> Tensor | None:
        """x, or None for no input -> [B, rate * (0 or more), C'], or None for no output."""
        context = self.layer.context_frames
        out = 0  # inputs of the tail whose outputs were returned
        if self.tail is not None:
            out = max(self.tail.shape[1] - context, 0)
            x = self.tail if x is None else torch.cat([self.tail, x], dim=1)
        if x is None:
            return None

        # Without its full right context an output is not final, except at the end.
        final = x.shape[1] if last else x.shape[1] - context
        if final <= out:
            self.tail = x
            return None
        rate = self.layer.rate
        y = self.layer.run(x)[:, out * rate : final * rate]

        # Keep the left context of the next output.
        dropped = max(final - context, 0)
        self.tail = x[:, dropped:]
        return y


Tails = list[Tensor | None]  # of every LayerStream


def vocode_chunk(
    layers: list[VocoderLayer], last: bool, mel: Tensor | None, tails: Tails
) -> tuple[Tensor | None, Tails]:
    """The next chunk of mel [1, 80, T], or None -> samples [1, n, 1] that are final now, or None,
    and the tails for the next chunk.
    """
    streams = [LayerStream(layer, tail) for layer, tail in zip(layers, tails, strict=True)]
    x = None
    if mel is not None:
        x = normalize(mel).transpose(1, 2).contiguous()  # [1, T, 80]
    for stream in streams:
        x = stream(x, last)
    return x, [stream.tail for stream in streams]


class VocoderStream:
    """Chunks of a mel in, chunks of its waveform out; joined, they equal that of the whole mel."""

    def __init__(self, vocoder: BigVGAN, run_chunk: RunChunk = run_plainly):
        """run_chunk: as in MelStream."""
        self.layers = vocoder.layers()
        self.run_chunk = run_chunk
        self.tails: Tails = [None] * len(self.layers)

    @torch.no_grad()
    def feed(self, mel: Tensor | None, last: bool = False) -> Tensor:
        """The next chunk [1, 80, T], or None -> samples [n] that are final now.

        last: no more mel follows.
        """
        function = partial(vocode_chunk, self.layers, last)
        key = None if last else "vocoder"
        x, self.tails = self.run_chunk(key, function, mel, self.tails)
        if x is None:
            return torch.zeros(0)
        return x[0, :, 0]


class SpeechStream:
    """Codes of one utterance in, chunks of its waveform out."""

    def __init__(
        self,
        token2wav: Token2Wav,
        voice: Voice,
        flow: FlowConfig,
        schedule: Schedule,
        generator: torch.Generator,
        mark: Callable[[str], object] = lambda event: None,
    ):
        """mark("mel") is called for each chunk of mel.

        Raises UserError for a voice that does not fit the model.
        """
        self.config = token2wav.config.dit
        self.mark = mark
        check_voice(voice, self.config)
        dit, vocoder = token2wav.code2wav_dit_model, token2wav.code2wav_bigvgan_model
        self.mel = MelStream(dit, voice, flow, schedule, generator, token2wav.run_chunk)
        self.vocoder = VocoderStream(vocoder, token2wav.run_chunk)

    def feed(self, codes: Tensor) -> Iterator[Tensor]:
        """Append codes [1, n] -> a waveform [samples] for each chunk that makes samples final.

        Raises UserError for codes that the model does not have.
        """
        check_codes(codes, self.config)
        for mel in self.mel.feed(codes):
            self.mark("mel")
            wave = self.vocoder.feed(mel)
            if len(wave):
                yield wave

    def finish(self) -> Iterator[Tensor]:
        """After the last codes -> the rest of the waveform in one chunk, if any."""
        mel = next(self.mel.finish(), None)
        if mel is not None:
            self.mark("mel")
        wave = self.vocoder.feed(mel, last=True)
        if len(wave):
            yield wave
