"""Solutions of the exercises of notebook 03. The graders are in the notebook."""

import math

import torch


def my_size(height, width, least, most):
    new = [28 * round(side / 28) for side in (height, width)]
    if new[0] * new[1] > most:
        beta = math.sqrt(height * width / most)
        new = [28 * max(1, math.floor(side / beta / 28)) for side in (height, width)]
    elif new[0] * new[1] < least:
        gamma = math.sqrt(least / (height * width))
        new = [28 * math.ceil(side * gamma / 28) for side in (height, width)]
    return tuple(new)


def my_cut(frames):
    n, _, height, width = frames.shape
    rows = []
    for t in range(0, n, 2):
        for top in range(0, height, 28):
            for left in range(0, width, 28):
                for y in (top, top + 14):
                    for x in (left, left + 14):
                        piece = frames[t : t + 2, :, y : y + 14, x : x + 14]
                        rows.append(piece.transpose(0, 1).flatten())
    return torch.stack(rows)


def my_fast_cut(frames):
    n, _, height, width = frames.shape
    x = frames.reshape(n // 2, 2, 3, height // 28, 2, 14, width // 28, 2, 14)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 1176)


def my_video(total, rate, most, frame_pixels, clip_pixels):
    n = int(min(max(2 * total / rate, 4), most, total)) // 2 * 2
    if n < 2:
        return [0], frame_pixels
    moments = [round(i * (total - 1) / (n - 1)) for i in range(n)]
    return moments, min(frame_pixels, clip_pixels / (n // 2))


def row_of(y, x, width):
    cell = y // 28 * (width // 28) + x // 28
    inside = y % 28 // 14 * 2 + x % 28 // 14
    return 4 * cell + inside


def halved(weight):
    return weight.view(-1, 3, 2, 196).sum(2).flatten(1)
