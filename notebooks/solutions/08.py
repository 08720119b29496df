"""Solutions of the exercises of notebook 08. The graders are in the notebook."""

import math


def bits_per_second(levels, rate):
    return rate * math.log2(math.prod(levels))


def digits_of(code, levels):
    rest, digits = code - 1, []
    for n in levels:
        digits.append(rest % n)
        rest //= n
    return digits


def shortest(text):
    return len(text) + sum(a == b for a, b in zip(text, text[1:]))


def chance_of(chances, letters):
    places = [0]
    for letter in letters:
        places += [letter, 0]
    at = [float(chances[0][c]) if s < 2 else 0.0 for s, c in enumerate(places)]
    for row in chances[1:]:
        new = []
        for s, c in enumerate(places):
            come = at[s] + (at[s - 1] if s > 0 else 0.0)
            if s > 1 and c != 0 and c != places[s - 2]:
                come += at[s - 2]
            new.append(come * float(row[c]))
        at = new
    return sum(at[-2:])
