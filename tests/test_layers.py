"""Layers, decoder, sampling and the two encoders against their definitions."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from minomni import layers
from minomni.config import QWEN7B, TINY
from minomni.decoder import Decoder
from minomni.inputs.mel import num_audio_tokens
from minomni.kv_cache import KVCache
from minomni.layers import RMSNorm, attention, attention_with_weights
from minomni.rotary import apply_rotary, rotary_cos_sin
from minomni.sampling import sample
from minomni.thinker.audio_encoder import AudioEncoder
from minomni.thinker.vision_encoder import VisionEncoder

EXACT = dict(rtol=0, atol=2e-6)  # fp32 sums in another order


def decoder():
    return Decoder(TINY.thinker.text, TINY.thinker.text.hidden_size).eval()


def case(rows=2, length=9):
    embeds = torch.randn(rows, length, TINY.thinker.text.hidden_size)
    return embeds, torch.arange(length).expand(3, rows, length)


def test_rms_norm_casts_before_the_weight():
    norm = RMSNorm(8, 1e-6)
    norm.weight.data.normal_()
    norm = norm.bfloat16()
    x = torch.randn(4, 8).bfloat16()
    unit = (x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert torch.equal(norm(x), norm.weight * unit)


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_attention_equals_its_written_out_form(causal, masked):
    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    mask = (torch.rand(2, 1, 7, 7) < 0.6) | torch.eye(7, dtype=torch.bool) if masked else None
    slow, weights = attention_with_weights(q, k, v, mask, causal)
    torch.testing.assert_close(attention(q, k, v, mask, causal), slow, **EXACT)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7), **EXACT)
    if causal:
        assert weights.triu(1).abs().max() == 0


@pytest.mark.parametrize("emulated", [False, True])
def test_attention_is_trained_in_fp32_where_bf16_is_emulated(monkeypatch, emulated):
    monkeypatch.setattr(
        layers, "is_emulated", lambda dtype, device: emulated and dtype == torch.bfloat16
    )
    found = []
    attend = layers.F.scaled_dot_product_attention
    monkeypatch.setattr(
        layers.F,
        "scaled_dot_product_attention",
        lambda q, *rest, **options: [found.append(q.dtype), attend(q, *rest, **options)][1],
    )
    q, k, v = torch.randn(3, 2, 2, 7, 16).bfloat16().unbind()
    assert attention(q, k, v, causal=True).dtype == torch.bfloat16
    trained = attention(q.requires_grad_(), k, v, causal=True)
    assert trained.dtype == torch.bfloat16
    slow, _ = attention_with_weights(q.float(), k.float(), v.float(), causal=True)
    torch.testing.assert_close(trained.float(), slow, rtol=0.02, atol=0.02)
    assert found == [torch.bfloat16, torch.float32 if emulated else torch.bfloat16]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 1), (4, 4)])
def test_attention_of_one_new_token(heads, kv_heads, masked):
    q = torch.randn(3, heads, 1, 16)
    k, v = torch.randn(3, kv_heads, 9, 16), torch.randn(3, kv_heads, 9, 16)
    mask = None
    if masked:  # left padding of 0, 2 and 5 tokens
        mask = torch.arange(9) >= torch.tensor([0, 2, 5])[:, None, None, None]
    slow, _ = attention_with_weights(q, k, v, mask)
    torch.testing.assert_close(attention(q, k, v, mask), slow, **EXACT)


def test_rotary_scores_depend_on_distance_only():
    config = TINY.thinker.text
    q, k = torch.randn(config.head_dim), torch.randn(config.head_dim)
    cos, sin = rotary_cos_sin(torch.arange(50).expand(3, 1, 50), config)
    q = apply_rotary(q.expand_as(cos), cos, sin)[0, 0]
    k = apply_rotary(k.expand_as(cos), cos, sin)[0, 0]
    scores = q @ k.T
    # Angles go up to 50 rad in fp32.
    torch.testing.assert_close(scores[3, 1], scores[40, 38], rtol=0, atol=2e-5)
    assert (scores[3, 1] - scores[3, 2]).abs() > 1e-3


def test_each_section_of_tmrope_follows_its_own_axis():
    config = QWEN7B.thinker.text
    position_ids = torch.zeros(3, 1, 1, dtype=torch.long)
    position_ids[1] = 5
    _, sin = rotary_cos_sin(position_ids, config)
    assert sin[0, 0, 0].nonzero()[:, 0].tolist() == [*range(16, 40), *range(80, 104)]


def test_cached_chunks_equal_a_full_pass():
    model = decoder()
    embeds, position_ids = case(length=9)
    cache = model.new_cache()
    with torch.no_grad():
        whole = model(embeds, position_ids)
        chunks = [
            model(embeds[:, a:b], position_ids[:, :, a:b], None, cache)
            for a, b in [(0, 4), (4, 5), (5, 9)]
        ]
    # Four layers of sums in another order.
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=0, atol=1e-5)
    assert cache.length == 9


def test_cache_grows():
    cache = KVCache(1)
    for i in range(700):
        step = torch.full((1, 1, 1, 2), float(i))
        keys, values = cache.append(0, step, -step)
    assert torch.equal(keys[0, 0, :, 0], torch.arange(700.0))
    assert torch.equal(values, -keys)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_gives_no_nan(side):
    model, (embeds, position_ids) = decoder(), case(rows=1, length=6)
    alone = model(embeds, position_ids)
    pad = (3, 0) if side == "left" else (0, 3)
    mask = F.pad(torch.ones(1, 6), pad)
    padded = F.pad(embeds, (0, 0, *pad), value=9.0).requires_grad_()
    out = model(padded, F.pad(position_ids, pad, value=1), mask)
    torch.testing.assert_close(out[mask.bool()], alone[0], rtol=0, atol=1e-5)
    out.sum().backward()
    assert out.isfinite().all()
    assert padded.grad.isfinite().all()


def test_cached_step_ignores_left_padding():
    model, (embeds, position_ids) = decoder(), case(rows=1, length=6)
    whole = model(embeds, position_ids)
    mask, cache = F.pad(torch.ones(1, 6), (4, 0)), model.new_cache()
    with torch.no_grad():
        padded = F.pad(embeds[:, :5], (0, 0, 4, 0), value=3.0)
        model(padded, F.pad(position_ids[:, :, :5], (4, 0), value=1), mask[:, :9], cache)
        step = model(embeds[:, 5:], position_ids[:, :, 5:], mask, cache)
    torch.testing.assert_close(step, whole[:, 5:], rtol=0, atol=1e-5)


def test_initialization_keeps_the_variance_of_the_residual_stream():
    model, (embeds, position_ids) = decoder(), case(length=32)
    stream = []
    model.norm.register_forward_pre_hook(lambda _, args: stream.append(args[0].std().item()))
    model(embeds, position_ids)
    # The input has 1; eight branches of about 1/sqrt(8) each were added.
    assert 0.9 < stream[0] < 2.0


def test_audio_encoder_has_no_length_limit_and_blocks_are_independent():
    """A clip of 320.75 seconds gives the tokens of its two-second blocks, in order."""
    encoder = AudioEncoder(TINY.thinker.audio).eval()
    mel = torch.randn(128, 32_075)
    with torch.no_grad():
        whole = encoder([mel])
        blocks = torch.cat([encoder([block]) for block in mel.split(200, dim=1)])
    assert len(whole) == num_audio_tokens(32_075) == 8_019
    torch.testing.assert_close(whole, blocks, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [(1, 0), (2, 0), (3, 1), (6, 1), (7, 2), (100, 25), (199, 50), (301, 75), (630, 157)],
)
def test_audio_token_counts(frames, tokens):
    encoded = AudioEncoder(TINY.thinker.audio)([torch.randn(128, frames)])
    assert num_audio_tokens(frames) == len(encoded) == tokens


def test_images_of_a_batch_are_independent():
    """Ragged windows, several images and frames: each frame is encoded as if it were alone."""
    encoder = VisionEncoder(TINY.thinker.vision).eval()
    grids = [(1, 4, 4), (3, 6, 10), (1, 30, 2), (1, 6, 6)]
    patches = [torch.randn(math.prod(grid), TINY.thinker.vision.patch_dim) for grid in grids]
    with torch.no_grad():
        together = encoder(torch.cat(patches), grids)
        alone = []
        for (frame_pairs, rows, columns), item in zip(grids, patches, strict=True):
            for frame in item.chunk(frame_pairs):
                alone.append(encoder(frame, [(1, rows, columns)]))
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("full_layers", "changed_cells"), [((), 4), ((1,), 16)])
def test_window_attention_limits_the_receptive_field(full_layers, changed_cells):
    """With windows only, a change stays in its window; one whole-frame layer spreads it."""
    # 4 x 4 merge cells in windows of 2 x 2 cells
    config = dataclasses.replace(TINY.thinker.vision, fullatt_block_indexes=full_layers)
    encoder = VisionEncoder(config).eval()
    patches = torch.randn(64, config.patch_dim)
    changed = patches.clone()
    changed[0] += 1
    with torch.no_grad():
        before = encoder(patches, [(1, 8, 8)])
        after = encoder(changed, [(1, 8, 8)])
    difference = (before - after).abs().amax(1)
    assert int((difference > 1e-6).sum()) == changed_cells


def settings(**changes):
    plain = dataclasses.replace(
        TINY.talker_sampling, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0
    )
    return dataclasses.replace(plain, **changes)


def frequencies_of(logits, sampling, draws=4000, **kwargs):
    logits = torch.tensor(logits).expand(draws, -1)
    ids = sample(logits, None, sampling, generator=torch.Generator().manual_seed(1), **kwargs)
    return torch.bincount(ids, minlength=logits.shape[1]) / draws


def test_sampling_follows_the_softmax():
    logits = [2.0, 1.0, 0.0, -1.0]
    atol = 4 * (0.25 / 4000) ** 0.5  # four standard deviations of a frequency
    expected = torch.tensor(logits).softmax(0)
    torch.testing.assert_close(frequencies_of(logits, settings()), expected, rtol=0, atol=atol)


def test_greedy_penalty_and_suppression():
    logits = torch.tensor([[3.0, 2.9, -1.0], [3.0, 2.9, -1.0]])
    greedy = settings(temperature=0.0, repetition_penalty=1.05)
    seen = torch.tensor([[True, False, False], [False, False, False]])
    assert sample(logits, seen, greedy).tolist() == [1, 0]
    assert sample(logits, seen, greedy, torch.tensor([True, True, False])).tolist() == [2, 2]
    negative = torch.tensor([[-1.0, -1.02]])
    assert sample(negative, torch.tensor([[True, False]]), greedy).tolist() == [1]


def test_top_k_and_top_p_keep_the_most_likely_ids():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()

    def kept(**changes):
        return frequencies_of(logits, settings(**changes)).nonzero()[:, 0].tolist()

    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=99) == [0, 1, 2, 3]
    assert kept(top_p=0.81) == [0, 1, 2]  # 0.5 + 0.3 do not reach 0.81
    assert kept(top_p=0.79) == [0, 1]
    assert kept(top_p=0.01) == [0]
    # top-p is applied to what top-k left: 0.5 / 0.95 + 0.3 / 0.95 = 0.84
    assert kept(top_k=3, top_p=0.9) == [0, 1, 2]
