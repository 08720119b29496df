"""Solutions of the exercises of notebook 01. The graders are in the notebook."""

import torch


def tokens_of(samples):
    frames = -(-samples // 160)
    return (frames + 1) // 4


def decibels(value):
    return 10 * (4 * value - 4)


def heard_at(hz, rate):
    hz = hz % rate
    return min(hz, rate - hz)


def floored(steps):
    return torch.maximum(steps, steps.amax((1, 2), keepdim=True) - 8)


def frames_ready(samples):
    return max(0, (samples - 200) // 160 + 1)
