"""Batches of rows with similar lengths, padded."""

from random import Random

import torch
from torch.nn import functional as F


def similar_lengths(
    lengths: list,
    batch: int,
    seed: int,
    step: int,
    weights: list[float] | None = None,
    pool: int = 8,
) -> list[int]:
    """Indices of one batch whose rows are about equally long, so little is padding; a function of
    the step alone.

    lengths: numbers, or tuples of them that are compared in turn. weights: how often each index is
    drawn; None for all alike. pool: of how many batches the rows are drawn and sorted together.
    """
    random = Random(f"{seed}-{step // pool}")
    chosen = random.choices(range(len(lengths)), weights, k=batch * pool)
    chosen.sort(key=lengths.__getitem__)
    batches = [chosen[i : i + batch] for i in range(0, len(chosen), batch)]
    random.shuffle(batches)
    return batches[step % pool]


def pad_mels(mels: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mels of several lengths -> [B, T, bands] filled up with silence, and their lengths [B]."""
    frames = torch.tensor([len(m) for m in mels])
    silence = -11.5129  # log(1e-5), what voice_mel gives for zeros
    return torch.stack(
        [F.pad(m, (0, 0, 0, int(frames.max()) - len(m)), value=silence) for m in mels]
    ), frames
