"""Incremental encoder of one user turn: audio and video are cut into parts of two seconds, which
are encoded and prefilled as soon as they are complete.

    audio alone    <|audio_bos|> A0 A1 ... <|audio_eos|>
    frames alone   <|vision_bos|> V0 V1 ... <|vision_eos|>
    both           <|vision_bos|> <|audio_bos|> V0 A0 V1 A1 ... <|audio_eos|> <|vision_eos|>

The log-mel of a clip is clipped relative to its peak, which is known only when the turn ends. The
running peak is used instead. Where a higher peak changes parts that are already prefilled, they are
prefilled again.
"""

import math
import weakref
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minomni.arguments import check_number
from minomni.config import INPUT_SAMPLE_RATE
from minomni.errors import UserError, quote
from minomni.inputs.audio import MAX_AMPLITUDE, MIN_SAMPLES, SILENCE_LEVEL
from minomni.inputs.image import load_image
from minomni.inputs.interleave import video_times
from minomni.inputs.mel import (
    DYNAMIC_RANGE,
    HOP,
    log_power,
    normalize_log_mel,
    num_audio_tokens,
)
from minomni.inputs.patches import image_patches, video_patches
from minomni.inputs.source import to_numpy
from minomni.thinker.tmrope import image_positions, text_positions, video_positions

if TYPE_CHECKING:
    from minomni.chat.session import Session

SAMPLES_PER_TOKEN = 4 * HOP  # 40 ms
MARGIN_FRAMES = 3  # mel frames around a block that its 25 ms windows reach
ONLY_SILENCE = "the audio holds only silence; speak louder, show something, or add text"
MAX_TURN_S = 86_400  # s


@dataclass
class Part:
    """A prefilled part, with the session's state before it."""

    kind: str  # "audio" or "frames"
    index: int  # among the parts of its kind
    length: int  # tokens
    position: int


@dataclass
class FramePair:
    """Two frames, encoded as one temporal step of the vision encoder."""

    features: Tensor  # [n, D]
    seconds: float  # time of the first frame, from the first frame of the turn
    grid: tuple[int, int, int]


class UserTurn:
    """One turn of a session. It prefills what it is given through the session."""

    def __init__(self, session: "Session"):
        # The session holds this turn; a weak reference avoids a cycle that would delay its release.
        self.session: Session = weakref.proxy(session)
        self.config = session.omni.config
        self.length = session.length  # tokens before the turn
        self.position = session.position  # before the turn
        # What the turn consists of: "frames", "audio" or both; fixed when its first part is ready.
        self.kinds: tuple[str, ...] = ()
        self.parts: list[Part] = []
        self.base = self.position  # position of the first part, after the opening markers

        # Audio: one block of log powers per part.
        self.wave = torch.zeros(0)
        self.block_frames = 2 * self.config.thinker.audio.n_window
        self.log_powers: list[Tensor] = []  # each [128, block_frames], the last may be shorter
        self.peak = torch.tensor(-torch.inf)  # of all log powers

        self.num_images = 0  # prefilled before audio and frames

        # Frames: encoded in pairs, one list of pairs per part.
        self.pairs: list[list[FramePair]] = []
        self.unpaired: tuple[Tensor, float] | None = None  # pixels [H, W, 3] and seconds
        self.frame_size: tuple[int, int] | None = None  # width and height
        self.first_frame_s: float | None = None
        self.last_frame_s: float | None = None

    # ----------------------------------------------------------------------------------- input
    def add_audio(self, chunk, rate: int) -> None:
        """See Session.add_audio()."""
        self.require_kind("audio")
        # Raise here if the context is full, so that no more audio accumulates.
        self.prefill_parts()
        context = self.config.thinker.text.max_position_embeddings
        samples = check_chunk(chunk, rate, max_samples=context * SAMPLES_PER_TOKEN)
        self.wave = torch.cat([self.wave, samples])

        # Encode each block that is complete together with its margin.
        while True:
            start = len(self.log_powers) * self.block_frames
            end = start + self.block_frames
            if len(self.wave) < (end + MARGIN_FRAMES) * HOP:
                break
            self.add_mel(start, end)
        self.prefill_parts()

    def add_frame(self, frame, at_seconds: float) -> None:
        """See Session.add_frame()."""
        self.require_kind("frames")
        at_seconds = check_number(at_seconds, "at_seconds", -1e12, 1e12)
        self.check_frame_time(at_seconds)
        image = load_image(frame)
        if self.frame_size is not None and self.frame_size != image.size:
            width, height = self.frame_size
            raise UserError(
                f"a frame of {image.width}x{image.height} pixels after {width}x{height}; "
                f"all frames of a turn must have the same size"
            )

        if self.first_frame_s is None:
            self.first_frame_s = at_seconds
        self.last_frame_s = at_seconds
        self.frame_size = image.size
        pixels = torch.from_numpy(np.array(image))
        if self.unpaired is None:
            self.unpaired = (pixels, at_seconds - self.first_frame_s)
        else:
            first, seconds = self.unpaired
            self.unpaired = None
            self.encode_pair(first, pixels, seconds)
            self.prefill_parts()

    @torch.no_grad()
    def add_image(self, image) -> None:
        """See Session.add_image()."""
        if self.kinds or len(self.wave) or self.first_frame_s is not None:
            raise UserError(
                "an image after audio or frames of the same turn; give images first, or call "
                "respond() before"
            )
        thinker = self.session.omni.thinker
        tokens = self.config.thinker.tokens
        patches, grid = image_patches(
            load_image(image), self.config.thinker.vision, self.config.media, "the image given"
        )
        features = thinker.encode_vision(patches, [grid])
        length = self.session.length
        position = self.session.position
        try:
            self.append_markers([tokens.vision_bos])
            positions = image_positions(self.session.position, grid, self.config.thinker)
            ids = torch.full((len(features),), tokens.image)
            self.session.append_tokens(ids, features, positions, int(positions.max()) + 1)
            self.append_markers([tokens.vision_eos])
        except UserError:  # the context is full: leave no half of an image
            self.session.truncate(length, position)
            raise
        self.num_images += 1

    def check_frame_time(self, at_seconds: float) -> None:
        """Raise UserError for a time that is not later than the last frame's, or far off."""
        if self.last_frame_s is not None and at_seconds <= self.last_frame_s:
            raise UserError(
                f"a frame at {at_seconds} s after one at {self.last_frame_s} s; "
                f"give frames in order of time"
            )
        if self.first_frame_s is not None and at_seconds - self.first_frame_s > MAX_TURN_S:
            raise UserError(
                f"a frame at {at_seconds:g} s, more than a day after the first one at "
                f"{self.first_frame_s:g} s; at_seconds is in seconds"
            )

    def require_kind(self, kind: str) -> None:
        """Raise UserError where the turn has already begun without this kind of input."""
        if self.kinds and kind not in self.kinds:
            raise UserError(
                f"this turn began without {kind}, and the inputs of a turn are fixed after its "
                f"first two seconds; call respond() first"
            )

    def finish(self, has_text: bool) -> None:
        """Encode and prefill the rest of the turn. Raises UserError where there was no input, or
        nothing but silence.
        """
        num_samples = len(self.wave)
        has_frames = bool(self.pairs) or self.unpaired is not None
        if not (num_samples or has_frames or has_text or self.num_images):
            raise UserError(
                "the turn is empty; call add_audio() or add_frame() before respond(), or give it "
                "text"
            )
        if 0 < num_samples <= MIN_SAMPLES:
            raise UserError(
                f"the turn has {num_samples * 1000 / INPUT_SAMPLE_RATE:.0f} ms of audio; "
                f"more than 20 ms are needed"
            )
        is_visual = has_frames or self.num_images > 0
        only_audio = num_samples > 0 and not is_visual and not has_text
        if only_audio and self.wave.abs().max() < SILENCE_LEVEL:
            raise UserError(ONLY_SILENCE)

        # A last frame without a partner is paired with itself.
        if self.unpaired is not None:
            frame, seconds = self.unpaired
            self.unpaired = None
            self.encode_pair(frame, frame, seconds)
        self.finish_audio()
        if self.pairs or self.log_powers:
            self.prefill_parts(last=True)
            self.append_end_markers()

    def finish_audio(self) -> None:
        """Compute the log powers of the rest of the audio, whose last block may be short."""
        num_frames = math.ceil(len(self.wave) / HOP)
        first = len(self.log_powers) * self.block_frames
        for start in range(first, num_frames, self.block_frames):
            end = start + self.block_frames
            self.add_mel(start, min(end, num_frames), last=end >= num_frames)
        # A last block that is too short for one token is left out.
        if self.log_powers and num_audio_tokens(self.log_powers[-1].shape[1]) == 0:
            self.log_powers.pop()

    # -------------------------------------------------------------------------------- encoding
    def add_mel(self, start: int, end: int, last: bool = False) -> None:
        """Compute the log powers of mel frames start to end; last: they are the end of the clip."""
        num_frames = end - start
        first = max(start - MARGIN_FRAMES, 0)
        stop = None if last else (end + MARGIN_FRAMES) * HOP
        log_powers = log_power(self.wave[first * HOP : stop])[:, start - first :]
        # At the end of the clip, the frames after it count for the peak too, as in log_mel().
        peak = log_powers.max() if last else log_powers[:, :num_frames].max()
        if peak > self.peak:
            self.peak = peak
            stale = self.first_stale_part()
            if stale is not None:
                self.rewind(stale)
        self.log_powers.append(log_powers[:, :num_frames])

    def first_stale_part(self) -> int | None:
        """Index of the first prefilled part whose normalized mel the new peak changes, if any.

        normalize_log_mel() only clips below the peak, so a block without values there is unchanged.
        """
        for i, part in enumerate(self.parts):
            if part.kind != "audio":
                continue
            if self.log_powers[part.index].min() < self.peak - DYNAMIC_RANGE:
                return i
        return None

    def rewind(self, index: int) -> None:
        """Drop a prefilled part and all after it from the session; prefill_parts() repeats them."""
        part = self.parts[index]
        self.session.truncate(part.length, part.position)
        del self.parts[index:]

    def encode_pair(self, first: Tensor, second: Tensor, seconds: float) -> None:
        """Encode two frames [H, W, 3] and add the pair to its part; seconds: time of the first."""
        config = self.config.thinker
        patches, grid = video_patches(
            torch.stack([first, second]), config.vision, self.config.media, "the frame"
        )
        with torch.no_grad():
            features = self.session.omni.thinker.encode_vision(patches, [grid])

        # A pair that lies beyond the current part begins the next one.
        time = float(video_times(torch.tensor(seconds), config.position_id_per_seconds))
        ids_per_part = config.seconds_per_chunk * config.position_id_per_seconds
        if not self.pairs or time >= len(self.pairs) * ids_per_part:
            self.pairs.append([])
        self.pairs[-1].append(FramePair(features, seconds, grid))

    # ------------------------------------------------------------------------------ prefilling
    def prefill_parts(self, last: bool = False) -> None:
        """Prefill all parts that are complete and next in order; last: the turn has ended."""
        if not self.kinds:
            if not (last or self.complete_parts("frames") > 0 or self.complete_parts("audio") > 0):
                return
            self.append_start_markers()
        while (part := self.next_part(last)) is not None:
            self.prefill_part(*part)

    def complete_parts(self, kind: str, last: bool = False) -> int:
        """Number of parts of a kind that get no more input; the last part of frames may still grow
        until the turn ends.
        """
        if kind == "audio":
            return len(self.log_powers)
        return len(self.pairs) if last else len(self.pairs) - 1

    def next_part(self, last: bool) -> tuple[str, int] | None:
        """Kind and index of the part to prefill next, None if it is not complete yet.

        With both kinds, parts alternate: frames 0, audio 0, frames 1, audio 1, and so on. When the
        turn has ended and one kind has no more parts, the other goes on.
        """
        frames_done = sum(part.kind == "frames" for part in self.parts)
        audio_done = len(self.parts) - frames_done
        frames_ready = "frames" in self.kinds and frames_done < self.complete_parts("frames", last)
        audio_ready = "audio" in self.kinds and audio_done < self.complete_parts("audio", last)

        # Until the turn ends, each kind waits for the other.
        frames_next = frames_done <= audio_done
        if len(self.kinds) == 2 and not last:
            frames_ready = frames_ready and frames_next
            audio_ready = audio_ready and not frames_next

        if frames_ready and (frames_next or not audio_ready):
            return "frames", frames_done
        if audio_ready:
            return "audio", audio_done
        return None

    def append_start_markers(self) -> None:
        """Fix what the turn consists of, and prefill the opening markers."""
        tokens = self.config.thinker.tokens
        kinds = []
        markers = []
        if self.pairs or self.unpaired is not None:
            kinds.append("frames")
            markers.append(tokens.vision_bos)
        if len(self.wave):
            kinds.append("audio")
            markers.append(tokens.audio_bos)
        self.kinds = tuple(kinds)
        self.append_markers(markers)
        self.base = self.session.position

    def append_end_markers(self) -> None:
        """Prefill the closing markers."""
        tokens = self.config.thinker.tokens
        markers = []
        if "audio" in self.kinds:
            markers.append(tokens.audio_eos)
        if "frames" in self.kinds:
            markers.append(tokens.vision_eos)
        self.append_markers(markers)

    def append_markers(self, ids: list[int]) -> None:
        """Prefill marker tokens, which share one position."""
        position = self.session.position
        positions = torch.full((3, len(ids)), position)
        self.session.append_tokens(torch.tensor(ids), None, positions, position + 1)

    @torch.no_grad()
    def prefill_part(self, kind: str, index: int) -> None:
        """Encode one part and prefill it."""
        session = self.session
        part = Part(kind, index, session.length, session.position)
        if kind == "audio":
            token = self.config.thinker.tokens.audio
            features, positions = self.audio_part(index)
        else:
            token = self.config.thinker.tokens.video
            features, positions = self.frames_part(index)
        next_position = int(positions.max()) + 1
        # A silent clip is one segment: the text after it follows its largest position.
        if self.kinds == ("frames",):
            next_position = max(next_position, session.position)
        ids = torch.full((len(features),), token)
        session.append_tokens(ids, features, positions, next_position)
        self.parts.append(part)

    def audio_part(self, index: int) -> tuple[Tensor, Tensor]:
        """-> features [n, D] and positions [3, n] of a block of audio."""
        mel = normalize_log_mel(self.log_powers[index], self.peak)
        features = self.session.omni.thinker.encode_audio([mel])
        start = self.base + index * num_audio_tokens(self.block_frames)
        return features, text_positions(start, len(features))

    def frames_part(self, index: int) -> tuple[Tensor, Tensor]:
        """-> features [n, D] and positions [3, n] of a part of the video."""
        pairs = self.pairs[index]
        features = torch.cat([pair.features for pair in pairs])
        seconds = torch.tensor([pair.seconds for pair in pairs])
        _, height, width = pairs[0].grid
        grid = (len(pairs), height, width)
        return features, video_positions(self.base, grid, seconds, self.config.thinker)


def check_chunk(chunk, rate: int, max_samples: int) -> Tensor:
    """A chunk of audio -> float32 [samples]. Raises UserError for another rate, shape or type, for
    too many samples and for values that are not a waveform.
    """
    if isinstance(rate, bool) or not isinstance(rate, Real) or rate != INPUT_SAMPLE_RATE:
        raise UserError(
            f"a chunk at {quote(rate)} Hz; expected {INPUT_SAMPLE_RATE} Hz, resample it first"
        )
    samples = to_numpy(chunk, "a chunk of audio")
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise UserError(
            f"a chunk of shape {list(samples.shape)} and type {samples.dtype}; "
            f"expected floats [samples]"
        )
    if len(samples) > max_samples:
        raise UserError(
            f"a chunk of {len(samples) / INPUT_SAMPLE_RATE:.0f} s of audio; the whole context "
            f"holds {max_samples / INPUT_SAMPLE_RATE:.0f} s. Give shorter chunks, and begin a new "
            f"session when it is full"
        )
    if not np.isfinite(samples).all():
        raise UserError("a chunk holds NaN or infinite samples; check the microphone")
    if len(samples) and abs(samples).max() > MAX_AMPLITUDE:
        raise UserError(
            f"a chunk with samples as high as {abs(samples).max():g}; expected floats from -1 to "
            f"1: divide 16-bit samples by 32768"
        )
    return torch.from_numpy(samples.astype(np.float32))
