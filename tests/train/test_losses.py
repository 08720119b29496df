"""Losses against values computed by hand."""

from math import log

import pytest
import torch

from minomni.config import IGNORE_INDEX
from minomni.talker.codec import letters_to_ids
from minomni.train import losses


def test_next_token_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]]])
    targets = torch.tensor([[0, 1, IGNORE_INDEX]])
    expected = (log(2) + (log(1 + torch.e**2))) / 2
    assert losses.next_token(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_parts_of_a_batch_count_as_the_whole():
    logits, targets = torch.randn(4, 3, 5), torch.randint(0, 5, (4, 3))
    targets[0, 1:] = IGNORE_INDEX
    parts = [(logits[:1, :2], targets[:1, :2]), (logits[1:], targets[1:])]
    assert losses.in_parts(parts).item() == pytest.approx(
        losses.next_token(logits, targets).item(), rel=1e-5
    )


def test_dpo_by_hand():
    loss = losses.dpo(
        torch.tensor([-1.0]),
        torch.tensor([-3.0]),
        torch.tensor([-2.0]),
        torch.tensor([-2.0]),
        beta=0.5,
    )
    assert loss.item() == pytest.approx(
        log(1 + torch.e**-1.0), rel=1e-5
    )  # margin (1) - (-1) = 2, times 0.5
    even = losses.dpo(*[torch.tensor([-1.0])] * 4, beta=0.1)
    assert even.item() == pytest.approx(log(2))


def test_sequence_log_prob_skips_ignored():
    logits = torch.zeros(1, 3, 4)
    assert losses.sequence_log_prob(
        logits, torch.tensor([[1, IGNORE_INDEX, 2]])
    ).item() == pytest.approx(-2 * log(4))


def test_flow_matching_is_zero_for_the_right_velocity():
    mel, noise, time = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.rand(2)
    assert losses.flow_matching(lambda x, t: mel - noise, mel, noise, time).item() == 0
    seen = []
    losses.flow_matching(lambda x, t: seen.append(x) or x, mel, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(seen[0][0], noise[0])
    assert torch.allclose(seen[0][1], mel[1])


def test_off_center_by_hand():
    grid = torch.tensor(
        [[[1.0, -1.0], [0.5, 1.0], [9.0, 9.0]], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]]
    )  # [B, C, channels]
    assert losses.off_center(grid, torch.tensor([2, 3])).item() == pytest.approx(
        (0.75**2 + 0 + 1 + 0) / 2
    )


def test_masked_l1_ignores_padding():
    target = torch.zeros(2, 4, 3)
    predicted = torch.ones(2, 4, 3)
    predicted[1, 2:] = 100
    assert losses.masked_l1(predicted, target, torch.tensor([4, 2])).item() == pytest.approx(1.0)


def test_ctc_is_per_letter():
    log_probs = torch.full((1, 3, 2), 0.5).log()
    # "a" in three frames of {blank, a}: six of the eight paths spell it
    assert losses.ctc(log_probs, torch.tensor([3]), [torch.tensor([1])]).item() == pytest.approx(
        -log(6 / 8), rel=1e-5
    )


def test_a_row_without_labels_does_not_count():
    log_probs = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    frames = torch.tensor([9, 8, 7])
    labels = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.long), torch.tensor([3])]
    found = losses.ctc(log_probs, frames, labels)
    expected = losses.ctc(log_probs[[0, 2]], frames[[0, 2]], [labels[0], labels[2]])
    assert found.item() == pytest.approx(expected.item())
    nothing = losses.ctc(log_probs, frames, [letters_to_ids("")] * 3)
    assert nothing.item() == 0


def test_equal_waveforms_have_a_finite_gradient():
    wave = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    predicted = wave.clone().requires_grad_()
    losses.spectral(predicted, wave).backward()
    assert predicted.grad.isfinite().all()


def test_means_of_halves_are_added_in_fp32():
    values = torch.full((3000,), 1.0).bfloat16()
    values[0] = 3.0
    assert losses.mean(values).item() == pytest.approx(3002 / 3000, abs=1e-6)
