"""Solutions of the exercises of notebook 07. The graders are in the notebook."""

import torch


def whose_keys(head, heads, shared):
    return head // (heads // shared)


def seen_by(i, real):
    return [j for j in range(i + 1) if real[j] or j == i]


def normed(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def one_more(q, keys, values):
    group = q.shape[0] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    shares = (torch.einsum("hd,shd->hs", q, keys) / q.shape[1] ** 0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", shares, values)
