"""Mels equal the official feature extractor's, and line up with their waves."""

import numpy as np
import pytest
import torch

from minomni.inputs.mel import (
    hz_to_mel,
    log_mel,
    mel_filters,
    mel_to_hz,
    num_audio_tokens,
    voice_mel,
)
from tests.oracle import GOLDEN

LENGTHS = (321, 5001, 16_000, 31_999, 50_000)


def wave(samples: int) -> torch.Tensor:
    """Noise with a swelling tone, from numpy's frozen generator."""
    t = np.arange(samples) / 16_000
    noise = np.random.RandomState(samples).randn(samples)
    tone = 0.3 * np.sin(2 * np.pi * 220 * t) * np.sin(2 * np.pi * 1.5 * t)
    return torch.from_numpy((0.05 * noise + tone).astype(np.float32))


def digest(mel: np.ndarray) -> np.ndarray:
    """Every seventh band at every fifth frame: small enough to commit."""
    return mel[::7, ::5]


def official(samples: np.ndarray) -> np.ndarray:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(
        feature_size=128,
        sampling_rate=16_000,
        hop_length=160,
        n_fft=400,
        chunk_length=30,
        return_attention_mask=True,
    )
    out = extractor(
        samples,
        sampling_rate=16_000,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="np",
    )
    return out["input_features"][0][:, : int(out["attention_mask"].sum())]


@pytest.mark.slow
@pytest.mark.parametrize("samples", LENGTHS)
def test_equals_the_official_extractor(samples):
    pytest.importorskip("transformers", reason="the official code is not installed")
    theirs = official(wave(samples).numpy())
    assert log_mel(wave(samples)).shape == theirs.shape
    assert (
        np.abs(log_mel(wave(samples)).numpy() - theirs).max() < 1e-5
    )  # float noise of two FFTs, scale about 1


@pytest.mark.parametrize("samples", LENGTHS)
def test_equals_what_the_official_extractor_answered(samples):
    """In fp64: the rounding of an FFT in fp32 depends on the processor."""
    golden = np.load(GOLDEN / "mel.npz")[str(samples)]
    exact = log_mel(wave(samples).double())
    assert np.abs(digest(exact.numpy()) - golden).max() < 1e-5
    # The logarithm enlarges rounding where a band has a small part of its frame's power.
    assert (log_mel(wave(samples)) - exact).abs().max() < 5e-5


def test_silence_is_minus_one_and_a_half():
    assert torch.equal(log_mel(torch.zeros(8000)), torch.full((128, 50), -1.5))


def test_frames_are_counted_up():
    assert [log_mel(torch.randn(n)).shape[1] for n in (160, 161, 320, 321, 16_000)] == [
        1,
        2,
        2,
        3,
        100,
    ]


@pytest.mark.slow
def test_filters_equal_librosa():
    librosa = pytest.importorskip("librosa", reason="librosa is a second opinion only")
    for n_fft, bands in ((400, 128), (1024, 80)):
        theirs = librosa.filters.mel(sr=16_000, n_fft=n_fft, n_mels=bands)
        assert np.abs(mel_filters(n_fft, bands).numpy() - theirs).max() < 1e-7


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [(1, 0), (2, 0), (3, 1), (100, 25), (301, 75), (630, 157), (30_000, 7_500)],
)
def test_tokens_of_frames(frames, tokens):
    """One per 40 ms, halved twice as in the encoder (release: none for the first 20 ms)."""
    assert num_audio_tokens(frames) == tokens == ((frames - 1) // 2 + 1 - 2) // 2 + 1


def test_clip_is_padded_with_silence():
    """A clip and the same clip followed by a second of silence agree on the clip's frames."""
    for samples in (3_000, 3_200, 3_333):
        clip = wave(samples)
        longer = log_mel(torch.nn.functional.pad(clip, (0, 16_000)))
        assert torch.allclose(log_mel(clip), longer[:, : -(-samples // 160)], atol=1e-6)


def test_loudness_is_measured_over_the_whole_clip():
    """A click at the very end is loudest in a frame that is cut off, and still sets the floor 2
    below its height.
    """
    click = 1e-6 * wave(16_000)
    click[-5:] = 1.0
    mel, whole = log_mel(click), log_mel(torch.nn.functional.pad(click, (0, 400)))
    assert float(whole.max() - whole.min()) == pytest.approx(2, abs=1e-5)
    assert 1.3 < float(mel.max() - mel.min()) < 1.7  # the last kept window holds 0.12 of the click
    assert torch.allclose(mel, whole[:, :100], atol=1e-6)


def test_scale_by_hand():
    hz = torch.tensor([0.0, 200, 1000, 6400])
    assert torch.allclose(hz_to_mel(hz), torch.tensor([0.0, 3, 15, 42]), atol=1e-4)
    assert torch.allclose(mel_to_hz(hz_to_mel(hz)), hz, rtol=1e-5)


def test_voice_mel_lines_up_with_the_wave():
    click = torch.zeros(16_000)
    click[160 * 40 + 80] = 1.0  # the center of frame 40
    mel = voice_mel(click)
    assert mel.shape == (100, 80)
    assert int(mel.mean(1).argmax()) == 40
    assert torch.allclose(mel[40 - 1], mel[40 + 1], atol=1e-4)  # and it lies in the middle of it


def test_batch_equals_single():
    waves = torch.stack([wave(8000), 3 * wave(8000)])
    for function in (log_mel, voice_mel):
        both = function(waves)
        assert all(torch.allclose(both[i], function(waves[i]), atol=1e-5) for i in range(2))


def test_gradient_of_silence_is_finite():
    silence = torch.zeros(1600, requires_grad=True)
    voice_mel(silence).sum().backward()
    assert torch.isfinite(silence.grad).all()


def write_golden() -> None:
    """python -c "from tests.inputs.test_mel import write_golden; write_golden()" """
    np.savez_compressed(
        GOLDEN / "mel.npz", **{str(n): digest(official(wave(n).numpy())) for n in LENGTHS}
    )
