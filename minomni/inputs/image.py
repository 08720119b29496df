"""Images: files, bytes, arrays and PIL images to upright RGB."""

import warnings
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from minomni.errors import UserError, shorten
from minomni.inputs.source import first_line, name_of, open_source, shape_of, to_numpy

# The largest phone cameras have 108 megapixels; conversions hold a few copies of 4 bytes per pixel.
MAX_IMAGE_PIXELS = 120_000_000
ORIENTATION = 0x0112  # EXIF tag: how to transpose the stored image to view it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TWELVE_BITS = 4_095  # uint16 levels up to here are values of 8 to 12 bits that were not scaled

# TIFF tags, and a value of PHOTOMETRIC.
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
MIN_IS_WHITE = 0
SAMPLE_FORMAT = 339
SIGNED = 2


def load_image(source: Any) -> Image.Image:
    """Any source of an image -> RGB image, upright, transparency on white.

    source: a path, a file:// or data: URI, bytes, an open file, {"bytes", "path"}, a
    PIL image, or an array [h, w], [h, w, channels] or [channels, h, w] of 1, 3 or 4
    channels, as uint8, uint16 over its full range, or floats from 0 to 1. Of an
    animation, the first frame is taken. Raises UserError for an image that is missing,
    unreadable, too large, or of unknown scale.
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
        except UserError:  # of the caller's file
            raise
        except Exception as error:  # readers raise anything on broken bytes
            reason = first_line(error)
            raise UserError(f"{name}: not a readable image ({reason})") from None
        with image:
            return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A PIL image, which may not be decoded yet -> RGB, upright."""
    _require_size(*image.size, name)
    try:
        with warnings.catch_warnings(action="ignore"):
            _require_known_levels(image, name)
            _scale_transparent_gray(image)
            image.load()
            return _converted(image, name)
    except UserError:
        raise
    except Exception as error:  # truncated or closed files of the caller, broken blocks, odd modes
        raise UserError(f"{name}: not a readable image ({first_line(error)})") from None


def _converted(image: Image.Image, name: str) -> Image.Image:
    """A decoded PIL image of any mode -> RGB, upright, transparency on white."""
    is_from_file = image.format is not None
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        transparent = image.info.get("transparency")  # a level of a PNG
        levels, white = _deep_levels(image)
        if not is_from_file:
            _require_full_range(levels, name)
        image = Image.fromarray(_eight_bits(levels, white, name))
        if isinstance(transparent, int):
            image.paste(255, mask=Image.fromarray(levels == transparent))
    if image.mode == "La":  # premultiplied gray; PIL converts it only to LA
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")

    image = image.convert("RGBA")
    background = Image.new("RGB", image.size, "white")
    background.paste(image, mask=image.getchannel("A"))
    return background


def _require_known_levels(image: Image.Image, name: str) -> None:
    """Raise UserError for an image, not decoded yet, whose levels PIL reads as others.

    It takes signed integers as unsigned ones, rounds the white of a deep JPEG 2000 in color to
    black, and compares the transparent color of a PNG with levels that it has cut to 8 bits.
    """
    what = ""
    if image.format == "FITS":
        what = "FITS, whose numbers do not tell their scale"
    if SIGNED in np.atleast_1d(getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, 0)):
        what = "a TIFF of signed integers, which do not tell their scale"
    if image.format == "PNG" and _packing(image) == "RGB;16B" and "transparency" in image.info:
        what = "a PNG of 16 bits per color with a transparent color"
    if image.format == "JPEG2000" and image.mode not in ("L", "I;16") and _is_deep_jpeg2000(image):
        what = "a JPEG 2000 in color of more than 8 bits, or of signed integers"
    if what:
        raise UserError(f"{name}: is {what}; expected 8 bits per color, save it as such a PNG")


def _scale_transparent_gray(image: Image.Image) -> None:
    """Give the transparent level of a PNG of 2 or 4 bits the scale of its levels, which PIL makes
    those of 8 bits.
    """
    factor = {"L;2": 85, "L;4": 17}.get(_packing(image))
    level = image.info.get("transparency")
    if factor and image.format == "PNG" and isinstance(level, int):
        image.info["transparency"] = factor * level


def _packing(image: Image.Image) -> str:
    """How the levels of an image that is not decoded yet are packed, in PIL's words; "" if it is
    not told.
    """
    tile = getattr(image, "tile", None)
    packing = tile[0][3] if tile else ""
    return packing[0] if isinstance(packing, tuple) and packing else str(packing)


def _is_deep_jpeg2000(image: Any) -> bool:
    """Whether the first component has more than 8 bits or signed integers, by the marker SIZ."""
    if not getattr(image, "tile", None):  # decoded by the caller
        return False
    at = image.fp.tell()
    image.fp.seek(0)
    head = image.fp.read(1 << 20)
    image.fp.seek(at)
    begin = head.find(b"\xff\x4f\xff\x51")
    component = head[begin + 42 : begin + 43]
    return begin >= 0 and bool(component) and component[0] >= 8  # bits - 1, and 128 for signed


def _require_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{name}: {width}x{height} pixels; expected at least one")
    if width * height > MAX_IMAGE_PIXELS:
        raise UserError(
            f"{name}: {width}x{height} pixels; expected at most {MAX_IMAGE_PIXELS}, make it smaller"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Rotated and flipped as EXIF says; as it is stored if EXIF cannot be read."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
        transpose = TURNS.get(orientation)
    except Exception:  # EXIF is often broken: struct, TIFF and text errors alike
        return image
    return image if transpose is None else image.transpose(transpose)


def _deep_levels(image: Image.Image) -> tuple[np.ndarray, int]:
    """Gray levels of more than 8 bits [h, w], and the level of white; 0 for that of the type."""
    levels = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    white = 0
    if image.mode == "I" and image.format == "PPM":  # PIL scales every depth above 8 bits to 16
        levels = levels.astype(np.uint16)
    if image.mode == "I;16" and tags.get(BITS_PER_SAMPLE) == (12,):
        white = TWELVE_BITS
    if tags.get(PHOTOMETRIC) == MIN_IS_WHITE:
        highest = 1 if levels.dtype.kind == "f" else (white or 65_535)
        levels = highest - levels
    return levels, white


def _eight_bits(levels: np.ndarray, white: int, name: str) -> np.ndarray:
    """uint8, uint16 or floats from 0 to 1 -> uint8 of the same shape.

    white: the level of white in uint16; 0 for 65535.
    """
    if levels.dtype == np.uint8:
        return levels
    if _is_uint16(levels):
        scaled = levels.astype(np.uint32) * 255 // white if white else levels // 257
        return scaled.astype(np.uint8)
    if levels.dtype.kind != "f":
        raise UserError(
            f"{name}: levels of type {levels.dtype}, which does not tell their scale; expected "
            f"uint8, uint16 over its full range, or floats from 0 to 1"
        )
    low = float(levels.min())
    high = float(levels.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"{name}: floats from {low:g} to {high:g}; expected 0 to 1, scale them or give uint8"
        )
    # In blocks of rows: the floats of a large image would take a gigabyte.
    result = np.empty(levels.shape, np.uint8)
    for i in range(0, len(levels), 256):
        result[i : i + 256] = np.rint(levels[i : i + 256] * np.float32(255))
    return result


def _is_uint16(levels: np.ndarray) -> bool:
    """Whether levels are uint16 of either byte order."""
    return levels.dtype.kind == "u" and levels.dtype.itemsize == 2


def _require_full_range(levels: np.ndarray, name: str) -> None:
    """Raise UserError for uint16 levels that were not scaled. A file's format tells their scale."""
    if _is_uint16(levels) and 0 < levels.max() <= TWELVE_BITS:
        raise UserError(
            f"{name}: uint16 levels that reach {levels.max()} at most; expected the full range, to "
            f"65535; divide them by their white (255, 1023, 4095) and give floats from 0 to 1"
        )


def _to_pil(source: Any, name: str) -> Image.Image:
    """An array of one image -> PIL image."""
    shape = shape_of(source, name)
    channels = (1, 3, 4)
    if len(shape) == 3 and shape[2] not in channels and shape[0] in channels:
        is_tensor = isinstance(source, Tensor)
        source = source.permute(1, 2, 0) if is_tensor else source.transpose(1, 2, 0)
    if len(shape) not in (2, 3) or (len(shape) == 3 and source.shape[2] not in channels):
        raise UserError(
            f"{name}: array of shape {shorten(shape, 60)}; expected [h, w], [h, w, 3] or [3, h, w]"
        )
    # Checked before anything is computed: a broadcast array may have any size.
    height, width = source.shape[:2]
    _require_size(width, height, name)

    levels = to_numpy(source, name)
    _require_full_range(levels, name)
    levels = _eight_bits(levels, 0, name)
    if levels.shape[2:] == (1,):
        levels = levels[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(levels))
