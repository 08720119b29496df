"""Sampling the next id from logits.

Repetition penalty, suppression, temperature, top-k and top-p are applied in the release's order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minomni.config import SamplingConfig
from minomni.errors import UserError

NEVER = float("-inf")  # logit of an id that is never sampled

# One generator for a whole batch, one for each row, or None for torch's global one.
Generators = torch.Generator | list[torch.Generator] | None


def penalize_repetition(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Make the ids of a row's history [B, V] (bool) less likely in logits [B, V] -> [B, V].

    Positive logits are divided by the penalty, negative ones are multiplied.
    """
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(history, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Mask all but the k largest logits of each row: [B, V] -> [B, V]."""
    k = min(k, logits.shape[-1])
    largest = logits.topk(k, dim=-1).values  # [B, k], descending
    smallest = largest[:, -1:]  # [B, 1]
    return logits.masked_fill(logits < smallest, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely ids whose probabilities reach p, at least one.

    logits [B, V] -> [B, V]. Sorted and summed from the least likely id up, as
    transformers does, so that rounding and ties give the same result.
    """
    ascending, order = logits.sort(dim=-1)
    cumulative = ascending.softmax(-1).cumsum(-1)
    drop = cumulative <= 1 - p
    drop[:, -1].fill_(False)
    drop = drop.scatter(1, order, drop)  # from sorted order back to id order
    return logits.masked_fill(drop, NEVER)


def process_logits(
    logits: Tensor,
    history: Tensor | None,
    sampling: SamplingConfig,
    suppressed: Tensor | None,
) -> Tensor:
    """The logits [B, V] that an id is chosen from: [B, V] fp32 -> [B, V].

    history: bool [B, V], the ids that the repetition penalty applies to (None: no penalty);
    suppressed: bool [V], ids that are never chosen (None: no such ids), on the device of the
    logits. At temperature 0 the largest logit is chosen, so that temperature, top-k and top-p do
    not apply. Nothing is read back from the device.
    """
    if history is not None and sampling.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, history, sampling.repetition_penalty)
    if suppressed is not None:
        logits = logits.masked_fill(suppressed, NEVER)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return logits


def logit_ranges(logits: Tensor) -> Tensor:
    """The difference between the largest and the smallest logit of each row: [B, V] -> [B].

    NaN where a row has one.
    """
    return logits.amax(-1) - logits.amin(-1)  # aminmax() would be much slower


def check_finite(logits: Tensor) -> None:
    """Raise UserError if a row of logits [B, V] is constant or not finite: broken weights."""
    check_ranges(logit_ranges(logits).tolist())


def check_ranges(ranges: list[float]) -> None:
    """Raise UserError if the logits of a row are constant or not finite: broken weights.

    ranges: as logit_ranges() gives them.
    """
    if all(0 < value < float("inf") for value in ranges):
        return
    what = "only one number" if 0 in ranges else "NaN or infinite numbers"
    raise UserError(
        f"the model's weights give {what} instead of scores for the next token; its files are "
        f"damaged, or its half precision overflows: copy them again, or load with "
        f"dtype=torch.float32"
    )


def draw(probabilities: Tensor, generator: Generators) -> Tensor:
    """Sample one id per row from probabilities [B, V] -> [B].

    With a list, row i uses generator i.
    """
    if not isinstance(generator, list):
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    ids = []
    for row, row_generator in zip(probabilities.split(1), generator, strict=True):
        ids.append(torch.multinomial(row, 1, generator=row_generator)[:, 0])
    return torch.cat(ids)


def cut_at_stop(
    steps: list[Tensor], rows: int, stops: Sequence[int], keep_stop: bool = False
) -> list[Tensor]:
    """Ids of a batch, one tensor [B] per step -> per row the ids before its first stop id [n].

    keep_stop: the stop id too. rows: B, for a batch without steps.
    """
    if not steps:
        return [torch.zeros(0, dtype=torch.long) for _ in range(rows)]
    ids = torch.stack(steps, dim=1)  # [B, n]
    is_stop = torch.isin(ids, torch.tensor(stops, device=ids.device))
    result = []
    for row, row_is_stop in zip(ids, is_stop, strict=True):
        end = len(row)
        if row_is_stop.any():
            end = int(row_is_stop.long().argmax()) + int(keep_stop)
        result.append(row[:end])
    return result


def sample(
    logits: Tensor,
    history: Tensor | None,
    sampling: SamplingConfig,
    suppressed: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    """Sample the next id of every row: logits [B, V] -> ids [B] long.

    history and suppressed: as in process_logits(); temperature 0 takes the largest logit. The
    generator is on the device of the logits; with one for each row, the result of a row does not
    depend on the rest of its batch. Raises UserError for logits that are not finite.
    """
    logits = logits.float()
    check_finite(logits)
    logits = process_logits(logits, history, sampling, suppressed)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return draw(logits.softmax(-1), generator)
