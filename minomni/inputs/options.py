"""The options of a content item besides its source: the keys of qwen-omni-utils, same names."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from minomni.errors import UserError, quote

SIZE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# Which frames of a video file are sampled.
SAMPLING_OPTIONS = ("nframes", "min_frames", "max_frames", "video_start", "video_end")
KEYS_OF = {
    "text": (),
    "image": SIZE_OPTIONS,
    "audio": ("audio_start", "audio_end"),
    "video": (
        "fps",
        *SAMPLING_OPTIONS,
        *SIZE_OPTIONS,
        "total_pixels",
        "sample_fps",
        "use_audio_in_video",
    ),
}
MAY_BE_NEGATIVE = ("video_start", "video_end")  # times before the beginning
# With a negative audio_start, qwen-omni-utils fails for files and counts arrays from their end.
# Here it is refused for both.
MAY_BE_ZERO = ("audio_start",)
MAX_NUMBER = 1e12  # of every number: far beyond any use, and safe to calculate with


@dataclass(frozen=True)
class MediaOptions:
    """Options of one content item; None where an option is not given."""

    fps: float | None = None  # frames per second that are sampled from a video
    nframes: int | None = None  # frames that are sampled in all, instead of fps
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None  # of an image, or of one frame
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


NO_OPTIONS = MediaOptions()


def options_of(kind: str, given: dict) -> MediaOptions:
    """The keys of one content item besides its source, none of them None -> its options.

    Raises UserError for a key that this kind of item does not have, for values that are not
    numbers, and for keys that contradict each other (as qwen-omni-utils does).
    """
    values: dict[str, Any] = {}
    for key, value in given.items():
        _require_known(key, kind)
        if key == "use_audio_in_video":
            values[key] = _flag(key, value)
        else:
            values[key] = _number(key, value)

    if "fps" in given and "nframes" in given:
        raise UserError("a video item has both fps and nframes; give one of them")
    if ("resized_height" in given) != ("resized_width" in given):
        raise UserError(
            f"{with_article(kind)} item has one of resized_height and resized_width; give both or "
            f"none"
        )
    for start_key, end_key in (("video_start", "video_end"), ("audio_start", "audio_end")):
        start = values.get(start_key, 0)
        end = values.get(end_key)
        if end is not None and end <= max(0, start):
            raise UserError(f"{end_key} is {end} s and the start {start} s; the end comes later")
    return MediaOptions(**values)


def _require_known(key: object, kind: str) -> None:
    """Raise UserError for a key that this kind of item does not have."""
    if key in KEYS_OF[kind]:
        return
    known = "it has no options"
    if KEYS_OF[kind]:
        known = f"it may have {', '.join(KEYS_OF[kind])}"
    raise UserError(f"{with_article(kind)} item has the unknown key {quote(key)}; {known}")


def _flag(key: str, value: object) -> bool:
    """A bool of Python or numpy as Python's own. Raises UserError for other values."""
    if not isinstance(value, (bool, np.bool_)):
        raise UserError(f"{key} is {quote(value)}; expected true or false")
    return bool(value)


def _number(key: str, value) -> int | float:
    """A number of any type as Python's own.

    Raises UserError for a value that is not finite, or too low for its key.
    """
    is_number = isinstance(value, Real) and not isinstance(value, (bool, np.bool_))
    if not is_number or not abs(value) <= MAX_NUMBER:  # NaN fails the comparison
        raise UserError(f"{key} is {quote(value)}; expected a number of at most {MAX_NUMBER:.0e}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if key in MAY_BE_ZERO and number < 0:
        raise UserError(f"{key} is {quote(value)}; expected a number that is not below zero")
    if number <= 0 and key not in (*MAY_BE_NEGATIVE, *MAY_BE_ZERO):
        raise UserError(f"{key} is {quote(value)}; expected a number above zero")
    return number


def with_article(kind: str) -> str:
    """A kind of item with its article: "an image", "a video"."""
    article = "an" if kind[0] in "aeiou" else "a"
    return f"{article} {kind}"
