"""Solutions of the exercises of notebook 02. The graders are in the notebook."""

import math

import torch


def my_convolution(x, weight, bias, stride):
    zero = torch.zeros(1, x.shape[1])
    x = torch.cat([zero, x, zero])
    starts = range(0, len(x) - 2, stride)
    return torch.stack([torch.einsum("kc,dck->d", x[t : t + 3], weight) + bias for t in starts])


def my_positions(count, size):
    half = size // 2
    omega = 10_000.0 ** (-torch.arange(half).double() / (half - 1))
    angles = torch.arange(count)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def my_block_attention(q, k, v, lengths):
    lengths = torch.tensor(lengths)
    block = torch.arange(len(lengths)).repeat_interleave(lengths)  # [T]
    mask = block[:, None] == block  # [T, T]
    scores = q @ k.T / math.sqrt(q.shape[1])
    weights = scores.masked_fill(~mask, -math.inf).softmax(1)
    return weights @ v, weights


def my_pool(x, lengths):
    even = [block[: len(block) // 2 * 2] for block in x.split(lengths)]
    return torch.cat([block.unflatten(0, (len(block) // 2, 2)).mean(1) for block in even])


def final_tokens(samples):
    frames = max(0, (samples - 200) // 160 + 1)
    return frames // 200 * 50
