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


def my_talker_vectors(hidden, embeds, is_media):
    spoken = embeds.masked_fill(is_media[:, None], 0)
    return hidden + spoken


def my_step_inputs(words, end, padding, steps):
    repeated = padding.expand(steps, -1)  # as often as could be needed
    return torch.cat([words, end[None], repeated])[:steps]


def lengths(samples, height, width, codes):
    frames = math.ceil(samples / 160)
    audio_tokens = (frames + 1) // 4
    image_tokens = height // 28 * (width // 28)
    return audio_tokens, image_tokens, codes / 25
