"""Solutions of the exercises of notebook 11. The graders are in the notebook."""

import torch


def my_transposed(x, weight, rate):
    channels, taps = weight.shape[1:]
    out = torch.zeros(channels, rate * (x.shape[1] - 1) + taps)
    for j in range(taps):
        last = j + rate * (x.shape[1] - 1) + 1
        out[:, j:last:rate] += weight[:, :, j].T @ x
    return out


def my_snake(x, alpha, beta):
    a, b = alpha.exp()[:, None], beta.exp()[:, None]
    return x + (a * x).sin().square() / b


def my_double(x, taps):
    reach = len(taps) // 4
    wide = torch.nn.functional.pad(x, (reach, reach), mode="replicate")
    sparse = torch.stack([wide, torch.zeros_like(wide)], 2).flatten(1)  # x 0 x 0 ...
    return 2 * sparse.unfold(1, len(taps), 1)[:, : 2 * x.shape[1]] @ taps


def my_halve(x, taps):
    half = len(taps) // 2
    wide = torch.nn.functional.pad(x, (half - 1, half), mode="replicate")
    return wide.unfold(1, len(taps), 2) @ taps


def my_activation(x, alpha, beta, taps):
    fine = my_snake(my_double(x, taps), alpha, beta)
    return my_halve(fine, taps)


def sees(kernel, dilations):
    side = kernel // 2
    return sum(5 + side * dilation + 5 + side for dilation in dilations)
