"""Rows of a report with confidence intervals."""

from dataclasses import dataclass
from math import sqrt
from random import Random

RESAMPLED = 1000  # draws of the bootstrap


@dataclass
class Metric:
    """One line of the card: a share of `n` items, or of `n` words where it is a word error."""

    name: str
    value: float | None  # None where it cannot be measured here
    n: int = 0
    bounds: tuple[float, float] | None = None  # where the value is no plain share

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of a share: Wilson's score interval, or the bounds given."""
        if self.bounds is not None:
            return self.bounds
        p, n, z = min(max(self.value, 0.0), 1.0), max(self.n, 1), 1.96
        centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - half) / (1 + z * z / n)), min(
            1.0, (centre + half) / (1 + z * z / n)
        )


def bootstrap(value, items: list) -> tuple[float, float]:
    """95 % interval of value(items) by drawing the items anew, with a fixed seed."""
    random = Random(0)
    values = sorted(value(random.choices(items, k=len(items))) for _ in range(RESAMPLED))
    return values[int(0.025 * RESAMPLED)], values[int(0.975 * RESAMPLED)]


def word_error_rate(items: list[tuple[int, int]]) -> float:
    """Word error of (edits, words) pairs."""
    return sum(wrong for wrong, _ in items) / max(1, sum(words for _, words in items))


def word_error_metric(name: str, items: list[tuple[int, int]]) -> Metric:
    """A row of (edits, words) a sentence; its interval draws sentences, since words of one go wrong
    together.
    """
    if not items:
        return Metric(name, None)
    return Metric(
        name,
        word_error_rate(items),
        sum(words for _, words in items),
        bootstrap(word_error_rate, items),
    )
