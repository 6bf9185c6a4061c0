"""Metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest

from deltatune.tasks import metrics


def test_classes() -> None:
    targets, predictions = [0, 0, 1, 1], [0, 1, 1, 1]
    assert metrics.accuracy(targets, predictions) == 0.75
    assert metrics.f1(targets, predictions) == pytest.approx(0.8)
    assert metrics.matthews(targets, predictions) == pytest.approx(1 / math.sqrt(3))
    assert metrics.matthews(targets, [1, 1, 1, 1]) == 0
    assert metrics.f1([0, 1, 2], [0, 1, 1]) == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_values() -> None:
    assert metrics.pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert metrics.spearman([1.0, 2.0, 3.0], [9.0, 4.0, 1.0]) == pytest.approx(-1)
    assert metrics.pearson([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0
    assert metrics.spearman([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0
    assert metrics.mse([1.0, 2.0], [2.0, 4.0]) == 2.5


def test_probabilities() -> None:
    p = [[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]]
    targets = [0, 1, 1]
    assert metrics.nll(targets, p) == pytest.approx(-(math.log(0.8) + math.log(0.6) + math.log(0.1)) / 3)
    assert metrics.brier(targets, p) == pytest.approx((0.08 + 0.32 + 1.62) / 3)
    assert metrics.ece(targets, p) == pytest.approx((0.2 + 0.4 + 0.9) / 3)
    assert metrics.ece([0, 0], [[1.0, 0.0], [1.0, 0.0]]) == 0
    assert metrics.ece([0, 1], [[0.8, 0.2], [0.8, 0.2]]) == pytest.approx(0.3), "one bin: 0.5 right at 0.8 confidence"


def test_scores_from_logits() -> None:
    logits = np.log([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]]) + 700
    found = metrics.scores(logits, [0, 1, 1], 2)
    assert list(found) == ["accuracy", "f1", "matthews", "nll", "brier", "ece"]
    assert found["brier"] == pytest.approx((0.08 + 0.32 + 1.62) / 3)
    assert list(metrics.scores([[1.0], [2.0]], [1.0, 3.0], 0)) == ["pearson", "spearman", "mse"]
    assert metrics.scores([1.0, 2.0], [1.0, 3.0], 0)["mse"] == 0.5


@pytest.mark.parametrize(
    ("outputs", "targets", "n_labels", "says"),
    [
        ([[0.0, 1.0]], [1, 0], 2, r"\(1, 2\) for 2 targets: expected \(2, 2\)"),
        ([[0.0, 1.0]], [1], 3, r"expected \(1, 3\)"),
        (np.zeros((0, 2)), [], 2, "0 targets"),
        ([[0.0, 1.0], [math.nan, 0.0]], [1, 0], 2, "not finite in 1 of 2 rows"),
    ],
)
def test_scores_refuse(outputs: object, targets: list[int], n_labels: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        metrics.scores(outputs, targets, n_labels)  # type: ignore[arg-type]


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        metrics.metric("acuracy")
