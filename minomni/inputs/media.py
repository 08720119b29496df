"""Files, bytes and arrays to sound, pictures and films. What cannot be read is one clear line,
never a guess.
"""

from minomni.inputs.audio import SHORTEST, load_audio
from minomni.inputs.image import load_image
from minomni.inputs.options import MediaOptions
from minomni.inputs.source import name_of
from minomni.inputs.video import Clip, load_video, sample_indices

__all__ = [
    "SHORTEST",
    "Clip",
    "MediaOptions",
    "load_audio",
    "load_image",
    "load_video",
    "name_of",
    "sample_indices",
]
