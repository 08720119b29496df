"""Images and video frames to flattened patches; the four patches of a merge cell are adjacent."""

from math import ceil, floor, sqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minomni.config import MediaConfig, VisionEncoderConfig
from minomni.errors import UserError
from minomni.inputs.options import NO_OPTIONS, SIZE_OPTIONS, MediaOptions

# CLIP's, which the release keeps.
CHANNEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CHANNEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
MAX_ASPECT_RATIO = 200  # the largest one that the release accepts
# A frame of a long clip keeps at least this many times frame_min_pixels.
MIN_FRAME_FACTOR = 1.05

Grid = tuple[int, int, int]  # frame pairs, rows and columns of patches


def smart_resize(
    height: int,
    width: int,
    cell: int,
    min_pixels: float,
    max_pixels: float,
    name: str = "the image",
    at_least_a_cell: bool = False,
) -> tuple[int, int]:
    """The size nearest to height x width whose sides are multiples of `cell`, within the limits.

    The limits are for the area. A side of less than half a cell is rounded to zero before the area
    is compared (the release's processor), or to one cell (at_least_a_cell: qwen-omni-utils). Raises
    UserError for images without pixels, for an aspect ratio above 200, and for max_pixels below
    min_pixels.
    """
    short, long = sorted((height, width))
    if not 0 < long <= MAX_ASPECT_RATIO * short:
        raise UserError(
            f"{name}: {width}x{height} pixels; expected an aspect ratio of at most "
            f"{MAX_ASPECT_RATIO}, crop the image"
        )
    if max_pixels < min_pixels:
        raise UserError(
            f"{name}: max_pixels is {max_pixels:.0f} and min_pixels {min_pixels:.0f}; give a "
            f"larger max_pixels or a smaller min_pixels"
        )

    # Round both sides to cells. Then shrink or grow them if the area is out of the limits.
    min_side = cell if at_least_a_cell else 0
    new_height = max(min_side, round(height / cell) * cell)
    new_width = max(min_side, round(width / cell) * cell)
    if new_height * new_width > max_pixels:
        shrink = sqrt(height * width / max_pixels)
        new_height = max(cell, floor(height / shrink / cell) * cell)
        new_width = max(cell, floor(width / shrink / cell) * cell)
    elif new_height * new_width < min_pixels:
        grow = sqrt(min_pixels / (height * width))
        new_height = ceil(height * grow / cell) * cell
        new_width = ceil(width * grow / cell) * cell
    return new_height, new_width


def image_size(
    height: int,
    width: int,
    cell: int,
    media: MediaConfig,
    name: str = "the image",
    options: MediaOptions = NO_OPTIONS,
) -> tuple[int, int]:
    """The size (height, width) that an image of height x width is resized to.

    Source: release processor; with any size option, qwen-omni-utils. Raises UserError as
    smart_resize.
    """
    min_pixels: float = media.image_min_pixels
    max_pixels: float = media.image_max_pixels
    if options.resized_height is not None and options.resized_width is not None:
        height = options.resized_height
        width = options.resized_width
    else:
        if options.min_pixels is not None:
            min_pixels = options.min_pixels
        if options.max_pixels is not None:
            max_pixels = options.max_pixels
    at_least_a_cell = bool(options.given(SIZE_OPTIONS))
    return smart_resize(height, width, cell, min_pixels, max_pixels, name, at_least_a_cell)


def frame_size(
    n: int,
    height: int,
    width: int,
    cell: int,
    media: MediaConfig,
    name: str,
    options: MediaOptions = NO_OPTIONS,
) -> tuple[int, int]:
    """The size (height, width) that each of n frames is resized to.

    Pairs of frames share media.clip_max_pixels, so the frames of long clips become smaller. Source:
    qwen-omni-utils, also for the options. Raises UserError as smart_resize.
    """
    if options.resized_height is not None:
        # qwen-omni-utils applies only the limits of images here.
        return image_size(height, width, cell, media, name, options)

    min_pixels: float = media.frame_min_pixels
    if options.min_pixels is not None:
        min_pixels = options.min_pixels
    total_pixels: float = media.clip_max_pixels
    if options.total_pixels is not None:
        total_pixels = options.total_pixels

    # The share of one frame, but not below its floor and not above its own maximum.
    share = min(media.frame_max_pixels, total_pixels / n * 2)
    max_pixels = max(share, int(min_pixels * MIN_FRAME_FACTOR))
    if options.max_pixels is not None:
        max_pixels = min(options.max_pixels, max_pixels)
    at_least_a_cell = bool(options.given((*SIZE_OPTIONS, "total_pixels")))
    return smart_resize(height, width, cell, min_pixels, max_pixels, name, at_least_a_cell)


def num_video_tokens(n: int, size: tuple[int, int], vision: VisionEncoderConfig) -> int:
    """Tokens of n frames, or of one image (n = 1), of a size in pixels (height, width)."""
    height, width = size
    return ceil(n / vision.temporal_patch_size) * height * width // vision.cell_size**2


def image_patches(
    image: Image.Image,
    vision: VisionEncoderConfig,
    media: MediaConfig,
    name: str = "the image",
    options: MediaOptions = NO_OPTIONS,
) -> tuple[Tensor, Grid]:
    """An RGB image -> patches [gh * gw, patch_dim] and grid (1, gh, gw).

    The image is both frames of a pair. Raises UserError for sizes that smart_resize
    does not accept.
    """
    cell = vision.cell_size
    height, width = image_size(image.height, image.width, cell, media, name, options)
    pixels = _resize(image, height, width)
    pair = pixels.expand(vision.temporal_patch_size, -1, -1, -1)
    return to_patches(pair, vision)


def video_patches(
    frames: Tensor,
    vision: VisionEncoderConfig,
    media: MediaConfig,
    name: str = "the video",
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Grid]:
    """Frames uint8 [n, height, width, 3] -> patches [t * gh * gw, patch_dim] and grid (t, gh, gw).

    t = ceil(n / 2); an odd last frame is repeated. size: in pixels (height, width), by default
    frame_size without options. Raises UserError for sizes that smart_resize refuses.
    """
    n, height, width = frames.shape[:3]
    if size is None:
        size = frame_size(n, height, width, vision.cell_size, media, name)
    resized = frames if size == (height, width) else _resize_frames(frames, size)
    missing = -n % vision.temporal_patch_size
    repeated = resized[-1:].expand(missing, -1, -1, -1)
    pixels = torch.cat((resized, repeated)).permute(0, 3, 1, 2)  # uint8 [n, 3, height, width]
    patches, grid = to_patches(pixels, vision)
    return _normalize(patches), grid


def to_patches(pixels: Tensor, vision: VisionEncoderConfig) -> tuple[Tensor, Grid]:
    """Normalized frames [n, 3, height, width] -> patches [t * gh * gw, patch_dim].

    Also returns the grid (t, gh, gw). Order of the rows: by frame pair, then by merge
    cell, then row-major inside the cell. Order of the columns: by (channel, frame, row,
    column).
    """
    n, channels, height, width = pixels.shape
    pair = vision.temporal_patch_size
    merge = vision.spatial_merge_size
    patch = vision.patch_size
    t, gh, gw = n // pair, height // patch, width // patch

    rows, columns = gh // merge, gw // merge  # of cells
    x = pixels.reshape(t, pair, channels, rows, merge, patch, columns, merge, patch)
    # -> [t, row and column of the cell, row and column inside it, channels, pair,
    # patch, patch]
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * gh * gw, vision.patch_dim), (t, gh, gw)


def _resize_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing. uint8 [n, height, width, 3] -> [n, *size, 3]."""
    height, width = size
    resized = []
    for frame in frames:
        image = Image.fromarray(frame.numpy())
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        resized.append(torch.from_numpy(np.array(image)))
    return torch.stack(resized)


def _normalize(patches: Tensor) -> Tensor:
    """Patches of uint8 [N, 3 * values], scaled and normalized by channel as in _resize()."""
    colors = patches.reshape(len(patches), len(CHANNEL_MEAN), -1).float()  # [N, 3, values]
    colors.div_(255).sub_(CHANNEL_MEAN[:, None]).div_(CHANNEL_STD[:, None])
    return colors.reshape(patches.shape)


def _resize(image: Image.Image, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, scaled and normalized -> [1, 3, height, width]."""
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    colors = np.asarray(resized, dtype=np.float32) / 255
    pixels = torch.from_numpy(colors)  # [height, width, 3]
    normalized = (pixels - CHANNEL_MEAN) / CHANNEL_STD
    return normalized.permute(2, 0, 1)[None]
