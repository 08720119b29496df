"""Losses against values computed by hand."""

from math import log

import pytest
import torch

from minomni.config import IGNORE_INDEX
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
