"""Solutions of the exercises of notebook 12. The graders are in the notebook."""

import math

import torch


def my_wait(arrivals, lengths):
    due, wait = arrivals[0], 0
    for arrival, length in zip(arrivals, lengths):
        wait = max(wait, arrival - due)
        due += length
    return wait


def my_chunk_attention(q, k, v):
    new, total = len(q), len(k)
    scores = q @ k.T / math.sqrt(q.shape[1])
    own = torch.arange(total - new, total)[:, None]
    later = torch.arange(total)[None] > own
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


def my_spans(frames, block, chunk=3, back=2, ahead=1):
    spans, done = [], 0
    while done < frames:
        end, seen = done + chunk * block, done + (chunk + ahead) * block
        if seen > frames:
            end = seen = frames
        spans.append((max(0, done - back * block), done, end, seen))
        done = end
    return spans


def my_pieces(net, mel, step, reach, hop):
    waves = []
    for start in range(0, mel.shape[1], step):
        end = min(start + step, mel.shape[1])
        first, last = max(0, start - reach), min(end + reach, mel.shape[1])
        wave = net(mel[:, first:last])
        waves.append(wave[(start - first) * hop : (end - first) * hop])
    return torch.cat(waves)


def cuts(schedule, total):
    ends, done = [], 0
    while True:
        blocks, ahead = schedule[min(len(ends), len(schedule) - 1)]
        if done + blocks + ahead > total:
            return ends + [total] if done < total else ends
        done += blocks
        ends.append(done)
