"""Solutions of the exercises of notebook 14. The graders are in the notebook."""

import torch


def my_sequence_log_prob(logits, targets):
    counted = targets != -100
    log_probs = logits[counted].log_softmax(-1)
    return log_probs.gather(1, targets[counted][:, None]).sum()


def my_dpo(chosen, rejected, chosen_reference, rejected_reference, beta):
    margin = (chosen - chosen_reference) - (rejected - rejected_reference)
    return -torch.nn.functional.logsigmoid(beta * margin).mean()


def my_weight(margins, beta):
    return beta * (-beta * margins).sigmoid()


def my_pairs(judged):
    pairs = []
    for i, samples in enumerate(judged):
        ranked = sorted(samples, key=lambda sample: sample[0])
        fewest, chosen = ranked[0]
        most, rejected = ranked[-1]
        if most > fewest + 1 and len(chosen) > 0:
            pairs.append((i, chosen, rejected))
    return pairs


def hacks(before, after):
    def run(codes):
        longest = now = 0
        for i, code in enumerate(codes):
            now = now + 1 if i and code == codes[i - 1] else 1
            longest = max(longest, now)
        return longest

    ratio = (sum(map(len, after)) / len(after)) / (sum(map(len, before)) / len(before))
    found = ["longer"] * (ratio > 1.5) + ["shorter"] * (ratio < 1 / 1.5)
    return found + ["stuck"] * (max(map(run, after)) > 2 * max(map(run, before)))
