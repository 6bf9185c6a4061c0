"""Splits, their stratified order, subsets, and the registry."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from deltatune.tasks import Split, Task, register, task, tasks
from deltatune.tasks.task import divide, stratified_order


def rows(n: int = 100, n_rare: int = 10) -> Split:
    return Split([(f"text {i}",) for i in range(n)], [int(i < n_rare) for i in range(n)])


def small(**changes: object) -> Task:
    train, validation, test = divide(rows(), "classification", [10, 10])
    made = Task(
        name="small",
        version=1,
        kind="classification",
        text=("text",),
        labels=("often", "rare"),
        metric="accuracy",
        licence="none",
        source="here",
        train=train,
        validation=validation,
        test=test,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_split() -> None:
    split = Split([("a", "b"), ("c", "d")], [0, 1])
    assert len(split) == 2
    assert split.head(1) == Split([("a", "b")], [0])
    assert split.head(9) == split
    assert split.take([1, 0]).targets == [1, 0]
    assert len(split.hash) == 64
    assert split.hash == Split([("a", "b"), ("c", "d")], [0, 1]).hash
    others = [Split([("ab", ""), ("c", "d")], [0, 1]), Split([("a", "b"), ("c", "d")], [1, 1]), split.take([1, 0])]
    assert len({split.hash, *(other.hash for other in others)}) == 4
    with pytest.raises(ValueError, match="2 texts but 1 targets"):
        Split([("a",), ("b",)], [0])


def test_every_prefix_is_stratified_and_nested() -> None:
    split = rows()
    order = stratified_order(split, "classification")
    assert sorted(order) == list(range(100))
    assert {split.targets[i] for i in order[:2]} == {0, 1}
    for n in (10, 20, 50):
        assert sum(split.targets[i] for i in order[:n]) in (n // 10, n // 10 + 1)
    assert order != stratified_order(split, "classification", seed=1)


def test_order_depends_on_texts_not_on_places() -> None:
    split = rows()
    backwards = split.take(range(99, -1, -1))
    texts = [split.texts[i] for i in stratified_order(split, "classification")]
    assert texts == [backwards.texts[i] for i in stratified_order(backwards, "classification")]


def test_values_are_stratified_by_rank() -> None:
    split = Split([(f"text {i}",) for i in range(100)], [i**2 / 7 for i in range(100)])
    order = stratified_order(split, "regression")
    assert {i // 10 for i in order[:10]} == set(range(10))


def test_equal_texts_stay_together() -> None:
    split = Split([(f"text {i % 20}",) for i in range(100)], [i % 2 for i in range(100)])
    parts = divide(split, "classification", [10, 10])
    seen = [set(part.texts) for part in parts]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert sum(map(len, parts)) == 100
    with pytest.raises(ValueError, match="too few"):
        divide(split.head(2), "classification", [1, 1])


def test_a_class_of_one_row_is_in_train() -> None:
    train, *_ = divide(rows(n_rare=1), "classification", [10, 10])
    assert Counter(train.targets) == {0: 79, 1: 1}


def test_task_checks_itself() -> None:
    made = small()
    assert made.n_outputs == 2
    assert str(made) == "small: 2 classes, 80 / 10 / 10 rows (train / validation / test), accuracy"
    assert made.hash == small(notes=("seen",)).hash
    assert len({made.hash, small(source="elsewhere").hash, small(test=made.validation).hash}) == 3
    assert made.scores([[1.0, 0.0], [0.0, 1.0]], [0, 0])["accuracy"] == 0.5
    with pytest.raises(ValueError, match="unknown metric 'acc'"):
        small(metric="acc")
    with pytest.raises(ValueError, match="regression with 2 labels"):
        small(kind="regression")
    with pytest.raises(ValueError, match="the test split has no rows"):
        small(test=Split([], []))


def test_limit() -> None:
    made = small()
    fewer = made.limit(20, n_validation=5)
    assert (len(fewer.train), len(fewer.validation), fewer.test) == (20, 5, made.test)
    assert set(fewer.train.texts) < set(made.limit(40).train.texts) < set(made.train.texts)
    assert fewer.train.targets.count(1) == 2
    assert set(made.limit(20, seed=1).train.texts) != set(fewer.train.texts)
    for n in (1, 81):
        with pytest.raises(ValueError, match=f"n_train={n}: task 'small' allows 2 to 80 train rows"):
            made.limit(n)


def test_registry() -> None:
    assert {"stdlib_docs", "glue/sst2", "glue/stsb"} <= set(tasks())
    with pytest.raises(ValueError, match="unknown task 'glue/sst'; did you mean 'glue/sst2'"):
        task("glue/sst")
    with pytest.raises(ValueError, match="no task: give a name"):
        task()
    with pytest.raises(ValueError, match="text, label and kind describe a file"):
        task("glue/sst2", label="label")
    with pytest.raises(ValueError, match="give its name or data, not both"):
        task("glue/sst2", data="x.csv")
    with pytest.raises(ValueError, match="exists already"):
        register("glue/sst2", "again")(small)


def test_a_task_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: dict[str, object] = {}
    monkeypatch.setattr(sys.modules["deltatune.tasks.task"], "_REGISTRY", registry)
    register("small", "for a test")(small)
    assert list(registry) == ["small"]
    assert len(task("small", n_train=8).train) == 8


def test_import_is_light() -> None:
    heavy = {"transformers", "datasets", "evaluate", "pyarrow", "sklearn"}
    code = f"import sys, deltatune.tasks; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
