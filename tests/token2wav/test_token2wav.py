"""Token2Wav against the official code, and against slow, simple versions of its parts.

To write tests/golden/token2wav.npz again (needs transformers 5.23.0):

    python tests/token2wav/test_token2wav.py
"""

import copy
import dataclasses
import math
from functools import cache
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

from minomni.config import QWEN7B, TINY
from minomni.errors import UserError
from minomni.token2wav.bigvgan import (
    Activation,
    AntiAliasedSnake,
    kaiser_taps,
    snake_by_convolution,
)
from minomni.token2wav.dit import BlockAttention, solve, time_grid
from minomni.token2wav.token2wav import Token2Wav
from minomni.token2wav.voice import Voice

CONFIG = oracle.CONFIG.token2wav
FLOW = QWEN7B.flow
# 30 frames: a block and a quarter.
CODES = torch.from_numpy(np.random.RandomState(0).randint(0, 8448, (1, 15)))
NOISE = torch.from_numpy(oracle.numbers("noise", 1, 30, 80))
VOICE = oracle.voices()["Chelsie"]
TIME = 0.3
# Ten times what two fp32 implementations differ by, for what adds up over 36 calls of the DiT and
# for one vocoder.
TOLERANCE = {"speaker": 2e-5, "velocity": 2e-5, "mel": 2e-5, "wave": 5e-6}


def filled(config=CONFIG) -> Token2Wav:
    """A model of its own with the numbers of oracle.fill, which are drawn once."""
    return copy.deepcopy(filled_once(config))


@cache
def filled_once(config) -> Token2Wav:
    model = Token2Wav(config).eval()
    oracle.fill({f"token2wav.{name}": tensor for name, tensor in model.state_dict().items()})
    return model


@pytest.fixture
def model() -> Token2Wav:
    return filled()


# ----------------------------------------------------------------------------------------------
# The official code
@torch.no_grad()
def official_outputs() -> dict[str, np.ndarray]:
    from transformers import Qwen2_5OmniToken2WavConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavModel

    given = oracle.as_json(oracle.to_json(oracle.CONFIG))["token2wav_config"]
    official = Qwen2_5OmniToken2WavModel(Qwen2_5OmniToken2WavConfig(**given)).eval()
    oracle.fill({f"token2wav.{name}": p for name, p in official.named_parameters()})
    dit, cond = official.code2wav_dit_model, VOICE.cond[:, None].expand(-1, 30, -1)
    speaker = dit.input_embed.spk_encoder(VOICE.ref_mel)
    velocity = dit(NOISE, VOICE.ref_mel, cond, CODES, torch.tensor(TIME), apply_cfg=False)
    with mock.patch("torch.randn", return_value=NOISE.clone()):
        mel = dit.sample(VOICE.cond, VOICE.ref_mel, CODES)
    wave = official.code2wav_bigvgan_model(mel)
    answers = {
        "speaker": speaker.reshape(1, -1),
        "velocity": velocity,
        "mel": mel,
        "wave": wave.reshape(1, -1),
    }
    return {name: np.asarray(x) for name, x in answers.items()}


@torch.no_grad()
def our_outputs(model: Token2Wav) -> dict[str, torch.Tensor]:
    dit, voice = model.code2wav_dit_model, (VOICE.cond, VOICE.ref_mel)
    mel = dit.sample(CODES, *voice, FLOW, NOISE)
    speaker, velocity = dit.input_embed.spk_encoder(VOICE.ref_mel), dit(NOISE, CODES, TIME, *voice)
    return {
        "speaker": speaker,
        "velocity": velocity,
        "mel": mel,
        "wave": model.code2wav_bigvgan_model(mel),
    }


def compare(mine: dict[str, torch.Tensor], theirs: dict[str, np.ndarray]) -> None:
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(mine[name], expected, rtol=0, atol=TOLERANCE[name], err_msg=name)


def test_equals_the_golden_file_of_the_official_code(model):
    compare(our_outputs(model), oracle.golden("token2wav"))


@pytest.mark.slow
def test_equals_the_official_code(model):
    transformers = pytest.importorskip(
        "transformers", reason="only needed to compare with the official code itself"
    )
    if transformers.__version__ != oracle.VERSION:
        pytest.skip(f"the comparison is written for transformers {oracle.VERSION}")
    compare(our_outputs(model), official_outputs())


def test_golden_file_detects_a_changed_weight(model):
    model.code2wav_dit_model.transformer_blocks[1].attn.to_k.weight.data[0] *= 1.01  # one row
    with pytest.raises(AssertionError, match="velocity"):
        compare(our_outputs(model), oracle.golden("token2wav"))


# ----------------------------------------------------------------------------------------------
# DiT
def dense_attention(attn: BlockAttention, h, cos, sin, valid, cache=None, num_final=0):
    """The attention of the paper's figure: all frames against all frames, with a mask of blocks."""
    frames = h.shape[1]
    block = torch.arange(frames) // attn.block_size
    distance = block[None] - block[:, None]
    mask = (distance >= -attn.back) & (distance <= attn.ahead)
    if valid is not None:
        mask = mask & valid

    def heads(x):
        return x.reshape(len(h), frames, attn.heads, -1).transpose(1, 2)  # [B, H, T, d]

    q, k, v = heads(attn.to_q(h)), heads(attn.to_k(h)), heads(attn.to_v(h))
    rotation = torch.complex(cos, sin)[:, 0]  # [T, d/2], neighboring pairs are complex numbers
    for x in (q, k):
        pairs = torch.view_as_complex(x[:, 0].unflatten(-1, (-1, 2)).contiguous())  # [B, T, d/2]
        x[:, 0] = torch.view_as_real(pairs * rotation).flatten(-2)
    scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return attn.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("frames", [2, 24, 50, 96])
@torch.no_grad()
def test_blocks_equal_a_dense_mask(model, frames):
    x, codes = torch.randn(3, frames, 80), torch.randint(0, 8448, (3, frames // 2))
    inputs = x, codes, torch.rand(3), torch.randn(3, 12), torch.randn(3, 20, 80)
    quick = model.code2wav_dit_model(*inputs)
    with mock.patch.object(BlockAttention, "forward", dense_attention):
        dense = model.code2wav_dit_model(*inputs)
    torch.testing.assert_close(quick, dense, rtol=0, atol=5e-6)  # fp32 rounding at a scale of 10


@torch.no_grad()
def test_one_forward_pass_sees_two_blocks_back_and_one_ahead():
    layers = "num_hidden_layers", "look_ahead_layers", "look_backward_layers"
    pattern = {name: getattr(QWEN7B.token2wav.dit, name) for name in layers}
    config = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, **pattern))
    dit = filled(config).code2wav_dit_model
    x = torch.randn(1, 8 * 24, 80)
    codes = torch.randint(0, 8448, (1, 8 * 12))
    voice = (VOICE.cond, VOICE.ref_mel)
    other = codes.clone()
    other[0, 4 * 12 + 5] += 1  # a code in the middle of block 4
    difference = dit(x, codes, TIME, *voice) - dit(x, other % 8448, TIME, *voice)
    changed = difference.abs().amax(-1)[0] > 1e-6  # [T]
    assert changed.reshape(8, 24).all(1).tolist() == changed.reshape(8, 24).any(1).tolist()
    # Block 5, for example, sees blocks 3 and 4 before it and block 6 after it.
    assert changed[::24].nonzero()[:, 0].tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("guidance", [0.0, 0.5])
@torch.no_grad()
def test_sample_is_guided_calls_of_forward(model, guidance):
    dit = model.code2wav_dit_model
    flow = dataclasses.replace(FLOW, guidance=guidance, points=4)
    encoder = dit.input_embed.spk_encoder
    zeros = [torch.zeros_like(x) for x in (CODES, VOICE.cond, VOICE.ref_mel)]

    def velocity_fn(time, x):
        conditional = dit(x, CODES, time, VOICE.cond, VOICE.ref_mel)
        unconditional = dit(x, zeros[0], time, zeros[1], zeros[2])
        return conditional + guidance * (conditional - unconditional)

    expected = solve(velocity_fn, NOISE, time_grid(flow), "rk4").transpose(1, 2)
    with (
        mock.patch.object(encoder, "forward", wraps=encoder.forward) as speaker,
        mock.patch.object(dit, "velocity", wraps=dit.velocity) as velocity,
    ):
        mel = dit.sample(CODES, VOICE.cond, VOICE.ref_mel, flow, NOISE)
    torch.testing.assert_close(mel, expected, rtol=0, atol=2e-5)
    assert speaker.call_count == 1
    assert velocity.call_count == 12
    assert {len(call.args[0]) for call in velocity.call_args_list} == {2 if guidance else 1}


def test_time_grid_of_the_release():
    expected = [0, 0.015192, 0.060307, 0.133975, 0.233956, 0.357212, 0.5, 0.65798, 0.826352, 1]
    np.testing.assert_allclose(time_grid(FLOW), expected, atol=5e-7)  # printed to six places
    np.testing.assert_allclose(
        time_grid(dataclasses.replace(FLOW, sway=0.0, points=3)), [0, 0.5, 1]
    )


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("rk4", 4)])
def test_solvers_converge_at_their_order(solver, order):
    """dy/dt = y + t from 1 ends at 2e - 2; half the step divides the error by 2^order."""
    errors = []
    for points in (9, 17):
        grid = torch.linspace(0, 1, points, dtype=torch.float64)
        end = solve(lambda t, y: y + t, torch.ones((), dtype=torch.float64), grid, solver)
        errors.append(abs(end.item() - (2 * math.e - 2)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_unknown_solver_is_named():
    with pytest.raises(UserError, match="'heun'.*euler, rk4"):
        solve(lambda t, y: y, NOISE, time_grid(FLOW), "heun")


def test_every_parameter_has_a_gradient_and_the_voice_is_encoded_once():
    dit = filled(TINY.token2wav).code2wav_dit_model.train()
    x, codes = torch.randn(2, 100, 80), torch.randint(0, 1000, (2, 25))
    speaker = dit.input_embed.spk_encoder
    with mock.patch.object(speaker, "forward", wraps=speaker.forward) as encode:
        velocity = dit(x, codes, torch.rand(2), torch.randn(2, 160), torch.randn(2, 40, 80))
    velocity.square().mean().backward()
    assert encode.call_count == 1
    assert without_gradient(dit) == []


def without_gradient(module) -> list[str]:
    """The names of parameters whose gradient is missing or zero."""
    names = []
    for name, p in module.named_parameters():
        if p.grad is None or not p.grad.abs().max() > 0:
            names.append(name)
    return names


def test_dropout_is_for_training_only(model):
    dit, inputs = model.code2wav_dit_model, (NOISE, CODES, TIME, VOICE.cond, VOICE.ref_mel)
    with torch.no_grad():
        assert torch.equal(dit(*inputs), dit(*inputs))
        assert not torch.equal(dit.train()(*inputs), dit(*inputs))


# ----------------------------------------------------------------------------------------------
# BigVGAN
def test_kaiser_taps_of_the_release():
    half = [0.00202896, 0.00938947, -0.02554346, -0.05765738, 0.12857258, 0.44320980]
    # The release computes them in fp32.
    np.testing.assert_allclose(kaiser_taps(), half + half[::-1], rtol=0, atol=5e-8)
    assert sum(kaiser_taps()) == pytest.approx(1)


def plain_activation(x, act):
    """Activation with replicate padding and depthwise convolutions. [B, T, C] -> same."""
    x, channels = x.transpose(1, 2), x.shape[-1]
    taps = torch.tensor(kaiser_taps(), dtype=x.dtype).expand(channels, 1, -1)
    x = F.pad(x, (5, 5), mode="replicate")
    x = 2 * F.conv_transpose1d(x, taps, stride=2, groups=channels)[..., 15:-15]
    alpha, beta = act.alpha.exp()[:, None], act.beta.exp()[:, None]
    x = x + (x * alpha).sin().square() / (beta + 1e-9)
    x = F.pad(x, (5, 6), mode="replicate")
    return F.conv1d(x, taps, stride=2, groups=channels).transpose(1, 2)


@pytest.mark.parametrize("frames", [1, 2, 7, 40])
def test_shifted_additions_equal_padded_convolutions(frames):
    activation = Activation(5)
    oracle.fill(dict(activation.named_parameters()))
    x = torch.randn(2, frames, 5, requires_grad=True)
    weights = torch.randn(2, frames, 5)
    leaves = x, activation.act.alpha, activation.act.beta
    fast = activation(x)
    plain = plain_activation(x, activation.act)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-6)
    gradients = torch.autograd.grad((fast * weights).sum(), leaves)
    expected = torch.autograd.grad((plain * weights).sum(), leaves)
    for ours, theirs in zip(gradients, expected, strict=True):
        # Sums over B and T in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("frames", [1, 2, 7, 40])
def test_the_activation_of_a_gpu_equals_that_of_a_cpu(frames):
    """Values and gradients of a and b of each channel, in fp64."""
    x = torch.randn(2, frames, 5, dtype=torch.float64, requires_grad=True)
    a, b = (torch.rand(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(2, frames, 5, dtype=torch.float64)
    by_frame = [parameter.expand(frames, -1).contiguous() for parameter in (a, b)]
    expected = AntiAliasedSnake.apply(x, *by_frame)
    found = snake_by_convolution(x, a, b)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    gradients = torch.autograd.grad((found * weights).sum(), (x, a, b))
    written = torch.autograd.grad((expected * weights).sum(), (x, a, b))
    torch.testing.assert_close(gradients, written, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 4, 9])
def test_written_gradient_equals_finite_differences(frames):
    shapes = (2, frames, 3), (frames, 3), (frames, 3)
    inputs = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(AntiAliasedSnake.apply, inputs)


@pytest.mark.parametrize("config", [CONFIG, TINY.token2wav], ids=["release rates", "tiny"])
@torch.no_grad()
def test_length_is_frames_times_rates(config):
    vocoder = filled(config).code2wav_bigvgan_model
    for frames in (1, 2, 7):
        wave = vocoder(torch.randn(2, 80, frames))
        assert wave.shape == (2, frames * math.prod(config.bigvgan.upsample_rates))
        assert wave.abs().max() <= 1


def test_vocoder_trains_every_parameter():
    vocoder = filled(TINY.token2wav).code2wav_bigvgan_model
    vocoder(torch.randn(2, 80, 6) - 4).square().mean().backward()
    assert without_gradient(vocoder) == []


# ----------------------------------------------------------------------------------------------
# Token2Wav
def test_one_code_gives_audio_and_a_seed_repeats(model):
    for codes in (CODES[:, :1], CODES):
        first, again, other = (
            model(codes, VOICE, FLOW, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert first.shape == (codes.shape[1] * 480,)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_bad_codes_and_voices_get_one_line(model):
    def refuse(codes, voice, match):
        return pytest.raises(UserError, model, codes, voice, FLOW).match(match)

    refuse(CODES[:, :0], VOICE, r"\[1, 0\], expected \[1, at least one code\]")
    refuse(CODES[0], VOICE, r"shape \[15\]")
    refuse(
        CODES.clone().fill_(8448), VOICE, "8448 to 8448, but this model has sounds for 0 to 8447"
    )
    refuse(-CODES - 1, VOICE, "sounds for 0 to 8447")
    refuse(
        CODES,
        dataclasses.replace(VOICE, cond=torch.zeros(1, 9)),
        r"'Chelsie' has cond \[1, 9\].*\[1, 12\]",
    )
    refuse(CODES, dataclasses.replace(VOICE, ref_mel=torch.zeros(1, 4, 80)), "5 to 30000 frames")
    refuse(
        CODES,
        Voice("Ethan", 415, VOICE.cond, torch.zeros(60, 80)),
        r"'Ethan' has cond .* ref_mel \[60, 80\]",
    )
    assert (
        model(CODES, dataclasses.replace(VOICE, ref_mel=VOICE.ref_mel[:, :5]), FLOW)
        .isfinite()
        .all()
    )


def test_release_on_the_meta_device():
    with torch.device("meta"):
        model = Token2Wav(QWEN7B.token2wav)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert (count(model.code2wav_dit_model), count(model.code2wav_bigvgan_model)) == (
        333_607_760,
        115_443_504,
    )
    assert list(model.buffers()) == []  # so that a checkpoint fills all there is


def test_built_on_meta_and_loaded_by_assign_gives_the_same_waveform(model):
    with torch.device("meta"):
        empty = Token2Wav(CONFIG).eval()
    empty.load_state_dict(model.state_dict(), assign=True)

    def speak(m):
        return m(CODES, VOICE, FLOW, torch.Generator().manual_seed(3))

    assert torch.equal(speak(empty), speak(model))


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.savez_compressed(oracle.GOLDEN / "token2wav.npz", **official_outputs())
