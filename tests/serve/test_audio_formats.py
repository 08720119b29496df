"""Audio of the API: chunks have no seams, and nothing is lost at the ends."""

import io

import numpy as np
import pytest
import serving  # noqa: F401  (skips where the server's packages are missing)
import soundfile
import soxr
import torch

from minomni.serve.audio import AudioReceiver, AudioSender, Resampler, encode, pcm16, wav_header


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    """A chirp, float32 [samples]."""
    at = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 + 1500 * at) * at)).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 111, 960, 100_000])
def test_received_chunks_equal_the_whole(chunk):
    data = pcm16(tone(24_000))
    receiver = AudioReceiver()
    parts = [receiver.feed(data[i : i + 2 * chunk]) for i in range(0, len(data), 2 * chunk)]
    received = np.concatenate((*parts, receiver.finish()))
    whole = soxr.resample(np.frombuffer(data, "<i2").astype(np.float32) / 32768, 24_000, 16_000)
    assert len(received) == len(whole) == 16_000
    assert received == pytest.approx(whole, abs=1e-5)


def test_a_receiver_begins_again_after_its_end():
    data = pcm16(tone(24_000))
    receiver = AudioReceiver()
    first = np.concatenate((receiver.feed(data), receiver.finish()))
    again = np.concatenate((receiver.feed(data), receiver.finish()))
    assert np.array_equal(first, again)
    assert len(receiver.finish()) == 0


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_sent_chunks_equal_the_whole(rate):
    wave = tone(rate)
    sender = AudioSender(rate)
    parts = [sender.feed(torch.from_numpy(wave[i : i + 777])) for i in range(0, rate, 777)]
    samples = np.frombuffer(b"".join((*parts, sender.finish())), "<i2")
    whole = soxr.resample(wave, rate, 24_000) if rate != 24_000 else wave
    assert len(samples) == 24_000
    assert samples / 32768 == pytest.approx(whole, abs=2e-4)


@pytest.mark.parametrize("seconds", [0.02, 0.0628, 0.25])
def test_little_is_held_back(seconds):
    """The first chunk of an answer is short: what is held back of it is a gap in what is played.
    What a microphone sends reaches the detector of speech as soon.
    """
    wave = tone(16_000, seconds)
    sent = len(AudioSender(16_000).feed(torch.from_numpy(wave))) / 2 / 24_000
    received = len(AudioReceiver().feed(pcm16(tone(24_000, seconds)))) / 16_000
    assert sent > seconds - 0.007
    assert received > seconds - 0.007


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_resampled_chunks_equal_the_whole(rate):
    """Noise has all frequencies. Lengths of chunks that share no factor with the steps."""
    noise = np.random.default_rng(rate).uniform(-0.9, 0.9, rate).astype(np.float32)
    resampler = Resampler(rate, 24_000)
    parts = [resampler.feed(noise[i : i + 701]) for i in range(0, rate, 701)]
    resampled = np.concatenate((*parts, resampler.finish()))
    whole = soxr.resample(noise, rate, 24_000)
    assert len(resampled) == len(whole)
    assert np.abs(resampled - whole).max() < 2**-15


def test_samples_are_clipped():
    assert pcm16(np.array([-2.0, 0.0, 2.0], np.float32)) == b"\x00\x80\x00\x00\xff\x7f"


@pytest.mark.parametrize("name", ["wav", "flac"])
def test_formats_without_loss(name):
    wave = tone(16_000)
    read, rate = soundfile.read(io.BytesIO(encode(torch.from_numpy(wave), 16_000, name)))
    assert rate == 16_000
    assert read == pytest.approx(wave, abs=1e-4)


def test_a_streamed_wav_is_readable():
    """PyAV reads a wav whose length was not known when it began."""
    import av

    data = wav_header(24_000) + pcm16(tone(24_000))
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.audio[0].rate == 24_000
        assert sum(frame.samples for frame in container.decode(audio=0)) == 24_000
