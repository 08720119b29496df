"""Pictures and clips become the official processor's patches, in its order."""

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from minomni.config import QWEN7B, SMALL, TINY
from minomni.errors import UserError
from minomni.inputs.patches import (
    CHANNEL_MEAN,
    CHANNEL_STD,
    frame_size,
    image_patches,
    smart_resize,
    to_patches,
    video_patches,
)
from tests.oracle import GOLDEN

VISION, MEDIA = QWEN7B.thinker.vision, QWEN7B.media
SIZES = ((84, 112), (150, 270), (29, 300), (300, 41), (56, 56))


def picture(height: int, width: int) -> np.ndarray:
    """Colored waves: smooth, so that resizing changes them, and different everywhere."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7 + c) * np.cos(y / 11 - c) for c in range(3)]
    return ((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)


def digest(patches: np.ndarray) -> np.ndarray:
    return patches[:: max(1, len(patches) // 20), ::37]


def official(array: np.ndarray) -> tuple[np.ndarray, list[int]]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    out = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12_845_056)(
        [array], return_tensors="np"
    )
    return np.asarray(out["pixel_values"], np.float32), np.asarray(out["image_grid_thw"])[
        0
    ].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_official_processor(size):
    pytest.importorskip("transformers", reason="the official code is not installed")
    theirs, grid = official(picture(*size))
    ours, our_grid = image_patches(Image.fromarray(picture(*size)), VISION, MEDIA)
    assert list(our_grid) == grid
    assert ours.shape == theirs.shape
    assert (
        np.abs(ours.numpy() - theirs).max() < 1e-5
    )  # both resize with PIL: only float noise is left


@pytest.mark.parametrize("size", SIZES)
def test_equals_what_the_official_processor_answered(size):
    golden = np.load(GOLDEN / "patches.npz")["x".join(map(str, size))]
    ours, _ = image_patches(Image.fromarray(picture(*size)), VISION, MEDIA)
    assert np.abs(digest(ours.numpy()) - golden).max() < 1e-5


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((84, 112), (84, 112)),
        ((42, 42), (56, 56)),
        ((70, 98), (56, 112)),  # 2.5 cells round to 2, 3.5 to 4: to even
        ((20, 20), (56, 56)),
        ((8000, 8000), (3584, 3584)),
    ],
)
def test_smart_resize(size, expected):
    found = smart_resize(*size, 28, 3136, 12_845_056)
    assert found == expected
    assert found[0] * found[1] <= 12_845_056


@pytest.mark.slow
def test_sizes_equal_the_official_ones():
    official = pytest.importorskip(
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
        reason="the official code is not installed",
    )
    random = Random(0)
    limits = [
        (m.image_min_pixels, m.image_max_pixels) for m in (QWEN7B.media, SMALL.media, TINY.media)
    ]
    for _ in range(5_000):
        height, width = (int(2 ** random.uniform(0, 13)) for _ in range(2))
        if max(height, width) <= 200 * min(height, width):
            least, most = random.choice(limits)
            expected = official.smart_resize(height, width, 28, least, most)
            assert smart_resize(height, width, 28, least, most) == expected, (height, width)


@pytest.mark.slow
def test_video_equals_pairs_of_official_images():
    """The official video processor is the image processor with two different frames in the place of
    two equal ones.
    """
    pytest.importorskip("transformers", reason="the official code is not installed")
    frames = [
        picture(308, 364),
        picture(308, 364)[::-1].copy(),
        picture(308, 364)[:, ::-1].copy(),
    ]  # within all limits
    ours, grid = video_patches(torch.from_numpy(np.stack(frames)), VISION, MEDIA)
    assert grid == (2, 22, 26)
    theirs = [
        torch.from_numpy(official(frame)[0]).view(-1, 3, 2, 196) for frame in (*frames, frames[-1])
    ]
    expected = [
        torch.stack([a[:, :, 0], b[:, :, 0]], 2)
        for a, b in zip(theirs[::2], theirs[1::2], strict=True)
    ]
    assert (ours.view(2, -1, 3, 2, 196) - torch.stack(expected)).abs().max() < 1e-5


def test_images_without_pixels_are_refused():
    with pytest.raises(UserError, match="0x8 pixels"):
        smart_resize(8, 0, 28, 3136, 12_845_056)


def test_large_aspect_ratios_are_refused():
    smart_resize(10, 2000, 28, 3136, 12_845_056)
    with pytest.raises(UserError, match="2001x10 pixels"):
        smart_resize(10, 2001, 28, 3136, 12_845_056)


def test_order_of_rows_and_columns():
    """Every pixel says where it is; every number of every patch must come from where it should."""
    n, height, width = 4, 56, 84
    axes = torch.meshgrid(torch.arange(n), torch.arange(height), torch.arange(width), indexing="ij")
    where = torch.stack(axes, 1).float()
    patches, grid = to_patches(where, VISION)  # channels are frame, row, column
    assert grid == (2, 4, 6)
    assert patches.shape == (48, 1176)
    row = 0
    for t in range(2):
        for cell_y in range(2):
            for cell_x in range(3):
                for y in range(2):
                    for x in range(2):
                        patch = patches[row].view(3, 2, 14, 14)
                        top, left = (2 * cell_y + y) * 14, (2 * cell_x + x) * 14
                        assert patch[0, :, 0, 0].tolist() == [2 * t, 2 * t + 1]
                        assert patch[1, 0, :, 0].tolist() == list(range(top, top + 14))
                        assert patch[2, 1, 0].tolist() == list(range(left, left + 14))
                        row += 1


def test_a_picture_is_two_equal_frames():
    patches, grid = image_patches(Image.fromarray(picture(56, 84)), VISION, MEDIA)
    pairs = patches.view(-1, 3, 2, 196)
    assert grid == (1, 4, 6)
    assert torch.equal(pairs[:, :, 0], pairs[:, :, 1])


@pytest.mark.parametrize("size", [(336, 364), (337, 360)])
def test_two_equal_frames_are_an_image_to_the_bit(size):
    """With and without resizing, which changes (337, 360) to (336, 364)."""
    frame = picture(*size)
    expected, grid = image_patches(Image.fromarray(frame), VISION, MEDIA)
    found, found_grid = video_patches(torch.from_numpy(np.stack([frame, frame])), VISION, MEDIA)
    assert found_grid == grid == (1, 24, 26)
    assert torch.equal(found, expected)


def test_odd_clips_repeat_their_last_frame():
    frames = torch.from_numpy(np.stack([picture(84, 84) // (i + 1) for i in range(5)]))
    patches, grid = video_patches(frames, TINY.thinker.vision, TINY.media)
    assert grid == (3, 6, 6)
    last = patches.view(3, 36, 3, 2, 196)[2]
    assert torch.equal(last[:, :, 0], last[:, :, 1])
    first = patches.view(3, 36, 3, 2, 196)[0]
    assert not torch.equal(first[:, :, 0], first[:, :, 1])


@pytest.mark.parametrize(
    ("n", "most"),
    [(2, 602_112), (300, 602_112), (340, 90_316_800 * 2 / 340), (768, 235_200), (4_000, 105_369)],
)
def test_frames_of_long_clips_get_smaller(n, most):
    """Pairs share 90,316,800 pixels, a frame keeps at least 105,369 of them (release:
    qwen-omni-utils).
    """
    height, width = frame_size(n, 1080, 1920, 28, MEDIA, "a clip")
    assert height % 28 == width % 28 == 0
    assert 0.85 * most < height * width <= most


def test_white_is_normalized():
    patches, _ = image_patches(Image.new("RGB", (56, 56), "white"), VISION, MEDIA)
    expected = (1 - CHANNEL_MEAN) / CHANNEL_STD
    assert torch.allclose(patches.view(-1, 3, 392).mean((0, 2)), expected, atol=1e-5)


def write_golden() -> None:
    """python -c "from tests.inputs.test_patches import write_golden; write_golden()" """
    answers = {"x".join(map(str, size)): digest(official(picture(*size))[0]) for size in SIZES}
    np.savez_compressed(GOLDEN / "patches.npz", **answers)
