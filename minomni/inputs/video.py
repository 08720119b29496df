"""Films: files, bytes, arrays and lists of frames to a few frames with their times, and the sound
track where it is wanted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import ceil, floor, inf, isfinite
from numbers import Real

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minomni.config import MediaConfig
from minomni.errors import UserError, shorten
from minomni.inputs.audio import audio_track
from minomni.inputs.containers import require_whole
from minomni.inputs.image import load_image
from minomni.inputs.options import SAMPLING, SIZES, MediaOptions
from minomni.inputs.patches import frame_size, smart_resize
from minomni.inputs.source import complaints, name_of, open_source

MOST_PIXELS = (
    36_000_000  # of one frame; 8K television has 33 million, and a decoder holds up to 16 frames
)
LONGEST = 1_000_000  # seconds of a film; a header or a rate that claims more is broken
# s that a frame of a film of constant rate may be off its place; matroska rounds to 1 ms
STEADY = 0.0015
# s that the time has to fall for a new piece to begin; avi files put frames a few places wrong
FELL_BACK = 1.0
# ffmpeg's names of formats that it shows as films, though they are none. Its formats of single
# pictures end in _pipe.
PICTURES = ("image2", "ico", "alias_pix", "brender_pix")
TEXTS = ("tty", "bin", "xbin", "adf", "idf")
LIKELY = 1.1  # of the tokens that fit: packets tell the number of frames roughly
CELLS_OF_LISTED = (
    2  # qwen-omni-utils 0.0.9 first brings frames of a list to multiples of twice the merge cell
)


@dataclass
class Clip:
    """A video ready for patching."""

    frames: Tensor  # uint8 [n, height, width, 3]
    seconds: Tensor  # float32 [n], when each frame is shown, counted from the first one
    wave: Tensor | None  # float32 [samples] at 16 kHz, the sound track where it was asked for
    # The frames have the size of their patches, multiples of the merge cell; otherwise they are
    # brought to frame_size.
    sized: bool = False


def load_video(
    source,
    media: MediaConfig,
    with_audio: bool,
    cell: int = 28,
    options: MediaOptions = MediaOptions(),
    most_tokens: int | None = None,
) -> Clip:
    """A path or bytes (mp4, webm, avi, mkv ...), a Clip, frames, or (frames, fps) -> Clip.

    Frames are an array [n, height, width, 3], or a list of whatever load_image takes; without a
    rate they are taken as options.sample_fps, options.fps or media.fps. Files are sampled at
    options.fps or media.fps, keep the real times of the chosen frames, and come at the size that
    patches of merge cells of `cell` pixels want: a long clip at full size would fill the memory.
    They stand upright as their display matrix says, and all have the size of the first. The sample
    aspect ratio is not looked at (release behavior). with_audio decides about the sound track,
    whatever the options say. most_tokens: what needs more of them is refused before it is decoded.
    Raises UserError for what cannot be read or done, and where with_audio asks for a sound track
    that is not there.
    """
    name = name_of(source, "video")
    if isinstance(source, Clip):
        clip = _checked(source, name, cell, options)
    elif isinstance(source, (np.ndarray, Tensor, list, tuple)):
        clip = _given_frames(source, name, media, cell, options, most_tokens)
    else:
        with open_source(source, name) as stream:
            clip = _decode_video(stream, name, media, with_audio, cell, options, most_tokens)
    if not (
        torch.isfinite(clip.seconds).all() and float(clip.seconds[-1] - clip.seconds[0]) < LONGEST
    ):
        raise UserError(
            f"{name}: lasts {float(clip.seconds[-1] - clip.seconds[0]):.3g} s by its times; expected less "
            f"than {LONGEST} s, its times or its rate are wrong"
        )
    if with_audio and clip.wave is None:
        raise UserError(
            f"{name}: has no sound track, and use_audio_in_video asks for one; switch it off, or set it in "
            f"each video item"
        )
    return clip


# ------------------------------------------------------------------------------------------------
# which frames are seen
def sample_indices(
    total: int,
    rate: float,
    media: MediaConfig,
    options: MediaOptions = MediaOptions(),
    first: int = 0,
    name: str = "the video",
) -> list[int]:
    """Which of `total` frames, from the number `first` on, at `rate` per second to look at: evenly
    spread, an even number (release: smart_nframes of qwen-omni-utils, but a film of a single frame
    is seen).

    Raises UserError where the options ask for fewer than 2 frames, or for more than there are.
    """
    if options.nframes is not None:
        n = round(options.nframes / 2) * 2
    else:
        least = media.min_frames if options.min_frames is None else ceil(options.min_frames / 2) * 2
        most = min(media.max_frames, total) if options.max_frames is None else options.max_frames
        wanted = total / rate * (options.fps or media.fps)
        n = int(min(max(wanted, least), floor(most / 2) * 2, total)) // 2 * 2
    if not 2 <= n <= total and (total > 1 or options.nframes is not None):
        raise UserError(
            f"{name}: {n} frames are asked for; expected an even number from 2 to {total}, the frames that "
            f"there are"
        )
    return torch.linspace(first, first + total - 1, max(1, n)).round().long().tolist()


def true_rate(times: list[float], last_duration: float, header: float) -> float:
    """Frames per second by the times [n] at which frames are shown, in seconds, rising.

    The last frame is shown for last_duration, but at least for as long as the others on average:
    decoders fill a missing duration from the header. The header's rate where it agrees to 1 %, so
    that rounded times do not matter.
    """
    span = times[-1] - times[0]
    if not span > 0:
        return header
    step = span / (len(times) - 1)
    rate = len(times) / (span + max(step, last_duration))
    return header if abs(rate - header) < 0.01 * header else rate


def frame_range(
    times: list[float], rate: float, options: MediaOptions, name: str
) -> tuple[int, int]:
    """Numbers of the first and the last frame from video_start to video_end, both counted from the
    first frame.

    At a constant rate by the frames' numbers (release: calculate_video_frame_range of
    qwen-omni-utils), otherwise by their times. Raises UserError where less than two frames lie
    there.
    """
    if options.video_start is None and options.video_end is None:
        return 0, len(times) - 1
    shown = [time - times[0] for time in times]
    length = len(times) / rate
    start = max(0.0, options.video_start or 0.0)
    end = length if options.video_end is None else max(0.0, options.video_end)
    if all(abs(time - i / rate) <= STEADY for i, time in enumerate(shown)):
        first = ceil(min(start, length) * rate)
        last = min(floor(min(end, length) * rate), len(times) - 1)
    else:
        first = sum(time < start for time in shown)
        last = sum(time <= end for time in shown) - 1
    if first >= last:
        raise UserError(
            f"{name}: less than two frames lie from video_start {start:g} s to video_end {end:g} s; it "
            f"lasts {length:.2f} s"
        )
    return first, last


# -----------------------------------------------------------------------------------------------------
# frames as given
def _checked(clip: Clip, name: str, cell: int, options: MediaOptions) -> Clip:
    """A clip as it is. Raises UserError for fields that are not what they should be, and for
    options about files.
    """
    frames, seconds, wave = clip.frames, clip.seconds, clip.wave
    is_clip = isinstance(frames, Tensor) and frames.dtype == torch.uint8 and frames.ndim == 4
    is_clip = is_clip and frames.shape[-1] == 3 and len(frames) > 0 and frames.device.type == "cpu"
    is_clip = (
        is_clip
        and isinstance(seconds, Tensor)
        and seconds.shape == frames.shape[:1]
        and bool(torch.isfinite(seconds).all() and (seconds.diff() >= 0).all())
    )
    if not is_clip:
        raise UserError(
            f"{name}: expected a Clip of frames uint8 [n, height, width, 3], n > 0, and rising seconds [n]"
        )
    if wave is not None and not (
        isinstance(wave, Tensor) and wave.ndim == 1 and wave.is_floating_point()
    ):
        raise UserError(
            f"{name}: expected a Clip whose wave is a float tensor [samples] at 16 kHz, or None"
        )
    _refuse(options, ("fps", "sample_fps", *SAMPLING), name, "a Clip")
    if not clip.sized:
        return clip
    if given := options.given((*SIZES, "total_pixels")):
        raise UserError(
            f"{name}: {given[0]} is for frames that are to be resized, and this is a Clip with sized=True; "
            f"leave it out"
        )
    height, width = frames.shape[1:3]
    if not (height > 0 and width > 0 and height % cell == 0 and width % cell == 0):
        raise UserError(
            f"{name}: a Clip with sized=True of {width}x{height} pixels; expected multiples of {cell}, "
            f"resize it or give sized=False"
        )
    return clip


def _refuse(options: MediaOptions, keys: tuple[str, ...], name: str, what: str) -> None:
    if given := options.given(keys):
        raise UserError(f"{name}: {given[0]} is for video files, and this is {what}; leave it out")


def _given_frames(source, name, media, cell, options, most_tokens) -> Clip:
    """Frames without a file -> Clip, all of them; an odd number of listed frames gets the last one
    twice.
    """
    rate = options.sample_fps or options.fps or media.fps
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], (Real, np.bool_)):
        source, rate = source
        _refuse(options, ("fps", "sample_fps"), name, "(frames, fps)")
    _refuse(options, SAMPLING, name, "a number of frames")
    rate = _checked_fps(rate, name)
    listed = isinstance(source, (list, tuple))
    if listed:
        frames = _listed_frames(source, name, media, cell, options, most_tokens)
    else:
        frames = _frame_array(source, name, media, cell, options, most_tokens)
    return Clip(frames, torch.arange(len(frames), dtype=torch.float32) / rate, None, sized=listed)


def _checked_fps(rate, name: str) -> float:
    """Frames per second as float. Raises UserError for those that are none: zero, infinite, True."""
    try:
        given = 0.0 if isinstance(rate, (bool, np.bool_)) else float(rate)
    except OverflowError:  # a whole number beyond all floats
        given = inf
    if not (isfinite(given) and given > 0):
        raise UserError(
            f"{name}: {shorten(rate, 60)} frames per second; expected a number above zero"
        )
    return given


def _frame_array(source, name, media, cell, options, most_tokens) -> Tensor:
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
    _require_pixels(*array.shape[1:3], name)
    if most_tokens is not None:
        _require_room(len(array), array.shape[1:3], name, media, cell, options, most_tokens)
    return torch.from_numpy(
        np.require(array, requirements=("C", "W"))
    )  # copies what torch cannot look at


def _listed_frames(source, name, media, cell, options, most_tokens) -> Tensor:
    """A list of pictures -> frames uint8 [n, height, width, 3], brought to their size as
    qwen-omni-utils does it.
    """
    if not source:
        raise UserError(f"{name}: a list of no frames; expected at least one")
    n, frames = ceil(len(source) / 2) * 2, []
    for i, listed in enumerate(source):
        try:
            image = load_image(listed)
        except UserError as error:
            raise UserError(f"{name}: frame {i + 1}: {error}") from None
        height, width = _listed_size(image, media, CELLS_OF_LISTED * cell, options, name)
        size = _require_room(n, (height, width), name, media, cell, options, most_tokens)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        frames.append(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)))
        if frames[i].shape != frames[0].shape:
            raise UserError(
                f"{name}: frame {i + 1} comes at {size[1]}x{size[0]} pixels and frame 1 at "
                f"{frames[0].shape[1]}x{frames[0].shape[0]}; frames of one video have one size"
            )
    return torch.from_numpy(np.stack(frames + frames[-1:] * (n - len(frames))))


def _listed_size(image, media, cell, options, name) -> tuple[int, int]:
    """What fetch_image of qwen-omni-utils 0.0.9 makes of a frame; its limits are in cells, so they
    are larger too.
    """
    most, least = (
        limit * CELLS_OF_LISTED**2 for limit in (media.image_max_pixels, media.image_min_pixels)
    )
    height, width = image.height, image.width
    if options.resized_height is not None:
        height, width = options.resized_height, options.resized_width
    else:
        least = least if options.min_pixels is None else options.min_pixels
        most = most if options.max_pixels is None else options.max_pixels
    return smart_resize(height, width, cell, least, most, name, at_least_a_cell=True)


def _require_pixels(height: int, width: int, name: str) -> None:
    if height * width > MOST_PIXELS:
        raise UserError(
            f"{name}: frames of {width}x{height} pixels; at most {MOST_PIXELS} pixels are read, shrink it"
        )


def _require_room(n, shape, name, media, cell, options, most_tokens) -> tuple[int, int]:
    """The size (height, width) that n frames of a shape come at. Raises UserError where they are
    too many or large.
    """
    _require_pixels(*shape, name)
    size = frame_size(n, *shape, cell, media, name, options)
    tokens = ceil(n / 2) * size[0] * size[1] // cell**2
    if most_tokens is not None and tokens > most_tokens:
        raise UserError(
            f"{name}: {n} frames of {size[1]}x{size[0]} pixels are {tokens} tokens, more than the context "
            f"holds; shorten it, or set fps, nframes or max_pixels"
        )
    return size


# ---------------------------------------------------------------------------------------------------------------
# files
def _decode_video(stream, name, media, with_audio, cell, options, most_tokens) -> Clip:
    """Two passes: the first learns every frame's time without keeping pixels, the second keeps the
    chosen frames.
    """
    require_whole(stream, name)
    if options.sample_fps is not None:
        raise UserError(
            f"{name}: sample_fps is for lists of frames, and this is a file; set fps instead"
        )
    with complaints(name, "not a readable video"):
        _refuse_picture(stream, name)
        if most_tokens is not None:
            _require_likely_room(stream, name, media, cell, options, most_tokens)
        times, rate = _times(stream, name, media.fps)
        origin = times[0]
        first, last = frame_range(times, rate, options, name)
        chosen = sample_indices(last - first + 1, rate, media, options, first, name)
        size, frames = None, []
        for i, (frame, _) in enumerate(_frames(stream, name)):
            if i == chosen[len(frames)]:
                image = upright(frame)
                if size is None:
                    size = _require_room(
                        len(chosen),
                        (image.height, image.width),
                        name,
                        media,
                        cell,
                        options,
                        most_tokens,
                    )
                frames.append(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)))
            if len(frames) == len(chosen):
                break
    seconds = torch.tensor([times[i] - times[first] for i in chosen])
    wave = _sound(stream, name, origin, options) if with_audio else None
    return Clip(torch.from_numpy(np.stack(frames)), seconds, wave, sized=True)


@contextmanager
def _opened(stream, name):
    """The container in a stream. Raises UserError where it holds no video, and for frames that are
    too large.
    """
    import av

    limit = {"max_pixels": str(MOST_PIXELS)}  # before a decoder takes memory for them
    stream.seek(0)
    with av.open(stream, options=limit) as container:
        if not container.streams.video or container.format.name in TEXTS:
            raise UserError(f"{name}: holds no video")
        codec = container.streams.video[0].codec_context
        if codec is None:
            raise UserError(
                f"{name}: its pictures are in a format that is not known here; save them as mp4 with h264"
            )
        codec.options = limit
        _require_pixels(codec.height, codec.width, name)
        yield container


def _refuse_picture(stream, name) -> None:
    """Raise UserError for a single picture. Pictures behind each other are a film, as some cameras
    write it.
    """
    with _opened(stream, name) as container:
        kind = container.format.name
        if not (kind.endswith("_pipe") or kind in PICTURES):
            return
        packets = (packet for packet in container.demux(video=0) if packet.size)
        if len(list(islice(packets, 2))) < 2:
            raise UserError(f"{name}: is a picture; give it as image")


def _require_likely_room(stream, name, media, cell, options, most_tokens) -> None:
    """Raise UserError for a film that is far too long by its packets: decoding it only to refuse it
    takes minutes.
    """
    with _opened(stream, name) as container:
        codec = container.streams.video[0].codec_context
        times = sorted(
            float(packet.pts * packet.time_base)
            for packet in container.demux(video=0)
            if packet.pts is not None
        )
    if len(times) < 2 or not times[-1] > times[0] or options.given(SAMPLING):
        return
    rate = (len(times) - 1) / (times[-1] - times[0])
    n = len(sample_indices(len(times), rate, media, options))
    _require_room(n, (codec.height, codec.width), name, media, cell, options, most_tokens * LIKELY)


def _frames(stream, name) -> Iterator[tuple]:
    """Every frame of the first video stream in the order they are shown, each with the header's
    rate, or None.
    """
    with _opened(stream, name) as container:
        rate = container.streams.video[0].average_rate
        yield from ((frame, rate) for frame in container.decode(video=0))


def _times(stream, name, usual_rate) -> tuple[list[float], float]:
    """When each frame is shown, in seconds of the file, rising, and how many there are per second.

    Where the time falls back by more than FELL_BACK, the recording began anew: the new piece
    follows the one before.
    """
    header = last_duration = None
    times, shift, latest = [], 0.0, -inf
    for frame, stream_rate in _frames(stream, name):
        header = float(stream_rate or usual_rate)
        time = len(times) / header if frame.time is None else frame.time
        last_duration = (
            float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        )
        if time + shift < latest - FELL_BACK:
            shift = latest + 1 / header - time
        times.append(time + shift)
        latest = max(latest, times[-1])
    if not times:
        raise UserError(f"{name}: not one frame could be decoded")
    # frames come in the order they are shown; avi files number them as they are stored
    times.sort()
    return times, true_rate(times, last_duration, header)


def upright(frame) -> Image.Image:
    """A decoded frame -> RGB picture as players show it: turned and mirrored by its display matrix,
    on white.
    """
    has_alpha = frame.format.name == "pal8" or any(
        part.is_alpha for part in frame.format.components
    )
    image = (
        load_image(Image.fromarray(frame.to_ndarray(format="rgba")))
        if has_alpha
        else frame.to_image()
    )
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV lists none of them where one is of a type that it does not know
        return image.rotate(frame.rotation, expand=True)
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[
        :5
    ].tolist()  # x, y are shown at a x + c y, b x + d y
    if abs(b) + abs(c) > abs(a) + abs(d):
        image = image.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image


def _sound(stream, name, origin, options) -> Tensor | None:
    """The sound track from video_start to video_end, float32 [samples] at 16 kHz; None where there
    is none.

    Both are counted from the first frame of the film, which is shown at `origin` seconds of the
    file.
    """
    start = origin + max(0.0, options.video_start or 0.0)
    end = None if options.video_end is None else origin + options.video_end
    stream.seek(0)
    return audio_track(stream, name, start, end)
