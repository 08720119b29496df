"""Voice activity detection on recordings of people, in noise."""

import numpy as np
import pytest
import soundfile
from serving import SAMPLES

from minomni.serve.vad import SpeechStarted, SpeechStopped, VadOptions, VoiceDetector

RATE = 16_000


def noise(seconds: float, level_db: float) -> np.ndarray:
    """White noise, float32 [samples]."""
    samples = np.random.default_rng(0).standard_normal(int(seconds * RATE))
    return (samples * 10 ** (level_db / 20)).astype(np.float32)


def starts_and_stops(samples: np.ndarray, chunk: int = 640) -> tuple[list[int], list[int]]:
    """Milliseconds at which speech begins and ends."""
    detector = VoiceDetector(VadOptions())
    events = []
    for start in range(0, len(samples), chunk):
        events += detector.feed(samples[start : start + chunk])
    starts = [event.at_ms for event in events if isinstance(event, SpeechStarted)]
    stops = [event.at_ms for event in events if isinstance(event, SpeechStopped)]
    return starts, stops


@pytest.mark.parametrize("level_db", [-100, -60, -40, -20])
def test_noise_is_no_speech(level_db):
    assert starts_and_stops(noise(30, level_db)) == ([], [])


def test_silence_is_no_speech():
    assert starts_and_stops(np.zeros(10 * RATE, np.float32)) == ([], [])


@pytest.mark.parametrize("level_db", [-100, -60])
@pytest.mark.parametrize("chunk", [111, 640, 100_000])
def test_a_question_is_found(level_db, chunk):
    wave, rate = soundfile.read(SAMPLES / "question.wav", dtype="float32")
    assert rate == RATE
    silence = np.zeros(2 * RATE, np.float32)
    samples = np.concatenate((silence, wave, silence))
    samples = samples + noise(len(samples) / RATE, level_db)[: len(samples)]
    starts, stops = starts_and_stops(samples, chunk)
    end_ms = 2_000 + 1_000 * len(wave) / RATE
    assert len(starts) == len(stops) == 1
    assert 1_500 <= starts[0] <= 2_500
    assert end_ms - 300 <= stops[0] <= end_ms + 700
