"""Batches of rows with similar lengths, and their padding."""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from random import Random
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

SILENT_MEL = -11.5129  # log(1e-5), what voice_mel gives for zeros

Item = TypeVar("Item")


def batched(items: list[Item], size: int) -> list[list[Item]]:
    """Consecutive parts of a list, `size` items each; the last part may be shorter."""
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def equally_batched(items: list[Item], size: int) -> list[list[Item]]:
    """Consecutive parts of a list, at most `size` items each, whose lengths differ by at most 1."""
    if not items:
        return []
    parts = ceil(len(items) / size)
    borders = [len(items) * part // parts for part in range(parts + 1)]
    return [items[begin:end] for begin, end in pairwise(borders)]


def similar_lengths(
    lengths: Sequence,
    batch: int,
    seed: int,
    step: int,
    weights: Sequence[float] | None = None,
    pool: int = 8,
) -> list[int]:
    """Indices of one batch of rows with similar lengths, to keep padding small.

    A function of the seed and the step alone. lengths: numbers, or tuples that are compared in
    order. weights: how often each index is drawn; None for uniform. pool: number of batches that
    are drawn and sorted together.
    """
    random = Random(f"{seed}-{step // pool}")
    indices = random.choices(range(len(lengths)), weights, k=batch * pool)
    indices.sort(key=lengths.__getitem__)
    batches = batched(indices, batch)
    random.shuffle(batches)
    return batches[step % pool]


def pad_mels(mels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mels [T_i, bands] -> one batch [B, T, bands] padded with silence, and their lengths [B]."""
    lengths = [len(mel) for mel in mels]
    longest = max(lengths)
    padded = [F.pad(mel, (0, 0, 0, longest - len(mel)), value=SILENT_MEL) for mel in mels]
    return torch.stack(padded), torch.tensor(lengths)
