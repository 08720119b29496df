"""Solutions of the exercises of notebook 07. The graders are in the notebook."""

import torch


def my_norm(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def my_attend(q, k, v):
    heads, d = q.shape[1:]
    group = heads // k.shape[1]
    out = torch.zeros_like(q)
    for h in range(heads):
        for i in range(len(q)):
            keys, values = k[: i + 1, h // group], v[: i + 1, h // group]  # [i + 1, d]
            weights = (keys @ q[i, h] / d**0.5).softmax(0)
            out[i, h] = weights @ values
    return out


def my_mlp(x, gate, up, down):
    z = x @ gate.T  # [L, D']
    return (z * z.sigmoid() * (x @ up.T)) @ down.T


def my_step(q, keys, values):
    group = q.shape[0] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))  # [S, H, d]
    weights = (torch.einsum("hd,shd->hs", q, keys) / q.shape[1] ** 0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, values)


def my_loss(logits, ids, mask):
    log_p = logits[:-1].log_softmax(-1)  # [L - 1, V]
    right = log_p.gather(1, ids[1:, None])[:, 0]
    return -right[mask[1:].bool()].mean()
