"""Every loss of the school as a pure function of tensors. A stage names the ones it uses and adds
them up.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minomni.config import IGNORE_INDEX


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, L, V] against targets [B, L], already aligned; IGNORE_INDEX is
    skipped.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.to(logits.device).flatten(), ignore_index=IGNORE_INDEX
    )


def in_parts(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """next_token over a batch whose parts (logits [B, L, V], targets [B, L]) differ in length:
    targets count alike.
    """
    counts = [(targets != IGNORE_INDEX).sum() for _, targets in parts]
    return sum(next_token(*part) * count for part, count in zip(parts, counts)) / sum(counts)


def ctc(log_probs: Tensor, frames: Tensor, letters: list[Tensor]) -> Tensor:
    """CTC loss per letter: log-probabilities [B, T, classes] `frames` [B] of them valid, and each
    row's classes.
    """
    lengths = torch.tensor([len(row) for row in letters], device=log_probs.device)
    targets = torch.cat(letters).to(log_probs.device)
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), targets, frames, lengths, reduction="none", zero_infinity=True
    )
    return (loss / lengths).mean()


def masked_l1(predicted: Tensor, target: Tensor, frames: Tensor) -> Tensor:
    """Mean absolute difference of mels [B, T, bands] over the first `frames` [B] frames of each
    row.
    """
    real = torch.arange(target.shape[1], device=target.device) < frames[:, None]  # [B, T]
    return (predicted - target).abs().mean(-1)[real].mean()


def off_centre(grid: Tensor, lengths: Tensor) -> Tensor:
    """Squared mean of every channel of FSQ values [B, C, channels] over a row's `lengths` [B],
    summed, rows averaged.

    It keeps channels awake: one that has drifted to the end of its scale says the same of
    everything, and its tanh is too flat there to bring it back.
    """
    real = torch.arange(grid.shape[1], device=grid.device) < lengths[:, None]  # [B, C]
    means = (grid * real[..., None]).sum(1) / lengths[:, None]  # [B, channels]
    return means.square().sum(-1).mean()


def flow_matching(predict, mel: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Squared error of the velocity on the straight way from noise to mel (arXiv 2210.02747, eq. 22
    with sigma 0).

    predict(x_t [B, T, bands], time [B]) -> velocity [B, T, bands]; mel and noise [B, T, bands],
    time [B] in [0, 1].
    """
    t = time[:, None, None]
    x_t = (1 - t) * noise + t * mel
    return F.mse_loss(predict(x_t, time), mel - noise)


def spectral(
    predicted: Tensor, target: Tensor, sizes: tuple[int, ...] = (128, 256, 512, 1024)
) -> Tensor:
    """Multi-resolution STFT distance of waves [B, samples]: convergence plus log-magnitude (arXiv
    1910.11480).
    """
    total = 0.0
    for n in sizes:
        window = torch.hann_window(n, device=target.device)
        a, b = (
            torch.stft(w, n, n // 4, window=window, return_complex=True).abs().clamp_min(1e-5)
            for w in (predicted, target)
        )
        total = total + (a - b).norm() / b.norm() + (a.log() - b.log()).abs().mean()
    return total / len(sizes)


def sequence_log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each row's targets [B, L] under logits [B, L, V], IGNORE_INDEX skipped -> [B]."""
    picked = (
        logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    )  # [B, L]
    return (picked * (targets != IGNORE_INDEX)).sum(-1)


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_reference: Tensor,
    rejected_reference: Tensor,
    beta: float,
) -> Tensor:
    """Direct preference optimisation on sequence log-probabilities [B] (paper, sec. 3.3; arXiv
    2305.18290, eq. 7).
    """
    margin = (chosen - chosen_reference) - (rejected - rejected_reference)
    return -F.logsigmoid(beta * margin).mean()
