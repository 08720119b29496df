"""A content item's keys mean what qwen-omni-utils makes of them; what contradicts itself is one
line.
"""

import json
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from minomni.config import QWEN7B, TINY
from minomni.errors import UserError
from minomni.inputs.item import parse_item
from minomni.inputs.media import MIN_SAMPLES, Clip, load_audio, load_video, sample_indices
from minomni.inputs.options import MediaOptions, options_of
from minomni.inputs.patches import frame_size, image_size
from minomni.inputs.video import frame_range
from tests.oracle import GOLDEN

MEDIA = QWEN7B.media
TABLE = json.loads(
    (GOLDEN / "qwen_omni_utils.json").read_text()
)  # made by tests/make_qwen_omni_utils.py


def answer(run):
    """What a call returns; "error" where it is refused."""
    try:
        return run()
    except UserError as error:
        message = str(error)
    assert len(message) <= 500
    assert "\n" not in message
    return "error"


def wrong(cases, run) -> list:
    """Those cases whose answer is not the last entry of their row."""
    found = [(case, answer(partial(run, *case[:-1]))) for case in cases]
    return [(case, ours) for case, ours in found if ours != case[-1]]


def test_frames_of_the_table():
    def run(given, total, rate):
        options = options_of("video", given)
        first, last = frame_range([5 + i / rate for i in range(total)], rate, options, "a film")
        return sample_indices(last - first + 1, rate, MEDIA, options, first)

    assert len(TABLE["frames"]) == 300
    assert not wrong(TABLE["frames"], run)


def test_sizes_of_pictures_of_the_table():
    def run(given, height, width):
        return list(image_size(height, width, 28, MEDIA, "a picture", options_of("image", given)))

    cases = [
        case for case in TABLE["images"] if case[0]
    ]  # without a key the release's processor decides
    assert len(cases) > 80
    assert not wrong(cases, run)


def test_sizes_of_films_of_the_table():
    def run(given, n, height, width):
        return list(frame_size(n, height, width, 28, MEDIA, "a film", options_of("video", given)))

    cases = [case for case in TABLE["films"] if case[0]]
    assert len(cases) > 100
    assert not wrong(cases, run)


def test_lists_of_frames_of_the_table():
    def run(given, n, height, width):
        images = [Image.new("RGB", (width, height))] * n
        return list(
            load_video(images, MEDIA, False, options=options_of("video", given)).frames.shape[:3]
        )

    assert len(TABLE["lists"]) > 50
    assert not wrong(TABLE["lists"], run)


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        ("video", {"fps": 1, "nframes": 4}, "both fps and nframes"),
        ("video", {"fps": "2"}, "fps is '2'; expected a number"),
        ("video", {"fps": float("nan")}, "expected a number"),
        ("video", {"fps": 0}, "fps is 0; expected a number above zero"),
        ("video", {"nframes": -2}, "above zero"),
        ("image", {"max_pixels": 10**400}, "max_pixels is 1000.*expected a number"),
        ("image", {"max_pixels": True}, "max_pixels is True"),
        ("image", {"min_pixels": [3136]}, "min_pixels is a list"),
        ("image", {"resized_height": 56}, "one of resized_height and resized_width"),
        ("image", {"fps": 2}, "an image item has the unknown key 'fps'; it may have min_pixels"),
        (
            "audio",
            {"max_pixels": 2},
            "an audio item has the unknown key 'max_pixels'; it may have audio_start, audio_end",
        ),
        ("video", {"audio_start": 2}, "unknown key 'audio_start'"),
        ("text", {"fps": 2}, "it has no options"),
        ("video", {"color": "x" * 900}, "unknown key 'color'"),
        ("video", {"x" * 900: 1}, "unknown key 'xxx"),
        ("video", {3: 1}, "unknown key 3"),
        ("video", {"video_start": 2, "video_end": 2}, "video_end is 2 s and the start 2 s"),
        ("audio", {"audio_start": 3, "audio_end": 1.5}, "audio_end is 1.5 s"),
        ("audio", {"audio_end": -1}, "audio_end"),
        (
            "video",
            {"use_audio_in_video": "yes"},
            "use_audio_in_video is 'yes'; expected true or false",
        ),
    ],
)
def test_wrong_options(kind, given, says):
    with pytest.raises(UserError, match=says) as error:
        options_of(kind, given)
    assert len(str(error.value)) <= 500
    assert "\n" not in str(error.value)


def test_numbers_of_other_types():
    assert options_of("video", {"fps": np.float32(1.5), "max_frames": np.int64(8)}).max_frames == 8


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("video", "fps"),
        ("image", "min_pixels"),
        ("audio", "audio_end"),
        ("video", "use_audio_in_video"),
        ("video", "video_start"),
    ],
)
def test_numbers_that_python_does_not_spell(kind, key):
    for value in (13**5_000, -(10**6_001)):
        with pytest.raises(UserError, match=f"{key} is a very large number"):
            options_of(kind, {key: value})
    with pytest.raises(UserError, match="unknown key a very large number"):
        options_of(kind, {12**7_000: 1})


def test_numbers_become_those_of_python():
    options = options_of(
        "video",
        {
            "sample_fps": Fraction(3, 4),
            "min_frames": np.int16(6),
            "video_start": np.float32(2),
            "use_audio_in_video": np.bool_(True),
        },
    )
    assert options == MediaOptions(
        sample_fps=0.75, min_frames=6, video_start=2.0, use_audio_in_video=True
    )
    assert type(options.sample_fps) is float
    assert type(options.min_frames) is int
    with pytest.raises(UserError, match="above zero"):
        options_of("video", {"fps": Fraction(1, 10**5_000)})


def test_a_sound_begins_at_zero_or_later():
    assert options_of("audio", {"audio_start": 0, "audio_end": np.float64(0.5)}) == MediaOptions(
        audio_start=0, audio_end=0.5
    )
    for key in ("audio_start", "audio_end"):
        with pytest.raises(UserError, match=rf"{key} is -0\.25; expected a number"):
            options_of("audio", {key: np.float32(-0.25)})


@pytest.mark.parametrize(
    ("item", "options"),
    [
        (
            {
                "type": "video",
                "video": "x",
                "fps": None,
                "nframes": 4,
                "detail": "low",
                "min_pixels": 784,
            },
            MediaOptions(nframes=4, min_pixels=784),
        ),
        (
            {"audio": "x", "audio_start": 0.5, "id": "17", "cache_control": {"type": "ephemeral"}},
            MediaOptions(audio_start=0.5),
        ),
    ],
)
def test_keys_of_an_item_become_options(item, options):
    assert parse_item(item).options == options


@pytest.mark.parametrize(
    ("source", "given", "says"),
    [
        (np.zeros((4, 56, 56, 3), np.uint8), {"nframes": 2}, "nframes is for video files"),
        ([np.zeros((56, 56, 3), np.uint8)] * 4, {"video_end": 1}, "video_end is for video files"),
        ((np.zeros((4, 56, 56, 3), np.uint8), 4), {"fps": 2}, "fps is for video files"),
        (
            Clip(torch.zeros(4, 56, 56, 3, dtype=torch.uint8), torch.arange(4.0), None),
            {"fps": 2},
            "this is a Clip",
        ),
    ],
)
def test_options_that_cannot_be_followed(source, given, says):
    with pytest.raises(UserError, match=says):
        load_video(source, TINY.media, False, options=options_of("video", given))


def test_sounds_of_the_table():
    def run(given, samples):
        return len(load_audio(np.full(samples, 0.1, np.float32), options_of("audio", given)))

    cases = [case if case[-1] > MIN_SAMPLES else [*case[:-1], "error"] for case in TABLE["sounds"]]
    assert len(cases) == 30
    assert not wrong(cases, run)
