"""Files, bytes and arrays to sound, pictures and clips. What cannot be read is one clear line, never a guess."""

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..config import LISTENING_RATE, MediaConfig
from ..errors import UserError

SHORTEST = LISTENING_RATE // 50  # samples: 20 ms or less make no audio token


@dataclass
class Clip:
    """A video ready for patching."""

    frames: Tensor  # uint8 [n, height, width, 3]
    seconds: Tensor  # float32 [n], when each frame is shown
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
        stream = _stream(source, name)
        try:
            with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
                source = Image.open(stream)
                source.load()
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{name}: not a readable picture ({_line(error)})") from None
    image = ImageOps.exif_transpose(source)
    if image.mode.startswith("I"):  # 16 bits or more: PIL's own conversion would clip instead of scale
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def load_video(source, media: MediaConfig, with_audio: bool) -> Clip:
    """A path or bytes (mp4, webm, avi, mkv ...), a Clip, frames [n, height, width, 3] or (frames, fps) -> Clip.

    Frames alone are taken as media.fps. Files are sampled at media.fps and keep the real times of the chosen frames.
    Raises UserError for what cannot be read, and where with_audio asks for a sound track that is not there.
    """
    name = name_of(source, "video")
    if isinstance(source, Clip):
        clip = source
    elif isinstance(source, (np.ndarray, Tensor, tuple)):
        frames, fps = source if isinstance(source, tuple) else (source, media.fps)
        frames = torch.as_tensor(np.asarray(frames))
        if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
            raise UserError(f"{name}: frames of shape {tuple(frames.shape)}; expected [n, height, width, 3], n > 0")
        clip = Clip(frames.to(torch.uint8), torch.arange(len(frames), dtype=torch.float32) / fps, None)
    else:
        clip = _decode_video(source, name, media, with_audio)
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

    stream = _stream(source, name)
    try:
        return soundfile.read(stream, dtype="float32")
    except soundfile.SoundFileError:
        stream.seek(0)
    wave = _audio_track(stream, name)
    if wave is None:
        raise UserError(f"{name}: holds no sound")
    return wave, LISTENING_RATE


def _unit(samples: np.ndarray) -> np.ndarray:
    """Samples as float32; those of whole numbers come to -1..1 first."""
    scale = 1 if samples.dtype.kind == "f" else -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32) / np.float32(scale)


def _audio_track(stream, name) -> np.ndarray | None:
    """The first sound track of a container, mono at 16 kHz [samples], beginning at time 0; None where there is none."""
    import av

    _require_whole(stream, name)
    try:
        with av.open(stream) as container:
            if not container.streams.audio:
                return None
            resampler = av.AudioResampler(format="flt", layout="mono", rate=LISTENING_RATE)
            pieces = [out.to_ndarray()[0] for frame in container.decode(audio=0) for out in resampler.resample(frame)]
            pieces += [out.to_ndarray()[0] for out in resampler.resample(None)]
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{name}: not readable as sound ({_line(error)})") from None
    return np.concatenate(pieces) if pieces else None


def _decode_video(source, name, media, with_audio) -> Clip:
    """Two passes: the first learns every frame's time without keeping pixels, the second keeps the chosen frames."""
    import av

    stream, most = _stream(source, name), media.frame_max_pixels
    _require_whole(stream, name)
    try:
        with av.open(stream) as container:
            if not container.streams.video:
                raise UserError(f"{name}: holds no video")
            times = [frame.time or 0.0 for frame in container.decode(video=0)]
            rate = float(container.streams.video[0].average_rate or 0) or media.fps
        if not times:
            raise UserError(f"{name}: not one frame could be decoded")
        chosen, frames = sample_indices(len(times), rate, media), []
        stream.seek(0)
        with av.open(stream) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if i in chosen:
                    frames += [_shrunk(frame, most)] * chosen.count(i)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: not a readable video ({_line(error)})") from None
    wave = None
    if with_audio:
        stream.seek(0)
        track = _audio_track(stream, name)
        wave = None if track is None else _listenable(track, LISTENING_RATE, name)
    return Clip(torch.from_numpy(np.stack(frames)), torch.tensor([times[i] for i in chosen]), wave)


def _shrunk(frame, most: int) -> np.ndarray:
    """A decoded frame as RGB [height, width, 3]; far larger ones than the model can use are halved to save memory."""
    image = frame.to_image()
    while image.width * image.height > 16 * most:
        image = image.reduce(2)
    return np.asarray(image)


def _to_pil(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise UserError(f"{name}: array of shape {array.shape} and type {array.dtype}; expected uint8 [h, w, 3]")
    return Image.fromarray(array)


def _stream(source, name: str):
    """A seekable binary stream of a path or of bytes."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    path = Path(str(source).removeprefix("file://"))
    if not path.exists():
        raise UserError(f"{name}: no such file")
    if not path.is_file():
        raise UserError(f"{name}: not a file")
    try:
        return open(path, "rb")  # closed with its last reader
    except OSError as error:
        raise UserError(f"{name}: cannot be opened ({_line(error)})") from None


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
    return (str(source) or "an empty path") if isinstance(source, (str, Path)) else f"the {kind} given"


def _line(error: Exception) -> str:
    """The first line of a library's complaint, without numbers and addresses that mean nothing to a reader."""
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    return (str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__])[0]
