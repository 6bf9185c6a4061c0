"""A task is data: rows of one or two texts with a target, in three splits, and the metric that ranks runs on them.

Every choice of rows is one order: within a class rows are sorted by a hash of seed and text, and the classes are dealt
out in proportion, so that any prefix of the order is stratified. Splits and subsets are prefixes. The order does not
depend on a random generator, on the machine or on the order of rows in a file, smaller subsets lie inside larger ones,
and rows with the same text stay in one split.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from numpy.typing import ArrayLike

from deltatune.core.errors import unknown
from deltatune.tasks.metrics import metric
from deltatune.tasks.metrics import scores as all_scores

Kind = Literal["classification", "regression"]
Text = tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Split:
    """Rows: `texts[i]` holds the row's one or two texts, `targets[i]` its class index or value."""

    texts: list[Text]
    targets: list[int] | list[float]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.targets):
            raise ValueError(f"{len(self.texts)} texts but {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Split(n={len(self)}, hash={self.hash[:12]!r})"

    @property
    def hash(self) -> str:
        """sha256 (hex) of texts and targets in their order."""
        digest = hashlib.sha256()
        for row in zip(self.texts, self.targets, strict=True):
            digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
        return digest.hexdigest()

    def take(self, rows: Iterable[int]) -> "Split":
        """The rows at these positions, in this order."""
        rows = list(rows)
        return Split([self.texts[i] for i in rows], [self.targets[i] for i in rows])

    def head(self, n: int) -> "Split":
        """The first `n` rows (all of them where there are fewer)."""
        return self.take(range(min(n, len(self))))


@dataclass(frozen=True)
class Task:
    """Examples, splits, labels, a metric, a version, a licence: the Task of the design.

    `text` are the one or two names of the text columns, `labels` the class names (() for regression), `metric` the
    primary metric, `notes` what was found or decided by itself while reading (to be shown, not part of the hash).
    """

    name: str
    version: int
    kind: Kind
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str
    licence: str
    source: str
    train: Split
    validation: Split
    test: Split
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        metric(self.metric)
        if (self.kind == "classification") != (len(self.labels) > 1):
            raise ValueError(f"task {self.name!r}: {self.kind} with {len(self.labels)} labels")
        for split, rows in self.splits.items():
            if not len(rows):
                raise ValueError(f"task {self.name!r}: the {split} split has no rows")

    def __str__(self) -> str:
        sizes = " / ".join(str(len(rows)) for rows in self.splits.values())
        what = f"{len(self.labels)} classes" if self.labels else "regression"
        return f"{self.name}: {what}, {sizes} rows (train / validation / test), {self.metric}"

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def n_outputs(self) -> int:
        """Width of the head: the number of classes, 1 for regression."""
        return len(self.labels) or 1

    @property
    def hash(self) -> str:
        """sha256 (hex) of name, version, source, labels and the three splits: equal hashes are equal data."""
        parts = [self.name, self.version, self.source, self.labels, [rows.hash for rows in self.splits.values()]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def scores(self, outputs: ArrayLike, targets: ArrayLike) -> dict[str, float]:
        """All metrics of this kind of task, the primary one among them.

        `outputs` are (n, C) logits, or (n,) or (n, 1) values for regression; `targets` (n,). Classes give accuracy, f1,
        matthews, nll, brier, ece; values give pearson, spearman, mse.
        Raises: ValueError for shapes that do not fit or outputs that are not finite.
        """
        return all_scores(outputs, targets, len(self.labels))

    def limit(self, n_train: int | None = None, n_validation: int | None = None, seed: int = 0) -> "Task":
        """The task with a stratified subset of its training (and validation) rows; the test rows stay.

        Raises: ValueError where more rows are asked for than there are, or fewer than there are classes.
        """
        chosen = self.splits
        for split, n in (("train", n_train), ("validation", n_validation)):
            rows = self.splits[split]
            if n is None:
                continue
            least = max(1, len(self.labels)) if split == "train" else 1
            if not least <= n <= len(rows):
                raise ValueError(f"n_{split}={n}: task {self.name!r} allows {least} to {len(rows)} {split} rows")
            chosen[split] = rows.take(stratified_order(rows, self.kind, seed)[:n])
        return replace(self, train=chosen["train"], validation=chosen["validation"])


def stratified_order(rows: Split, kind: Kind, seed: int = 0) -> list[int]:
    """All positions of `rows`, so ordered that each prefix is stratified by class (by tenth of the values' ranks for
    regression), and one as long as there are classes holds them all. Rows of equal text come together.
    """
    groups: dict[Text, list[int]] = defaultdict(list)
    for i, text in enumerate(rows.texts):
        groups[text].append(i)
    strata: dict[Hashable, list[tuple[bytes, Text]]] = defaultdict(list)
    stratum: dict[Text, Hashable] = {text: rows.targets[members[0]] for text, members in groups.items()}
    if kind == "regression":
        ranked = sorted(groups, key=lambda text: (stratum[text], text))
        stratum = {text: 10 * rank // len(ranked) for rank, text in enumerate(ranked)}
    for text in groups:
        strata[stratum[text]].append((hashlib.sha256(json.dumps([seed, text]).encode()).digest(), text))
    deal = [(k / len(s), key, text) for s in strata.values() for k, (key, text) in enumerate(sorted(s))]
    return [i for _, _, text in sorted(deal) for i in groups[text]]


def divide(rows: Split, kind: Kind, n_parts: Sequence[int], seed: int = 0) -> list[Split]:
    """`rows` cut along their stratified order into a first part and further ones of `n_parts` rows each (about: rows of
    equal text are never separated).

    Raises: ValueError where nothing would be left for the first part.
    """
    order = stratified_order(rows, kind, seed)
    parts: list[Split] = []
    for n in reversed(n_parts):
        cut = len(order) - n
        while 0 < cut < len(order) and rows.texts[order[cut - 1]] == rows.texts[order[cut]]:
            cut -= 1
        if n < 1 or cut < 1:
            raise ValueError(f"{len(rows)} rows are too few to be divided")
        order, parts = order[:cut], [rows.take(order[cut:]), *parts]
    return [rows.take(order), *parts]


_REGISTRY: dict[str, tuple[str, Callable[[], Task]]] = {}


def register(name: str, summary: str) -> Callable[[Callable[[], Task]], Callable[[], Task]]:
    """Decorator: the function without arguments that it marks makes the task `name`.

    Raises: ValueError where the name is taken.
    """

    def add(make: Callable[[], Task]) -> Callable[[], Task]:
        if name in _REGISTRY:
            raise ValueError(f"a task named {name!r} exists already")
        _REGISTRY[name] = (summary, make)
        return make

    return add


def tasks() -> dict[str, str]:
    """All registered names with one line about each; nothing is read."""
    return {name: summary for name, (summary, _) in sorted(_REGISTRY.items())}


def task(
    name: str | None = None,
    *,
    n_train: int | None = None,
    seed: int = 0,
    data: str | os.PathLike[str] | None = None,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    kind: Kind | None = None,
) -> Task:
    """The task of that name, or the task in the file or folder `data` (see `deltatune.tasks.files.read`).

    `n_train` takes a stratified subset of the training rows, drawn by `seed`; validation and test never depend on it.
    Raises: ValueError for an unknown name (with the nearest ones), for neither or both of name and data, and for data
    that do not fit.
    """
    if data is not None:
        from deltatune.tasks import files

        if name in _REGISTRY:
            raise ValueError(f"{name!r} is a task of its own: give its name or data, not both")
        made = files.read(data, text=text, label=label, kind=kind, name=name)
    elif name is None:
        raise ValueError(f"no task: give a name ({', '.join(sorted(_REGISTRY))}) or data (a file or a folder)")
    elif text is not None or label is not None or kind is not None:
        raise ValueError(f"text, label and kind describe a file: task {name!r} has its own")
    elif name not in _REGISTRY:
        raise unknown("task", name, _REGISTRY)
    else:
        made = _REGISTRY[name][1]()
    return made if n_train is None else made.limit(n_train, seed=seed)
