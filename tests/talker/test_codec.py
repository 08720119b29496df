"""The speech codec: quantization, block boundaries, letters and their alignment."""

from itertools import product

import torch

from minomni.config import TINY
from minomni.talker.codec import FIRST_CODE, FSQ, Codec, ctc_align, ids_to_letters, letters_to_ids


def test_letters_are_found_where_they_are_said():
    """By hand: a, pause, a again, b drawn out; and what every way through would be, tried one by
    one.
    """
    log_probs = torch.full((6, 3), -5.0)
    log_probs[range(6), [1, 0, 1, 2, 2, 0]] = -0.1
    assert ctc_align(log_probs, torch.tensor([1, 1, 2])).tolist() == [0, 0, 1, 2, 2, 2]
    assert (
        ctc_align(log_probs[:2], torch.tensor([1, 1])) is None
    )  # two of a kind need a pause between them
    random = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    letters = [3, 1, 1]
    ways = [way for way in product(range(4), repeat=5) if squeezed(way) == letters]
    best = max(ways, key=lambda way: sum(float(random[t, c]) for t, c in enumerate(way)))
    said, expected = 0, []
    for before, now in zip((0, *best), best):
        said += now not in (0, before)
        expected.append(max(said - 1, 0))
    assert len(ways) > 3
    assert ctc_align(random, torch.tensor(letters)).tolist() == expected


def squeezed(classes) -> list[int]:
    """Repeats collapse, blanks vanish."""
    return [now for before, now in zip((0, *classes), classes) if now not in (0, before)]


def test_fsq_is_a_bijection():
    fsq = FSQ((8, 5, 5, 5))
    codes = torch.arange(FIRST_CODE, FIRST_CODE + 1000)
    values = fsq.values(codes)
    assert len({tuple(v) for v in values.tolist()}) == 1000
    inside = torch.atanh(values.clamp(-0.999, 0.999))
    assert torch.equal(fsq(inside)[1], codes)
    assert torch.allclose(fsq(inside)[0], values, atol=1e-6)


def test_fsq_passes_gradients_straight_through():
    x = torch.zeros(4, requires_grad=True)
    FSQ((8, 5, 5, 5))(x)[0].sum().backward()
    assert torch.allclose(
        x.grad, torch.ones(4)
    )  # derivative of tanh at 0, as if nothing were rounded


def test_codec_lengths_and_blocks():
    codec = Codec(TINY.codec)
    mel = torch.randn(1, 480, 80)
    codes = codec.encode(mel)
    assert codes.shape == (1, 120)
    assert codes.min() >= FIRST_CODE
    assert codes.max() <= TINY.codec.num_codes
    changed = mel.clone()
    changed[:, 440:] += 1  # in the third 2-second block: the first must not notice
    assert torch.equal(codec.encode(changed)[:, :45], codes[:, :45])


def test_letters_round_trip():
    classes = torch.stack(
        [letters_to_ids("a shape"), torch.zeros(7, dtype=torch.long)], 1
    ).flatten()
    assert ids_to_letters(classes) == "a shape"
