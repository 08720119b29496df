"""Solutions of the exercises of notebook 08, and the code that it folds. The graders are in the
notebook.
"""

import torch
import torch.nn.functional as F


def my_fsq(x, levels):
    top = torch.tensor(levels) - 1
    scaled = (x.tanh() + 1) / 2 * top
    rounded = scaled + (scaled.round() - scaled).detach()
    return rounded / top * 2 - 1


def my_collapse(path, blank=0):
    labels = []
    for i, label in enumerate(path):
        repeated = i > 0 and label == path[i - 1]
        if not repeated and label != blank:
            labels.append(label)
    return labels


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


def shortest(text):
    return len(text) + sum(a == b for a, b in zip(text, text[1:]))


def my_nearest(x, book):
    distance = (x[..., None, :] - book).square().sum(-1)
    return distance.argmin(-1)


def my_conv(x, conv):
    size, step, pad = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    wide = F.pad(x, (0, 0, pad, pad))
    seen = [wide[i : i + size].T for i in range(0, len(x) + 2 * pad - size + 1, step)]
    return torch.stack([(conv.weight * s).sum((1, 2)) + conv.bias for s in seen])


def my_near(x, conv, bounds):
    out = conv.bias.repeat(len(x), 1)
    for i, (low, high) in enumerate(bounds):
        for j in range(max(i - 2, low), min(i + 3, high)):
            out[i] += conv.weight[:, 0, j - i + 2] * x[j]
    return out


def my_block(part, x, size):
    starts = [i // size * size for i in range(len(x))]
    bounds = [(s, min(s + size, len(x))) for s in starts]  # what token i sees
    x = x + my_near(x, part.near, bounds)
    q, k, v = (y.unflatten(-1, (part.heads, -1))
               for y in part.qkv(part.attn_norm(x)).chunk(3, -1))  # [T, heads, d]
    out = torch.zeros_like(q)
    for head in range(part.heads):
        for i, (low, high) in enumerate(bounds):
            weights = (k[low:high, head] @ q[i, head] / q.shape[-1] ** 0.5).softmax(0)
            out[i, head] = weights @ v[low:high, head]
    x = x + part.out(out.flatten(1))
    return x + part.ff(part.ff_norm(x))


def my_encoder(codec, mel):
    x = F.gelu(my_conv((mel + 5) / 3, codec.stem))  # about unit size
    for conv in codec.down:
        x = F.gelu(my_conv(x, conv))
    size = codec.config.block_frames // codec.config.downsample
    for part in codec.encoder:
        x = my_block(part, x, size)
    return codec.to_grid(x)


def my_mel(codec, grid, voice):
    x = codec.from_grid(grid) + codec.speaker(voice)
    for i, conv in enumerate(codec.mel_layers):
        x = x + F.gelu(my_conv(x, conv))
        if i < len(codec.down):
            x = torch.stack([row for row in x for _ in range(2)])
    return my_conv(x, codec.mel_out) * 3 - 5
