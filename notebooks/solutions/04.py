"""Solutions of the exercises of notebook 04. The graders are in the notebook."""

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


def my_windows(x, labels, attend):
    order = labels.argsort(stable=True)
    sizes = labels.unique(return_counts=True)[1]  # patches in each window
    found = [attend(window) for window in x[order].split(sizes.tolist())]
    return torch.cat(found)[order.argsort()]


def my_merge(x, rows, columns):
    x = x.view(rows // 2, 2, columns // 2, 2, -1)
    return x.transpose(1, 2).reshape(rows * columns // 4, -1)


def pairs(rows, columns, side):
    down, across = (n // side * side**2 + (n % side) ** 2 for n in (rows, columns))
    return down * across
