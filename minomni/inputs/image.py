"""Pictures: files, bytes, arrays and PIL images to RGB, upright."""

import warnings

import numpy as np
from PIL import Image
from torch import Tensor

from minomni.errors import UserError, shorten
from minomni.inputs.source import array_of, first_line, name_of, open_source

MOST_PIXELS = (
    120_000_000  # a telephone's 108 megapixels; conversions hold a few copies of 4 bytes per pixel
)
ORIENTATION = 0x0112  # EXIF: how to turn the stored picture to view it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TWELVE_BITS = (
    4_095  # uint16 levels up to here are those of a camera of 8 to 12 bits that were not scaled
)
BITS_PER_SAMPLE, PHOTOMETRIC, MIN_IS_WHITE = 258, 262, 0  # TIFF


def load_image(source) -> Image.Image:
    """Anything that holds a picture -> RGB picture, upright, transparency on white.

    source: a path, a file:// or data: URI, bytes, an open file, {"bytes", "path"}, a PIL image, or
    an array [h, w], [h, w, channels] or [channels, h, w] of 1, 3 or 4 channels, as uint8, uint16
    over its full range, or floats from 0 to 1. Of moving pictures the first one is taken. Raises
    UserError for what is missing, unreadable, too large, or of unknown scale.
    """
    name = name_of(source, "image")
    if isinstance(source, (np.ndarray, Tensor)):
        source = _to_pil(source, name)
    if isinstance(source, Image.Image):
        return _to_rgb(source, name)
    with open_source(source, name) as stream:
        try:
            with warnings.catch_warnings(action="ignore"):
                image = Image.open(stream)
        except (
            Exception
        ) as error:  # readers of some formats raise whatever broken bytes lead them to
            raise UserError(f"{name}: not a readable picture ({first_line(error)})") from None
        with image:
            return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A PIL image, perhaps not decoded yet -> RGB, upright."""
    _require_size(*image.size, name)
    try:
        with warnings.catch_warnings(action="ignore"):
            image.load()
            image = _upright(image)
            if image.mode.startswith(("I", "F")):
                image = Image.fromarray(_eight_bits(*_deep_levels(image), name))
            if image.mode == "La":  # premultiplied gray, which PIL turns into nothing else
                image = image.convert("LA")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGB", image.size, "white")
                white.paste(image, mask=image.getchannel("A"))
                return white
            return image.convert("RGB")
    except UserError:
        raise
    except (
        Exception
    ) as error:  # truncated or closed files that the caller opened, broken blocks, unknown modes
        raise UserError(f"{name}: not a readable picture ({first_line(error)})") from None


def _require_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{name}: {width}x{height} pixels; expected at least one")
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{name}: {width}x{height} pixels; at most {MOST_PIXELS} are read, make it smaller"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as EXIF tells; as it is stored where that cannot be read."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except (
        Exception
    ):  # EXIF is written by everybody and wrongly by many; struct, TIFF and text errors alike
        turn = None
    return image if turn is None else image.transpose(turn)


def _deep_levels(image: Image.Image) -> tuple[np.ndarray, int]:
    """Gray levels deeper than 8 bits [h, w], and the level of white (0 if the number type tells
    it).
    """
    levels, tags = np.asarray(image), getattr(image, "tag_v2", {})
    white = 0
    if image.mode == "I" and image.format == "PPM":  # PIL stretches every depth above 8 bits to 16
        levels = levels.astype(np.uint16)
    if image.mode == "I;16" and tags.get(BITS_PER_SAMPLE) == (12,):
        white = 4095
    if tags.get(PHOTOMETRIC) == MIN_IS_WHITE:
        levels = (1 if levels.dtype.kind == "f" else white or 65_535) - levels
    return levels, white


def _eight_bits(levels: np.ndarray, white: int, name: str) -> np.ndarray:
    """uint8, uint16 or floats from 0 to 1 -> uint8 of the same shape."""
    if levels.dtype == np.uint8:
        return levels
    if levels.dtype.kind == "u" and levels.dtype.itemsize == 2:  # of both byte orders
        return (levels // 257 if not white else levels.astype(np.uint32) * 255 // white).astype(
            np.uint8
        )
    if levels.dtype.kind != "f":
        raise UserError(
            f"{name}: levels of type {levels.dtype}, which does not tell their scale; expected uint8, "
            f"uint16 over its full range, or floats from 0 to 1"
        )
    low, high = float(levels.min()), float(levels.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"{name}: floats from {low:g} to {high:g}; expected 0 to 1, scale them or give uint8"
        )
    scaled = np.empty(levels.shape, np.uint8)
    for i in range(0, len(levels), 256):  # rows at once: floats of a large picture take a gigabyte
        scaled[i : i + 256] = np.rint(levels[i : i + 256] * np.float32(255))
    return scaled


def _to_pil(source, name: str) -> Image.Image:
    """An array of one picture -> PIL image."""
    shape = tuple(source.shape)
    if len(shape) == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        source = (
            source.permute(1, 2, 0) if isinstance(source, Tensor) else source.transpose(1, 2, 0)
        )
    if len(shape) not in (2, 3) or (len(shape) == 3 and source.shape[2] not in (1, 3, 4)):
        raise UserError(
            f"{name}: array of shape {shorten(shape, 60)}; expected [h, w], [h, w, 3] or [3, h, w]"
        )
    _require_size(
        source.shape[1], source.shape[0], name
    )  # before anything is computed: broadcast arrays claim any
    levels = array_of(source, name)
    if levels.dtype.kind == "u" and levels.dtype.itemsize == 2 and 0 < levels.max() <= TWELVE_BITS:
        raise UserError(
            f"{name}: uint16 levels that reach {levels.max()} at most; expected the full range, to 65535; "
            f"divide them by their white (255, 1023, 4095) and give floats from 0 to 1"
        )
    levels = _eight_bits(levels, 0, name)
    return Image.fromarray(
        np.ascontiguousarray(levels[:, :, 0] if levels.shape[2:] == (1,) else levels)
    )
