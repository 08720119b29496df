"""The training losses, each a pure function of tensors. A stage adds up the ones it needs."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from minomni.config import IGNORE_INDEX

STFT_SIZES = (128, 256, 512, 1024)  # samples


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, L, V] against aligned targets [B, L].

    Positions with IGNORE_INDEX do not count.
    """
    targets = targets.to(logits.device).flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX)


def in_parts(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """next_token() over a batch in parts (logits [B, L, V], targets [B, L]) of different lengths.

    Every target has the same weight, whichever part it is in.
    """
    total = torch.zeros(())
    count = torch.zeros((), dtype=torch.long)
    for logits, targets in parts:
        part_count = (targets != IGNORE_INDEX).sum()
        total = total + next_token(logits, targets) * part_count
        count = count + part_count
    return total / count


def ctc(log_probs: Tensor, frames: Tensor, labels: list[Tensor]) -> Tensor:
    """CTC loss per label, averaged over rows.

    log_probs [B, T, classes], of which `frames` [B] are valid; labels: the classes of
    each row.
    """
    lengths = torch.tensor([len(row) for row in labels], device=log_probs.device)
    targets = torch.cat(labels).to(log_probs.device)
    loss = F.ctc_loss(
        log_probs.transpose(0, 1),
        targets,
        frames,
        lengths,
        reduction="none",
        zero_infinity=True,
    )
    return (loss / lengths).mean()


def masked_l1(predicted: Tensor, target: Tensor, frames: Tensor) -> Tensor:
    """Mean absolute error of mels [B, T, bands] over the first `frames` [B] frames of each row."""
    valid = torch.arange(target.shape[1], device=target.device) < frames[:, None]  # [B, T]
    return (predicted - target).abs().mean(-1)[valid].mean()


def off_center(grid: Tensor, lengths: Tensor) -> Tensor:
    """Squared means of the channels of FSQ values [B, C, channels]: their sum, averaged
    over rows.

    Only the first `lengths` [B] values of a row count. The loss keeps channels in use:
    a channel that has drifted to the end of its range is constant, and tanh is too flat
    there to recover.
    """
    valid = torch.arange(grid.shape[1], device=grid.device) < lengths[:, None]  # [B, C]
    means = (grid * valid[..., None]).sum(1) / lengths[:, None]  # [B, channels]
    return means.square().sum(-1).mean()


def flow_matching(
    predict: Callable[[Tensor, Tensor], Tensor],
    mel: Tensor,
    noise: Tensor,
    time: Tensor,
) -> Tensor:
    """Squared error of the velocity on the straight path from noise to mel.

    arXiv 2210.02747, eq. 22 and 23 with sigma 0. predict(x_t [B, T, bands], time [B])
    -> velocity [B, T, bands]; mel and noise [B, T, bands]; time [B] in [0, 1].
    """
    t = time[:, None, None]
    x_t = (1 - t) * noise + t * mel
    return F.mse_loss(predict(x_t, time), mel - noise)


def spectral(predicted: Tensor, target: Tensor) -> Tensor:
    """Multi-resolution STFT loss of waveforms [B, samples] (arXiv 1910.11480).

    Spectral convergence plus L1 of log magnitudes, averaged over STFT_SIZES.
    """
    total = torch.zeros((), device=target.device)
    for fft_size in STFT_SIZES:
        predicted_magnitude = stft_magnitude(predicted, fft_size)
        target_magnitude = stft_magnitude(target, fft_size)
        convergence = (predicted_magnitude - target_magnitude).norm() / target_magnitude.norm()
        log_l1 = (predicted_magnitude.log() - target_magnitude.log()).abs().mean()
        total = total + convergence + log_l1
    return total / len(STFT_SIZES)


def stft_magnitude(wave: Tensor, fft_size: int) -> Tensor:
    """Waveforms [B, samples] -> magnitudes [B, bins, frames], at least 1e-5; hop of a quarter."""
    window = torch.hann_window(fft_size, device=wave.device)
    spectrum = torch.stft(wave, fft_size, fft_size // 4, window=window, return_complex=True)
    return spectrum.abs().clamp_min(1e-5)


def adversarial(scores: list[Tensor]) -> Tensor:
    """How far a generator is from being taken for real: least squares over the scores [B, N] of
    each discriminator, averaged over them (arXiv 1611.04076, eq. 2, with b = c = 1).
    """
    return torch.stack([(1 - score).square().mean() for score in scores]).mean()


def discrimination(real: list[Tensor], generated: list[Tensor]) -> Tensor:
    """Least-squares loss of discriminators: 1 for the scores of recordings and 0 for generated
    waveforms, both [B, N], averaged over the discriminators (the same equation, with a = 0).
    """
    to_zero = torch.stack([score.square().mean() for score in generated]).mean()
    return adversarial(real) + to_zero


def feature_matching(real: list[list[Tensor]], generated: list[list[Tensor]]) -> Tensor:
    """L1 distance of activations to those of the recordings, summed over the layers of a
    discriminator and averaged over discriminators (arXiv 2010.05646, eq. 4).
    """
    distances = []
    for real_layers, generated_layers in zip(real, generated, strict=True):
        pairs = zip(real_layers, generated_layers, strict=True)
        distances.append(torch.stack([F.l1_loss(made, true) for true, made in pairs]).sum())
    return torch.stack(distances).mean()


def sequence_log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each row's targets [B, L] under logits [B, L, V] -> [B].

    Positions with IGNORE_INDEX do not count.
    """
    log_probs = logits.float().log_softmax(-1)
    ignored = targets == IGNORE_INDEX
    index = targets.masked_fill(ignored, 0)[..., None]
    target_log_probs = log_probs.gather(-1, index)[..., 0]  # [B, L]
    return target_log_probs.masked_fill(ignored, 0).sum(-1)


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_reference: Tensor,
    rejected_reference: Tensor,
    beta: float,
) -> Tensor:
    """Direct preference optimization (paper, sec. 3.3; arXiv 2305.18290, eq. 7).

    The first four: sequence log-probabilities [B] under the policy and under the
    reference model.
    """
    chosen_gain = chosen - chosen_reference
    rejected_gain = rejected - rejected_reference
    return -F.logsigmoid(beta * (chosen_gain - rejected_gain)).mean()
