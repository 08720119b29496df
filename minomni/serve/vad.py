"""Voice activity detection: where speech begins and ends in a stream of audio.

The level of each frame of 20 ms is compared with the level of the background, which is followed:
down at once, up slowly. Speech begins after several loud frames and ends after a time without any
(hangover), so that the pauses between words do not end it.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from minomni.config import INPUT_SAMPLE_RATE

FRAME = INPUT_SAMPLE_RATE // 50  # samples
FRAME_MS = 20
QUIET_DB = -55.0  # of full scale: below this, nothing is speech
# Per frame: how fast the background may get louder. During speech it hardly does, as long speech
# would become its own background.
RISE_DB = 0.06  # 3 dB per second
RISE_IN_SPEECH_DB = 0.01
BEGIN_FRAMES = 5  # loud frames of the last WINDOW that begin speech
WINDOW = 7
MIN_DB = -100.0


@dataclass
class VadOptions:
    """OpenAI's server_vad."""

    threshold: float = 0.5  # 0.5 is 10 dB above the background; higher needs louder speech
    prefix_padding_ms: int = 300  # of audio that is kept from before the speech
    silence_duration_ms: int = 500  # without speech that end it

    @property
    def margin_db(self) -> float:
        return 20.0 * self.threshold


@dataclass
class SpeechStarted:
    """Speech began. wave: float32 [samples] from prefix_padding_ms before it."""

    at_ms: int
    wave: np.ndarray


@dataclass
class SpeechGoesOn:
    """More of the same speech: float32 [samples]."""

    wave: np.ndarray


@dataclass
class SpeechStopped:
    """Speech ended, silence_duration_ms ago."""

    at_ms: int


class VoiceDetector:
    """Audio in chunks of any length -> the speech in it."""

    def __init__(self, options: VadOptions):
        self.options = options
        self.rest = np.zeros(0, np.float32)  # samples of an incomplete frame
        prefix_frames = max(1, options.prefix_padding_ms // FRAME_MS) + WINDOW
        self.before: deque[np.ndarray] = deque(maxlen=prefix_frames)
        self.loud: deque[bool] = deque(maxlen=WINDOW)
        self.background: float | None = None  # dB
        self.speaking = False
        self.quiet_frames = 0
        self.frames = 0  # read so far
        self.last = 0.0  # sample before the frame, for the difference

    def feed(self, samples: np.ndarray) -> list[SpeechStarted | SpeechGoesOn | SpeechStopped]:
        """The next samples, float32 [n] at 16 kHz -> events, in order."""
        events: list[SpeechStarted | SpeechGoesOn | SpeechStopped] = []
        samples = np.concatenate((self.rest, samples))
        whole = len(samples) - len(samples) % FRAME
        self.rest = samples[whole:]
        for frame in samples[:whole].reshape(-1, FRAME):
            self.add_frame(frame, events)
        return events

    def add_frame(self, frame: np.ndarray, events: list) -> None:
        """Read one frame and append what it changes to the events."""
        self.frames += 1
        is_loud = self.is_loud(frame)
        self.loud.append(is_loud)
        if not self.speaking:
            self.before.append(frame)
            if sum(self.loud) >= BEGIN_FRAMES:
                self.speaking = True
                self.quiet_frames = 0
                wave = np.concatenate(self.before)
                at_ms = self.frames * FRAME_MS - len(wave) * 1000 // INPUT_SAMPLE_RATE
                events.append(SpeechStarted(at_ms, wave))
                self.before.clear()
            return

        if events and isinstance(events[-1], SpeechGoesOn):
            events[-1].wave = np.concatenate((events[-1].wave, frame))
        else:
            events.append(SpeechGoesOn(frame))
        self.quiet_frames = 0 if is_loud else self.quiet_frames + 1
        if self.quiet_frames * FRAME_MS >= self.options.silence_duration_ms:
            self.speaking = False
            self.loud.clear()
            events.append(SpeechStopped(self.frames * FRAME_MS))

    def is_loud(self, frame: np.ndarray) -> bool:
        """Whether a frame is louder than the background, which follows."""
        # The difference of neighbors weakens hum and rumble, which are loud and below speech.
        difference = np.diff(frame, prepend=np.float32(self.last))
        self.last = float(frame[-1])
        power = float(np.mean(difference**2))
        level = 10.0 * np.log10(power) if power > 0 else MIN_DB
        level = max(level, MIN_DB)
        if self.background is None:
            self.background = max(level, QUIET_DB - self.options.margin_db)
        loud = level > max(self.background + self.options.margin_db, QUIET_DB)
        if level < self.background:
            self.background += 0.2 * (level - self.background)
        else:
            rise = RISE_IN_SPEECH_DB if self.speaking else RISE_DB
            self.background += min(rise, level - self.background)
        return loud
