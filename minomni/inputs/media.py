"""Files, bytes and arrays to sound, pictures and films. What cannot be read is one clear line, never a guess."""

from .audio import SHORTEST, load_audio
from .image import load_image
from .options import MediaOptions
from .source import name_of
from .video import Clip, load_video, sample_indices

__all__ = ["SHORTEST", "Clip", "MediaOptions", "load_audio", "load_image", "load_video", "name_of", "sample_indices"]
