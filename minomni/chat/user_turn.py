"""What a user says and shows in one turn, cut into parts of two seconds that are encoded and read
as they fill up.

    sound alone    <|audio_bos|> A0 A1 ... <|audio_eos|>
    frames alone   <|vision_bos|> V0 V1 ... <|vision_eos|>
    both           <|vision_bos|> <|audio_bos|> V0 A0 V1 A1 ... <|audio_eos|> <|vision_eos|>

One thing is not known until a turn ends: the loudest point of its sound, by which the release
scales all of it. So the loudest so far is used, and where a louder one changes what was read, it is
read again from there.
"""

import weakref
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from minomni.arguments import number, shown
from minomni.config import LISTENING_RATE
from minomni.errors import UserError
from minomni.inputs.audio import LOUDEST, SHORTEST, SILENCE
from minomni.inputs.image import load_image
from minomni.inputs.mel import HOP, log_power, normalize_log_mel, num_audio_tokens
from minomni.inputs.patches import video_patches
from minomni.inputs.prompt import video_times
from minomni.inputs.source import array_of
from minomni.thinker.tmrope import text_positions, video_positions

SAMPLES_PER_TOKEN = 4 * HOP  # 40 ms
SIDE = 3  # mel frames that are computed before and after a stretch, lest its borders be heard
ONLY_SILENCE = "only silence was heard; speak louder, show something, or ask in text too"
LONGEST_TURN = 86_400  # s


@dataclass
class Part:
    """A part that has been read, and where the conversation stood before it."""

    kind: str  # "sound" or "frames"
    index: int
    length: int
    position: int


class UserTurn:
    """One turn of a Session, which it makes read what comes in."""

    def __init__(self, session):
        self.session = weakref.proxy(
            session
        )  # which holds this turn: a circle would keep both until Python tidies up
        self.config = session.omni.config
        self.length, self.position = session.length, session.position  # before it
        self.kinds: tuple[
            str, ...
        ] = ()  # what this turn is made of, settled when its first part is read
        self.parts: list[Part] = []
        self.wave, self.powers, self.peak = (
            torch.zeros(0),
            [],
            torch.tensor(-torch.inf),
        )  # powers: [128, F] a block
        self.block = 2 * self.config.thinker.audio.n_window  # mel frames
        self.odd = self.size = self.began_at = self.last_at = (
            None  # a frame without its pair, sizes and times
        )
        self.views: list[
            list[tuple[Tensor, float, tuple]]
        ] = []  # per part: features, seconds, grid of each pair

    # ------------------------------------------------------------------------------------------------
    # what comes in
    def add_audio(self, chunk, rate: int) -> None:
        """Session.hear()."""
        self.expect("sound")
        self.read()  # where the context is full, here is the end of it: nothing is heaped up
        most = self.config.thinker.text.max_position_embeddings * SAMPLES_PER_TOKEN
        self.wave = torch.cat([self.wave, checked(chunk, rate, most)])
        while len(self.wave) >= HOP * ((len(self.powers) + 1) * self.block + SIDE):
            self.add_mel(len(self.powers) * self.block, (len(self.powers) + 1) * self.block)
        self.read()

    def add_frame(self, frame, at_seconds: float) -> None:
        """Session.see()."""
        self.expect("frames")
        at_seconds = number(at_seconds, "at_seconds", -1e12, 1e12)
        if self.last_at is not None and not at_seconds > self.last_at:
            raise UserError(
                f"a frame at {at_seconds} s after one at {self.last_at} s; give frames in order of time"
            )
        if self.began_at is not None and at_seconds - self.began_at > LONGEST_TURN:
            raise UserError(
                f"a frame at {at_seconds:g} s, more than a day after the first one at {self.began_at:g} s; "
                f"at_seconds counts seconds"
            )
        image = load_image(frame)
        if self.size not in (None, image.size):
            raise UserError(
                f"a frame of {image.width}x{image.height} pixels after {self.size[0]}x{self.size[1]}; "
                f"frames of one turn have one size"
            )
        self.began_at = at_seconds if self.began_at is None else self.began_at
        self.size, self.last_at, pixels = image.size, at_seconds, torch.from_numpy(np.array(image))
        if self.odd is None:
            self.odd = pixels, at_seconds - self.began_at
        else:
            self.encode_frames(pixels)
            self.read()

    def expect(self, kind: str) -> None:
        if self.kinds and kind not in self.kinds:
            raise UserError(
                f"this turn began without {kind}, and what a turn is made of is settled in its first two "
                f"seconds; respond() first"
            )

    def finish(self, something_said: bool) -> None:
        """Read what is left and close the turn. Raises UserError where there was nothing, or
        nothing but silence.
        """
        frames, samples = bool(self.views or self.odd), len(self.wave)
        if not (samples or frames or something_said):
            raise UserError(
                "nothing was heard or seen yet; recognized_words() and see() come before respond(), or give it text"
            )
        if 0 < samples <= SHORTEST:
            raise UserError(
                f"{samples * 1000 / LISTENING_RATE:.0f} ms of sound were heard; more than 20 ms are needed"
            )
        if samples and not frames and not something_said and self.wave.abs().max() < SILENCE:
            raise UserError(ONLY_SILENCE)
        if self.odd is not None:
            self.encode_frames(self.odd[0])  # an odd last frame is doubled
        total = -(-samples // HOP)
        for start in range(len(self.powers) * self.block, total, self.block):
            self.add_mel(start, min(start + self.block, total), last=start + self.block >= total)
        if self.powers and not num_audio_tokens(self.powers[-1].shape[1]):
            self.powers.pop()  # too short for a token
        if self.views or self.powers:
            self.read(last=True)
            self.close()

    # ------------------------------------------------------------------------------------- encoding
    # it, part by part
    def add_mel(self, start: int, end: int, last: bool = False) -> None:
        """Mel frames start to end, not yet scaled; if they are the loudest so far, see who has to
        be read again.
        """
        first = max(start - SIDE, 0)
        power = log_power(self.wave[first * HOP : None if last else (end + SIDE) * HOP])[
            :, start - first :
        ]
        peak = torch.maximum(self.peak, (power if last else power[:, : end - start]).max())
        if peak > self.peak:
            self.peak = peak
            again = [
                i
                for i, part in enumerate(self.parts)
                if part.kind == "sound" and self.powers[part.index].min() < peak - 8.0
            ]
            if again:
                self.session.truncate(self.parts[again[0]].length, self.parts[again[0]].position)
                del self.parts[again[0] :]
        self.powers.append(power[:, : end - start])

    def encode_frames(self, second: Tensor) -> None:
        """A pair of frames is complete: encode it, and put it into its part."""
        (first, at), self.odd, thinker = self.odd, None, self.config.thinker
        patches, grid = video_patches(
            torch.stack([first, second]), thinker.vision, self.config.media, "the frame"
        )
        with torch.no_grad():
            view = self.session.omni.thinker.visual(patches, [grid]), at, grid
        time = float(video_times(torch.tensor(at), thinker.position_id_per_seconds))
        if (
            not self.views
            or time >= len(self.views) * thinker.seconds_per_chunk * thinker.position_id_per_seconds
        ):
            self.views.append([])
        self.views[-1].append(view)

    # -------------------------------------------------------------------------------------- and
    # reading it in order
    def read(self, last: bool = False) -> None:
        """Read all parts whose turn it is: sound and frames alternate, frames first."""
        complete = {
            "sound": len(self.powers),
            "frames": len(self.views) - (not last),
        }  # the last views may still grow
        if not self.kinds and (last or max(complete.values()) > 0):
            self.open()
        while self.kinds:
            seen, heard = (
                sum(part.kind == kind for part in self.parts) for kind in ("frames", "sound")
            )
            order = (
                (("frames", seen), ("sound", heard))
                if seen <= heard
                else (("sound", heard), ("frames", seen))
            )
            here = [(kind, index) for kind, index in order if kind in self.kinds]
            ready = [
                (kind, index)
                for kind, index in (here if last else here[:1])
                if index < complete[kind]
            ]
            if not ready:
                return
            self.append_tokens(*ready[0])

    def open(self) -> None:
        """Settle what the turn is made of and read the opening markers, which share one position."""
        tokens, sound, frames = (
            self.config.thinker.tokens,
            bool(len(self.wave)),
            bool(self.views or self.odd),
        )
        self.kinds = ("frames",) * frames + ("sound",) * sound
        self.append_markers([tokens.vision_bos] * frames + [tokens.audio_bos] * sound)
        self.base = self.session.position

    def close(self) -> None:
        tokens = self.config.thinker.tokens
        self.append_markers(
            [tokens.audio_eos] * ("sound" in self.kinds)
            + [tokens.vision_eos] * ("frames" in self.kinds)
        )

    def append_markers(self, ids: list[int]) -> None:
        place = torch.full((3, len(ids)), self.session.position)
        self.session.append_tokens(torch.tensor(ids), None, place, self.session.position + 1)

    @torch.no_grad()
    def append_tokens(self, kind: str, index: int) -> None:
        """Read one part."""
        session, config = self.session, self.config.thinker
        part = Part(kind, index, session.length, session.position)
        if kind == "sound":
            token, features = (
                config.tokens.audio,
                session.omni.thinker.audio_tower(
                    [normalize_log_mel(self.powers[index], self.peak)]
                ),
            )  # [n, D]
            places = text_positions(self.base + index * num_audio_tokens(self.block), len(features))
        else:
            views, times, grids = zip(*self.views[index])
            token, features = config.tokens.video, torch.cat(views)  # [n, D]
            places = video_positions(
                self.base, (len(views), *grids[0][1:]), torch.tensor(times), config
            )
        then = int(places.max()) + 1
        if self.kinds == ("frames",):
            then = max(
                then, session.position
            )  # a silent clip is one segment, and its largest id counts
        session.append_tokens(torch.full((len(features),), token), features, places, then)
        self.parts.append(part)


def checked(chunk, rate: int, most: int) -> Tensor:
    """A chunk of sound -> float32 [samples], at most so many. Raises UserError."""
    if isinstance(rate, bool) or not isinstance(rate, Real) or rate != LISTENING_RATE:
        raise UserError(
            f"a chunk at {shown(rate)} Hz; expected {LISTENING_RATE} Hz, resample it first"
        )
    samples = array_of(chunk, "a chunk of sound")
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise UserError(
            f"a chunk of shape {list(samples.shape)} and type {samples.dtype}; expected floats [samples]"
        )
    if len(samples) > most:
        raise UserError(
            f"a chunk of {len(samples) / LISTENING_RATE:.0f} s of sound; the whole context holds "
            f"{most / LISTENING_RATE:.0f} s. Give shorter chunks, and begin a new session when it is full"
        )
    if not np.isfinite(samples).all():
        raise UserError("a chunk holds NaN or infinite samples; check the microphone")
    if len(samples) and abs(samples).max() > LOUDEST:
        raise UserError(
            f"a chunk with samples as high as {abs(samples).max():g}; expected floats from -1 to 1: divide "
            f"those of 16 bits by 32768"
        )
    return torch.from_numpy(samples.astype(np.float32))
