"""Solutions of the exercises of notebook 00. The graders are in the notebook."""

import math

import torch


def my_placed(embeds, ids, features, token):
    x = embeds.clone()
    x[ids == token] = features
    return x


def my_answer(next_logits, stop, limit):
    said = []
    while len(said) < limit and stop not in said:
        said.append(int(next_logits(said).argmax()))
    return said


def my_talker_inputs(states, embeds, end, pad, steps):
    vectors = [*(states + embeds), end]
    vectors += [pad] * (steps - len(vectors))
    return torch.stack(vectors[:steps])


def samples_of(codes, repeats, rates):
    return codes * repeats * math.prod(rates)
