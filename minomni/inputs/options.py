"""What a content item may ask for besides its source: the keys of qwen-omni-utils, under their own
names.
"""

from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from minomni.arguments import shown
from minomni.errors import UserError

SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
SAMPLING = (
    "nframes",
    "min_frames",
    "max_frames",
    "video_start",
    "video_end",
)  # which frames of a film are looked at
KEYS_OF = {
    "text": (),
    "image": SIZES,
    "audio": ("audio_start", "audio_end"),
    "video": ("fps", *SAMPLING, *SIZES, "total_pixels", "sample_fps", "use_audio_in_video"),
}
MAY_BE_NEGATIVE = ("video_start", "video_end")  # times before the beginning
# Below zero, qwen-omni-utils fails for files and counts arrays from their end: here audio_start is
# refused for both.
MAY_BE_ZERO = ("audio_start",)
LARGEST = 1e12  # of every number: far beyond any use, and safe to calculate with


@dataclass(frozen=True)
class MediaOptions:
    """Options of one content item; None where it says nothing."""

    fps: float | None = None  # frames looked at per second of a video
    nframes: int | None = None  # frames looked at in all, instead of fps
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None  # of a picture, or of one frame
    max_pixels: int | None = None
    total_pixels: int | None = None  # of all frames of a video together
    resized_height: int | None = None  # pixels; both or none
    resized_width: int | None = None
    video_start: float | None = None  # s
    video_end: float | None = None
    audio_start: float | None = None  # s
    audio_end: float | None = None
    sample_fps: float | None = None  # frames per second at which a list of frames was taken
    use_audio_in_video: bool | None = None  # for this video, instead of for all

    def given(self, keys: tuple[str, ...]) -> list[str]:
        """Those of the keys that have a value."""
        return [key for key in keys if getattr(self, key) is not None]


def options_of(kind: str, given: dict) -> MediaOptions:
    """The keys of one content item beside its source, none of them None -> its options.

    Raises UserError for a key that this kind of item does not have, for values that are no number,
    and for keys that contradict each other (as qwen-omni-utils does).
    """
    numbers = {}
    for key, value in given.items():
        if key not in KEYS_OF[kind]:
            known = (
                f"it may have {', '.join(KEYS_OF[kind])}" if KEYS_OF[kind] else "it has no options"
            )
            raise UserError(f"{with_article(kind)} item has the unknown key {shown(key)}; {known}")
        if key == "use_audio_in_video":
            if not isinstance(value, (bool, np.bool_)):
                raise UserError(f"{key} is {shown(value)}; expected true or false")
            numbers[key] = bool(value)
        else:
            numbers[key] = _number(key, value)
    if "fps" in given and "nframes" in given:
        raise UserError("a video item has both fps and nframes; give one of them")
    if ("resized_height" in given) != ("resized_width" in given):
        raise UserError(
            f"{with_article(kind)} item has one of resized_height and resized_width; give both or none"
        )
    for start, end in (("video_start", "video_end"), ("audio_start", "audio_end")):
        if end in numbers and numbers[end] <= max(0, numbers.get(start, 0)):
            raise UserError(
                f"{end} is {numbers[end]} s and the start {numbers.get(start, 0)} s; the end comes later"
            )
    return MediaOptions(**numbers)


def _number(key: str, value) -> int | float:
    """A number of any type as Python's own. Raises UserError for what is not finite, or too low for
    its key.
    """
    is_number = isinstance(value, Real) and not isinstance(value, (bool, np.bool_))
    if not is_number or not abs(value) <= LARGEST:  # neither is NaN
        raise UserError(f"{key} is {shown(value)}; expected a number of at most {LARGEST:.0e}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if key in MAY_BE_ZERO and number < 0:
        raise UserError(f"{key} is {shown(value)}; expected a number that is not below zero")
    if number <= 0 and key not in (*MAY_BE_NEGATIVE, *MAY_BE_ZERO):
        raise UserError(f"{key} is {shown(value)}; expected a number above zero")
    return number


def with_article(kind: str) -> str:
    """A kind of item as a sentence begins with it."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
