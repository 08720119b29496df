"""Solutions of the exercises of notebook 09. The graders are in the notebook."""

import math

import torch


def my_inputs(r, end, pad, table, codes, bos):
    before = table[torch.tensor([bos, *codes])]
    column = [*r, end] + [pad] * len(codes)
    return torch.stack(column[: len(before)]) + before


def my_targets(length, rows, eos):
    longest = max(map(len, rows))
    targets = torch.full((len(rows), length + 2 + longest), -100)
    for target, codes in zip(targets, rows):
        answer = torch.tensor([*codes, eos])
        target[length + 1 : length + 1 + len(answer)] = answer
    return targets


def my_decode(logits_of, choose, banned, stops, most):
    codes = []
    while len(codes) < most:
        logits = logits_of(codes).clone()
        logits[banned] = -math.inf
        chosen = int(choose(logits))
        if chosen in stops:
            break
        codes.append(chosen)
    return codes


def my_banned(ids, rows, pad, bos, eos):
    return [i for i in range(ids) if i == bos or i >= rows and i not in (pad, eos)]


def ready_at(chosen, cost, count):
    free, times = 0, []
    for i in range(count):
        free = max(free, chosen[min(i + 1, len(chosen) - 1)]) + cost
        times.append(free)
    return times


def my_nucleus(logits, temperature, top_p):
    p = (logits / temperature).softmax(0)
    falling, order = p.sort(descending=True)
    likelier = falling.cumsum(0) - falling  # probability of all likelier ids
    kept = torch.where(likelier < top_p, falling, 0.0)
    return torch.zeros_like(p).scatter(0, order, kept / kept.sum())
