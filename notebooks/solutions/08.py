"""Solutions of the exercises of notebook 08. The graders are in the notebook."""

import torch


def my_collapse(path, blank=0):
    labels = []
    for i, label in enumerate(path):
        repeated = i > 0 and label == path[i - 1]
        if not repeated and label != blank:
            labels.append(label)
    return labels


def my_fsq(x, levels):
    top = torch.tensor(levels) - 1
    scaled = (x.tanh() + 1) / 2 * top
    rounded = scaled + (scaled.round() - scaled).detach()
    return rounded / top * 2 - 1


def my_forward(probs, letters):
    labels = [0]
    for letter in letters:
        labels += [letter, 0]
    alpha = [float(probs[0][c]) if s < 2 else 0.0 for s, c in enumerate(labels)]
    for row in probs[1:]:
        new = []
        for s, c in enumerate(labels):
            reached = alpha[s] + (alpha[s - 1] if s > 0 else 0.0)
            if s > 1 and c != 0 and c != labels[s - 2]:
                reached += alpha[s - 2]
            new.append(reached * float(row[c]))
        alpha = new
    return sum(alpha[-2:])


def my_nearest(x, book):
    distance = (x[..., None, :] - book).square().sum(-1)
    return distance.argmin(-1)


def shortest(text):
    return len(text) + sum(a == b for a, b in zip(text, text[1:]))
