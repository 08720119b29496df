"""Solutions of the exercises of notebook 00. The graders are in the notebook."""

import math


def samples_of(codes, repeats, rates):
    return codes * repeats * math.prod(rates)


def clip_tokens(frames, height, width, samples):
    seen = -(-frames // 2) * (height // 28) * (width // 28)
    heard = (-(-samples // 160) + 1) // 4
    return seen + heard + (4 if samples else 2)


def fed(words, steps):
    lines = words[:-1] + ["over"] + ["silence"] * steps
    return lines[:steps]


def placed(embeds, ids, features, token):
    row = embeds.clone()
    row[ids == token] = features
    return row
