"""The training losses, each a function of tensors. A stage adds up the ones it needs.

A batch may be divided over several processes, each of which has some of its rows (distributed.py).
A mean is over the rows of all of them, whichever process computes a loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from minomni.config import IGNORE_INDEX
from minomni.train.distributed import summed

STFT_SIZES = (128, 256, 512, 1024)  # samples


def mean(values: Tensor) -> Tensor:
    """Mean of values of any shape, over all processes."""
    return ratio(precise(values).sum(), torch.full((), values.numel(), device=values.device))


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """One scalar over another, each summed over all processes; in fp32 at least. 0 for 0 / 0."""
    total = precise(total)
    sums = summed(torch.stack([total, count.to(total)]))
    return sums[0] / sums[1].clamp_min(torch.finfo(sums.dtype).tiny)


def precise(values: Tensor) -> Tensor:
    """The same values in fp32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, L, V] against aligned targets [B, L].

    Positions with IGNORE_INDEX do not count.
    """
    return in_parts([(logits, targets)])


def in_parts(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """next_token() over a batch in parts (logits [B, L, V], targets [B, L]) of different lengths.

    Every target has the same weight, whichever part it is in.
    """
    totals = []
    counts = []
    for logits, targets in parts:
        targets = targets.to(logits.device).flatten()
        rows = precise(logits.flatten(0, 1))
        totals.append(F.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX, reduction="sum"))
        counts.append((targets != IGNORE_INDEX).sum())
    return ratio(torch.stack(totals).sum(), torch.stack(counts).sum())


def ctc(log_probs: Tensor, frames: Tensor, labels: list[Tensor]) -> Tensor:
    """CTC loss per label, averaged over the rows that have labels.

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
    labeled = lengths > 0
    return mean(loss[labeled] / lengths[labeled])


def masked_l1(predicted: Tensor, target: Tensor, frames: Tensor) -> Tensor:
    """Mean absolute error of mels [B, T, bands] over the first `frames` [B] frames of each row."""
    valid = torch.arange(target.shape[1], device=target.device) < frames[:, None]  # [B, T]
    return mean((predicted - target).abs().mean(-1)[valid])


def off_center(grid: Tensor, lengths: Tensor) -> Tensor:
    """Squared means of the channels of FSQ values [B, C, channels]: their sum, averaged
    over rows.

    Only the first `lengths` [B] values of a row count. The loss keeps channels in use:
    a channel that has drifted to the end of its range is constant, and tanh is too flat
    there to recover.
    """
    valid = torch.arange(grid.shape[1], device=grid.device) < lengths[:, None]  # [B, C]
    means = (grid * valid[..., None]).sum(1) / lengths[:, None]  # [B, channels]
    return mean(means.square().sum(-1))


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
    return mean((predict(x_t, time) - (mel - noise)).square())


def spectral(predicted: Tensor, target: Tensor) -> Tensor:
    """Multi-resolution STFT loss of waveforms [B, samples] (arXiv 1910.11480).

    Spectral convergence plus L1 of log magnitudes, averaged over STFT_SIZES.
    """
    total = torch.zeros((), device=target.device)
    for fft_size in STFT_SIZES:
        predicted_magnitude = stft_magnitude(predicted, fft_size)
        target_magnitude = stft_magnitude(target, fft_size)
        difference = (predicted_magnitude - target_magnitude).square().sum()
        # Of equal waveforms the root would have an infinite gradient.
        squared = ratio(difference, target_magnitude.square().sum())
        convergence = squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()
        log_l1 = mean((predicted_magnitude.log() - target_magnitude.log()).abs())
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
    return torch.stack([mean((1 - score).square()) for score in scores]).mean()


def discrimination(real: list[Tensor], generated: list[Tensor]) -> Tensor:
    """Least-squares loss of discriminators: 1 for the scores of recordings and 0 for generated
    waveforms, both [B, N], averaged over the discriminators (the same equation, with a = 0).
    """
    to_zero = torch.stack([mean(score.square()) for score in generated]).mean()
    return adversarial(real) + to_zero


def feature_matching(real: list[list[Tensor]], generated: list[list[Tensor]]) -> Tensor:
    """L1 distance of activations to those of the recordings, summed over the layers of a
    discriminator and averaged over discriminators (arXiv 2010.05646, eq. 4).
    """
    distances = []
    for real_layers, generated_layers in zip(real, generated, strict=True):
        pairs = zip(real_layers, generated_layers, strict=True)
        distances.append(torch.stack([mean((made - true).abs()) for true, made in pairs]).sum())
    return torch.stack(distances).mean()


def sequence_log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each row's targets [B, L] under logits [B, L, V] -> [B].

    Positions with IGNORE_INDEX do not count.
    """
    log_probs = precise(logits).log_softmax(-1)
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
    return -mean(F.logsigmoid(beta * (chosen_gain - rejected_gain)))
