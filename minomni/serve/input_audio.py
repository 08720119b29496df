"""The user's side of a conversation: what was heard and shown since the last answer.

Audio arrives in a buffer, where a detector finds speech, and becomes part of the turn. All input of
a turn is encoded while it arrives.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from minomni.chat.session import Session
from minomni.config import INPUT_SAMPLE_RATE
from minomni.serve.audio import AudioReceiver
from minomni.serve.chat_request import MAX_TEXT
from minomni.serve.errors import ApiError, bad_request
from minomni.serve.realtime_objects import TurnDetection, new_id, parse_turn_detection
from minomni.serve.vad import (
    SAMPLES_PER_MS,
    SpeechEvent,
    SpeechStarted,
    VadOptions,
    VoiceDetector,
)

# After a barge-in, input is held back for up to this much speech, until conversation.item.truncate
# says how much of the answer was played.
HOLD_S = 0.4
MAX_HELD = 32  # inputs that are held back
# Audio that is kept from before speech: as much as a soft beginning of a word needs. Training has
# up to 0.5 s of silence there.
PADDING_MS = 300  # OpenAI's
SHORT_PADDING_MS = 128  # of models trained here
MAX_SILENCE_S = 60  # that is kept while no speech was found
FRAMES_PER_S = 4.0  # camera frames that are kept
MAX_IMAGES = 16  # of a turn

Input = Callable[[Session], Any]  # something that is given to the session of the model


class InputTurn:
    """The microphone, the camera and the messages of the current turn.

    submit: gives the worker an input and its bytes. trained_here: models of this project understand
    no speech after a long silence.
    """

    def __init__(self, submit: Callable[[Input, int], None], trained_here: bool):
        self.submit = submit
        self.trained_here = trained_here
        self.padding_ms = SHORT_PADDING_MS if trained_here else PADDING_MS

        # The microphone.
        self.receiver = AudioReceiver()
        self.detection: TurnDetection | None = parse_turn_detection({}, self.padding_ms)
        self.detector: VoiceDetector | None = None  # made for the first audio
        self.silence = np.zeros(0, np.float32)  # audio of push to talk before any speech
        self.item = new_id("item")  # id of the audio in the buffer

        # The turn so far.
        self.num_samples = 0  # at 16 kHz
        self.buffer_samples = 0  # the part of num_samples that is not committed yet
        self.texts: list[str] = []
        self.images: list[Image.Image] = []
        self.frame: np.ndarray | None = None  # the newest camera frame outside of speech
        self.last_frame_s: float | None = None

        # Inputs that are held back, each with its bytes; see HOLD_S.
        self.held: list[tuple[Input, int]] | None = None
        self.held_until = 0  # samples of the turn

    def begin(self) -> None:
        """Begin the next turn: what arrives from now on belongs to it."""
        self.num_samples = 0
        self.buffer_samples = 0
        self.texts = []
        self.images = []
        self.frame = None
        self.last_frame_s = None

    # -------------------------------------------------------------------------------------- buffer
    def set_detection(self, detection: TurnDetection | None) -> None:
        """Find turns in another way; None for push to talk."""
        self.detection = detection
        self.reset_detector()

    def reset_detector(self) -> None:
        """Forget the speech that has begun; its audio stays in the turn."""
        self.detector = None
        self.silence = np.zeros(0, np.float32)

    @property
    def speaking(self) -> bool:
        """Whether speech was found that has not ended."""
        return self.detector is not None and self.detector.speaking

    def feed(self, data: bytes) -> list[SpeechEvent]:
        """Audio of the buffer, pcm16 -> what the detector found in it.

        Push to talk adds the audio and finds nothing. Raises ApiError after too much silence.
        """
        samples = self.receiver.feed(data)
        if self.detection is None:
            self.add_buffer_audio(self.without_silence(samples))
            return []
        if self.detector is None:
            self.detector = VoiceDetector(self.detection.options)
        return self.detector.feed(samples)

    def without_silence(self, samples: np.ndarray) -> np.ndarray:
        """Push to talk: the next audio, without what comes before the first speech of the turn.

        Only for models that understand no speech after silence, see PADDING_MS: others may be asked
        about sounds.
        """
        if self.num_samples or not self.trained_here:
            return samples
        if self.detector is None:
            self.detector = VoiceDetector(VadOptions(prefix_padding_ms=self.padding_ms))
        if len(self.silence) + len(samples) > MAX_SILENCE_S * INPUT_SAMPLE_RATE:
            raise bad_request(f"no speech in {MAX_SILENCE_S} seconds; clear the buffer", "audio")
        self.silence = np.concatenate((self.silence, samples))
        for found in self.detector.feed(samples):
            if isinstance(found, SpeechStarted):
                speech = self.silence[found.at_ms * SAMPLES_PER_MS :]
                self.silence = np.zeros(0, np.float32)
                self.detector = None
                return speech
        return np.zeros(0, np.float32)

    def add_buffer_audio(self, samples: np.ndarray) -> None:
        """Add audio of the buffer [samples] at 16 kHz to the turn: not committed yet."""
        self.buffer_samples += len(samples)
        self.add_audio(samples)

    def finish_buffer(self) -> None:
        """Push to talk is over: add the rest of its audio."""
        rest = self.receiver.finish()
        if len(self.silence):  # no speech was found: the model decides what it is
            rest = np.concatenate((self.silence, rest))
        self.reset_detector()
        self.add_buffer_audio(rest)

    def commit(self) -> str:
        """Complete the audio of the buffer -> the id of its item. Raises ApiError without audio."""
        if self.buffer_samples == 0:
            raise ApiError(
                400,
                "the audio buffer is empty; append audio before it is committed",
                code="input_audio_buffer_commit_empty",
            )
        self.buffer_samples = 0
        self.release_held()
        committed = self.item
        self.item = new_id("item")
        return committed

    def clear(self) -> None:
        """Forget the audio that is not committed.

        All audio and frames of a turn are encoded together: what was committed before is forgotten
        with what came after it.
        """
        self.receiver = AudioReceiver()
        self.reset_detector()
        if self.buffer_samples:
            self.held = None
            images = list(self.images)
            self.submit(lambda session: keep_images(session, images), 0)
            self.num_samples = 0
            self.buffer_samples = 0
            self.last_frame_s = None

    # ------------------------------------------------------------------------------ parts of a turn
    def add_audio(self, samples: np.ndarray) -> None:
        """Add audio [samples] at 16 kHz to the turn: of the buffer, or of an item."""
        if not len(samples):
            return
        if self.frame is not None and self.num_samples == 0:
            self.add_frame(self.frame)
            self.frame = None
        self.num_samples += len(samples)
        self.add_input(lambda session: session.add_audio(samples), samples.nbytes)

    def show(self, frame: np.ndarray) -> None:
        """A camera frame [height, width, 3]. It counts where the user speaks."""
        if self.num_samples == 0:
            self.frame = frame  # the first one of the next turn
        else:
            self.add_frame(frame)

    def add_frame(self, frame: np.ndarray) -> None:
        """Add a frame at the time of the audio so far."""
        at_s = self.num_samples / INPUT_SAMPLE_RATE
        if self.last_frame_s is not None and at_s - self.last_frame_s < 1 / FRAMES_PER_S:
            return
        self.last_frame_s = at_s
        self.add_input(lambda session: session.add_frame(frame, at_s), frame.nbytes)

    def add_image(self, image: Image.Image) -> None:
        """Add an image to the turn."""
        self.images.append(image)
        num_bytes = 3 * image.width * image.height
        self.add_input(lambda session: session.add_image(image), num_bytes)

    def check(self, content: list[dict]) -> None:
        """Raise ApiError where an item's texts or images would be too many for the turn."""
        parts = [part for part in content if isinstance(part, dict)]
        num_images = sum(part.get("type") == "input_image" for part in parts)
        if len(self.images) + num_images > MAX_IMAGES:
            raise bad_request(f"a turn has at most {MAX_IMAGES} images", "item.content")
        texts = [str(part.get("text")) for part in parts if part.get("type") == "input_text"]
        if len(" ".join((*self.texts, *texts))) > MAX_TEXT:
            raise bad_request(
                f"the texts of a turn have at most {MAX_TEXT} characters", "item.content"
            )

    # ------------------------------------------------------------------------------------ held back
    def hold(self) -> None:
        """Hold input back from now on, see HOLD_S."""
        self.held = []
        self.held_until = self.num_samples + int(HOLD_S * INPUT_SAMPLE_RATE)

    def add_input(self, function: Input, num_bytes: int) -> None:
        """Give the session input of the turn, or hold it back."""
        if self.held is None:
            self.submit(function, num_bytes)
            return
        self.held.append((function, num_bytes))
        if self.num_samples >= self.held_until or len(self.held) >= MAX_HELD:
            self.release_held()

    def release_held(self) -> None:
        """Give the session what was held back."""
        held = self.held or []
        self.held = None
        for function, num_bytes in held:
            self.submit(function, num_bytes)


def keep_images(session: Session, images: list[Image.Image]) -> None:
    """Forget all of the current turn but its images."""
    session.discard_turn()
    for image in images:
        session.add_image(image)
