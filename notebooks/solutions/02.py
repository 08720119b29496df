"""Solutions of the exercises of notebook 02. The graders are in the notebook."""

import math

import torch


def heard_by(ms):
    return ms // 2000, ms % 2000 // 40


def scores_of(frames):
    full, rest = divmod(frames, 200)
    return full * 100**2 + ((rest + 1) // 2) ** 2


def packed(x, steps):
    even = [block[: n // 2 * 2] for block, n in zip(x, steps)]
    return torch.cat([block.unflatten(0, (len(block) // 2, 2)).mean(1) for block in even])


def nearness(i, j, size):
    apart, half = i % 100 - j % 100, size // 2
    return sum(math.cos(apart / 10_000 ** (k / (half - 1))) for k in range(half))


def understood(samples):
    frames = max(0, (samples - 200) // 160 + 1)
    return frames // 200 * 50
