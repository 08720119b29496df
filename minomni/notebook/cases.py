"""Cases for graders that several exercises share."""

import torch

from minomni.config import SIZES
from minomni.inputs.patches import to_patches


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
