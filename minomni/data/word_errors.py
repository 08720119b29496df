"""Edit distance and word error rate."""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

ErrorPair = tuple[int, int]  # edits and words of one sentence


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other."""
    return Levenshtein.distance(reference, hypothesis)


def word_errors(text: str, hypothesis: list[str]) -> ErrorPair:
    """Edits between a sentence and recognized words, and the number of words in the sentence."""
    reference = text.split()
    return edit_distance(reference, hypothesis), len(reference)


def word_error_rate(pairs: list[ErrorPair]) -> float:
    """Word error rate of some sentences: edits per word."""
    edits = sum(edits for edits, _ in pairs)
    words = sum(words for _, words in pairs)
    return edits / max(1, words)
