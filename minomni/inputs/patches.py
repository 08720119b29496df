"""Pictures and frames to rows of flattened patches, four rows of one merge cell in a row."""

from math import ceil, floor, sqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minomni.config import MediaConfig, VisionEncoderConfig
from minomni.errors import UserError
from minomni.inputs.options import SIZES, MediaOptions

# CLIP's, which the release keeps.
CHANNEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CHANNEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
MOST_STRETCHED = 200  # the aspect ratio the release still accepts
VIDEO_FLOOR = 1.05  # a frame of a long clip keeps at least this many times frame_min_pixels

Grid = tuple[int, int, int]  # frame pairs, rows and columns of patches


def smart_resize(
    height: int,
    width: int,
    cell: int,
    min_pixels: float,
    max_pixels: float,
    name: str = "the picture",
    at_least_a_cell: bool = False,
) -> tuple[int, int]:
    """The size nearest to height x width whose sides are multiples of `cell` and whose area lies
    within the limits.

    A side of less than half a cell is rounded to nothing before the area is looked at (the
    release's processor), or to one cell (at_least_a_cell: qwen-omni-utils). Raises UserError for no
    pixels, for an aspect ratio above 200 and for limits that leave nothing between them.
    """
    short, long = sorted((height, width))
    if not 0 < long <= MOST_STRETCHED * short:
        raise UserError(
            f"{name}: {width}x{height} pixels; an aspect ratio of at most {MOST_STRETCHED} is read, "
            f"cut the picture"
        )
    if max_pixels < min_pixels:
        raise UserError(
            f"{name}: max_pixels is {max_pixels:.0f} and min_pixels {min_pixels:.0f}; give a larger "
            f"max_pixels or a smaller min_pixels"
        )
    least = cell if at_least_a_cell else 0
    new_height, new_width = (max(least, round(side / cell) * cell) for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = sqrt(height * width / max_pixels)
        new_height, new_width = (
            max(cell, floor(side / shrink / cell) * cell) for side in (height, width)
        )
    elif new_height * new_width < min_pixels:
        grow = sqrt(min_pixels / (height * width))
        new_height, new_width = (ceil(side * grow / cell) * cell for side in (height, width))
    return new_height, new_width


def image_size(
    height: int,
    width: int,
    cell: int,
    media: MediaConfig,
    name: str = "the picture",
    options: MediaOptions = MediaOptions(),
) -> tuple[int, int]:
    """The size that a picture of height x width is brought to (release; with any size option:
    qwen-omni-utils).

    Raises UserError as smart_resize.
    """
    if options.resized_height is not None:
        return smart_resize(
            options.resized_height,
            options.resized_width,
            cell,
            media.image_min_pixels,
            media.image_max_pixels,
            name,
            at_least_a_cell=True,
        )
    least = media.image_min_pixels if options.min_pixels is None else options.min_pixels
    most = media.image_max_pixels if options.max_pixels is None else options.max_pixels
    return smart_resize(
        height, width, cell, least, most, name, at_least_a_cell=bool(options.given(SIZES))
    )


def frame_size(
    n: int,
    height: int,
    width: int,
    cell: int,
    media: MediaConfig,
    name: str,
    options: MediaOptions = MediaOptions(),
) -> tuple[int, int]:
    """The size that each of n frames is brought to: pairs of frames share media.clip_max_pixels, so
    long clips get smaller ones (release: qwen-omni-utils, also for the options). Raises UserError
    as smart_resize.
    """
    if (
        options.resized_height is not None
    ):  # the limits of pictures: qwen-omni-utils looks at no others here
        return image_size(height, width, cell, media, name, options)
    least = media.frame_min_pixels if options.min_pixels is None else options.min_pixels
    shared = media.clip_max_pixels if options.total_pixels is None else options.total_pixels
    most = max(min(media.frame_max_pixels, shared / n * 2), int(least * VIDEO_FLOOR))
    most = most if options.max_pixels is None else min(options.max_pixels, most)
    any_size = bool(options.given((*SIZES, "total_pixels")))
    return smart_resize(height, width, cell, least, most, name, at_least_a_cell=any_size)


def num_video_tokens(n: int, size: tuple[int, int], vision: VisionEncoderConfig) -> int:
    """Tokens of n frames, or of one picture (n = 1), of a size in pixels (height, width)."""
    return ceil(n / vision.temporal_patch_size) * size[0] * size[1] // vision.cell_size**2


def image_patches(
    image: Image.Image,
    vision: VisionEncoderConfig,
    media: MediaConfig,
    name: str = "the picture",
    options: MediaOptions = MediaOptions(),
) -> tuple[Tensor, Grid]:
    """An RGB picture -> patches [gh * gw, patch_dim] and grid (1, gh, gw); it stands in for both
    frames of a pair.

    Raises UserError for sizes that smart_resize refuses.
    """
    height, width = image_size(image.height, image.width, vision.cell_size, media, name, options)
    pixels = _resized(image, height, width)
    return to_patches(pixels.expand(vision.temporal_patch_size, -1, -1, -1), vision)


def video_patches(
    frames: Tensor,
    vision: VisionEncoderConfig,
    media: MediaConfig,
    name: str = "the video",
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Grid]:
    """Frames uint8 [n, height, width, 3] -> patches [t * gh * gw, patch_dim] and grid (t, gh, gw),
    t = ceil(n / 2).

    An odd last frame is doubled. size: in pixels (height, width), by default frame_size without
    options. Raises UserError for sizes that smart_resize refuses.
    """
    size = size or frame_size(*frames.shape[:3], vision.cell_size, media, name)
    pixels = torch.cat(
        [_resized(Image.fromarray(frame.numpy()), *size) for frame in frames]
    )  # [n, 3, height, width]
    missing = -len(pixels) % vision.temporal_patch_size
    return to_patches(torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)]), vision)


def to_patches(pixels: Tensor, vision: VisionEncoderConfig) -> tuple[Tensor, Grid]:
    """Normalised frames [n, 3, height, width] -> patches [t * gh * gw, patch_dim] and grid (t, gh,
    gw).

    Rows go by frame pair, then by merge cell, then row-major inside the cell; columns by (channel,
    frame, row, column).
    """
    n, channels, height, width = pixels.shape
    pair, merge, patch = vision.temporal_patch_size, vision.spatial_merge_size, vision.patch_size
    t, gh, gw = n // pair, height // patch, width // patch
    x = pixels.reshape(t, pair, channels, gh // merge, merge, patch, gw // merge, merge, patch)
    x = x.permute(
        0, 3, 6, 4, 7, 2, 1, 5, 8
    )  # t, row and column of the cell, those inside it, C, pair, patch, patch
    return x.reshape(t * gh * gw, vision.patch_dim), (t, gh, gw)


def _resized(image: Image.Image, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, then scaled and normalised -> [1, 3, height, width]."""
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)  # [height, width, 3]
    return ((pixels - CHANNEL_MEAN) / CHANNEL_STD).permute(2, 0, 1)[None]
