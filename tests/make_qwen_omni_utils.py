"""Write tests/golden/qwen_omni_utils.json: what qwen-omni-utils 0.0.9 answers to a table of cases.

    pip download --no-deps qwen-omni-utils==0.0.9 --dest DOWNLOADS
    python -m tests.make_qwen_omni_utils DOWNLOADS/qwen_omni_utils-0.0.9-py3-none-any.whl

The package is read from its wheel. Only its own arithmetic runs: what it imports to decode and to
resize (torchvision, librosa, audioread, requests) is replaced by stubs that note what was asked
for.
"""

import json
import logging
import sys
from random import Random
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import torch
from PIL import Image

from tests.oracle import GOLDEN

CELL = 28
STUBBED = (
    "requests",
    "torchvision",
    "torchvision.io",
    "torchvision.transforms",
    "librosa",
    "audioread",
    "av",
)


def utils(wheel: str) -> tuple[ModuleType, ModuleType]:
    """The modules for vision and audio of the package in a wheel."""
    for name in STUBBED:
        sys.modules[name] = MagicMock()
    sys.path.insert(0, wheel)
    from qwen_omni_utils.v2_5 import audio_process, vision_process

    logging.disable(logging.WARNING)
    smart_resize = vision_process.smart_resize

    def resize_to_something(*args, **limits):
        if 0 in (size := smart_resize(*args, **limits)):
            raise NothingLeft
        return size

    vision_process.smart_resize = resize_to_something
    return vision_process, audio_process


class NothingLeft(Exception):
    """A side of zero pixels, where its resizing fails; minomni keeps one cell."""


def answer(run):
    """What a call returns; "error" where it raises, and None for cases that are left out."""
    try:
        return run()
    except NothingLeft:
        return None
    except (AssertionError, ValueError, ZeroDivisionError):
        return "error"


def some(random: Random, options: dict) -> dict:
    """A random choice of keys, each with a random one of its values."""
    kept = [key for key in options if random.random() < 0.4]
    return {key: random.choice(options[key]) for key in kept}


def frames_case(vision, random: Random) -> list:
    """[options, frames of the film, its rate] -> numbers of the frames that are looked at."""
    options = some(
        random,
        {
            "fps": [0.25, 1, 2, 3.3, 8, 60],
            "nframes": [1, 2, 3, 5, 6, 7.0, 20, 400],
            "min_frames": [1, 3, 4, 9, 40],
            "max_frames": [1, 2, 5, 8, 33, 900],
            "video_start": [0.0, 0.4, 1, 2.57, 5, 70],
            "video_end": [0.3, 1, 3.5, 8, 99],
        },
    )
    if (
        "fps" in options and "nframes" in options and random.random() < 0.9
    ):  # an error: a few such cases are enough
        del options["fps"]
    total, rate = (
        random.choice([2, 3, 9, 24, 61, 300, 2_000]),
        random.choice([4, 12, 25, 30, 30000 / 1001, 60]),
    )

    def run():
        first, last, n = vision.calculate_video_frame_range(options, total, rate)
        nframes = vision.smart_nframes(options, n, rate)
        return torch.linspace(first, last, nframes).round().long().tolist()

    return [options, total, rate, answer(run)]


SIZES = {
    "min_pixels": [784, 3_136, 50_176, 200_000],
    "max_pixels": [3_136, 50_176, 151_200, 602_112, 3_000_000],
    "resized_height": [20, 280, 500, 2_000],
    "resized_width": [50, 420, 999],
}


def picture_size(random: Random) -> tuple[int, int]:
    return random.choice([8, 40, 97, 480, 720]), random.choice([30, 112, 640, 1_281])


def image_case(vision, random: Random) -> list:
    """[options, height, width of the picture] -> height, width after resizing."""
    options, (height, width) = paired(some(random, SIZES)), picture_size(random)

    def run():
        image = vision.fetch_image({"image": Image.new("RGB", (width, height))} | options)
        return [image.height, image.width]

    return [options, height, width, answer(run)]


def paired(options: dict) -> dict:
    """One of resized_height and resized_width alone counts for nothing there, and is an error here:
    no case.
    """
    both = "resized_height" in options and "resized_width" in options
    return {key: value for key, value in options.items() if both or not key.startswith("resized")}


def film_case(vision, random: Random) -> list:
    """[options, frames, height, width of each] -> height, width after resizing."""
    options = paired(
        some(random, SIZES | {"total_pixels": [100_000, 4_000_000, 20_480 * CELL**2, 1e9]})
    )
    n, (height, width) = random.choice([2, 4, 20, 250, 768]), picture_size(random)
    frames = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(n, 3, height, width)
    vision.VIDEO_READER_BACKENDS["torchvision"] = lambda ele: (frames, {}, 2.0)
    return [
        options,
        n,
        height,
        width,
        answer(lambda: resized_by(vision, {"video": "a film"} | options)),
    ]


def list_case(vision, random: Random) -> list:
    """[options, frames in the list, height, width of each] -> how many frames there are in the end,
    height, width.
    """
    options = paired(some(random, SIZES | {"total_pixels": [100_000, 4_000_000]}))
    n, (height, width) = random.choice([1, 2, 3, 5]), picture_size(random)
    images = [Image.new("RGB", (width, height))] * n

    def run():
        size = resized_by(vision, {"video": images} | options)
        return [len(vision.transforms.functional.resize.call_args.args[0]), *size]

    return [options, n, height, width, answer(run)]


def resized_by(vision, item: dict) -> list[int]:
    resize = vision.transforms.functional.resize
    resize.reset_mock()
    vision.fetch_video(item)
    return [int(side) for side in resize.call_args.args[1]]


def sound_case(audio, random: Random) -> list:
    """[options, samples at 16 kHz] -> samples that are heard."""
    options = some(
        random, {"audio_start": [0.0, 0.1, 0.33333, 1], "audio_end": [0.25, 0.7, 1.00001, 5]}
    )
    samples = random.choice([9_000, 16_000, 40_001])
    item = {"type": "audio", "audio": np.zeros(samples, np.float32)} | options
    found = audio.process_audio_info(
        [{"role": "user", "content": [item]}], use_audio_in_video=False
    )
    return [options, samples, len(found[0])]


def main(wheel: str) -> None:
    vision, audio = utils(wheel)
    vision.get_video_reader_backend = lambda: "torchvision"
    random = Random(0)
    makers = {
        "frames": (frames_case, vision, 300),
        "images": (image_case, vision, 150),
        "films": (film_case, vision, 150),
        "lists": (list_case, vision, 60),
        "sounds": (sound_case, audio, 30),
    }
    table = {
        name: [make(module, random) for _ in range(n)] for name, (make, module, n) in makers.items()
    }
    kept = {name: [case for case in cases if case[-1] is not None] for name, cases in table.items()}
    rows = {name: ",\n  ".join(json.dumps(case) for case in cases) for name, cases in kept.items()}
    text = ",\n".join(f' "{name}": [\n  {cases}]' for name, cases in rows.items())
    (GOLDEN / "qwen_omni_utils.json").write_text(f"{{\n{text}}}\n")


if __name__ == "__main__":
    main(sys.argv[1])
