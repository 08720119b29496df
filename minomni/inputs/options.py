"""What a content item may ask for besides its source: the keys of qwen-omni-utils, under their own names."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MediaOptions:
    """Wishes of one content item; None where it says nothing."""

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
