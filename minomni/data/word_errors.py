"""Edit distance and word error rate."""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other."""
    return Levenshtein.distance(reference, hypothesis)


def word_error_rate(pairs: list[tuple[str, str]]) -> float:
    """Word error rate of (reference, hypothesis) sentences: edits per reference word."""
    edits = 0
    words = 0
    for reference, hypothesis in pairs:
        edits += edit_distance(reference.split(), hypothesis.split())
        words += len(reference.split())
    return edits / words
