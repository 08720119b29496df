"""Pictures: files, bytes, arrays and PIL images to RGB, upright."""

import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError
from .source import first_line, name_of, open_source


def load_image(source) -> Image.Image:
    """A path, bytes, array [height, width, 3] or PIL image -> RGB picture, upright, transparency on white."""
    name = name_of(source, "image")
    if isinstance(source, (np.ndarray, Tensor)):
        source = _to_pil(np.asarray(source), name)
    if not isinstance(source, Image.Image):
        with open_source(source, name) as stream:
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
        raise UserError(f"{name}: not a readable picture ({first_line(error)})") from None


def _to_pil(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise UserError(f"{name}: array of shape {array.shape} and type {array.dtype}; expected uint8 [h, w, 3]")
    return Image.fromarray(array)
