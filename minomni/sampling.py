"""From logits to the next id: repetition penalty, suppression, temperature, top-k, top-p, in the
release's order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minomni.config import SamplingConfig
from minomni.errors import UserError

NEVER = float("-inf")


def penalize_repetition(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Make ids that a row has had less likely: positive logits are divided by the penalty, negative
    ones multiplied.
    """
    return torch.where(history, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the k largest logits of each row."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
    return logits.masked_fill(logits < smallest, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely ids whose probabilities reach p, at least one.

    Sorted and summed from the least likely on, as transformers does it: rounding and ties then fall
    alike.
    """
    ascending, order = logits.sort(dim=-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[:, -1] = False
    return logits.masked_fill(
        drop.scatter(1, order, drop), NEVER
    )  # back from sorted order to id order


def check_finite(logits: Tensor) -> None:
    """Raise UserError where a row of logits [B, V] is not finite or of one value throughout: the
    weights are broken.
    """
    spreads = (
        logits.amax(-1) - logits.amin(-1)
    ).tolist()  # [B], NaN where a row holds one; aminmax() is much slower
    if not all(0 < spread < float("inf") for spread in spreads):
        what = "only one number" if 0 in spreads else "NaN or infinite numbers"
        raise UserError(
            f"the model's weights give {what} instead of scores for the next token; its files are damaged, "
            f"or its half precision overflows: copy them again, or load with dtype=torch.float32"
        )


def draw(
    probabilities: Tensor, generator: torch.Generator | list[torch.Generator] | None
) -> Tensor:
    """One id of each row by its probabilities [B, V] -> [B]; with a list, row i draws from
    generator i.
    """
    if not isinstance(generator, list):
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    rows = zip(probabilities.split(1), generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own)[:, 0] for row, own in rows])


def sample(
    logits: Tensor,
    history: Tensor | None,
    sampling: SamplingConfig,
    suppress: Sequence[int] | Tensor = (),
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Choose the next id of every row. logits [B, V] -> ids [B] long.

    history: bool [B, V], the ids that the repetition penalty applies to (None: no penalty);
    suppress: ids never chosen; temperature 0 takes the largest logit. The generator lives on the
    logits' device; with one for each row, a row draws the same whatever else is in its batch.
    Raises UserError for logits that are not finite.
    """
    logits = logits.float()
    check_finite(logits)
    if history is not None and sampling.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, history, sampling.repetition_penalty)
    if len(suppress):
        logits = logits.index_fill(1, torch.as_tensor(suppress, device=logits.device), NEVER)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return draw(logits.softmax(-1), generator)
