"""Natural voices: what a job asks for is what is heard, and the same samples come every time."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import soxr

from minomni.data import grammar, neural_tts, text_to_speech
from minomni.data.text_to_speech import MARGIN, SILENT_SAMPLE, Job
from minomni.errors import UserError

TEXT = "the red circle is above the blue square"
installed = pytest.mark.skipif(
    not neural_tts.available(), reason="hibari-tts or onnxruntime is not installed"
)


def speak(voice="natural:heart", text=TEXT, seed=0, **options):
    """One trimmed utterance, int16 [samples] at 16 kHz, in this process."""
    (wave,) = text_to_speech._synthesize_part([Job(text, voice, **options)], seed)
    return wave


def fundamental_frequency(wave):
    """Median over voiced frames of 64 ms, in Hz, by autocorrelation: its first high peak."""
    found = []
    for frame in np.lib.stride_tricks.sliding_window_view(wave.astype(float), 1024)[::512]:
        frame = frame - frame.mean()
        correlation = np.correlate(frame, frame, "full")[1023:] / np.arange(1024, 0, -1)
        lags = correlation[39:268]  # 410 to 60 Hz
        if lags.max() <= 0.6 * correlation[0]:
            continue
        is_peak = (lags[1:-1] > lags[:-2]) & (lags[1:-1] >= lags[2:])
        peaks = np.flatnonzero(is_peak & (lags[1:-1] > 0.85 * lags.max()))
        if len(peaks):
            found.append(16_000 / (peaks[0] + 40))
    return np.median(found)


@installed
def test_every_voice_speaks_at_its_pitch():
    heart = fundamental_frequency(speak())
    assert heart == pytest.approx(198, rel=0.1)
    for name, voice in neural_tts.VOICES.items():
        wave = speak(f"natural:{name}")
        assert wave.dtype == np.int16
        assert 1.2 < len(wave) / 16_000 < 4
        assert 1_000 < np.sqrt(np.mean(wave.astype(float) ** 2)) < 4_000
        assert np.abs(wave.astype(int)).max() <= neural_tts.PEAK + 1
        assert fundamental_frequency(wave) / heart == pytest.approx(voice.pitch, rel=0.12)


@installed
def test_rate_and_pitch_of_a_job():
    normal = speak()
    assert len(speak(rate=90)) / len(normal) == pytest.approx(2, rel=0.15)
    assert len(speak(rate=270)) / len(normal) == pytest.approx(2 / 3, rel=0.15)
    octave_lower = fundamental_frequency(speak(pitch=0))
    assert octave_lower / fundamental_frequency(normal) == pytest.approx(0.5, rel=0.1)


@installed
def test_silence_is_cut_to_the_margin():
    wave = speak()
    assert not wave[:MARGIN].any()
    assert not wave[-MARGIN:].any()
    assert abs(int(wave[MARGIN])) >= SILENT_SAMPLE
    assert abs(int(wave[-MARGIN - 1])) >= SILENT_SAMPLE


@installed
def test_samples_depend_on_the_job_and_the_seed_alone():
    """Not on the order, on jobs before, or on the process."""
    jobs = [Job(TEXT, "natural:heart"), Job("the digit is two", "natural:tenor", 200, 60)]
    together = text_to_speech._synthesize_part(jobs, 3)
    turned = text_to_speech._synthesize_part(jobs[::-1], 3)[::-1]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
        apart = fresh_process.submit(text_to_speech._synthesize_part, jobs, 3).result()
    for first, second, third in zip(together, turned, apart, strict=True):
        assert (first == second).all()
        assert (first == third).all()
    other = text_to_speech._synthesize_part(jobs, 4)
    assert not np.array_equal(together[0], other[0])


@pytest.mark.slow
@installed
@pytest.mark.skipif(not text_to_speech.available(), reason="espeakng-loader is not installed")
def test_both_synthesizers_in_one_part():
    """Natural voices between those of espeak-ng do not change the latter."""
    espeak = [Job(TEXT, "en-us+f5"), Job("the digit is two", "en-us+adam")]
    mixed = [espeak[0], Job(TEXT, "natural:alto"), espeak[1]]
    alone = text_to_speech.synthesize(espeak, 3)
    among = text_to_speech.synthesize(mixed, 3)
    assert (alone[0] == among[0]).all()
    assert (alone[1] == among[2]).all()


@installed
def test_a_text_without_words_is_refused():
    with pytest.raises(UserError, match="needs a word"):
        speak(text=" ")


def test_an_unknown_voice_is_refused():
    with pytest.raises(UserError, match=r"no natural voice 'natural:stranger', only natural:heart"):
        speak("natural:stranger")


@installed
def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(neural_tts, "WEIGHTS_SHA256", "0" * 64)
    neural_tts._load_engine.cache_clear()
    with pytest.raises(UserError, match="other weights than the version that was tested"):
        speak()
    neural_tts._load_engine.cache_clear()


def test_where_the_package_is_missing(monkeypatch):
    """The names of the voices stay, and espeak-ng speaks for them."""
    monkeypatch.setattr(neural_tts, "available", lambda: False)
    neural_tts._load_engine.cache_clear()
    with pytest.raises(UserError, match="pip install hibari-tts"):
        speak()
    assert grammar.installed(grammar.NATURAL_VOICES) == grammar.ESPEAK_VOICES
    monkeypatch.setattr(neural_tts, "available", lambda: True)
    assert grammar.installed(grammar.NATURAL_VOICES) == grammar.NATURAL_VOICES


def test_tables_of_voices_agree():
    assert list(grammar.NATURAL_VOICES) == list(grammar.ESPEAK_VOICES) == list(grammar.VOICES)
    for voice in grammar.NATURAL_VOICES.values():
        neural_tts.find_voice(voice)


def test_loudness_has_a_peak():
    quiet = np.array([0, 1e-3, -1e-3, 1e-3], np.float32)
    normalized = neural_tts._normalize_loudness(quiet)
    assert np.abs(normalized).max() == pytest.approx(neural_tts.LOUDNESS)
    click = np.full(1_000, 0.05, np.float32)
    click[0] = 1
    assert neural_tts._normalize_loudness(click).max() <= neural_tts.PEAK


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.25])
def test_shifted_pitch(factor):
    """Voiced sound of 200 Hz comes out at the factor of it, as long; unvoiced sound as it was."""
    seconds = np.arange(24_000) / 24_000
    buzz = sum(np.cos(2 * np.pi * 200 * harmonic * seconds) for harmonic in range(1, 10))
    shifted = neural_tts.shift_pitch(buzz, np.full(80, 200.0), factor)
    assert len(shifted) == len(buzz)
    at_16_khz = soxr.resample(shifted, 24_000, 16_000)
    assert fundamental_frequency(at_16_khz) == pytest.approx(200 * factor, rel=0.02)
    noise = np.random.default_rng(0).standard_normal(24_000)
    same = neural_tts.shift_pitch(noise, np.zeros(80), factor)
    assert np.abs(same - noise)[500:-500].max() < 0.1


def test_too_short_for_a_period():
    wave = np.ones(300)
    assert (neural_tts.shift_pitch(wave, np.array([50.0]), 0.5) == wave).all()
