"""Cases for graders that several exercises share."""

import torch
from PIL import Image

from minomni.config import SIZES, TINY
from minomni.data.vocabulary import world_tokenizer
from minomni.inputs.patches import to_patches
from minomni.inputs.prompt import Processor


def cut_cases() -> list[tuple]:
    """Cases of grade() for a cut into patches.

    The numbers in the frames [n, 3, height, width] are all different, so each must come from its
    place.
    """
    sizes = {
        "one cell: its four patches": (2, 28, 28),
        "cell by cell, row by row": (2, 56, 84),
        "two frame pairs": (4, 56, 28),
    }
    cases = []
    for about, (n, height, width) in sizes.items():
        frames = torch.arange(n * 3 * height * width).view(n, 3, height, width)
        expected, _ = to_patches(frames, SIZES["qwen7b"].thinker.vision)
        cases.append(((frames,), expected, about))
    return cases


def length_cases() -> list[tuple]:
    """Cases of grade() for the lengths that a question, an image and an answer have in `tiny`.

    The tokens are counted in the sequences that the package makes.
    """
    sizes = {
        "as in section 1": (21_452, 112, 112, 52),
        "134 whole frames": (21_440, 56, 84, 25),
        "three frames are a token": (321, 112, 56, 1),
        "a block of sound": (32_000, 84, 112, 130),
    }
    speech = TINY.token2wav
    assert speech is not None  # tiny speaks
    tokens = TINY.thinker.tokens
    processor = Processor(TINY, world_tokenizer(tokens))
    cases = []
    for about, (samples, height, width, codes) in sizes.items():
        image = Image.new("RGB", (width, height))
        content = [{"audio": torch.zeros(samples)}, {"image": image}]
        ids = processor([[{"role": "user", "content": content}]]).input_ids
        audio_tokens = int((ids == tokens.audio).sum())
        image_tokens = int((ids == tokens.image).sum())
        seconds = codes / speech.codes_per_second
        expected = (audio_tokens, image_tokens, seconds)
        cases.append(((samples, height, width, codes), expected, about))
    return cases
