"""A content item's keys mean what qwen-omni-utils makes of them; what contradicts itself is one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minomni.config import QWEN7B, TINY
from minomni.errors import UserError
from minomni.inputs.item import parse_item
from minomni.inputs.media import SHORTEST, Clip, load_audio, load_video, sample_indices
from minomni.inputs.options import MediaOptions, options_of
from minomni.inputs.patches import frame_size, image_size
from minomni.inputs.video import frame_range
from tests.oracle import GOLDEN

MEDIA = QWEN7B.media
TABLE = json.loads((GOLDEN / "qwen_omni_utils.json").read_text())  # made by tests/make_qwen_omni_utils.py


def answer(run):
    """What a call returns; "error" where it is refused."""
    try:
        return run()
    except UserError as error:
        assert len(str(error)) <= 500 and "\n" not in str(error)
        return "error"


def wrong(cases, run) -> list:
    """Those cases whose answer is not the last entry of their row."""
    found = [(case, answer(lambda: run(*case[:-1]))) for case in cases]
    return [(case, ours) for case, ours in found if ours != case[-1]]


def test_frames_of_the_table():
    def run(wishes, total, rate):
        options = options_of("video", wishes)
        first, last = frame_range([5 + i / rate for i in range(total)], rate, options, "a film")
        return sample_indices(last - first + 1, rate, MEDIA, options, first)

    assert len(TABLE["frames"]) == 300 and not wrong(TABLE["frames"], run)


def test_sizes_of_pictures_of_the_table():
    def run(wishes, height, width):
        return list(image_size(height, width, 28, MEDIA, "a picture", options_of("image", wishes)))

    cases = [case for case in TABLE["images"] if case[0]]  # without a key the release's processor decides
    assert len(cases) > 80 and not wrong(cases, run)


def test_sizes_of_films_of_the_table():
    def run(wishes, n, height, width):
        return list(frame_size(n, height, width, 28, MEDIA, "a film", options_of("video", wishes)))

    cases = [case for case in TABLE["films"] if case[0]]
    assert len(cases) > 100 and not wrong(cases, run)


def test_lists_of_frames_of_the_table():
    def run(wishes, n, height, width):
        images = [Image.new("RGB", (width, height))] * n
        return list(load_video(images, MEDIA, False, options=options_of("video", wishes)).frames.shape[:3])

    assert len(TABLE["lists"]) > 50 and not wrong(TABLE["lists"], run)


@pytest.mark.parametrize("kind, wishes, says", [
    ("video", {"fps": 1, "nframes": 4}, "both fps and nframes"),
    ("video", {"fps": "2"}, "fps is '2'; expected a number"), ("video", {"fps": float("nan")}, "expected a number"),
    ("video", {"fps": 0}, "fps is 0; expected a number above zero"), ("video", {"nframes": -2}, "above zero"),
    ("image", {"max_pixels": 10**400}, "max_pixels is 1000.*expected a number"),
    ("image", {"max_pixels": True}, "max_pixels is True"), ("image", {"min_pixels": [3136]}, "min_pixels is a list"),
    ("image", {"resized_height": 56}, "one of resized_height and resized_width"),
    ("image", {"fps": 2}, "an image item has the unknown key 'fps'; it may have min_pixels"),
    ("audio", {"max_pixels": 2}, "an audio item has the unknown key 'max_pixels'; it may have audio_start, audio_end"),
    ("video", {"audio_start": 2}, "unknown key 'audio_start'"), ("text", {"fps": 2}, "it has no options"),
    ("video", {"colour": "x" * 900}, "unknown key 'colour'"), ("video", {"x" * 900: 1}, "unknown key 'xxx"),
    ("video", {3: 1}, "unknown key 3"),
    ("video", {"video_start": 2, "video_end": 2}, "video_end is 2 s and the start 2 s"),
    ("audio", {"audio_start": 3, "audio_end": 1.5}, "audio_end is 1.5 s"), ("audio", {"audio_end": -1}, "audio_end"),
    ("video", {"use_audio_in_video": "yes"}, "use_audio_in_video is 'yes'; expected true or false"),
])
def test_wrong_wishes(kind, wishes, says):
    with pytest.raises(UserError, match=says) as error:
        options_of(kind, wishes)
    assert len(str(error.value)) <= 500 and "\n" not in str(error.value)


def test_numbers_of_other_types():
    assert options_of("video", {"fps": np.float32(1.5), "max_frames": np.int64(8)}).max_frames == 8


@pytest.mark.parametrize("item, options", [
    ({"type": "video", "video": "x", "fps": None, "nframes": 4, "detail": "low", "min_pixels": 784},
     MediaOptions(nframes=4, min_pixels=784)),
    ({"audio": "x", "audio_start": 0.5, "id": "17", "cache_control": {"type": "ephemeral"}},
     MediaOptions(audio_start=0.5)),
])
def test_keys_of_an_item_become_options(item, options):
    assert parse_item(item).options == options


@pytest.mark.parametrize("source, wishes, says", [
    (np.zeros((4, 56, 56, 3), np.uint8), {"nframes": 2}, "nframes is for video files"),
    ([np.zeros((56, 56, 3), np.uint8)] * 4, {"video_end": 1}, "video_end is for video files"),
    ((np.zeros((4, 56, 56, 3), np.uint8), 4), {"fps": 2}, "fps is for video files"),
    (Clip(torch.zeros(4, 56, 56, 3, dtype=torch.uint8), torch.arange(4.0), None), {"fps": 2}, "this is a Clip"),
])
def test_wishes_that_cannot_be_fulfilled(source, wishes, says):
    with pytest.raises(UserError, match=says):
        load_video(source, TINY.media, False, options=options_of("video", wishes))


def test_sounds_of_the_table():
    def run(wishes, samples):
        return len(load_audio(np.full(samples, 0.1, np.float32), options_of("audio", wishes)))

    cases = [case if case[-1] > SHORTEST else [*case[:-1], "error"] for case in TABLE["sounds"]]
    assert len(cases) == 30 and not wrong(cases, run)
