"""Files, bytes and arrays to sound, pictures and clips. What cannot be read is one clear line, never a guess."""

import io
import struct
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..config import LISTENING_RATE, MediaConfig
from ..errors import UserError
from .patches import frame_size

SHORTEST = LISTENING_RATE // 50  # samples: 20 ms or less make no audio token


@dataclass
class Clip:
    """A video ready for patching."""

    frames: Tensor  # uint8 [n, height, width, 3]
    seconds: Tensor  # float32 [n], when each frame is shown, counted from the first one
    wave: Tensor | None  # float32 [samples] at 16 kHz, the sound track where it was asked for


def load_audio(source) -> Tensor:
    """Anything that holds sound -> float32 mono wave [samples] at 16 kHz.

    source: path (wav, flac, ogg, mp3, or what PyAV reads), bytes, array [samples] taken as 16 kHz, or (array, Hz); two-
    dimensional arrays are [samples, channels]. Raises UserError for what is missing, unreadable, too
    short or not finite.
    """
    name = name_of(source, "audio")
    return _listenable(*_decode_audio(source, name), name)


def _listenable(samples: np.ndarray, rate: int, name: str) -> Tensor:
    """Decoded samples [n] or [n, channels] -> what load_audio promises."""
    if samples.ndim == 2:
        samples = samples.mean(1)
    if samples.ndim != 1:
        raise UserError(f"{name}: sound of shape {samples.shape}; expected [samples] or [samples, channels]")
    if not np.isfinite(samples).all():
        raise UserError(f"{name}: holds NaN or infinite samples; repair the recording")
    if rate <= 0:
        raise UserError(f"{name}: {rate} samples per second; expected the sampling rate in Hz")
    if rate != LISTENING_RATE:
        import soxr

        samples = soxr.resample(samples, rate, LISTENING_RATE)
    if len(samples) <= SHORTEST:
        raise UserError(f"{name}: {len(samples) * 1000 / LISTENING_RATE:.0f} ms of sound; more than 20 ms are needed")
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


def load_image(source) -> Image.Image:
    """A path, bytes, array [height, width, 3] or PIL image -> RGB picture, upright, transparency on white."""
    name = name_of(source, "image")
    if isinstance(source, (np.ndarray, Tensor)):
        source = _to_pil(np.asarray(source), name)
    if not isinstance(source, Image.Image):
        with _stream(source, name) as stream:
            source = _open_picture(stream, name)
    image = ImageOps.exif_transpose(source)
    if image.mode.startswith("I"):  # 16 bits or more: PIL's own conversion would clip instead of scale
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _open_picture(stream, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(stream)
            image.load()
            return image
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable picture ({_line(error)})") from None


def load_video(source, media: MediaConfig, with_audio: bool, cell: int = 28) -> Clip:
    """A path or bytes (mp4, webm, avi, mkv ...), a Clip, frames [n, height, width, 3] or (frames, fps) -> Clip.

    Frames alone are taken as media.fps. Files are sampled at media.fps, keep the real times of the chosen frames, and
    come at the size that patches of merge cells of `cell` pixels want: a long clip at full size would fill the memory.
    Raises UserError for what cannot be read, and where with_audio asks for a sound track that is not there.
    """
    name = name_of(source, "video")
    if isinstance(source, Clip):
        clip = source
    elif isinstance(source, (np.ndarray, Tensor, tuple)):
        frames, fps = source if isinstance(source, tuple) else (source, media.fps)
        frames = torch.as_tensor(np.asarray(frames))
        if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0 or frames.dtype != torch.uint8:
            raise UserError(f"{name}: frames of shape {tuple(frames.shape)} and type {frames.dtype}; expected uint8 "
                            f"[n, height, width, 3], n > 0")
        if fps <= 0:
            raise UserError(f"{name}: {fps} frames per second; expected more than none")
        clip = Clip(frames, torch.arange(len(frames), dtype=torch.float32) / fps, None)
    else:
        with _stream(source, name) as stream:
            clip = _decode_video(stream, name, media, with_audio, cell)
    if with_audio and clip.wave is None:
        raise UserError(f"{name}: has no sound track, and use_audio_in_video asks for one; switch it off")
    return clip


def sample_indices(total: int, rate: float, media: MediaConfig) -> list[int]:
    """Which of `total` frames at `rate` per second to look at: evenly spread, an even number (release behaviour)."""
    wanted = min(max(total / rate * media.fps, media.min_frames), min(media.max_frames, total))
    n = max(1, int(wanted) // 2 * 2)
    return torch.linspace(0, total - 1, n).round().long().tolist()


def _decode_audio(source, name) -> tuple[np.ndarray, int]:
    if isinstance(source, tuple):
        return _unit(np.asarray(source[0])), int(source[1])
    if isinstance(source, (np.ndarray, Tensor)):
        return _unit(np.asarray(source)), LISTENING_RATE
    import soundfile

    with _stream(source, name) as stream:
        try:
            return soundfile.read(stream, dtype="float32")
        except (soundfile.SoundFileError, TypeError):  # TypeError: a name ending in .raw is taken at its word
            stream.seek(0)
        track = _audio_track(stream, name)
    if track is None:
        raise UserError(f"{name}: holds no sound")
    return track


def _unit(samples: np.ndarray) -> np.ndarray:
    """Samples as float32; those of whole numbers come to -1..1 first."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    if samples.dtype.kind not in "iu":
        raise UserError(f"the audio given: samples of type {samples.dtype}; expected numbers, float or integer")
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    middle = half if samples.dtype.kind == "u" else 0  # unsigned samples swing about the middle of their range
    return ((samples - middle) / half).astype(np.float32)


def _audio_track(stream, name) -> tuple[np.ndarray, int] | None:
    """The first sound track of a container: mono [samples] and its Hz. None where there is none."""
    import av

    _require_whole(stream, name)
    with _complaints(name, "not readable as sound"), av.open(stream) as container:
        if not container.streams.audio:
            return None
        planar, pieces, rate = av.AudioResampler(format="fltp"), [], LISTENING_RATE
        for frame in container.decode(audio=0):
            rate = frame.sample_rate
            pieces += [out.to_ndarray().mean(0) for out in planar.resample(frame)]  # each [samples]
    return (np.concatenate(pieces), rate) if pieces else None


def _decode_video(stream, name, media, with_audio, cell) -> Clip:
    """Two passes: the first learns every frame's time without keeping pixels, the second keeps the chosen frames."""
    import av

    _require_whole(stream, name)
    with _complaints(name, "not a readable video"):
        with av.open(stream) as container:
            if not container.streams.video:
                raise UserError(f"{name}: holds no video")
            rate = float(container.streams.video[0].average_rate or media.fps)
            shown = enumerate(container.decode(video=0))
            times = [i / rate if frame.time is None else frame.time for i, frame in shown]
        if not times:
            raise UserError(f"{name}: not one frame could be decoded")
        times.sort()  # frames come in the order they are shown; avi files number them as they are stored
        chosen, frames = sample_indices(len(times), rate, media), []
        stream.seek(0)
        with av.open(stream) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if i == chosen[len(frames)]:
                    image = frame.to_image().rotate(frame.rotation, expand=True)  # upright, however the camera was held
                    size = frame_size(len(chosen), image.height, image.width, cell, media, name)
                    frames.append(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)))
                if len(frames) == len(chosen):
                    break
    seconds = torch.tensor([times[i] - times[0] for i in chosen])
    stream.seek(0)
    track = _audio_track(stream, name) if with_audio else None
    return Clip(torch.from_numpy(np.stack(frames)), seconds, None if track is None else _listenable(*track, name))


@contextmanager
def _complaints(name: str, what: str):
    """What a decoder raises becomes one line that names the file."""
    import av

    try:
        yield
    except UserError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{name}: {what} ({_line(error)})") from None


def _to_pil(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise UserError(f"{name}: array of shape {array.shape} and type {array.dtype}; expected uint8 [h, w, 3]")
    return Image.fromarray(array)


def _stream(source, name: str):
    """A seekable binary stream of a path or of bytes."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if not isinstance(source, (str, Path)):
        raise UserError(f"{name}: a {type(source).__name__} cannot be read; give a path, bytes or an array")
    path = Path(str(source).removeprefix("file://"))
    try:
        found, readable = path.exists(), path.is_file()
        if readable:
            return open(path, "rb")
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be opened ({_line(error)})") from None
    web = "; web addresses are not fetched, download it" if "://" in str(source) else ""
    raise UserError(f"{name}: {'not a file' if found else 'no such file'}{web}")


def _require_whole(stream, name: str) -> None:
    """Raise UserError where a box of an mp4 file reaches beyond its end: decoders would just play what is left."""
    end, place = stream.seek(0, io.SEEK_END), 0
    while place + 16 <= end:
        stream.seek(place)
        size, kind, long_size = struct.unpack(">I4sQ", stream.read(16))
        if place == 0 and kind != b"ftyp" or size == 0:  # another container; or a last box of open length
            break
        place += max(8, long_size if size == 1 else size)
    stream.seek(0)
    if place > end:
        raise UserError(f"{name}: cut short, {end} of at least {place} bytes are there; copy it again")


def name_of(source, kind: str) -> str:
    """What to call a source in a message."""
    if not isinstance(source, (str, Path)):
        return f"the {kind} given"
    spelling = str(source) or "an empty path"
    return spelling if len(spelling) <= 300 else f"{spelling[:60]}..."


def _line(error: Exception) -> str:
    """The first line of a library's complaint, without numbers and addresses that mean nothing to a reader."""
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    return (str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__])[0]
