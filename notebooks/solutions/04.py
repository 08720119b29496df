"""Solutions of the exercises of notebook 04. The graders are in the notebook."""

import math

import torch


def my_masks(positions, side):
    frame = positions[:, :2]
    window = torch.cat([frame, positions[:, 2:] // side], 1)  # [N, 4]
    return [(keys[:, None] == keys).all(2) for keys in (window, frame)]


def my_rotate(x, rows, columns):
    half = x.shape[1] // 2
    omega = 10_000.0 ** (-torch.arange(0, half, 2).double() / half)  # [d / 4]
    angles = torch.cat([rows[:, None] * omega, columns[:, None] * omega], 1)  # [N, d / 2]
    pairs = torch.complex(x[:, :half].double(), x[:, half:].double())
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], 1)


def my_head(q, k, v, mask):
    scores = q @ k.T / q.shape[1] ** 0.5  # [N, N]
    weights = scores.masked_fill(~mask, -math.inf).softmax(1)
    return weights @ v, weights


def my_merge(x, rows, columns):
    x = x.view(rows // 2, 2, columns // 2, 2, -1)
    return x.transpose(1, 2).reshape(rows * columns // 4, -1)


def pairs(rows, columns, side):
    down, across = (n // side * side**2 + (n % side) ** 2 for n in (rows, columns))
    return down * across
