"""Edit distance and word error rate."""


def edit_distance(right, heard) -> int:
    """Fewest insertions, deletions and substitutions between two sequences."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(right, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def word_error_rate(pairs: list[tuple[str, str]]) -> float:
    """Word error rate of (right, heard) sentences: edits over right words."""
    return sum(edit_distance(r.split(), h.split()) for r, h in pairs) / sum(
        len(r.split()) for r, _ in pairs
    )
