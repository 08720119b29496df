"""Videos: files, bytes, arrays and lists of frames to sampled frames with their times.

The audio track is decoded where it is asked for.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import ceil, floor, inf, isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minomni.config import MediaConfig
from minomni.errors import UserError, shorten
from minomni.inputs.audio import MAX_AUDIO_S, TOKENS_PER_S, audio_track
from minomni.inputs.containers import (
    RisingTimes,
    Watched,
    best_track,
    open_container,
    require_whole,
)
from minomni.inputs.image import load_image
from minomni.inputs.options import NO_OPTIONS, SAMPLING_OPTIONS, SIZE_OPTIONS, MediaOptions
from minomni.inputs.patches import frame_size, smart_resize
from minomni.inputs.source import name_of, one_line_errors, open_source

# Pixels of one frame. 8K television has 33 million.
MAX_FRAME_PIXELS = 36_000_000
# Bytes of one decoded frame. 8K television has 50 million, or 100 million in 10 bits. A decoder
# was measured to hold up to 15 frames, and that of h264 up to 32.
MAX_FRAME_BYTES = 100_000_000
HOLDS_MORE = {"h264": 2}  # codec -> how many times the frames that other decoders hold
# Pixels of all frames: two hours of 1920 x 1080 at 30 frames a second have 448 billion. They are
# decoded at about 100 million a second.
MAX_FILM_PIXELS = 500_000_000_000
MAX_VIDEO_S = 1_000_000  # seconds of a video; a header or a rate that says more is broken
# Seconds that a frame of a video of constant rate may be off its time. Matroska rounds to 1 ms.
STEADY = 0.0015
# ffmpeg's names of formats that it reads as video, though they are none. Its other formats of
# single images end in _pipe.
IMAGE_FORMATS = ("image2", "ico", "alias_pix", "brender_pix")
TEXT_FORMATS = ("tty", "bin", "xbin", "adf", "idf")
# ffmpeg's names of formats whose header lists all tracks. In others, they are found on the way.
LISTS_TRACKS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")
# Factor on the tokens that fit, for a check by packets: their number is about that of the frames.
TOLERANCE = 1.1
# qwen-omni-utils 0.0.9 first resizes frames of a list to multiples of twice the merge cell.
CELLS_OF_LISTED = 2


@dataclass
class Clip:
    """A video ready for patching."""

    frames: Tensor  # uint8 [n, height, width, 3]
    seconds: Tensor  # float32 [n], when each frame is shown, counted from the first one
    wave: Tensor | None  # float32 [samples] at 16 kHz, the audio track where it was asked for
    # Whether the frames have the size of their patches, multiples of the merge cell. Otherwise they
    # will be resized to frame_size.
    sized: bool = False


@dataclass(frozen=True)
class _Request:
    """The arguments of load_video that most steps need."""

    name: str  # of the video in messages
    media: MediaConfig
    cell: int  # side of a merge cell in pixels
    options: MediaOptions
    most_tokens: int | None

    def size_of(
        self, n: int, height: int, width: int, tolerance: float = 1.0, audio_tokens: int = 0
    ) -> tuple[int, int]:
        """The size (height, width) that n frames of height x width are resized to.

        Raises UserError for frames that are too large, and where they and the audio are more than
        most_tokens * tolerance.
        """
        _require_pixels(height, width, self.name)
        new_height, new_width = frame_size(
            n, height, width, self.cell, self.media, self.name, self.options
        )
        tokens = ceil(n / 2) * new_height * new_width // self.cell**2
        if self.most_tokens is not None and audio_tokens + tokens > self.most_tokens * tolerance:
            audio = f" beside {audio_tokens} of audio" if audio_tokens else ""
            advice = "video_start and video_end" if audio_tokens else "fps, nframes or max_pixels"
            raise UserError(
                f"{self.name}: {n} frames of {new_width}x{new_height} pixels are {tokens} tokens"
                f"{audio}, more than the context holds; shorten it, or set {advice}"
            )
        return new_height, new_width

    def refuse(self, keys: tuple[str, ...], what: str) -> None:
        """Raise UserError if an option of video files was given for something else."""
        given = self.options.given(keys)
        if given:
            raise UserError(
                f"{self.name}: {given[0]} is for video files, and this is {what}; leave it out"
            )


def load_video(
    source: Any,
    media: MediaConfig,
    with_audio: bool,
    cell: int = 28,
    options: MediaOptions = NO_OPTIONS,
    most_tokens: int | None = None,
) -> Clip:
    """A path or bytes (mp4, webm, avi, mkv ...), a Clip, frames, or (frames, fps) -> Clip.

    Frames are an array [n, height, width, 3], or a list of anything that load_image takes. Without
    a rate, options.sample_fps, options.fps or media.fps is taken. Files are sampled at options.fps
    or media.fps. Their frames keep their real times, are upright according to the display matrix,
    all have the size of the first one, and are resized for patches of merge cells of `cell` pixels:
    a long clip at full size would fill the memory. The sample aspect ratio is ignored (release
    behavior).

    with_audio decides about the audio track, whatever the options say. most_tokens: a video that
    needs more is refused before it is decoded. Raises UserError for a source that cannot be read,
    for options that cannot be applied, and if with_audio asks for an audio track that is missing.
    """
    request = _Request(name_of(source, "video"), media, cell, options, most_tokens)
    name = request.name
    if isinstance(source, Clip):
        clip = _checked_clip(source, request)
    elif isinstance(source, (np.ndarray, Tensor, list, tuple)):
        clip = _given_frames(source, request)
    else:
        with open_source(source, name) as stream:
            clip = _decode_video(stream, with_audio, request)

    length = float(clip.seconds[-1] - clip.seconds[0])
    if not torch.isfinite(clip.seconds).all() or not length < MAX_VIDEO_S:
        raise UserError(
            f"{name}: lasts {length:.3g} s by its times; expected less than {MAX_VIDEO_S} s, its "
            "times or its rate are wrong"
        )
    if with_audio and clip.wave is None:
        raise _no_audio_track(name)
    return clip


def _no_audio_track(name: str) -> UserError:
    return UserError(
        f"{name}: has no audio track, and use_audio_in_video asks for one; switch it off, or set "
        f"it in each video item"
    )


# ------------------------------------------------------------------------------------- sampling


def sample_indices(
    total: int,
    rate: float,
    media: MediaConfig,
    options: MediaOptions = NO_OPTIONS,
    first: int = 0,
    name: str = "the video",
) -> list[int]:
    """Indices of the sampled frames, of `total` frames at `rate` per second that begin at `first`.

    Evenly spaced and of even number (release: smart_nframes of qwen-omni-utils, but a video of a
    single frame is accepted). Raises UserError if the options ask for fewer than 2 frames, or for
    more than there are.
    """
    if options.nframes is not None:
        n = round(options.nframes / 2) * 2
    else:
        min_frames: float = media.min_frames
        if options.min_frames is not None:
            min_frames = ceil(options.min_frames / 2) * 2
        max_frames: float = min(media.max_frames, total)
        if options.max_frames is not None:
            max_frames = options.max_frames
        max_frames = floor(max_frames / 2) * 2

        by_rate = total / rate * (options.fps or media.fps)
        n = int(min(max(by_rate, min_frames), max_frames, total)) // 2 * 2

    is_even_required = total > 1 or options.nframes is not None
    if is_even_required and not 2 <= n <= total:
        raise UserError(
            f"{name}: {n} frames are asked for; expected an even number from 2 to {total}, the "
            f"number of frames"
        )
    return torch.linspace(first, first + total - 1, max(1, n)).round().long().tolist()


def true_rate(times: list[float], last_duration: float, header: float) -> float:
    """Frames per second by the increasing times [n] in seconds at which frames are shown.

    The last frame lasts last_duration, but at least as long as the others on average: decoders fill
    in a missing duration from the header. Where the header's rate agrees to 1 %, it is returned, so
    that rounded times do not matter.
    """
    span = times[-1] - times[0]
    if not span > 0:
        return header
    step = span / (len(times) - 1)
    rate = len(times) / (span + max(step, last_duration))
    agrees = abs(rate - header) < 0.01 * header
    return header if agrees else rate


def frame_range(
    times: list[float], rate: float, options: MediaOptions, name: str
) -> tuple[int, int]:
    """Indices of the first and the last frame from video_start to video_end.

    Both are counted from the first frame. At a constant rate the indices follow from the rate
    (release: calculate_video_frame_range of qwen-omni-utils), otherwise from the times. Raises
    UserError for a range of less than two frames.
    """
    if options.video_start is None and options.video_end is None:
        return 0, len(times) - 1
    seconds = [time - times[0] for time in times]
    length = len(times) / rate
    start = max(0.0, options.video_start or 0.0)
    end = length if options.video_end is None else max(0.0, options.video_end)

    if all(abs(time - index / rate) <= STEADY for index, time in enumerate(seconds)):
        first = ceil(min(start, length) * rate)
        last = min(floor(min(end, length) * rate), len(times) - 1)
    else:
        first = bisect_left(seconds, start)
        last = bisect_right(seconds, end) - 1
    if first >= last:
        raise UserError(
            f"{name}: less than two frames lie from video_start {start:g} s to video_end {end:g} "
            f"s; it lasts {length:.2f} s"
        )
    return first, last


# ------------------------------------------------------------------------------------- given frames


def _checked_clip(clip: Clip, request: _Request) -> Clip:
    """A clip as it is. Raises UserError for wrong fields and for options of video files."""
    name = request.name
    cell = request.cell
    if not _are_frames(clip.frames) or not _are_times(clip.seconds, clip.frames):
        raise UserError(
            f"{name}: expected a Clip of frames uint8 [n, height, width, 3], n > 0, and rising "
            f"seconds [n]"
        )
    if clip.wave is not None and not _is_wave(clip.wave):
        raise UserError(
            f"{name}: expected a Clip whose wave is a float tensor [samples] at 16 kHz, or None"
        )
    request.refuse(("fps", "sample_fps", *SAMPLING_OPTIONS), "a Clip")
    if not clip.sized:
        return clip

    given = request.options.given((*SIZE_OPTIONS, "total_pixels"))
    if given:
        raise UserError(
            f"{name}: {given[0]} is for frames that are to be resized, and this is a Clip with "
            f"sized=True; leave it out"
        )
    height, width = clip.frames.shape[1:3]
    if height == 0 or width == 0 or height % cell != 0 or width % cell != 0:
        raise UserError(
            f"{name}: a Clip with sized=True of {width}x{height} pixels; expected multiples of "
            f"{cell}, resize it or give sized=False"
        )
    return clip


def _are_frames(frames: object) -> bool:
    """Whether frames are a uint8 tensor [n, height, width, 3] on the CPU, n > 0."""
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8 or frames.ndim != 4:
        return False
    return frames.shape[-1] == 3 and len(frames) > 0 and frames.device.type == "cpu"


def _are_times(seconds: object, frames: Tensor) -> bool:
    """Whether seconds are finite, do not decrease, and are as many as the frames."""
    if not isinstance(seconds, Tensor) or seconds.shape != frames.shape[:1]:
        return False
    return bool(torch.isfinite(seconds).all() and (seconds.diff() >= 0).all())


def _is_wave(wave: object) -> bool:
    return isinstance(wave, Tensor) and wave.ndim == 1 and wave.is_floating_point()


def _given_frames(source: Any, request: _Request) -> Clip:
    """Frames without a file -> Clip of all of them. An odd last frame of a list is repeated."""
    options = request.options
    rate: Any = options.sample_fps or options.fps or request.media.fps
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], (Real, np.bool_)):
        source, rate = source
        request.refuse(("fps", "sample_fps"), "(frames, fps)")
    request.refuse(SAMPLING_OPTIONS, "a number of frames")
    rate = _checked_fps(rate, request.name)

    is_list = isinstance(source, (list, tuple))
    frames = _listed_frames(source, request) if is_list else _frame_array(source, request)
    seconds = torch.arange(len(frames), dtype=torch.float32) / rate
    return Clip(frames, seconds, None, sized=is_list)


def _checked_fps(rate: Any, name: str) -> float:
    """Frames per second as float. Raises UserError for zero, infinity, bools and the like."""
    try:
        given = 0.0 if isinstance(rate, (bool, np.bool_)) else float(rate)
    except OverflowError:  # an integer beyond all floats
        given = inf
    if not (isfinite(given) and given > 0):
        raise UserError(
            f"{name}: {shorten(rate, 60)} frames per second; expected a number above zero"
        )
    return given


def _frame_array(source: Any, request: _Request) -> Tensor:
    """An array or tensor of frames -> uint8 [n, height, width, 3]."""
    name = request.name
    try:
        array = source.detach().cpu().numpy() if isinstance(source, Tensor) else np.asarray(source)
    except (TypeError, RuntimeError, NotImplementedError):  # bfloat16, tensors without values
        raise UserError(
            f"{name}: a tensor of type {source.dtype} on {source.device}; expected uint8"
        ) from None
    if array.ndim != 4 or array.shape[-1] != 3 or len(array) == 0 or array.dtype != np.uint8:
        raise UserError(
            f"{name}: frames of shape {array.shape[:8]} and type {array.dtype}; expected uint8 "
            f"[n, height, width, 3], n > 0"
        )
    n, height, width = array.shape[:3]
    _require_pixels(height, width, name)
    if request.most_tokens is not None:
        request.size_of(n, height, width)
    # torch takes neither read-only arrays nor negative strides: those are copied.
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def _listed_frames(source: list | tuple, request: _Request) -> Tensor:
    """A list of images -> frames uint8 [n, height, width, 3].

    Each image is resized twice, like in qwen-omni-utils.
    """
    name = request.name
    if not source:
        raise UserError(f"{name}: a list of no frames; expected at least one")
    n = ceil(len(source) / 2) * 2
    frames: list[np.ndarray] = []
    for number, listed in enumerate(source, 1):
        try:
            image = load_image(listed)
        except UserError as error:
            raise UserError(f"{name}: frame {number}: {error}") from None
        height, width = _listed_size(image, request)
        new_height, new_width = request.size_of(n, height, width)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        frames.append(np.asarray(image))

        first_height, first_width = frames[0].shape[:2]
        if (new_height, new_width) != (first_height, first_width):
            raise UserError(
                f"{name}: frame {number} comes at {new_width}x{new_height} pixels and frame 1 at "
                f"{first_width}x{first_height}; frames of one video have one size"
            )
    if len(frames) < n:
        frames.append(frames[-1])
    return torch.from_numpy(np.stack(frames))


def _listed_size(image: Image.Image, request: _Request) -> tuple[int, int]:
    """The size (height, width) that fetch_image of qwen-omni-utils 0.0.9 gives a listed frame.

    Its limits count cells. The cells are larger here, and so are the limits.
    """
    options = request.options
    height, width = image.height, image.width
    min_pixels: float = request.media.image_min_pixels * CELLS_OF_LISTED**2
    max_pixels: float = request.media.image_max_pixels * CELLS_OF_LISTED**2
    if options.resized_height is not None and options.resized_width is not None:
        height = options.resized_height
        width = options.resized_width
    else:
        if options.min_pixels is not None:
            min_pixels = options.min_pixels
        if options.max_pixels is not None:
            max_pixels = options.max_pixels
    cell = CELLS_OF_LISTED * request.cell
    return smart_resize(
        height, width, cell, min_pixels, max_pixels, request.name, at_least_a_cell=True
    )


def _require_pixels(height: int, width: int, name: str) -> None:
    if height * width > MAX_FRAME_PIXELS:
        raise UserError(
            f"{name}: frames of {width}x{height} pixels; expected at most {MAX_FRAME_PIXELS} "
            "pixels, make them smaller"
        )


# ------------------------------------------------------------------------------------- files


def _require_small(codec_name: str, pixels: Any, height: int, width: int, name: str) -> None:
    """Raise UserError if frames of a format of pixels would fill the memory while they are decoded.

    pixels: as PyAV has it; None where the header does not tell it.
    """
    size = 0 if pixels is None else height * width * pixels.padded_bits_per_pixel // 8
    most = MAX_FRAME_BYTES // HOLDS_MORE.get(codec_name, 1)
    if size > most:
        raise UserError(
            f"{name}: frames of {width}x{height} pixels in {pixels.name} are {size / 1e6:.0f} MB "
            f"each; of {codec_name}, at most {most / 1e6:.0f} MB a frame are read; scale it down"
        )


def _require_short(frames: int, height: int, width: int, name: str, before: int = 0) -> None:
    """Raise UserError if decoding takes too long. before: pixels of frames of other sizes."""
    pixels = before + frames * height * width
    if pixels > MAX_FILM_PIXELS:
        raise UserError(
            f"{name}: {frames} frames of {width}x{height} pixels take too long to decode; cut or "
            f"scale it to at most {MAX_FILM_PIXELS / 1e9:g} billion pixels in all"
        )


def _decode_video(stream: Any, with_audio: bool, request: _Request) -> Clip:
    """Decode a file in three passes: its packets, the times of all frames, the sampled frames."""
    name = request.name
    require_whole(stream, name)
    if request.options.sample_fps is not None:
        raise UserError(
            f"{name}: sample_fps is for lists of frames, and this is a file; set fps instead"
        )
    with one_line_errors(name, "not a readable video"):
        _refuse_image(stream, name)
        audio_tokens = _checked_audio(stream, request) if with_audio else 0
        packets = _checked_packets(stream, request, audio_tokens)
        times, rate, shifts = _times(stream, name, request.media.fps, packets)
        first, last = frame_range(times, rate, request.options, name)
        indices = sample_indices(
            last - first + 1, rate, request.media, request.options, first, name
        )
        frames = _sampled_frames(stream, indices, request)

    seconds = torch.tensor([times[index] - times[first] for index in indices])
    wave = None
    if with_audio:
        wave = _audio_of(stream, name, times[0], shifts, request.options)
    return Clip(frames, seconds, wave, sized=True)


def _sampled_frames(stream: Any, indices: list[int], request: _Request) -> Tensor:
    """Decode the frames at increasing indices -> uint8 [n, height, width, 3], resized."""
    size = None
    frames: list[np.ndarray] = []
    for index, (frame, _) in enumerate(_frames(stream, request.name)):
        if index == indices[len(frames)]:
            image = upright(frame)
            if size is None:  # the first frame decides
                size = request.size_of(len(indices), image.height, image.width)
            height, width = size
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            frames.append(np.asarray(image))
        if len(frames) == len(indices):
            break
    return torch.from_numpy(np.stack(frames))


@contextmanager
def _opened(stream: Any, name: str) -> Iterator[tuple[Any, Any, Watched]]:
    """The container in a stream, its best video track, and the stream as it is watched.

    Raises UserError if it holds no video, or frames too large.
    """
    limit = {"max_pixels": str(MAX_FRAME_PIXELS)}  # checked before a decoder allocates memory
    with open_container(stream, name, limit) as (container, watched):
        track = best_track(container, "video")
        if track is None or container.format.name in TEXT_FORMATS:
            raise UserError(f"{name}: holds no video")
        codec = track.codec_context
        if codec is None:
            raise UserError(f"{name}: no decoder is known for its frames; save it as mp4 with h264")
        codec.options = limit
        _require_pixels(codec.height, codec.width, name)
        _require_small(codec.name, codec.format, codec.height, codec.width, name)
        yield container, track, watched


def _refuse_image(stream: Any, name: str) -> None:
    """Raise UserError for a single image. Some cameras store videos as concatenated images."""
    with _opened(stream, name) as (container, track, _):
        format_name = container.format.name
        if not format_name.endswith("_pipe") and format_name not in IMAGE_FORMATS:
            return
        packets = (packet for packet in container.demux(track) if packet.size)
        if len(list(islice(packets, 2))) < 2:
            raise UserError(f"{name}: is an image; give it as image")


def _checked_audio(stream: Any, request: _Request) -> int:
    """About how many tokens the audio track of a video has, by its packets.

    Raises UserError, before frames are decoded, for a file whose header lists no audio track, and
    for one that is far too long.
    """
    name = request.name
    options = request.options
    seconds = 0.0
    with _opened(stream, name) as (container, _, watched):
        track = best_track(container, "audio")
        if track is None:
            if container.format.name in LISTS_TRACKS:
                raise _no_audio_track(name)
            return 0
        for packet in container.demux(track):
            watched.zeros = 0
            seconds += float((packet.duration or 0) * packet.time_base)

    start = max(0.0, options.video_start or 0.0)
    seconds = max(0.0, seconds - start)
    if options.video_end is not None:
        seconds = min(seconds, max(0.0, options.video_end - start))
    tokens = int(seconds * TOKENS_PER_S)
    most = MAX_AUDIO_S * TOKENS_PER_S
    if request.most_tokens is not None:
        most = min(most, request.most_tokens)
    if tokens > most * TOLERANCE:
        raise UserError(
            f"{name}: {seconds:.0f} s of audio are {tokens} tokens, more than the context holds; "
            f"shorten it, or set video_start and video_end"
        )
    return tokens


def _checked_packets(stream: Any, request: _Request, audio_tokens: int) -> int:
    """The number of packets of a video. Raises UserError if it is far too long by them.

    To decode it first and then refuse it would take minutes.
    """
    name = request.name
    times = []
    count = 0
    with _opened(stream, name) as (container, track, watched):
        codec = track.codec_context
        rate = float(track.average_rate or request.media.fps)
        for packet in container.demux(track):
            watched.zeros = 0
            count += packet.size > 0
            if packet.pts is not None:
                times.append(float(packet.pts * packet.time_base))
    _require_short(count, codec.height, codec.width, name)
    if request.most_tokens is None or request.options.given(SAMPLING_OPTIONS):
        return count

    n = count  # of a stream without times, such as h264 without a container
    times.sort()
    if len(times) > 1 and times[-1] > times[0]:
        n = len(times)
        rate = (n - 1) / (times[-1] - times[0])
    if n > 1:
        sampled = len(sample_indices(n, rate, request.media, request.options))
        request.size_of(sampled, codec.height, codec.width, TOLERANCE, audio_tokens)
    return count


def _frames(stream: Any, name: str) -> Iterator[tuple]:
    """Each frame of the best video track in display order, with the header's rate or None."""
    with _opened(stream, name) as (container, track, watched):
        rate = track.average_rate
        for frame in container.decode(track):
            watched.zeros = 0
            _require_small(track.codec_context.name, frame.format, frame.height, frame.width, name)
            yield frame, rate


def _times(
    stream: Any, name: str, default_rate: float, packets: int
) -> tuple[list[float], float, list[float]]:
    """The increasing times in seconds at which the frames of a file are shown, and their rate.

    packets: about as many as frames. Recordings that begin midway are appended to the one before:
    also returns what was added to the stored times of each recording. Raises UserError as soon as a
    frame that is larger than the header says makes the rest too long.
    """
    times: list[float] = []
    header = default_rate
    last_duration = 0.0
    rising = RisingTimes()
    pixels = 0  # of the frames so far
    for frame, stream_rate in _frames(stream, name):
        remaining = max(1, packets - len(times))
        _require_short(remaining, frame.height, frame.width, name, pixels)
        pixels += frame.height * frame.width
        header = float(stream_rate or default_rate)
        time = len(times) / header if frame.time is None else frame.time
        last_duration = 0.0
        if frame.duration and frame.time_base:
            last_duration = float(frame.duration * frame.time_base)
        times.append(rising.repair(time, step=1 / header))
    if not times:
        raise UserError(f"{name}: not one frame could be decoded")
    # Frames come in display order, but the times of avi files are in the order of storage.
    times.sort()
    return times, true_rate(times, last_duration, header), rising.shifts


def upright(frame: Any) -> Image.Image:
    """A decoded frame -> RGB image as players show it: rotated and flipped by its display matrix.

    Transparency is on white.
    """
    image = _to_image(frame)
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV lists no side data where one entry has a type that it does not know
        return image.rotate(frame.rotation, expand=True)
    if matrix is None:
        return image

    # The pixel at x, y is shown at a x + c y, b x + d y.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        image = image.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image


def _to_image(frame: Any) -> Image.Image:
    """A decoded frame -> RGB image as it is stored, transparency on white."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    if has_alpha or frame.format.name == "pal8":
        return load_image(Image.fromarray(frame.to_ndarray(format="rgba")))
    return frame.to_image()


def _audio_of(
    stream: Any, name: str, origin: float, shifts: list[float], options: MediaOptions
) -> Tensor | None:
    """The audio track from video_start to video_end, float32 [samples] at 16 kHz; None if missing.

    Both are counted from the first frame, which is shown at `origin` seconds of the file. shifts:
    those of the frames' times, which the audio track follows.
    """
    start = origin + max(0.0, options.video_start or 0.0)
    end = None if options.video_end is None else origin + options.video_end
    stream.seek(0)
    return audio_track(stream, name, start, end, shifts)
