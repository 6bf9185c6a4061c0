"""How sure a score is: intervals over seeds, intervals over test rows, paired differences, and who is dominated.

Two sources of chance, kept apart. *Seeds*: another start and another order of the rows would have given another model;
Student's t over the seeds' scores says how far its mean may be off. *Test rows*: another test set would have given the
same model another score; a percentile bootstrap over the rows says how far. Neither says anything of the other.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[Any]
Score = Callable[[Array, Array], float]


class Interval(NamedTuple):
    """A closed range; `0.0 in interval` asks whether zero is plausible."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, Interval | None]:
    """mean ± t s / sqrt(n), t the quantile at n − 1 degrees of freedom; no interval from one value.

    Raises: ValueError for no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("a mean of no values")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * math.sqrt(variance / n)
    return mean, Interval(mean - half, mean + half)


def bootstrap(
    statistic: Callable[[Array], float], n: int, *, n_resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The percentile interval of `statistic(rows)` over `n_resamples` draws of `n` row numbers with replacement.

    Draws on which the statistic is no number (a correlation of one constant) are left out. Same seed, same interval.
    Raises: ValueError for n < 1, or where no draw gave a number.
    """
    if n < 1:
        raise ValueError("a bootstrap over no rows")
    generator = np.random.default_rng(seed)
    draws = np.array([statistic(generator.integers(0, n, n)) for _ in range(n_resamples)])
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        raise ValueError(f"the statistic is no number on any of {n_resamples} draws of {n} rows")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def score_bootstrap(score: Score, targets: Sequence[Any], answers: Sequence[Any], **options: Any) -> Interval:
    """The interval of `score(targets, answers)` over test rows. Raises: ValueError where the lengths differ."""
    t, a = np.asarray(targets), np.asarray(answers)
    _same_length(t, a)
    return bootstrap(lambda rows: score(t[rows], a[rows]), len(t), **options)


def paired_bootstrap(
    score: Score, targets: Sequence[Any], ours: Sequence[Sequence[Any]], theirs: Sequence[Sequence[Any]], **options: Any
) -> Interval:
    """The interval of mean score(ours) − mean score(theirs), both on the same drawn test rows.

    `ours` and `theirs` hold one list of answers per seed. What makes a row hard is common to both methods and cancels,
    so this is narrower than the distance of two separate intervals.
    Raises: ValueError where a list of answers is not as long as the targets.
    """
    t, a, b = np.asarray(targets), [np.asarray(x) for x in ours], [np.asarray(x) for x in theirs]
    for answers in (*a, *b):
        _same_length(t, answers)

    def difference(rows: Array) -> float:
        drawn = t[rows]
        return float(np.mean([score(drawn, x[rows]) for x in a]) - np.mean([score(drawn, x[rows]) for x in b]))

    return bootstrap(difference, len(t), **options)


def pareto(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The points that no other beats (at most as dear and better, or cheaper and as good), by rising cost.

    Of points equal in both the first stands for all.
    """
    frontier: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not frontier or scores[i] > scores[frontier[-1]]:
            frontier.append(i)
    return frontier


def _same_length(targets: Array, answers: Array) -> None:
    if len(targets) != len(answers):
        raise ValueError(f"{len(targets)} targets and {len(answers)} predictions")


def accuracy(targets: Array, answers: Array) -> float:
    """The share of equal rows."""
    return float(np.mean(targets == answers))


def f1(targets: Array, answers: Array) -> float:
    """2 TP / (2 TP + FP + FN) of class 1 where there is no class but 0 and 1, else the mean over the classes found."""
    classes = np.union1d(targets, answers)
    positive = [1] if set(classes.tolist()) <= {0, 1} else classes
    hits = [2 * np.sum((targets == c) & (answers == c)) for c in positive]
    sizes = [max(np.sum(targets == c) + np.sum(answers == c), 1) for c in positive]
    return float(np.mean(np.divide(hits, sizes)))


def matthews(targets: Array, answers: Array) -> float:
    """Matthews' correlation of two labellings, for any number of classes; 0 where one of them is constant."""
    classes = np.union1d(targets, answers)
    return _correlation(targets[:, None] == classes, answers[:, None] == classes)


def pearson(targets: Array, answers: Array) -> float:
    """The linear correlation; 0 where one side is constant."""
    return _correlation(targets, answers)


def spearman(targets: Array, answers: Array) -> float:
    """The linear correlation of the ranks, equal values sharing their mean rank; 0 where one side is constant."""
    return _correlation(_ranks(targets), _ranks(answers))


def mse(targets: Array, answers: Array) -> float:
    """The mean squared error."""
    return float(np.mean((targets - answers) ** 2))


def _correlation(a: Array, b: Array) -> float:
    a, b = a - np.mean(a, axis=0, dtype=float), b - np.mean(b, axis=0, dtype=float)
    scale = math.sqrt(float(np.sum(a * a)) * float(np.sum(b * b)))
    return float(np.sum(a * b)) / scale if scale else 0.0


def _ranks(values: Array) -> Array:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: Array = np.cumsum(counts) - (counts - 1) / 2
    return mean_rank[place]


SCORES: dict[str, Score] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "mse": mse,
}
"""The tasks' metrics once more, fast enough to be drawn a thousand times; others get intervals over seeds only."""
