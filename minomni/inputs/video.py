"""Films: files, bytes and arrays to a few frames with their times, and the sound track where it is wanted."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import MediaConfig
from ..errors import UserError
from .audio import audio_track
from .options import MediaOptions
from .patches import frame_size
from .source import complaints, name_of, open_source, require_whole


@dataclass
class Clip:
    """A video ready for patching."""

    frames: Tensor  # uint8 [n, height, width, 3]
    seconds: Tensor  # float32 [n], when each frame is shown, counted from the first one
    wave: Tensor | None  # float32 [samples] at 16 kHz, the sound track where it was asked for


def load_video(source, media: MediaConfig, with_audio: bool, cell: int = 28,
               options: MediaOptions = MediaOptions()) -> Clip:
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
        with open_source(source, name) as stream:
            clip = _decode_video(stream, name, media, with_audio, cell)
    if with_audio and clip.wave is None:
        raise UserError(f"{name}: has no sound track, and use_audio_in_video asks for one; switch it off")
    return clip


def sample_indices(total: int, rate: float, media: MediaConfig) -> list[int]:
    """Which of `total` frames at `rate` per second to look at: evenly spread, an even number (release behaviour)."""
    wanted = min(max(total / rate * media.fps, media.min_frames), min(media.max_frames, total))
    n = max(1, int(wanted) // 2 * 2)
    return torch.linspace(0, total - 1, n).round().long().tolist()


def _decode_video(stream, name, media, with_audio, cell) -> Clip:
    """Two passes: the first learns every frame's time without keeping pixels, the second keeps the chosen frames."""
    import av

    require_whole(stream, name)
    with complaints(name, "not a readable video"):
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
    wave = audio_track(stream, name, origin=times[0]) if with_audio else None
    return Clip(torch.from_numpy(np.stack(frames)), seconds, wave)
