"""From logits to the next id: repetition penalty, suppression, temperature, top-k, top-p, in the release's order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minomni.config import SamplingConfig

NEVER = float("-inf")


def penalise(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Make ids that a row has had less likely: positive logits are divided by the penalty, negative ones multiplied."""
    return torch.where(history, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the k largest logits of each row."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
    return logits.masked_fill(logits < smallest, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely ids whose probabilities reach p, at least one."""
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities  # probability of everything more likely
    drop = (before >= p).scatter(1, order, before >= p)  # back from sorted order to id order
    drop.scatter_(1, order[:, :1], False)
    return logits.masked_fill(drop, NEVER)


def sample(logits: Tensor, history: Tensor | None, sampling: SamplingConfig, suppress: Sequence[int] | Tensor = (),
           generator: torch.Generator | None = None) -> Tensor:
    """Choose the next id of every row. logits [B, V] -> ids [B] long.

    history: bool [B, V], the ids that the repetition penalty applies to (None: no penalty); suppress: ids never chosen;
    temperature 0 takes the largest logit. The generator lives on the logits' device.
    """
    logits = logits.float()
    if history is not None and sampling.repetition_penalty != 1.0:
        logits = penalise(logits, history, sampling.repetition_penalty)
    if len(suppress):
        logits = logits.index_fill(1, torch.as_tensor(suppress, device=logits.device), NEVER)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]  # [B]
