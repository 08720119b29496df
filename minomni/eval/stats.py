"""Metrics with confidence intervals."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from random import Random

from minomni.data.word_errors import ErrorPair, word_error_rate

BOOTSTRAP_SAMPLES = 1000
Z_95 = 1.96  # quantile of the normal distribution for a two-sided 95 % interval


@dataclass
class Metric:
    """One row of a report: a fraction of `n` items, or of `n` words for a word error rate.

    Or the mean of `n` scores on a scale of their own.
    """

    name: str
    value: float | None  # None if it cannot be measured here
    n: int = 0
    bounds: tuple[float, float] | None = None  # confidence interval; None for a plain fraction
    is_score: bool = False  # on a scale of its own, not a fraction

    def format(self, value: float) -> str:
        """A value of this metric as text: a percentage, or a score with two decimals."""
        return f"{value:.2f}" if self.is_score else f"{value:.1%}"

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval: the bounds if given, else Wilson's score interval."""
        if self.bounds is not None:
            return self.bounds
        if self.value is None:
            raise ValueError(f"metric {self.name} has no value, so it has no confidence interval")
        p = min(max(self.value, 0.0), 1.0)
        n = max(self.n, 1)
        center = p + Z_95 * Z_95 / (2 * n)
        margin = Z_95 * sqrt(p * (1 - p) / n + Z_95 * Z_95 / (4 * n * n))
        scale = 1 + Z_95 * Z_95 / n
        low = max(0.0, (center - margin) / scale)
        high = min(1.0, (center + margin) / scale)
        return low, high

    def json_object(self) -> dict[str, float | int | None]:
        """Value, interval and number of items, to six decimals."""
        if self.value is None:
            return {"value": None}
        low, high = self.interval()
        return {
            "value": round(self.value, 6),
            "low": round(low, 6),
            "high": round(high, 6),
            "items": self.n,
        }

    def cells(self) -> list[str]:
        """Name, value, interval and number of items as the cells of a table row."""
        if self.value is None:
            return [self.name, "not measurable here", "", ""]
        low, high = self.interval()
        interval = f"{self.format(low)} to {self.format(high)}"
        return [self.name, self.format(self.value), interval, str(self.n)]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with one line per row; an empty cell is one space wide."""
    lines = []
    for row in (header, *rows):
        cells = "|".join(f" {cell} " if cell else " " for cell in row)
        lines.append(f"|{cells}|")
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def bootstrap(value: Callable[[list], float], items: list) -> tuple[float, float]:
    """95 % interval of value(items): items are resampled with replacement, with a fixed seed."""
    random = Random(0)
    values = []
    for _ in range(BOOTSTRAP_SAMPLES):
        resampled = random.choices(items, k=len(items))
        values.append(value(resampled))
    values.sort()
    return values[int(0.025 * BOOTSTRAP_SAMPLES)], values[int(0.975 * BOOTSTRAP_SAMPLES)]


def word_error_metric(name: str, items: list[ErrorPair]) -> Metric:
    """Word error rate of (edits, words) pairs, one pair per sentence.

    The interval resamples sentences, because the errors within one sentence are correlated.
    """
    if not items:
        return Metric(name, None)
    words = sum(words for _, words in items)
    return Metric(name, word_error_rate(items), words, bootstrap(word_error_rate, items))


def mean(values: list[float]) -> float:
    """Arithmetic mean of at least one value."""
    return sum(values) / len(values)


def score_metric(name: str, values: list[float]) -> Metric:
    """Mean of one score per sentence; the interval resamples sentences."""
    if not values:
        return Metric(name, None, is_score=True)
    return Metric(name, mean(values), len(values), bootstrap(mean, values), is_score=True)
