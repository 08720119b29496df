"""Discriminators: what they see, who learns from which loss, and that they are not in the model."""

import pytest
import torch
from safetensors.torch import load_file
from training import recordings_only, stage_of  # noqa: F401  (a fixture)

from minomni.train import losses
from minomni.train.discriminators import (
    Discriminators,
    PeriodDiscriminator,
    SpectrogramDiscriminator,
    fixed,
)
from minomni.train.loop import train
from minomni.train.stages import vocoder


def test_losses_by_hand():
    real = [torch.tensor([[1.0, 0.5]]), torch.tensor([[0.0]])]
    generated = [torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0]])]
    # Squared distances to 1: mean 0.125 and 1 for recordings, 0.25 and 0 for waveforms.
    assert losses.adversarial(generated).item() == pytest.approx((0.25 + 0) / 2)
    # Squared distances to 0 of the waveforms: 0.25 and 1.
    expected = (0.125 + 1) / 2 + (0.25 + 1) / 2
    assert losses.discrimination(real, generated).item() == pytest.approx(expected)


def test_feature_matching_sums_layers_and_averages_discriminators():
    zeros = [torch.zeros(1, 2), torch.zeros(1, 4)]
    ones = [torch.ones(1, 2), torch.tensor([[0.0, 0.0, 0.0, 2.0]])]
    assert losses.feature_matching([zeros, zeros], [ones, zeros]).item() == pytest.approx(1.5 / 2)


def test_a_column_of_a_period_is_every_third_sample():
    wave = torch.arange(7.0)[None]
    image = PeriodDiscriminator(3).image(wave)
    # The end is reflected: 6, then 5 and 4.
    assert image[0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 5, 4]]


def test_a_tone_is_in_its_bin():
    seconds = torch.arange(5120) / 16_000
    tone = torch.sin(2 * torch.pi * 2000 * seconds)[None]
    image = SpectrogramDiscriminator(512).image(tone)
    assert image.shape == (1, 1, 257, 41)
    assert image[0, 0, :, 20].argmax() == 64  # 2,000 Hz / (16,000 Hz / 512)


def test_each_loss_reaches_one_side():
    stage = stage_of("vocoder", batch=1)
    recordings, _ = stage.batch(0)
    wave = recordings.clone().requires_grad_()
    found = stage.adversarial_losses(wave, recordings)
    members = list(stage.discriminators.parameters())

    (found["adversarial"] + found["features"]).backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in members)
    assert wave.grad.abs().sum() > 0

    wave.grad = None
    found["discrimination"].backward()
    assert wave.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in members)


def test_fixed_discriminators_say_the_same():
    torch.manual_seed(0)
    discriminators = Discriminators()
    wave = torch.randn(2, 2048)
    pairs = zip(discriminators(wave), fixed(discriminators, wave), strict=True)
    for (scores, layers), (fixed_scores, fixed_layers) in pairs:
        assert torch.equal(scores, fixed_scores)
        assert all(map(torch.equal, layers, fixed_layers))


def test_they_learn_to_tell_tones_from_noise():
    torch.manual_seed(0)
    discriminators = Discriminators()
    optimizer = torch.optim.AdamW(discriminators.parameters(), lr=2e-3)
    seconds = torch.arange(2048) / 16_000
    tones = torch.sin(2 * torch.pi * torch.tensor([[200.0], [330.0]]) * seconds)
    noise = torch.randn(2, 2048)

    def loss() -> torch.Tensor:
        real = [scores for scores, _ in discriminators(tones)]
        return losses.discrimination(real, [scores for scores, _ in discriminators(noise)])

    before = loss().item()
    for _ in range(25):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.2 * before


def test_they_join_late_and_stay_out_of_the_model(tmp_path, monkeypatch):
    """A run that is resumed after they have joined equals one that was not stopped, to the bit."""
    monkeypatch.setattr(vocoder, "SPECTRAL_STEPS", 1)
    assert [stage_of("vocoder").batch(step)[1] for step in (0, 1)] == [False, True]
    halved = stage_of("vocoder", accumulate=2)  # two batches a step
    assert [halved.batch(number)[1] for number in range(4)] == [False, False, True, True]

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    means = train(stage_of("vocoder", batch=1, steps=4), whole)
    train(stage_of("vocoder", batch=1, steps=4), halves, until=2)
    train(stage_of("vocoder", batch=1, steps=4), halves, resume=True)
    assert {"mel", "stft", "adversarial", "features", "discrimination"} == set(means)
    files = [folder / "vocoder.safetensors" for folder in (whole, halves)]
    assert files[0].read_bytes() == files[1].read_bytes()
    names = load_file(files[0])
    assert all(name.startswith("token2wav.code2wav_bigvgan_model.") for name in names)
