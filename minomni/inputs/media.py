"""Files, bytes and arrays to audio, images and videos: the loaders of the other modules.

A source that cannot be read raises UserError, one line; nothing is guessed.
"""

from minomni.inputs.audio import MIN_SAMPLES, load_audio
from minomni.inputs.image import load_image
from minomni.inputs.options import MediaOptions
from minomni.inputs.source import name_of
from minomni.inputs.video import Clip, load_video, sample_indices

__all__ = [
    "MIN_SAMPLES",
    "Clip",
    "MediaOptions",
    "load_audio",
    "load_image",
    "load_video",
    "name_of",
    "sample_indices",
]
