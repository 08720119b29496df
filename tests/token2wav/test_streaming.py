"""Streaming Token2Wav: the vocoder is exact, the DiT equals its schedule computed in one solve."""

import dataclasses
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
from operations import Operations
from test_token2wav import CODES, CONFIG, FLOW, VOICE, filled
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from minomni import cuda_graphs
from minomni.config import TINY
from minomni.cuda_graphs import Graphs, Recording
from minomni.errors import UserError
from minomni.token2wav.bigvgan import Activation, BigVGAN
from minomni.token2wav.dit import BlockAttention, both_branches, guided, rotate_first_head
from minomni.token2wav.ode_solver import evaluation_times, solve, time_grid
from minomni.token2wav.streaming import (
    FIRST_CHUNK_FRAMES,
    RELEASE_SCHEDULE,
    MelStream,
    Schedule,
    SpeechStream,
    VocoderStream,
    codes_until_audio,
    low_latency_schedule,
)
from minomni.token2wav.voice import Voice

# 8 evaluations of the velocity field: enough for each to depend on the caches of the others.
SHORT = dataclasses.replace(FLOW, points=3)
EULER = dataclasses.replace(SHORT, solver="euler", guidance=0.0)
# 250 frames: 10 blocks and a part of one.
MANY = torch.randint(0, 8448, (1, 125), generator=torch.Generator().manual_seed(1))
BLOCK = CONFIG.dit.block_size
LOW_LATENCY = low_latency_schedule(filled())
SAME = dict(rtol=0, atol=1e-4)  # mels of scale 10, and sums in another order at every evaluation


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return filled()


def streamed_mel(model, codes, flow, schedule, step=None) -> torch.Tensor:
    """The whole mel of a stream that gets its codes `step` at a time."""
    stream = MelStream(model.code2wav_dit_model, VOICE, flow, schedule, seeded())
    chunks = []
    for some in codes.split(step or codes.shape[1], dim=1):
        chunks += stream.feed(some)
    return torch.cat([*chunks, *stream.finish()], dim=2)


# ----------------------------------------------------------------------------------------------
# BigVGAN
@pytest.mark.parametrize("config", [CONFIG, TINY.token2wav], ids=["release rates", "tiny"])
@pytest.mark.parametrize("pieces", [[1] * 30, [24] * 4, [7, 90], [40, 0, 3], [2]], ids=str)
@torch.no_grad()
def test_vocoder_chunks_equal_the_whole_waveform(config, pieces):
    vocoder = filled(config).code2wav_bigvgan_model
    mel = torch.randn(1, 80, sum(pieces)) - 4
    stream = VocoderStream(vocoder)
    waves = [stream.feed(piece) for piece in mel.split(pieces, dim=2)]
    waves.append(stream.feed(None, last=True))
    torch.testing.assert_close(torch.cat(waves), vocoder(mel)[0], rtol=0, atol=1e-5)


def depends_on(function, x, output) -> list[int]:
    """The frames of x [1, T, C] that an output frame depends on."""
    x = x.clone().requires_grad_()
    function(x)[0, output].sum().backward()
    return x.grad.abs().sum(2)[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("config", [CONFIG, TINY.token2wav], ids=["release rates", "tiny"])
def test_stages_have_exactly_their_context_frames(config):
    for i, layer in enumerate(BigVGAN.layers(filled(config).code2wav_bigvgan_model)):
        x = 0.1 * torch.randn(1, 200, width(config.bigvgan, i))
        seen = []
        for at in range(layer.rate):
            seen += depends_on(layer.run, x, 100 * layer.rate + at)
        left, right = 100 - min(seen), max(seen) - 100
        assert max(left, right) == layer.context_frames


def width(config, layer) -> int:
    """Channels that come into a layer."""
    return config.upsample_initial_channel // 2 ** (layer // 2) if layer else config.mel_dim


def test_activation_reaches_five_frames():
    seen = depends_on(Activation(3), torch.randn(1, 40, 3), 20)
    assert seen == list(range(15, 26))
    assert Activation.context_frames == 5


# ----------------------------------------------------------------------------------------------
# DiT
@pytest.mark.parametrize("flow", [SHORT, EULER], ids=["rk4", "euler"])
@torch.no_grad()
def test_windows_equal_samples_of_slices(model, flow):
    """The release's schedule written out: one solve per window over slices of one noise tensor.

    The middle of each window is kept.
    """
    dit, frames, chunk, back, ahead = model.code2wav_dit_model, 250, 3 * BLOCK, 2 * BLOCK, BLOCK
    noise, expected, done = torch.randn(1, frames, 80, generator=seeded()), [], 0
    while done < frames:
        last = done + chunk + ahead > frames
        begin, end = max(done - back, 0), frames if last else done + chunk + ahead
        mel = dit.sample(
            MANY[:, begin // 2 : end // 2], VOICE.cond, VOICE.ref_mel, flow, noise[:, begin:end]
        )
        kept = frames if last else done + chunk
        expected.append(mel[:, :, done - begin : kept - begin])
        done = kept
    torch.testing.assert_close(
        streamed_mel(model, MANY, flow, RELEASE_SCHEDULE), torch.cat(expected, dim=2), **SAME
    )


def unrolled(schedule, frames):
    """One sequence of all blocks that a schedule with caches computes, look-ahead included.

    -> rows of (chunk, block, final), which determine what each block attends to.
    """
    rows, done, chunk = [], 0, 0
    frames += left_pad(schedule)  # the first block begins before the utterance
    while done * BLOCK < frames:
        blocks, ahead = schedule.chunks[min(chunk, len(schedule.chunks) - 1)]
        end = done + blocks if (done + blocks + ahead) * BLOCK <= frames else -(-frames // BLOCK)
        seen = end + ahead if (done + blocks + ahead) * BLOCK <= frames else end
        rows += [(chunk, block, block < end) for block in range(done, seen)]
        done, chunk = end, chunk + 1
    return rows


def left_pad(schedule) -> int:
    """How many frames shorter a schedule's first block is than the others."""
    return 0 if schedule.first_block_codes is None else BLOCK - 2 * schedule.first_block_codes


def attends_to(row, other, back, ahead) -> bool:
    """Whether a row attends to another: in its own chunk, or to final blocks of earlier chunks."""
    (chunk, block, _), (chunk2, block2, final2) = row, other
    if not -back <= block2 - block <= ahead:
        return False
    return chunk2 == chunk or (final2 and chunk2 < chunk and block2 < block)


@pytest.mark.parametrize("flow", [SHORT, EULER], ids=["rk4", "euler"])
@pytest.mark.parametrize(
    "schedule",
    [
        LOW_LATENCY,
        Schedule(((2, 1),)),
        Schedule(((1, 2), (1, 0))),
        Schedule(((1, 0), (1, 0)), first_block_codes=5),
        Schedule(((2, 1),), first_block_codes=11),
    ],
    ids=str,
)
@torch.no_grad()
def test_caches_equal_one_solve_over_all_blocks(model, flow, schedule):
    """All blocks that are ever computed, in one sequence with one dense mask and one solve."""
    dit, frames = model.code2wav_dit_model, 250
    rows, noise = unrolled(schedule, frames), torch.randn(1, frames, 80, generator=seeded())
    at = torch.tensor(
        [frame for _, block, _ in rows for frame in range(block * BLOCK, (block + 1) * BLOCK)]
    )
    at = at - left_pad(schedule)
    valid, at = (at >= 0) & (at < frames), at.clamp(0, frames - 1)
    attentions = [block.attn for block in dit.transformer_blocks]
    masks = {
        attn: torch.tensor(
            [[attends_to(row, other, attn.back, attn.ahead) for other in rows] for row in rows]
        )
        .repeat_interleave(BLOCK, 0)
        .repeat_interleave(BLOCK, 1)
        & valid
        for attn in attentions
    }

    def dense(attn, h, cos, sin, *_):
        q, k, v = (
            to(h).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = rotate_first_head(q, *dit.rotary(at)), rotate_first_head(k, *dit.rotary(at))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~masks[attn], -torch.inf)
        return attn.to_out((scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).flatten(2))

    inputs = (both_branches(x, flow) for x in (MANY, VOICE.cond, VOICE.ref_mel))
    context = dit.context(*inputs)[:, at]

    def velocity_fn(time, x):
        x = x.expand(len(context), -1, -1)
        return guided(dit.velocity(x, context, dit.modulations(time)), flow)

    with mock.patch.object(BlockAttention, "forward", dense):
        mel = solve(velocity_fn, noise[:, at], time_grid(flow), flow.solver)[0]
    kept = torch.tensor([final for _, _, final in rows]).repeat_interleave(BLOCK) & valid
    torch.testing.assert_close(streamed_mel(model, MANY, flow, schedule)[0].T, mel[kept], **SAME)


@torch.no_grad()
def test_a_short_first_block_is_the_first_chunk(model):
    """With as many codes as a block has it changes nothing; and no window becomes longer."""
    plain = streamed_mel(model, MANY, EULER, Schedule(((1, 0), (2, 1))))
    torch.testing.assert_close(
        streamed_mel(model, MANY, EULER, Schedule(((1, 0), (2, 1)), first_block_codes=12)),
        plain,
        **SAME,
    )
    stream = MelStream(
        model.code2wav_dit_model,
        VOICE,
        EULER,
        Schedule(((1, 0), (2, 1)), first_block_codes=5),
        seeded(),
    )
    assert stream.schedule.first_codes(CONFIG.dit) == 5
    lengths = [mel.shape[2] for mel in [*stream.feed(MANY), *stream.finish()]]
    assert lengths[:2] == [10, 2 * BLOCK]
    assert sum(lengths) == 2 * MANY.shape[1]
    with pytest.raises(UserError, match="13 codes; a block of this model has 12"):
        MelStream(
            model.code2wav_dit_model,
            VOICE,
            EULER,
            Schedule(((1, 0),), first_block_codes=13),
            seeded(),
        )


@pytest.mark.parametrize("config", [CONFIG, TINY.token2wav], ids=["release rates", "tiny"])
@torch.no_grad()
def test_low_latency_schedule_has_the_shortest_first_chunk(config):
    """With one code less in the first block, the first chunk of audio would be too short."""
    model = filled(config)
    voice = (
        VOICE
        if config is CONFIG
        else Voice("x", 0, torch.zeros(1, config.dit.enc_emb_dim), torch.zeros(1, 30, 80))
    )
    schedule = low_latency_schedule(model)
    codes = torch.zeros(1, codes_until_audio(schedule, model), dtype=torch.long)
    first_chunk = FIRST_CHUNK_FRAMES * math.prod(config.bigvgan.upsample_rates)  # samples
    for fewer in (0, 1):
        shorter = dataclasses.replace(
            schedule, first_block_codes=schedule.first_block_codes - fewer
        )
        stream = SpeechStream(model, voice, EULER, shorter, seeded())
        samples = sum(map(len, stream.feed(codes[:, fewer:])))
        assert (samples >= first_chunk) is (fewer == 0)
    assert not list(SpeechStream(model, voice, EULER, schedule, seeded()).feed(codes[:, 1:]))


@pytest.mark.parametrize(
    "schedule", [LOW_LATENCY, RELEASE_SCHEDULE], ids=["low latency", "release"]
)
@torch.no_grad()
def test_when_codes_arrive_changes_nothing(model, schedule):
    whole = streamed_mel(model, MANY, EULER, schedule)
    for step in (1, 7, 50):
        torch.testing.assert_close(
            streamed_mel(model, MANY, EULER, schedule, step), whole, rtol=0, atol=0
        )


@torch.no_grad()
def test_caches_compute_finished_blocks_once(model):
    """The network computes each block once, and look-ahead blocks once more."""
    dit = model.code2wav_dit_model
    look = dit.velocity
    blocks = []

    def counted(x, *rest):
        blocks.append(math.ceil(x.shape[1] / BLOCK))
        return look(x, *rest)

    def blocks_per_evaluation(schedule) -> float:
        blocks.clear()
        with mock.patch.object(dit, "velocity", counted):
            streamed_mel(model, MANY, EULER, schedule)
        return sum(blocks) / len(evaluation_times(EULER))

    assert blocks_per_evaluation(Schedule(((1, 0), (2, 0)))) == 11  # 250 frames are 11 blocks
    # Three chunks end before the last one.
    assert blocks_per_evaluation(Schedule(((3, 1),))) == 11 + 3
    assert blocks_per_evaluation(RELEASE_SCHEDULE) == 4 + 6 + 6 + 4


@torch.no_grad()
def test_short_speech_is_whole_utterance_speech(model):
    """Speech shorter than the first chunk takes one solve and one vocoder call."""
    for codes in (CODES[:, :1], CODES):
        stream = SpeechStream(model, VOICE, SHORT, RELEASE_SCHEDULE, seeded())
        wave = torch.cat([*stream.feed(codes), *stream.finish()])
        torch.testing.assert_close(wave, model(codes, VOICE, SHORT, seeded()), rtol=0, atol=1e-5)


def changed_blocks(first, second, atol=1e-5) -> list[int]:
    """The blocks in which two mels [1, 80, T] differ."""
    frames = (first - second).abs().amax(1)[0] > atol
    return [i for i, block in enumerate(frames.split(BLOCK)) if block.any()]


@torch.no_grad()
def test_every_evaluation_extends_the_context_by_two_blocks_back_and_one_ahead():
    """A whole solve, 36 evaluations with the release's settings, exceeds any finite window."""
    dit, codes, noise = (
        filled().double().code2wav_dit_model,
        MANY[:, :120],
        torch.randn(1, 240, 80).double(),
    )
    cond, ref_mel = VOICE.cond.double(), VOICE.ref_mel.double()  # the farthest effects are small
    other = codes.clone()
    other[0, 5 * 12 + 3] = (codes[0, 5 * 12 + 3] + 4000) % 8448  # in block 5
    back, ahead = (
        sum(getattr(block.attn, side) for block in dit.transformer_blocks)
        for side in ("back", "ahead")
    )
    for points in (2, 3, 4):
        flow = dataclasses.replace(EULER, points=points)
        mels = [dit.sample(x, cond, ref_mel, flow, noise) for x in (codes, other)]
        n = points - 1
        assert changed_blocks(*mels, atol=1e-11) == list(
            range(max(5 - n * ahead, 0), min(5 + n * back, 9) + 1)
        )


@torch.no_grad()
def test_a_schedule_bounds_what_a_code_can_change(model):
    other = MANY.clone()
    # In block 5, which the second chunk makes final.
    other[0, 5 * 12 + 3] = (MANY[0, 5 * 12 + 3] + 4000) % 8448
    for schedule, blocks in (
        (RELEASE_SCHEDULE, range(3, 9)),
        (Schedule(((3, 1),)), range(3, 11)),
        (LOW_LATENCY, range(3, 11)),
    ):
        mels = [streamed_mel(model, codes, SHORT, schedule) for codes in (MANY, other)]
        assert set(changed_blocks(*mels)) <= set(blocks)
        assert 5 in changed_blocks(*mels)
    # Frames of the chunks before the one that holds the code: no whole blocks here.
    before = 2 * LOW_LATENCY.first_block_codes + 3 * BLOCK
    difference = (mels[0] - mels[1]).abs()
    assert difference[:, :, :before].max() <= 1e-5
    assert difference[:, :, before:].max() > 1e-5


@torch.no_grad()
def test_noise_is_one_tensor(model):
    stream = MelStream(model.code2wav_dit_model, VOICE, FLOW, RELEASE_SCHEDULE, seeded(5))
    pieces = [stream.draw(0, n) for n in (10, 34, 30, 100)]
    assert torch.equal(pieces[-1], torch.randn(1, 100, 80, generator=seeded(5)))


# ----------------------------------------------------------------------------------------------
# Bad input
def test_bad_schedules_and_codes_get_one_line(model):
    for bad in (
        dict(chunks=()),
        dict(chunks=((0, 1),)),
        dict(chunks=((1, -1),)),
        dict(chunks=((1, 0),), back=-1),
    ):
        with pytest.raises(UserError, match="a schedule of chunks"):
            Schedule(**bad)
    stream = SpeechStream(model, VOICE, FLOW, LOW_LATENCY, seeded())
    with pytest.raises(UserError, match="sounds for 0 to 8447"):
        list(stream.feed(torch.tensor([[9000]])))
    with pytest.raises(UserError, match="'Chelsie' has cond"):
        SpeechStream(
            model, dataclasses.replace(VOICE, cond=torch.zeros(1, 9)), FLOW, LOW_LATENCY, seeded()
        )


# ----------------------------------------------------------------------------------------------
# CUDA graphs
class FakeRecording(Recording):
    """A recording without CUDA: the first call's function, run again on the copied inputs."""

    def record(self, pool):
        results = self.function(*self.inputs)
        buffers = [leaf for leaf in tree_leaves(results) if leaf is not None]

        class Graph:
            def replay(graph):
                again = tree_leaves(self.function(*self.inputs))
                for buffer, value in zip(
                    buffers, (leaf for leaf in again if leaf is not None), strict=True
                ):
                    buffer.copy_(value)

        return Graph(), results


@pytest.mark.parametrize("schedule", [LOW_LATENCY, RELEASE_SCHEDULE], ids=["cached", "recomputed"])
def test_recorded_chunks_give_the_speech_of_plain_ones(schedule, monkeypatch):
    """Numbers of the first utterance that were fixed in a recording would change the others."""
    monkeypatch.setattr(cuda_graphs, "Recording", FakeRecording)
    other_voice = dataclasses.replace(VOICE, cond=VOICE.cond + 1, ref_mel=VOICE.ref_mel - 1)
    model = filled()
    codes = MANY[:, :100]
    utterances = ((VOICE, codes, 1), (VOICE, codes, 1), (other_voice, codes.flip(1), 2))

    def speech(voice, codes, seed) -> torch.Tensor:
        stream = SpeechStream(model, voice, EULER, schedule, seeded(seed))
        chunks = [chunk for some in codes.split(25, dim=1) for chunk in stream.feed(some)]
        return torch.cat([*chunks, *stream.finish()])

    plain = [speech(*utterance) for utterance in utterances]
    model.graphs = Graphs()
    for utterance, expected in zip(utterances, plain, strict=True):
        torch.testing.assert_close(speech(*utterance), expected, rtol=0, atol=1e-5)
    kinds = {type(key[0][0]).__name__ for key in model.graphs.recordings}
    assert kinds == {"ChunkShape", "str"}  # of the DiT and of the vocoder


def test_a_chunk_never_waits_for_the_device(model):
    """Neither DiT nor vocoder reads a number back or copies one from the host."""
    waits = []

    def run(key, function, *inputs):
        with Operations() as operations:
            results = function(*inputs)
        waits.extend(operations.waits)
        return results

    model = filled()
    model.run_chunk = run
    stream = SpeechStream(model, VOICE, SHORT, LOW_LATENCY, seeded())
    assert len(list(stream.feed(MANY))) == 3
    assert waits == []


@torch.no_grad()
def test_a_traced_chunk_can_be_repeated(model):
    """Numbers that came from the host would be fixed in the trace of the first chunk."""
    flow = dataclasses.replace(EULER, points=2)  # one evaluation
    schedule = Schedule(chunks=((1, 0),))
    chunks = []

    def run(key, function, *inputs):
        results = function(*inputs)
        chunks.append((function, inputs, results))
        return results

    stream = MelStream(model.code2wav_dit_model, VOICE, flow, schedule, seeded(), run)
    list(stream.feed(MANY[:, :48]))
    (_, _, _), (function, inputs, _), (_, others, (expected, _)), _ = chunks
    traced = make_fx(lambda *tensors: function(*tensors)[0])(*inputs)
    torch.testing.assert_close(traced(*others), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(traced(*inputs), expected, rtol=0, atol=1e-2)


def test_graphs_by_hand(monkeypatch):
    """Recorded at the second call; other shapes and other keys apart; the longest unused goes."""
    monkeypatch.setattr(cuda_graphs, "Recording", FakeRecording)
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    graphs = Graphs()

    def double(x, nothing):
        return [2 * x], nothing

    for value in (1.0, 2.0, 3.0, 4.0):
        assert len(graphs.recordings) == (value > 2)
        x = torch.full((3,), value)
        [found], nothing = graphs.call("a", double, (x, None))
        assert found.tolist() == [2 * value] * 3
        assert nothing is None
    kept, _ = graphs.call("a", double, (torch.ones(3), None))
    graphs.call("a", double, (torch.zeros(3), None))
    assert kept[0].tolist() == [2, 2, 2]  # a copy: the next replay does not change it

    for shape in (4, 5):
        for _ in range(2):
            graphs.call("a", double, (torch.ones(shape), None))
    sizes = [key[1][0] for key in graphs.recordings]
    assert sizes == [(4,), (5,)]


def test_tf32_is_on_during_token2wav_alone(model):
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    assert before != ["tf32", "tf32"]
    seen = []

    def note(*_):
        seen.append([setting.fp32_precision for setting in settings])

    model = filled()
    model.code2wav_dit_model.proj_out.register_forward_hook(note)
    model.code2wav_bigvgan_model.activation_post.register_forward_hook(note)
    for tf32, expected in ((False, before), (True, ["tf32", "tf32"])):
        model.tf32 = tf32
        seen.clear()
        model(CODES, VOICE, EULER)
        list(SpeechStream(model, VOICE, EULER, LOW_LATENCY, seeded()).feed(CODES))
        assert len(seen) > 4
        assert all(precisions == expected for precisions in seen)
        assert [setting.fp32_precision for setting in settings] == before


def test_settings_of_pytorch_stay_as_they_are_without_tf32():
    """Reading the effective precision and writing it back would end its inheritance."""
    program = """
import torch
from minomni.devices import tf32_products
torch.backends.fp32_precision = "tf32"
with tf32_products(False):
    pass
torch.backends.fp32_precision = "ieee"
print(torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["ieee", "ieee"], done.stderr


def test_a_precision_has_graphs_of_its_own_and_a_last_chunk_has_none(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "Recording", FakeRecording)
    model = filled()
    model.graphs = Graphs()
    keys = []
    call = Graphs.call
    monkeypatch.setattr(Graphs, "call", lambda self, *a: keys.append(a[0]) or call(self, *a))
    for tf32 in (False, True):
        model.tf32 = tf32
        stream = SpeechStream(model, VOICE, EULER, RELEASE_SCHEDULE, seeded())
        list(stream.feed(MANY[:, :60]))
        called = len(keys)
        assert len(list(stream.finish())) == 1
        assert len(keys) == called
    assert {key[1] for key in keys} == {False, True}
    assert len(set(keys)) == 2 * len({key[0] for key in keys})
