"""Metrics: one number each from targets and predictions, or from targets and the probabilities behind them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deltatune.core.errors import unknown

Floats = NDArray[np.floating[Any]]


def accuracy(targets: ArrayLike, predictions: ArrayLike) -> float:
    """The fraction of rows whose predicted class is the target."""
    return float(np.mean(np.asarray(targets) == np.asarray(predictions)))


def f1(targets: ArrayLike, predictions: ArrayLike) -> float:
    """2 P R / (P + R) of class 1 where there are two classes, else the mean over the classes that occur (macro)."""
    from sklearn.metrics import f1_score

    binary = set(np.unique(targets)) | set(np.unique(predictions)) <= {0, 1}
    return float(f1_score(targets, predictions, average="binary" if binary else "macro", zero_division=0.0))


def matthews(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Matthews correlation coefficient; 0 where all predictions are one class."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(targets, predictions))


def pearson(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Pearson's r; 0 (not NaN) where either side is constant, as it carries no information then."""
    from scipy.stats import pearsonr

    return 0.0 if _constant(targets) or _constant(predictions) else float(pearsonr(targets, predictions).statistic)


def spearman(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Spearman's rank correlation; 0 (not NaN) where either side is constant."""
    from scipy.stats import spearmanr

    return 0.0 if _constant(targets) or _constant(predictions) else float(spearmanr(targets, predictions).statistic)


def mse(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Mean squared error."""
    return float(np.mean((np.asarray(targets, float) - np.asarray(predictions, float)) ** 2))


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "mse": mse,
}
CLASSIFICATION = ("accuracy", "f1", "matthews")
REGRESSION = ("pearson", "spearman", "mse")
LOWER_IS_BETTER = frozenset({"mse", "nll", "brier", "ece"})


def metric(name: str) -> Callable[[ArrayLike, ArrayLike], float]:
    """The metric of that name, a function of (targets, predictions).

    Raises: ValueError for an unknown name, with the nearest ones.
    """
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def softmax(logits: ArrayLike) -> Floats:
    """(n, C) logits to (n, C) probabilities, in float64."""
    shifted: Floats = np.asarray(logits, np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def nll(targets: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean of -log p(target), natural logarithm, p from (n, C) `probabilities`, held above 1e-12."""
    p = np.asarray(probabilities, np.float64)
    return float(-np.log(np.maximum(p[np.arange(len(p)), np.asarray(targets, int)], 1e-12)).mean())


def brier(targets: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean over rows of the sum over classes of (p - 1[target])²: 0 to 2 (Brier 1950)."""
    p = np.asarray(probabilities, np.float64)
    return float(((p - np.eye(p.shape[1])[np.asarray(targets, int)]) ** 2).sum(axis=1).mean())


def ece(targets: ArrayLike, probabilities: ArrayLike, n_bins: int = 15) -> float:
    """Expected calibration error (1706.04599): |accuracy - confidence| of the top class, averaged over equal-width
    bins of the confidence with their rows as weights.
    """
    p = np.asarray(probabilities, np.float64)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == np.asarray(targets)
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(p))


def scores(outputs: ArrayLike, targets: ArrayLike, n_labels: int) -> dict[str, float]:
    """Every number of a kind of task: from (n, C) logits where `n_labels` is C > 0, from (n,) or (n, 1) values where 0.

    Classes: accuracy, f1, matthews, nll, brier, ece. Values: pearson, spearman, mse.
    Raises: ValueError for shapes that do not fit, no rows, or outputs that are not finite.
    """
    out, gold = np.asarray(outputs, np.float64), np.asarray(targets)
    n = len(gold)
    fits = [(n, n_labels)] if n_labels else [(n,), (n, 1)]
    if not n or out.shape not in fits:
        raise ValueError(f"outputs of shape {out.shape} for {n} targets: expected {' or '.join(map(str, fits))}")
    if bad := int((~np.isfinite(out.reshape(n, -1)).all(axis=1)).sum()):
        raise ValueError(f"outputs are not finite in {bad} of {n} rows: the run has diverged")
    if not n_labels:
        return {name: METRICS[name](gold, out.reshape(n)) for name in REGRESSION}
    classes, p = out.argmax(axis=1), softmax(out)
    found = {name: METRICS[name](gold, classes) for name in CLASSIFICATION}
    return found | {"nll": nll(gold, p), "brier": brier(gold, p), "ece": ece(gold, p)}


def _constant(values: ArrayLike) -> bool:
    return bool(np.ptp(np.asarray(values, np.float64)) == 0)
