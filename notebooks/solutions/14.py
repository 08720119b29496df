"""Solutions of the exercises of notebook 14. The graders are in the notebook."""

import math


def pull(better, worse, better_before, worse_before, beta):
    margin = (better - better_before) - (worse - worse_before)
    return beta / (1 + math.exp(beta * margin))


def pair_of(mistakes):
    fewest, most = min(mistakes), max(mistakes)
    if most - fewest <= 1:
        return []
    return [mistakes.index(fewest), mistakes.index(most)]


def balance(agree, beta):
    return math.log(agree / (1 - agree)) / beta


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
